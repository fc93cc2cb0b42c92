from pathlib import Path

import pytest
from chat_checkpoints import checkpoint, shown
from tiny_checkpoints import VOCABULARY

from millrace.data.errors import DataError
from millrace.data.tokenizer import ChatTokenizer

EMPTY_SYSTEM = "<|im_start|>system\n<|im_end|>\n"
USER = {"role": "user", "content": "2+2?"}
ASKED = "<|im_start|>user\n2+2?<|im_end|>\n"
THOUGHT = {"role": "assistant", "reasoning_content": "two and two", "content": "4"}
PLAIN = {"role": "assistant", "content": "4"}
SECOND = {"role": "user", "content": "3+3?"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    path = checkpoint(tmp_path_factory.mktemp("nemotron"), "", model_type="nemotron_h")
    return ChatTokenizer(path, VOCABULARY)


def prompt(tokenizer: ChatTokenizer, messages: list[dict], **form: object) -> str:
    return tokenizer.decode(tokenizer.render_prompt(messages, **form), skip_special=False)


def test_the_thinking_form_opens_a_block_and_the_other_one_closes_it(tokenizer: ChatTokenizer) -> None:
    opened = EMPTY_SYSTEM + ASKED + "<|im_start|>assistant\n<think>\n"
    assert prompt(tokenizer, [USER]) == opened
    assert prompt(tokenizer, [USER], thinking=True) == opened
    assert prompt(tokenizer, [USER], thinking=False) == EMPTY_SYSTEM + ASKED + "<|im_start|>assistant\n<think></think>"


def test_a_system_message_takes_the_place_of_the_empty_block(tokenizer: ChatTokenizer) -> None:
    text = prompt(tokenizer, [{"role": "system", "content": "Be brief."}, USER], thinking=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n" + ASKED + "<|im_start|>assistant\n<think></think>"


def test_reasoning_is_trained_on_with_one_newline_behind_it(tokenizer: ChatTokenizer) -> None:
    (sequence,) = tokenizer.render_conversation([USER, THOUGHT])
    assert shown(tokenizer, sequence) == (
        EMPTY_SYSTEM + ASKED + "<|im_start|>assistant\n<think>\n[[two and two\n</think>\n4<|im_end|>]]"
    )


@pytest.mark.parametrize(
    "content",
    ["<think>\ntwo and two\n</think>\n4", "<think>two and two</think>4", "two and two\n</think>\n\n4"],
)
def test_reasoning_inside_the_content_is_the_same(tokenizer: ChatTokenizer, content: str) -> None:
    inside = {"role": "assistant", "content": content}
    assert tokenizer.render_conversation([USER, inside]) == tokenizer.render_conversation([USER, THOUGHT])


def test_an_answer_without_reasoning_is_trained_on_in_the_other_form(tokenizer: ChatTokenizer) -> None:
    for message in (PLAIN, {"role": "assistant", "content": "<think></think>4"}, {**PLAIN, "reasoning_content": ""}):
        (sequence,) = tokenizer.render_conversation([USER, message])
        assert shown(tokenizer, sequence) == (
            EMPTY_SYSTEM + ASKED + "<|im_start|>assistant\n<think></think>[[4<|im_end|>]]"
        )


def test_history_has_no_reasoning_and_each_turn_of_the_user_is_a_sequence(tokenizer: ChatTokenizer) -> None:
    second = {"role": "assistant", "reasoning_content": "three and three", "content": "6"}
    first, last = tokenizer.render_conversation([USER, THOUGHT, SECOND, second])
    assert shown(tokenizer, first).endswith("<think>\n[[two and two\n</think>\n4<|im_end|>]]")
    assert shown(tokenizer, last) == (
        EMPTY_SYSTEM + ASKED + "<|im_start|>assistant\n<think></think>\n4<|im_end|>\n"
        "<|im_start|>user\n3+3?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n[[three and three\n</think>\n6<|im_end|>]]"
    )


def test_turns_without_reasoning_share_one_sequence(tokenizer: ChatTokenizer) -> None:
    (sequence,) = tokenizer.render_conversation([USER, PLAIN, SECOND, {"role": "assistant", "content": "6"}])
    assert shown(tokenizer, sequence) == (
        EMPTY_SYSTEM + ASKED + "<|im_start|>assistant\n<think></think>[[4<|im_end|>]]\n"
        "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n<think></think>[[6<|im_end|>]]"
    )


SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": " Find pages. ",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {"type": "string", "description": "What to look for."},
                "sites": {"type": "array", "items": {"type": "string"}, "default": []},
                "order": {"type": ["string", "null"], "enum": ["new", "old"], "nullable": True},
            },
            "required": ["query"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
NOW = {"name": "now", "parameters": {"type": "object", "properties": {}}}
TOOL_BLOCK = """# Tools

These functions are at hand:

<tools>
<function>
<name>search</name>
<description>Find pages.</description>
<parameters>
<parameter>
<name>query</name>
<type>string</type>
<description>What to look for.</description>
</parameter>
<parameter>
<name>sites</name>
<type>array</type>
<items>{"type": "string"}</items>
<default>[]</default>
</parameter>
<parameter>
<name>order</name>
<type>['string', 'null']</type>
<enum>["new", "old"]</enum>
<nullable>True</nullable>
</parameter>
<additionalProperties>False</additionalProperties>
<required>["query"]</required>
</parameters>
<strict>True</strict>
</function>
<function>
<name>now</name>
<parameters>
</parameters>
</function>
</tools>

To call one, end the answer with a block of this form, every required parameter in it:

<tool_call>
<function=NAME>
<parameter=PARAMETER>
VALUE
</parameter>
</function>
</tool_call>"""


def test_tools_stand_in_the_system_block_behind_the_system_message(tokenizer: ChatTokenizer) -> None:
    text = prompt(tokenizer, [{"role": "system", "content": "Be brief."}, USER], tools=[SEARCH, NOW])
    assert text == (f"<|im_start|>system\nBe brief.\n\n{TOOL_BLOCK}<|im_end|>\n{ASKED}<|im_start|>assistant\n<think>\n")
    text = prompt(tokenizer, [USER], tools=[SEARCH, NOW], thinking=False)
    assert text == f"<|im_start|>system\n{TOOL_BLOCK}<|im_end|>\n{ASKED}<|im_start|>assistant\n<think></think>"


def call(name: str, arguments: object) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ARGUMENTS = {"query": "a\nb", "sites": ["x", 1, None], "most": 3, "filter": {"new": True, "kind": "é"}}
CALLS = """<tool_call>
<function=search>
<parameter=query>
a
b
</parameter>
<parameter=sites>
["x", 1, null]
</parameter>
<parameter=most>
3
</parameter>
<parameter=filter>
{"new": true, "kind": "é"}
</parameter>
</function>
</tool_call>
<tool_call>
<function=now>
</function>
</tool_call>
"""


@pytest.mark.parametrize("as_text", [False, True])
def test_calls_and_results_within_a_turn_keep_its_reasoning(tokenizer: ChatTokenizer, as_text: bool) -> None:
    arguments = '{"query": "a\\nb", "sites": ["x", 1, null], "most": 3, "filter": {"new": true, "kind": "é"}}'
    calling = {
        "role": "assistant",
        "reasoning_content": "look",
        "content": None,
        "tool_calls": [call("search", arguments if as_text else ARGUMENTS), call("now", "" if as_text else {})],
    }
    results = [{"role": "tool", "content": "one page"}, {"role": "tool", "content": "noon"}]
    answer = {"role": "assistant", "reasoning_content": "read", "content": "Done."}
    (sequence,) = tokenizer.render_conversation([USER, calling, *results, answer])
    assert shown(tokenizer, sequence) == (
        EMPTY_SYSTEM + ASKED + "<|im_start|>assistant\n<think>\n"
        f"[[look\n</think>\n{CALLS}<|im_end|>]]\n"
        "<|im_start|>user\n<tool_response>\none page\n</tool_response>\n"
        "<tool_response>\nnoon\n</tool_response>\n<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n[[read\n</think>\nDone.<|im_end|>]]"
    )


def test_calls_of_earlier_turns_lose_their_reasoning_and_keep_their_words(tokenizer: ChatTokenizer) -> None:
    calling = {"role": "assistant", "reasoning_content": "r", "content": "Let me see.", "tool_calls": [call("now", {})]}
    silent = {"role": "assistant", "reasoning_content": "r", "tool_calls": [call("now", {})]}
    result = {"role": "tool", "content": "noon"}
    text = prompt(tokenizer, [USER, calling, result, silent, result, THOUGHT, SECOND])
    called = "<tool_call>\n<function=now>\n</function>\n</tool_call>\n<|im_end|>\n"
    responded = "<|im_start|>user\n<tool_response>\nnoon\n</tool_response>\n<|im_end|>\n"
    assert text == (
        EMPTY_SYSTEM + ASKED + f"<|im_start|>assistant\n<think></think>Let me see.\n{called}{responded}"
        f"<|im_start|>assistant\n<think></think>\n{called}{responded}"
        "<|im_start|>assistant\n<think></think>\n4<|im_end|>\n"
        "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_calls_in_the_non_thinking_form(tokenizer: ChatTokenizer) -> None:
    calling = {"role": "assistant", "content": "Let me see.", "tool_calls": [call("now", {})]}
    (sequence,) = tokenizer.render_conversation([USER, calling])
    assert shown(tokenizer, sequence).endswith(
        "<|im_start|>assistant\n<think></think>[[Let me see.\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>\n<|im_end|>]]"
    )


def test_thinking_false_leaves_reasoning_out_and_true_asks_for_it(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.render_conversation([USER, THOUGHT], thinking=False) == tokenizer.render_conversation(
        [USER, PLAIN]
    )
    with pytest.raises(DataError, match=r"renders message 1 otherwise .* no reasoning, so leave thinking out"):
        tokenizer.render_conversation([USER, PLAIN], thinking=True)


def test_the_template_can_be_named_for_any_checkpoint(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    named = ChatTokenizer(checkpoint(tmp_path), VOCABULARY, chat_template="nemotron")
    assert not named.brings_template and not tokenizer.brings_template
    assert named.render_prompt([USER]) == tokenizer.render_prompt([USER])
    own = ChatTokenizer(checkpoint(tmp_path, model_type="nemotron_h"), VOCABULARY)
    assert own.brings_template and prompt(own, [USER]) == ASKED + "<|im_start|>assistant\n"
