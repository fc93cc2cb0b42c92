"""What a run has been through, read from its ledger: pure, so that it is the same for the run, a dry run and a test.

A label names weights: `start` (the model itself), `STAGE` (its end) or `STAGE@STEP` (an evaluation inside it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from millrace.config.graph import START
from millrace.evaluation.pass_rate import PassRate
from millrace.observe.chain import Entry
from millrace.observe.entries import counted

Scores = Mapping[str, PassRate]
"""Held-out pass rate by domain."""


@dataclass(frozen=True)
class Row:
    """One row of the stage-by-domain matrix."""

    label: str
    scores: Scores
    checkpoint: str | None
    """Name of the checkpoint that holds these weights; None where none was kept, and for `start`."""


@dataclass(frozen=True)
class History:
    """The facts that count: what was recorded before a rewind about the stages it took back is left out."""

    started: Mapping[str, Entry] = field(default_factory=dict)
    finished: Mapping[str, Entry] = field(default_factory=dict)
    rows: Mapping[str, Row] = field(default_factory=dict)
    """By label, in the order they were measured."""
    gates: Mapping[str, Entry] = field(default_factory=dict)
    """The last verdict on each stage."""

    def result(self, stage: str) -> str:
        """Label of the weights that later stages take when they start from `stage`: its end, or what its gate went back
        to."""
        gate = self.gates.get(stage)
        return gate["result"] if gate else stage


def read_history(events: Sequence[Entry], stages: Sequence[str]) -> History:
    """The history that a ledger's events tell, for the stages of a recipe in their order."""
    kept = counted(events, stages)
    rows = [_row(event) for event in kept if event["event"] == "evaluated"]
    return History(
        started={event["stage"]: event for event in kept if event["event"] == "stage_started"},
        finished={event["stage"]: event for event in kept if event["event"] == "stage_finished"},
        rows={row.label: row for row in rows},
        gates={event["stage"]: event for event in kept if event["event"] == "gate"},
    )


def _row(event: Entry) -> Row:
    scores = {domain: PassRate(**score) for domain, score in event["scores"].items()}
    checkpoint = None if event["after"] == START else event.get("checkpoint")
    return Row(event["after"], scores, checkpoint)
