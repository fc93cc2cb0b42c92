"""What of a ledger's entries counts: the same for the run that goes on from them and for the report. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from millrace.observe.chain import Entry

_OF_THE_WHOLE_RUN = ("exported", "finished")


def counted(events: Sequence[Entry], stages: Sequence[str]) -> list[Entry]:
    """The events that still count: without what `rewound` events withdrew. `stages` in the order of the recipe."""
    kept: list[Entry] = []
    for entry in events:
        if entry["event"] == "rewound":
            to = entry["to"]
            withdrawn = {to, *(stages[list(stages).index(to) :] if to in stages else ())}
            kept = [e for e in kept if e["event"] not in _OF_THE_WHOLE_RUN and stage_of_entry(e) not in withdrawn]
        kept.append(entry)
    return kept


def stage_of_entry(entry: Entry) -> str | None:
    """The stage that an event speaks about; None of the whole run."""
    label = entry.get("stage") or entry.get("after")
    return stage_of(label) if label else None


def stage_of(label: str) -> str:
    """The stage of a checkpoint's label: that of `STAGE@STEP`, a measurement inside one, is STAGE."""
    return label.split("@")[0]
