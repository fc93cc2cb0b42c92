import time

import pytest

from millrace.environments.tool_calls import ToolCall, ToolCallError, parse_tool_calls

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer"},
                "b": {"type": ["number", "null"]},
                "note": {"type": "string"},
                "tags": {"type": "array"},
                "exact": {"type": "boolean"},
            },
        },
    },
}


def xml(name: str, **parameters: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>\n"


def test_json_calls_are_read_in_their_order() -> None:
    answer = (
        'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "note": "x"}}\n</tool_call>\n'
        '<tool_call>{"name": "now"}</tool_call>'
    )
    assert parse_tool_calls(answer) == [ToolCall("add", {"a": 1, "note": "x"}), ToolCall("now", {})]


def test_xml_calls_keep_text_and_read_what_is_declared_otherwise() -> None:
    answer = xml("add", a="3", b="null", note="3", tags='["x"]', exact="True", other="7") + xml("now")
    arguments = {"a": 3, "b": None, "note": "3", "tags": ["x"], "exact": True, "other": "7"}
    assert parse_tool_calls(answer, [ADD]) == [ToolCall("add", arguments), ToolCall("now", {})]
    assert parse_tool_calls(xml("add", a="3")) == [ToolCall("add", {"a": "3"})]


def test_a_value_of_several_lines_loses_only_the_lines_around_it() -> None:
    code = "\ndef f(x):\n    return '<b>' if x < 1 else 2\n"
    assert parse_tool_calls(xml("run", code=code)) == [ToolCall("run", {"code": code})]


def test_calls_in_the_reasoning_and_in_reasoning_that_never_ends_do_not_count() -> None:
    assert parse_tool_calls(f"<think>perhaps {xml('a')}</think>{xml('b')}") == [ToolCall("b", {})]
    assert parse_tool_calls(f"<think>perhaps {xml('a')}") == []
    assert parse_tool_calls("the answer is 4") == []


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ('<tool_call>{"name": "add"}', "does not end with </tool_call>"),
        ('<tool_call>{"name": "add", }</tool_call>', "not valid JSON"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "not valid JSON"),
        ('<tool_call>{"arguments": {}}</tool_call>', 'has no "name"'),
        ("<tool_call>[1]</tool_call>", 'has no "name"'),
        ('<tool_call>{"name": "add", "arguments": {"note": ["\\ud83d"]}}</tool_call>', "surrogates not allowed"),
        (xml("add", tags='["\\ud83d"]'), "parameter tags of add must be of type array"),
        ('<tool_call>{"name": "add", "arguments": "a"}</tool_call>', "must be a JSON object"),
        ("<tool_call><function=></function></tool_call>", "must begin with <function=NAME>"),
        ("<tool_call><function=add><parameter=a>1</function></tool_call>", "parameter a of add does not end"),
        ("<tool_call><function=add>a=1</function></tool_call>", "something else than parameters"),
        ("<tool_call><function=add></tool_call>", "something else than parameters"),
        (xml("add", a="one"), "parameter a of add must be of type integer, not 'one'"),
        (xml("add", a="true"), "must be of type integer"),
        (xml("add", b="[]"), "must be of type number or null"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(answer: str, says: str) -> None:
    with pytest.raises(ToolCallError, match=says.replace("[", r"\[")):
        parse_tool_calls(answer, [ADD])


def test_long_nonsense_takes_linear_time() -> None:
    began = time.perf_counter()
    for nonsense in ("<tool_call>" * 100_000, "<tool_call>" + "<parameter=a>" * 100_000, "<tool_call></tool_call>" * 9):
        with pytest.raises(ToolCallError):
            parse_tool_calls(nonsense)
    assert time.perf_counter() - began < 2
