"""The batch of a distillation step: who teaches which tokens, and what is put on record of it."""

import pytest
import torch

from millrace.config.schema import MopdStage
from millrace.stages.mopd import by_answer, joined, mopd_batch, per_teacher_means, taught_tokens, teacher_of_sequence

from .answers import group

STAGE = MopdStage(
    name="mopd",
    steps=1,
    teachers={"math": "best(math)", "chat": "stage(rlhf)"},
    rewarded=("mcqa",),
    samples_per_prompt=2,
)
GROUPS = [
    group([0.0, 1.0], domain="chat", lengths=[2, 3]),
    group([0.0, 1.0], domain="mcqa", lengths=[1, 2]),
    group([1.0, 1.0], domain="math", lengths=[1, 1]),
]
"""Prompts of three tokens: sequences of 5, 6, 4, 5, 4 and 4 tokens."""


@pytest.fixture
def batch():
    return mopd_batch(GROUPS, STAGE)


def test_each_sequence_has_its_domains_teacher_or_none(batch):
    assert teacher_of_sequence(batch) == [2, 2, 0, 0, 1, 1]
    assert batch.streams["taught"].split(batch.lengths.tolist())[0].tolist() == [0, 0, 0, 2, 2]


def test_only_rewarded_domains_have_an_advantage(batch):
    per_answer = [values[-1].item() for values in batch.streams["advantage"].split(batch.lengths.tolist())]
    assert per_answer[:2] == [0, 0] and per_answer[4:] == [0, 0]
    assert per_answer[2] < 0 < per_answer[3]


def test_each_answer_weighs_the_same_as_in_the_papers_equation_4(batch):
    per_answer = [values.sum().item() for values in batch.streams["weight"].split(batch.lengths.tolist())]
    assert per_answer == pytest.approx([1 / 6] * 6)


def test_teachers_go_through_prompts_and_answers_of_their_sequences(batch):
    assert taught_tokens(batch) == 5 + 6 + 4 + 4


def test_what_is_on_record_of_teachers_is_what_is_read_back(batch):
    teacher_logp = -torch.rand(batch.tokens.numel()) * (batch.streams["taught"] > 0)
    lines = by_answer(batch, teacher_logp)
    assert [sorted(line) for line in lines] == [["teacher_logp"]] * 2 + [["advantage"]] * 2 + [["teacher_logp"]] * 2
    assert len(lines[1]["teacher_logp"]) == 3
    assert torch.equal(joined(batch, lines), teacher_logp)


def test_a_mean_over_a_teachers_tokens_does_not_depend_on_how_many_the_others_have():
    sums = {"loss": 1.0, "reverse_kl/math": 0.1, "taught/math": 0.2, "reverse_kl/chat": 0.3, "taught/chat": 0.4}
    means = per_teacher_means(sums, STAGE)
    assert means["reverse_kl/math"] == pytest.approx(0.5) and means["reverse_kl/chat"] == pytest.approx(0.75)
    assert means["reverse_kl"] == pytest.approx(0.4 / 0.6) and means["loss"] == 1.0


def test_a_teacher_without_a_token_in_the_batch_has_no_mean():
    sums = {"reverse_kl/math": 0.1, "taught/math": 0.2, "reverse_kl/chat": 0.0, "taught/chat": 0.0}
    assert "reverse_kl/chat" not in per_teacher_means(sums, STAGE)
