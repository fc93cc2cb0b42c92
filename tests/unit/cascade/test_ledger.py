import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.cascade.ledger import Ledger, LedgerDamaged, counted, standing

STAGES = ["sft", "rl-math", "rl-if"]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A small ledger. It lies in memory where that is possible: damage to every byte means thousands of fsyncs."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield filled(Ledger(Path(folder)))


def filled(ledger: Ledger) -> Ledger:
    ledger.append("evaluated", after="start", step=0, scores={"math": {"pass_rate": 0.25, "answers": 8}})
    ledger.append("stage_started", stage="sft", step=0)
    ledger.append("stage_finished", stage="sft", step=12, parent={"name": "start", "hash": "a1"})
    ledger.append("stopped", step=12)
    return ledger


def whole_lines(content: bytes, upto: int) -> int:
    """How many lines lie before byte `upto`, their newlines perhaps missing."""
    ends = [i for i in range(len(content)) if content[i : i + 1] == b"\n"]
    return sum(end <= upto for end in ends)


def after_damage(ledger: Ledger, content: bytes) -> tuple[list[dict], str | None]:
    """What the ledger tells and what recover says of damaged content; what follows must be a sound ledger."""
    ledger.path.write_bytes(content)
    told = ledger.events()
    said = ledger.recover()
    assert ledger.events() == told, "recovering changed what is read"
    assert ledger.recover() is None, "a recovered ledger is sound"
    ledger.append("stage_started", stage="later")
    assert [entry["event"] for entry in ledger.events()] == [*(entry["event"] for entry in told), "stage_started"]
    assert ledger.recover() is None
    return told, said


def damaged_files(ledger: Ledger) -> Iterator[Path]:
    return ledger.path.parent.glob("ledger.jsonl.damaged-*")


@pytest.fixture
def restore(ledger: Ledger):
    """Puts the sound ledger and its head back before each piece of damage."""
    sound, head = ledger.path.read_bytes(), ledger.head.read_bytes()

    def put_back() -> bytes:
        ledger.head.write_bytes(head)
        for file in damaged_files(ledger):
            file.unlink()
        return sound

    return put_back


def test_every_flipped_byte_is_detected_and_all_before_it_is_kept(ledger: Ledger, restore) -> None:
    sound, events = restore(), ledger.events()
    for position in range(len(sound)):
        for mask in (0x01, 0x20, 0xFF):
            restore()
            flipped = bytearray(sound)
            flipped[position] ^= mask
            told, said = after_damage(ledger, bytes(flipped))
            line = sound[:position].count(b"\n")
            assert told == events[:line]
            assert said and f"line {line + 1} " in said
            rest = sound[: sum(map(len, sound.splitlines(keepends=True)[:line]))]
            assert next(damaged_files(ledger)).read_bytes() == bytes(flipped)[len(rest) :]


def test_every_cut_is_detected_and_all_whole_lines_are_kept(ledger: Ledger, restore) -> None:
    sound, events = restore(), ledger.events()
    for size in range(len(sound)):
        restore()
        told, said = after_damage(ledger, sound[:size])
        assert told == events[: whole_lines(sound, size)]
        # The only harmless cut takes nothing but the last newline.
        assert (said is None) is (size == len(sound) - 1)


def test_every_missing_line_is_detected(ledger: Ledger, restore) -> None:
    lines, events = restore().splitlines(keepends=True), ledger.events()
    for missing in range(len(lines)):
        restore()
        told, said = after_damage(ledger, b"".join(lines[:missing] + lines[missing + 1 :]))
        assert told == events[:missing]
        assert said and ("is due" in said or "missing at its end" in said)


def test_swapped_and_repeated_lines_are_detected(ledger: Ledger, restore) -> None:
    lines, events = restore().splitlines(keepends=True), ledger.events()
    for first in range(len(lines) - 1):
        for second in range(first + 1, len(lines)):
            restore()
            swapped = list(lines)
            swapped[first], swapped[second] = swapped[second], swapped[first]
            told, said = after_damage(ledger, b"".join(swapped))
            assert told == events[:first] and said
    for place in range(len(lines)):
        restore()
        told, said = after_damage(ledger, b"".join(lines[: place + 1] + lines[place:]))
        assert told == events[: place + 1] and said


def test_every_inserted_byte_is_detected_and_all_before_it_is_kept(ledger: Ledger, restore) -> None:
    sound, events = restore(), ledger.events()
    for position in range(len(sound) + 1):
        for byte in (b"\n", b" ", b"7", b"\x00", b"\xff"):
            restore()
            told, said = after_damage(ledger, sound[:position] + byte + sound[position:])
            ends_a_line = byte == b"\n" == sound[position : position + 1]
            assert told == events[: whole_lines(sound, position if ends_a_line else position - 1)]
            assert said


def test_a_lost_and_an_edited_head_are_no_reason_to_doubt_the_lines(ledger: Ledger, restore) -> None:
    sound, events, head = restore(), ledger.events(), ledger.head.read_bytes()
    for position in range(len(head)):
        ledger.head.write_bytes(head[:position] + bytes([head[position] ^ 1]) + head[position + 1 :])
        told, said = after_damage(ledger, sound)
        assert told == events and said and "ledger.head names one that it does not hold" in said
    ledger.head.unlink()
    assert after_damage(ledger, sound) == (events, None)


