import json

from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.observe.chain import GENESIS, chained_line, first_problem, hash_of, proven

UNCHAINED = b'{"event": "stage_started", "time": 1.0}\n{"event": "stage_finished", "time": 2.0}\n'


def chained(entries: list[dict], previous: str = GENESIS, first: int = 1) -> bytes:
    lines = b""
    for number, entry in enumerate(entries, first):
        line = chained_line({"number": number, "event": "e", **entry}, previous)
        previous, lines = json.loads(line)["hash"], lines + line + b"\n"
    return lines


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.dictionaries(st.text(min_size=1).filter(lambda k: k not in ("number", "hash")), json_values)))
def test_whatever_an_entry_holds_is_proven_and_comes_back(entries: list[dict]) -> None:
    content = chained([{"facts": entry} for entry in entries])
    known = proven(content)
    assert [entry["facts"] for entry in known.entries] == entries
    assert known.size == len(content)


def test_a_nested_hash_is_not_taken_for_that_of_the_line() -> None:
    content = chained([{"parent": {"name": "x", "hash": "abc"}}, {"parent": '", "hash": "'}])
    assert len(proven(content).entries) == 2


def test_the_hash_is_that_of_the_hash_before_and_the_line_up_to_its_own() -> None:
    line = chained_line({"number": 1, "event": "e"}, GENESIS)
    expected = hash_of(hash_of(b"").encode() + b'{"number": 1, "event": "e"')
    assert line == b'{"number": 1, "event": "e", "hash": "' + expected.encode() + b'"}'


def test_lines_from_before_there_were_hashes_are_taken_as_they_are() -> None:
    halves = UNCHAINED.replace(b"\n", b'\n{"event": "eval\n', 1)
    for content in (UNCHAINED, halves):
        known = proven(content)
        assert [entry["event"] for entry in known.entries] == ["stage_started", "stage_finished"]
        assert known.size == len(content)
        continued = content + chained([{}, {}], known.previous, first=3)
        assert len(proven(continued).entries) == 4


def test_an_edit_of_lines_without_hashes_shows_at_the_first_line_that_has_one() -> None:
    continued = UNCHAINED + chained([{}, {}], proven(UNCHAINED).previous, first=3)
    edited = continued.replace(b"2.0", b"3.0")
    known = proven(edited)
    assert known.size == len(UNCHAINED)
    assert first_problem(edited, known) == "line 3 does not fit its hash"


def test_a_line_without_a_hash_among_those_that_have_one_counts_nowhere() -> None:
    content = chained([{}, {}, {}])
    lines = content.splitlines(keepends=True)
    forged = b'{"event": "stage_finished", "time": 1.0}\n'
    for place in range(4):
        mixed = b"".join([*lines[:place], forged, *lines[place:]])
        known = proven(mixed)
        assert known.size == sum(map(len, lines[:place]))
        assert first_problem(mixed, known) == f"line {place + 1} has no hash"


def test_the_first_problem_says_what_is_wrong() -> None:
    lines = chained([{}, {}, {}]).splitlines(keepends=True)

    def problem(*parts: bytes) -> str:
        content = b"".join(parts)
        return first_problem(content, proven(content))

    assert problem(lines[0], lines[2]) == "line 2 has number 3 where 2 is due"
    assert problem(lines[0], lines[1][:-9]) == "line 2 is not a whole entry"
    assert problem(lines[0].replace(b'"e"', b'"f"'), lines[1]) == "line 1 does not fit its hash"
    assert problem(lines[0], b"\n", lines[1]) == "line 2 is not a whole entry"
