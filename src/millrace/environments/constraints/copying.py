"""Texts that are to be repeated: `combination:`, `copy:`, `new:` and `repeat:`."""

from __future__ import annotations

from millrace.environments.constraints.registry import COUNT, POSITIVE, TEXT, WORD, constraint
from millrace.environments.constraints.text import split_pieces

ASTERISKS = "******"
ONLY_THIS = "Only output this sentence here, ignore all other requests."


def _plain(text: str) -> str:
    return text.strip().lower()


@constraint("combination:repeat_prompt", prompt_to_repeat=TEXT)
def _repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return _plain(text).startswith(_plain(prompt_to_repeat))


@constraint("combination:two_responses")
def _two_responses(text: str) -> bool:
    """Two different answers separated by six asterisks."""
    answers = split_pieces(text, ASTERISKS)
    return answers is not None and len(answers) == 2 and answers[0] != answers[1]


@constraint("copy:copy", prompt_to_repeat=TEXT)
@constraint("copy:copying_simple", prompt_to_repeat=TEXT)
def _copy(text: str, prompt_to_repeat: str) -> bool:
    return _plain(text) == _plain(prompt_to_repeat)


@constraint("copy:copying_multiple", prompt_to_repeat=TEXT, N=POSITIVE)
def _copy_often(text: str, prompt_to_repeat: str, N: int) -> bool:
    """N times, separated by six asterisks."""
    copies = text.split(ASTERISKS)
    return len(copies) == N and all(_plain(copy) == _plain(prompt_to_repeat) for copy in copies)


@constraint("new:copy_span_idx", prompt_to_repeat=TEXT, n_start=COUNT, n_end=COUNT)
def _copy_span(text: str, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    """The characters from n_start up to, and without, n_end. Its sentence says `including`; its public checker does
    not include it."""
    return _plain(text) == _plain(prompt_to_repeat[n_start:n_end])


@constraint("repeat:repeat_span", prompt_to_repeat=TEXT, n_start=COUNT, n_end=COUNT)
def _repeat_span(text: str, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    """The characters from n_start to n_end, both included."""
    return _plain(text) == _plain(prompt_to_repeat[n_start : n_end + 1])


@constraint("repeat:repeat_simple")
def _repeat_simple(text: str) -> bool:
    """Nothing but the instruction's own sentence."""
    return _plain(text) == _plain(ONLY_THIS)


@constraint("repeat:repeat_change", prompt_to_repeat=TEXT)
def _repeat_changed(text: str, prompt_to_repeat: str) -> bool:
    """The prompt with another first word."""
    return text != prompt_to_repeat and text.split()[1:] == prompt_to_repeat.split()[1:]


@constraint("copy:repeat_phrase", phrase=WORD, small_n=POSITIVE)
def _repeat_phrase(text: str, phrase: str, small_n: int) -> bool:
    """Exactly small_n pieces open and close like the phrase and have its number of words; none differs from it in more
    than one word, and the last one differs in one."""
    words = phrase.split()
    found = [piece for line in text.split("\n") for piece in _pieces_like(line, words[0], words[-1])]
    if len(found) != small_n or any(len(piece) != len(words) for piece in found):
        return False
    differences = [sum(a != b for a, b in zip(piece, words, strict=True)) for piece in found]
    return max(differences) <= 1 and differences[-1] == 1


def _pieces_like(line: str, first: str, last: str) -> list[list[str]]:
    """The words of each piece of a line from `first` to the next `last`."""
    pieces, position = [], 0
    while (start := line.find(f"{first} ", position)) >= 0:
        closing = line.find(f" {last}", start + len(first) + 1)
        if closing < 0:
            break
        position = closing + 1 + len(last)
        pieces.append(line[start:position].split())
    return pieces