def test_a_kill_between_a_line_and_its_head_is_no_damage(ledger: Ledger) -> None:
    head = ledger.head.read_bytes()
    ledger.append("stage_started", stage="rl-math")
    ledger.head.write_bytes(head)
    assert ledger.recover() is None
    assert len(ledger.events()) == 5


def test_earlier_damage_is_never_overwritten(ledger: Ledger) -> None:
    for number in (1, 2, 3):
        with ledger.path.open("ab") as file:
            file.write(b"torn %d" % number)
        said = ledger.recover()
        assert said == (
            f"{ledger.path}: line 5 is not a whole entry; it and all behind it count no more and were moved to "
            f"ledger.jsonl.damaged-{number}; the run goes on from entry 4 (stopped)"
        )
    assert sorted(file.read_bytes() for file in damaged_files(ledger)) == [b"torn 1", b"torn 2", b"torn 3"]


def test_nothing_is_appended_to_a_damaged_ledger(ledger: Ledger) -> None:
    ledger.path.write_bytes(ledger.path.read_bytes().replace(b"0.25", b"0.75"))
    with pytest.raises(LedgerDamaged, match=r"ledger\.jsonl: line 1 does not fit its hash; run the same command again"):
        ledger.append("finished", stages=STAGES)


def test_a_ledger_without_hashes_is_read_and_continued(tmp_path: Path) -> None:
    old = [
        {"event": "stage_started", "time": 1.0, "stage": "sft"},
        {"event": "finished", "time": 2.0, "stages": ["sft"]},
    ]
    ledger = Ledger(tmp_path)
    ledger.path.write_text(json.dumps(old[0]) + '\n{"event": "eval\n' + json.dumps(old[1]) + "\n")
    assert ledger.recover() is None
    assert ledger.events() == old and ledger.is_finished(["sft"])
    ledger.append("stage_started", stage="rl-math")
    assert ledger.events()[:2] == old
    assert ledger.events()[2]["number"] == 3
    assert ledger.recover() is None


def test_half_a_line_at_the_end_of_a_ledger_without_hashes_is_moved_aside(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.path.write_text('{"event": "stage_started", "time": 1.0, "stage": "sft"}\n{"event": "evalua')
    said = ledger.recover()
    assert said and said.endswith("the run goes on from entry 1 (stage_started sft)")
    ledger.append("stage_finished", stage="sft")
    assert [entry["event"] for entry in ledger.events()] == ["stage_started", "stage_finished"]


APPEND_FOREVER = """
import sys
from pathlib import Path
from millrace.cascade.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
ledger.recover()
while True:
    ledger.append("evaluated", after="start", scores={"text": "x" * 3000})
"""


def test_a_writer_killed_at_any_moment_leaves_a_ledger_that_goes_on(tmp_path: Path) -> None:
    ledger, before = Ledger(tmp_path), 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", APPEND_FOREVER, str(tmp_path)])
        while len(ledger.events()) < before + 5:
            assert process.poll() is None
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        ledger.recover()
        numbers = [entry["number"] for entry in ledger.events()]
        assert numbers == list(range(1, len(numbers) + 1))
        before = len(numbers)


def test_events_come_back_in_order_and_scores_by_label(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append("evaluated", after="start", scores={"math": {"pass_rate": 0.25}})
    ledger.append("stage_started", stage="sft")
    ledger.append("evaluated", after="sft", scores={"math": {"pass_rate": 0.5}})
    assert [entry["event"] for entry in ledger.events()] == ["evaluated", "stage_started", "evaluated"]
    assert [entry["number"] for entry in ledger.events("evaluated")] == [1, 3]
    assert ledger.scores() == {"start": {"math": {"pass_rate": 0.25}}, "sft": {"math": {"pass_rate": 0.5}}}


def test_a_run_is_finished_when_it_came_to_the_end_of_these_very_stages_and_was_not_rewound(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert not ledger.is_finished(["sft"])
    ledger.append("finished", stages=["sft"])
    assert ledger.is_finished(["sft"])
    assert not ledger.is_finished(["sft", "rl"])
    ledger.append("rewound", to="sft")
    assert not ledger.is_finished(["sft"])


def test_what_a_run_was_rewound_from_counts_no_more() -> None:
    events = [
        {"event": "evaluated", "after": "start"},
        {"event": "stage_started", "stage": "sft"},
        {"event": "stage_finished", "stage": "sft"},
        {"event": "stage_started", "stage": "rl-math"},
        {"event": "evaluated", "after": "rl-math@10"},
        {"event": "stage_finished", "stage": "rl-math"},
        {"event": "stage_started", "stage": "rl-if"},
        {"event": "finished", "stages": STAGES},
    ]
    assert standing(events, STAGES).begun == ("start", "sft", "rl-math", "rl-if")
    assert standing(events, STAGES).finished == ("sft", "rl-math")
    events.append({"event": "rewound", "to": "rl-math"})
    assert [entry.get("stage") or entry.get("after") for entry in counted(events, STAGES)] == [
        "start",
        "sft",
        "sft",
        None,
    ]
    assert standing(events, STAGES) == standing(events[:3], STAGES)
    events.append({"event": "stage_started", "stage": "rl-math"})
    assert standing(events, STAGES).begun == ("start", "sft", "rl-math")
    assert standing(events, STAGES).finished == ("sft",)
