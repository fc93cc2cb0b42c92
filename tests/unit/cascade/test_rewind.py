"""Taking a run back: what is kept, what is moved aside, and what a dry run says of it."""

import dataclasses
import json

import pytest

from millrace.cascade.history import read_history
from millrace.cascade.ledger import Ledger
from millrace.cascade.rewind import is_rewound, reached, require_stage, rewind, would_do
from millrace.checkpoint_store import FACTS, MANIFEST, CheckpointStore
from millrace.config.errors import ConfigError

from .campaign import recipe

RECIPE = recipe()
NAMES = [stage.name for stage in RECIPE.stages]
CHECKPOINTS = {  # name: the stage it resumes in, and the step
    "stage-00-sft": (1, 0),
    "step-00000006": (1, 2),
    "stage-01-rl-if-step-000002": (1, 2),
    "stage-01-rl-if": (2, 0),
    "stage-02-rl-math": (3, 0),
    "step-00000014": (3, 2),
}


@pytest.fixture
def run_dir(tmp_path):
    """A run that is through rl-math and two steps into its side branch."""
    for sequence, (name, (stage, step)) in enumerate(CHECKPOINTS.items(), 1):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        state = {"stage": stage, "step": step, "stages": NAMES}
        facts = {"sequence": sequence, "keep_always": True, "state": state}
        (folder / FACTS).write_text(json.dumps(facts))
        (folder / MANIFEST).write_text("{}")
    CheckpointStore(tmp_path / "checkpoints", 2).point_to(tmp_path / "checkpoints" / "step-00000014")
    ledger = Ledger(tmp_path)
    for name in NAMES[:3]:
        ledger.append("stage_started", stage=name)
        ledger.append("stage_finished", stage=name)
        (tmp_path / "rollouts" / name).mkdir(parents=True)
    ledger.append("stage_started", stage="chat")
    return tmp_path


def names(folder):
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def test_a_run_goes_on_at_the_beginning_of_the_stage_and_loses_nothing(run_dir):
    said = rewind(RECIPE, run_dir, "rl-if")
    assert names(run_dir / "checkpoints") == ["stage-00-sft"]
    assert CheckpointStore(run_dir / "checkpoints", 2).latest().name == "stage-00-sft"
    aside = run_dir / "superseded" / "01-from-rl-if"
    assert names(aside / "checkpoints") == sorted(set(CHECKPOINTS) - {"stage-00-sft"})
    assert names(aside / "rollouts") == ["rl-if", "rl-math"] and names(run_dir / "rollouts") == ["sft"]
    assert list(read_history(Ledger(run_dir).events(), NAMES).finished) == ["sft"]
    assert "back to the beginning of rl-if: 7 folders" in said and "superseded/01-from-rl-if" in said


def test_back_to_the_first_stage_leaves_no_checkpoint(run_dir):
    rewind(RECIPE, run_dir, "sft")
    assert CheckpointStore(run_dir / "checkpoints", 2).latest() is None


def test_a_second_rewind_keeps_what_the_first_one_moved(run_dir):
    rewind(RECIPE, run_dir, "rl-math")
    rewind(RECIPE, run_dir, "rl-if")
    assert names(run_dir / "superseded") == ["01-from-rl-math", "02-from-rl-if"]


def test_a_stage_that_the_run_has_not_reached_is_no_place_to_go_back_to(run_dir):
    with pytest.raises(ConfigError, match="--from mopd: chat, which comes before it, is not finished"):
        rewind(RECIPE, run_dir, "mopd")
    assert not (run_dir / "superseded").exists()


def test_a_run_that_is_on_its_way_from_a_rewind_is_known_to_be(run_dir):
    assert not is_rewound(run_dir, "rl-if")
    rewind(RECIPE, run_dir, "rl-if")
    assert is_rewound(run_dir, "rl-if") and not is_rewound(run_dir, "rl-math")
    Ledger(run_dir).append("stage_finished", stage="rl-if")
    assert not is_rewound(run_dir, "rl-if")


def test_a_recipe_without_the_stages_that_were_run_is_refused(run_dir):
    other = dataclasses.replace(RECIPE, stages=(RECIPE.stages[1], RECIPE.stages[0], *RECIPE.stages[2:]))
    with pytest.raises(ConfigError, match="has been through sft, rl-if, rl-math, chat, but the recipe"):
        reached(other, run_dir)


def test_stages_that_have_not_begun_may_be_others(run_dir):
    assert reached(dataclasses.replace(RECIPE, stages=RECIPE.stages[:4]), run_dir) == (3, 2)


def test_an_unknown_stage_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"--until rl-mth: the recipe has no such stage \(did you mean rl-math\?\)"):
        require_stage(RECIPE, "rl-mth", "--until")


def test_a_dry_run_stands_where_the_last_checkpoint_does(run_dir):
    lines = would_do(RECIPE, run_dir, None, None)
    assert ["done" in line for line in lines] == [True, True, True, False, False]
    assert "goes on at step 2 of 4 steps" in lines[3]


def test_a_dry_run_of_a_rewind_changes_nothing(run_dir):
    lines = would_do(RECIPE, run_dir, "rl-if", None)
    assert ["to do" in line for line in lines] == [False, True, True, True, True]
    assert names(run_dir / "checkpoints") == sorted(CHECKPOINTS)


def test_a_dry_run_of_a_fresh_folder_has_all_to_do(tmp_path):
    assert all("to do" in line for line in would_do(RECIPE, tmp_path, None, None))
