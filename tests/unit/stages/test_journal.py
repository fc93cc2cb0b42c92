import dataclasses

import pytest

from millrace.config.schema import ModelConfig, Recipe, RlStage, SamplingConfig, TrainerConfig
from millrace.stages.journal import RolloutJournal

from .answers import group

STAGE = RlStage(name="rl", domains=("math",), steps=1)
RECIPE = Recipe(name="trial", run_dir="runs/trial", model=ModelConfig(path="base"), stages=(STAGE,))


def test_what_is_read_back_trains_like_what_was_written(tmp_path):
    journal = RolloutJournal(tmp_path, "rl-math", RECIPE)
    groups = [
        group([0.0, 1.0], name="1", version=4),
        group([1.0, 1.0], name="2", lengths=[3, 1], version=4),
        group([0.1, 0.2], name="3", lengths=[7, 9], version=4, given=[(1, 2), (4, 6)], masked=[1], cut="turns"),
    ]
    journal.write(3, {"weight_version": 4, "sampler": {"position": 2}}, groups)
    header, read = journal.read(3, weight_version=4)
    assert header["sampler"] == {"position": 2}
    assert [g.rewards for g in read] == [[0.0, 1.0], [1.0, 1.0], [0.1]]
    for ours, theirs in zip(groups, read, strict=True):
        assert ours.answers == theirs.answers


def test_answers_of_other_weights_are_not_used(tmp_path):
    journal = RolloutJournal(tmp_path, "rl", RECIPE)
    journal.write(0, {"weight_version": 4}, [group([1.0])])
    assert journal.read(0, weight_version=5) is None
    assert journal.read(1, weight_version=4) is None


def test_a_journal_that_a_kill_left_half_written_does_not_count(tmp_path):
    journal = RolloutJournal(tmp_path, "rl", RECIPE)
    journal.path(0).with_suffix(".tmp").write_text('{"weight_version": 0}\n{"half')
    assert journal.read(0, weight_version=0) is None


HOTTER = dataclasses.replace(STAGE, sampling=SamplingConfig(temperature=1.3))


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({"stages": (HOTTER,)}, False),
        ({"seed": 2}, False),
        ({"name": "renamed", "trainer": TrainerConfig(threads_per_rank=2)}, True),
        ({"stages": (STAGE, dataclasses.replace(HOTTER, name="later"))}, True),
    ],
)
def test_answers_are_used_again_only_under_a_recipe_that_computes_the_same(tmp_path, changes, used):
    RolloutJournal(tmp_path, "rl", RECIPE).write(0, {"weight_version": 4}, [group([1.0])])
    changed = RolloutJournal(tmp_path, "rl", dataclasses.replace(RECIPE, **changes))
    assert (changed.read(0, weight_version=4) is not None) is used
