"""Rows of programming problems, in the field's formats, as tests.

* `tests`: [{"input": ..., "output": ...}, ...], and perhaps `function`. Without it both are text for standard streams;
  with it `input` is the list of arguments and `output` the value.
* APPS and TACO: `input_output`, a JSON string of {"inputs", "outputs"} and perhaps "fn_name". With it the outputs of a
  row may all stand in a list of one, as APPS has them; that list is then taken off.
* LiveCodeBench: `public_test_cases` and `private_test_cases`, JSON strings of lists of {"input", "output", "testtype"}
  (the private ones packed by pickle, zlib and base64), and `metadata` with "func_name". A function's arguments stand in
  `input` one to a line, as JSON.
* NeMo-Gym: `unit_tests`, {"inputs", "outputs", "fn_name"}, beside its request.

`prompt` is a string or messages. Without it the problem's text is `question` (APPS, TACO) or `question_content`
(LiveCodeBench), and what the answer should look like is said here. `language` asks for python or cpp.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from millrace.environments.base import Message
from millrace.environments.prompts import opening_messages, prompt_problem
from millrace.environments.sandbox.compare import NotOneValueError, read_value
from millrace.environments.sandbox.service import Case

Row = Mapping[str, Any]

MOST_UNPACKED_BYTES = 1 << 30
"""Of private tests; more is no test set but a bomb."""

UNREADABLE_PICKLE = (
    pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, OverflowError, MemoryError,
)  # fmt: skip
"""What reading one may raise that is damaged."""

TEXT_FIELDS = ("question", "question_content")

LANGUAGES = {"python": "Python", "cpp": "C++"}
ASK_STREAMS = (
    "Write a {names} program that reads standard input and writes standard output. Give it in one {tags} block."
)
ASK_FUNCTION = "Write the Python function {name} that solves this. Give the whole code in one ```python block."
STARTER = "Begin with this code:\n\n```python\n{code}\n```"


class CodeRowError(ValueError):
    """What is wrong with a row, in a sentence without a subject."""


@dataclass(frozen=True)
class Problem:
    cases: Sequence[Case]
    function: str | None


def read_problem(row: Row) -> Problem:
    """The tests of a row.

    Raises:
        CodeRowError: it has none, or they cannot be read.
    """
    if row.get("tests") is not None:
        problem = _own(row["tests"], row.get("function"))
    elif row.get("unit_tests") is not None:
        problem = _inputs_outputs(row["unit_tests"], "unit_tests")
    elif row.get("input_output") is not None:
        problem = _inputs_outputs(row["input_output"], "input_output")
    elif row.get("public_test_cases") is not None or row.get("private_test_cases") is not None:
        problem = _live_code_bench(row)
    else:
        raise CodeRowError(
            "no tests: give tests, input_output (APPS, TACO), unit_tests (NeMo-Gym), or public_test_cases and "
            f"private_test_cases (LiveCodeBench); the row has {', '.join(row) or 'nothing'}"
        )
    if not problem.cases:
        raise CodeRowError("an empty list of tests, which every program would pass")
    if problem.function is None and not any(case.expected.strip() for case in problem.cases):
        raise CodeRowError("tests that all expect no output, which a program that does nothing passes")
    return problem


def opening_problem(row: Row) -> str | None:
    """Why a row cannot open an episode, or None."""
    if row.get("prompt") is not None:
        return prompt_problem(row["prompt"])
    if not isinstance(_text(row), str) or not str(_text(row)).strip():
        return f"a row needs prompt, or the problem's text in {' or '.join(TEXT_FIELDS)}"
    return None


def opening(row: Row, function: str | None, languages: Sequence[str] = ("python",)) -> list[Message]:
    """`languages` are those that the program may be written in."""
    if row.get("prompt") is not None:
        return opening_messages(row["prompt"])
    parts = [str(_text(row)).strip()]
    if starter := str(row.get("starter_code") or "").strip():
        parts.append(STARTER.format(code=starter))
    if function is None:
        names = " or ".join(LANGUAGES[each] for each in languages)
        tags = " or ".join(f"```{each}" for each in languages)
        parts.append(ASK_STREAMS.format(names=names, tags=tags))
    else:
        parts.append(ASK_FUNCTION.format(name=function))
    return [{"role": "user", "content": "\n\n".join(parts)}]


def _text(row: Row) -> Any:
    return next((row[name] for name in TEXT_FIELDS if row.get(name) is not None), None)


def _own(tests: Any, function: Any) -> Problem:
    if not _are_tests(tests):
        raise CodeRowError("tests that are no list of objects with input and output")
    _require_name(function, "function")
    if function is None:
        return Problem([_stream_case(test["input"], test["output"]) for test in tests], None)
    return Problem([_call_case(test["input"], test["output"]) for test in tests], function)


def _inputs_outputs(given: Any, field: str) -> Problem:
    tests = _parsed(given, field)
    if not isinstance(tests, Mapping) or not _are_lists_of_one_length(tests.get("inputs"), tests.get("outputs")):
        raise CodeRowError(f"{field} that has no lists inputs and outputs of one length")
    function = tests.get("fn_name")
    _require_name(function, f"{field}.fn_name")
    if function is None:
        pairs = zip(tests["inputs"], tests["outputs"], strict=True)
        return Problem([_stream_case(_joined(given), _joined(expected)) for given, expected in pairs], None)
    inputs = [_lines_of_json(each, field) if isinstance(each, str) else each for each in tests["inputs"]]
    outputs = [_parsed(each, field) if isinstance(each, str) and isinstance(tests["inputs"][0], str) else each
               for each in tests["outputs"]]  # fmt: skip
    if all(isinstance(each, list) and len(each) == 1 for each in outputs):
        outputs = [each[0] for each in outputs]
    return Problem([_call_case(*pair) for pair in zip(inputs, outputs, strict=True)], function)


def _live_code_bench(row: Row) -> Problem:
    tests = []
    for field in ("public_test_cases", "private_test_cases"):
        found = _unpacked(row.get(field) or [], field)
        if not isinstance(found, list) or not all(
            isinstance(t, Mapping) and "input" in t and "output" in t for t in found
        ):
            raise CodeRowError(f"{field} that is no list of objects with input and output")
        tests += found
    kinds = {test.get("testtype", "stdin") for test in tests}
    if kinds <= {"stdin"}:
        return Problem([_stream_case(test["input"], test["output"]) for test in tests], None)
    metadata = _parsed(row.get("metadata") or {}, "metadata")
    function = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    if kinds != {"functional"} or function is None:
        raise CodeRowError(f"tests of types {sorted(map(str, kinds))}, and {function!r} as metadata.func_name")
    _require_name(function, "metadata.func_name")
    cases = [_call_case(_lines_of_json(t["input"], "input"), _parsed(t["output"], "output")) for t in tests]
    return Problem(cases, function)


def _stream_case(given: Any, expected: Any) -> Case:
    if not isinstance(given, str) or not isinstance(expected, str):
        raise CodeRowError("tests of standard streams whose input and output are not both text (function is not given)")
    try:
        (given + expected).encode()
    except UnicodeEncodeError as error:
        raise CodeRowError(f"a test whose input or output no program can be given or print ({error})") from None
    return Case(given, expected)


def _call_case(arguments: Any, expected: Any) -> Case:
    if not isinstance(arguments, list):
        raise CodeRowError("tests of a function whose input is no list of arguments")
    try:
        json.dumps(expected, allow_nan=False)
    except ValueError:
        raise CodeRowError("a test of a function that expects NaN or Infinity, which no answer is") from None
    return Case(json.dumps(arguments), expected)


def _require_name(function: Any, field: str) -> None:
    if function is not None and not (isinstance(function, str) and function.isidentifier()):
        raise CodeRowError(f"{field} {function!r}, which is no name of a function")


def _are_tests(tests: Any) -> bool:
    return isinstance(tests, list) and all(isinstance(t, Mapping) and "input" in t and "output" in t for t in tests)


def _are_lists_of_one_length(inputs: Any, outputs: Any) -> bool:
    return isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)


def _joined(text: Any) -> Any:
    """Some rows give a stream as a list of its lines."""
    return "\n".join(text) if isinstance(text, list) and all(isinstance(line, str) for line in text) else text


def _lines_of_json(text: Any, field: str) -> list[Any]:
    if not isinstance(text, str):
        raise CodeRowError(f"{field} of a function that is no text with an argument to a line")
    return [_parsed(line, field) for line in text.split("\n") if line.strip()]


def _parsed(given: Any, field: str) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return read_value(given)
    except NotOneValueError as error:
        raise CodeRowError(f"{field} that is {error}") from None


def _unpacked(given: Any, field: str) -> Any:
    if not isinstance(given, str) or given.lstrip().startswith("["):
        return _parsed(given, field)
    try:
        unpack = zlib.decompressobj()
        packed = unpack.decompress(base64.b64decode(given, validate=True), MOST_UNPACKED_BYTES)
        text = _TextOnly(io.BytesIO(packed)).load()
    except (zlib.error, *UNREADABLE_PICKLE, ValueError) as error:
        raise CodeRowError(f"{field} that is neither JSON nor packed text ({error})") from None
    return _parsed(text, field)


class _TextOnly(pickle.Unpickler):
    """A pickle may name anything to be called; these hold a string and need nothing."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
