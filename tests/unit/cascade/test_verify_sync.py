"""How the evidence of a weight sync is judged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from millrace.cascade.verify_sync import Evidence, judge, seats_of_engine
from millrace.config.schema import FleetConfig
from millrace.rollout.bandwidth import Link
from millrace.rollout.placement import HERE
from millrace.rollout.types import Rollout
from millrace.rollout.weight_sync import SyncReport


def rollout(*answer: int) -> Rollout:
    logp = tuple(-0.1 * token for token in answer)
    return Rollout("prompt-0", 0, (1, 2), answer, logp, "length", 2, "http://127.0.0.1:1")


def evidence() -> Evidence:
    swapped = [rollout(5, 6, 7), rollout(8, 9, 3)]
    scores = [torch.tensor(answer.rollout_logp) + 1e-6 for answer in swapped]
    report = SyncReport(
        version=2,
        engines=1,
        bytes=1000,
        tensors=10,
        link=Link("a copy in memory", 1.0),
        seconds=0.5,
        phases={},
        fingerprints=2,
        held=1,
        probe_mean=0.0,
        probe_max=0.0,
    )
    return Evidence([rollout(4, 4, 4), rollout(4, 4, 4)], swapped, swapped, scores, scores, None, report)


def test_answers_that_agree_everywhere_pass():
    verdict = judge(evidence(), 1e-4)
    assert verdict.passed and verdict.facts["answer_tokens"] == 6
    assert "6 greedy tokens after a swap of 10 tensors equal a fresh engine's" in verdict.summary


def test_another_answer_of_a_fresh_engine_is_named_by_its_first_token():
    given = evidence()
    verdict = judge(replace(given, fresh=[given.fresh[0], rollout(8, 1, 3)]), 1e-4)
    assert not verdict.passed
    assert verdict.summary == (
        "greedy answers of the swapped engine against a fresh one: answer 1, token 1 is 9 instead of 1"
    )


def test_a_logprob_that_is_off_or_not_a_number_is_named():
    given = evidence()
    off = [given.trainer[0], given.trainer[1] + torch.tensor([0.0, 0.0, 0.01])]
    assert "answer 1, token 2 (3): differs by 0.01" in judge(replace(given, trainer=off), 1e-4).summary
    lost = [torch.full((3,), float("nan")), given.trainer[1]]
    assert not judge(replace(given, transformers=lost), 1e-4).passed


def test_an_engine_that_kept_its_old_weights_does_not_pass():
    given = evidence()
    verdict = judge(replace(given, before=given.swapped), 1e-4)
    assert verdict.summary == "the swapped engine: its answers did not change with the weights"


def test_nccl_gets_an_engine_on_gpus_that_no_rank_computes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert seats_of_engine(FleetConfig(transport="nccl"), 2).gpus == ["6"]
    assert seats_of_engine(FleetConfig(transport="ipc"), 2) == HERE
