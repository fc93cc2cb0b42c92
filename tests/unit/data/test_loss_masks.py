"""Training sequences of random conversations against a second rendering of each format, written out in Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_checkpoints import THINKING_ONCE, checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import IM_END, IM_START, VOCABULARY

from millrace.data.messages import has_reasoning, is_trained
from millrace.data.tokenizer import ChatTokenizer, TrainingSequence

MERGES = ["Ċ Ċ", "> Ċ", "Ċ a", "a a", "Ġ a", "> a"]
"""Pairs that stand at the borders of prompts, answers and turns, so that each of them can merge."""

Render = Callable[[list[dict], bool], str]
"""Messages and the form of the prompt behind them to text."""


def as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def block(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def last_user(messages: list[dict]) -> int:
    return max((n for n, m in enumerate(messages) if m["role"] == "user"), default=-1)


def chatml_turn(message: dict) -> str:
    reasoning = message.get("reasoning_content")
    return (f"<think>\n{reasoning}\n</think>\n\n" if reasoning else "") + message["content"]


def chatml(messages: list[dict], _thinking: bool) -> str:
    turns = [block(m["role"], chatml_turn(m)) for m in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def chatml_answer(messages: list[dict], _thinking: bool) -> str:
    return chatml_turn(messages[-1])


def once_turn(message: dict, shows: bool) -> str:
    calls = "".join(f"\n<tool_call>\n{as_json(c['function'])}\n</tool_call>" for c in message.get("tool_calls", []))
    head = f"<think>\n{message.get('reasoning_content') or ''}\n</think>\n\n" if shows else ""
    return head + message["content"] + calls


def once(messages: list[dict], thinking: bool) -> str:
    text = ""
    for number, m in enumerate(messages):
        if m["role"] == "assistant":
            last = number > last_user(messages) and (number == len(messages) - 1 or m.get("reasoning_content"))
            text += block("assistant", once_turn(m, bool(last)))
        elif m["role"] == "tool":
            text += block("user", f"<tool_response>\n{m['content']}\n</tool_response>")
        else:
            text += block(m["role"], m["content"])
    return text + "<|im_start|>assistant\n" + ("" if thinking else "<think>\n\n</think>\n\n")


def once_answer(messages: list[dict], thinking: bool) -> str:
    return once_turn(messages[-1], thinking)


def nemotron_calls(message: dict) -> str:
    text = ""
    for each in message.get("tool_calls", []):
        text += f"<tool_call>\n<function={each['function']['name']}>\n"
        for name, value in each["function"]["arguments"].items():
            text += f"<parameter={name}>\n{value if isinstance(value, str) else as_json(value)}\n</parameter>\n"
        text += "</function>\n</tool_call>\n"
    return text


def nemotron_turn(message: dict, present: bool) -> str:
    reasoning, content, calls = message.get("reasoning_content"), message["content"], nemotron_calls(message)
    if present:
        text = f"<think>\n{reasoning}\n</think>\n{content}" if reasoning else f"<think></think>{content}"
    elif calls:
        text = f"<think></think>{content.strip()}"
    else:
        text = "<think></think>" + ("\n" if reasoning else "") + content
    return text.strip() + ("\n" + calls if calls else "")


def nemotron(messages: list[dict], thinking: bool) -> str:
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    text = block("system", system)
    for number, m in enumerate(messages):
        if m["role"] == "assistant":
            text += block("assistant", nemotron_turn(m, number > last_user(messages)))
        elif m["role"] == "tool":
            response = f"<tool_response>\n{m['content']}\n</tool_response>\n"
            opens, closes = messages[number - 1]["role"] != "tool", messages[number + 1 :][:1]
            text += "<|im_start|>user\n" * opens + response
            text += "" if closes and closes[0]["role"] == "tool" else "<|im_end|>\n"
        elif m["role"] == "user":
            text += block("user", m["content"])
    return text + "<|im_start|>assistant\n" + ("<think>\n" if thinking else "<think></think>")


def nemotron_answer(messages: list[dict], thinking: bool) -> str:
    return nemotron_turn(messages[-1], True).removeprefix("<think>\n" if thinking else "<think></think>")


FORMATS = {
    "chatml": (None, None, chatml, chatml_answer),
    "once": (THINKING_ONCE, None, once, once_answer),
    "nemotron": (None, "nemotron", nemotron, nemotron_answer),
}

words = st.text(alphabet="a \né<", max_size=4)
reasonings = st.one_of(st.none(), st.text(alphabet="a \n", min_size=1, max_size=4).filter(str.strip))
values = st.one_of(words, st.integers(), st.lists(st.integers(), max_size=2), st.dictionaries(words, st.none()))
call = st.fixed_dictionaries(
    {"name": st.sampled_from("fg"), "arguments": st.dictionaries(st.sampled_from("pq"), values, max_size=2)}
).map(lambda function: {"type": "function", "function": function})
trained = st.sampled_from([{}, {}, {"train": False}, {"weight": 0}, {"weight": 1}])


@st.composite
def conversations(draw: st.DrawFn, tools: bool) -> list[dict]:
    messages = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(words)})
        steps = draw(st.integers(0, 2)) if tools else 0
        for step in range(steps + 1):
            message = {"role": "assistant", "content": draw(words), **draw(trained)}
            if (reasoning := draw(reasonings)) is not None:
                message["reasoning_content"] = reasoning
            messages.append(message)
            if step < steps:
                message["tool_calls"] = draw(st.lists(call, min_size=1, max_size=2))
                messages += [{"role": "tool", "content": draw(words)} for _ in message["tool_calls"]]
    return messages


def bytes_of(text: str) -> list[int]:
    """Ids of the tokenizer without merges: a byte each, and the two special tokens."""
    ids: list[int] = []
    while text:
        for special, number in (("<|im_start|>", IM_START), ("<|im_end|>", IM_END)):
            if text.startswith(special):
                ids, text = [*ids, number], text[len(special) :]
                break
        else:
            ids, text = [*ids, *text[0].encode()], text[1:]
    return ids


def trained_turns(sequences: list[TrainingSequence]) -> list[tuple[list[int], list[int]]]:
    """What stands before each trained stretch, and the stretch."""
    turns = []
    for tokens, mask in ((s.tokens, [False, *s.loss_mask, False]) for s in sequences):
        starts = [n for n in range(len(tokens)) if mask[n + 1] and not mask[n]]
        ends = [n for n in range(1, len(tokens) + 1) if mask[n] and not mask[n + 1]]
        turns += [(tokens[:start], tokens[start:end]) for start, end in zip(starts, ends, strict=True)]
    return turns


def without_reasoning(messages: list[dict]) -> list[dict]:
    return [{key: value for key, value in m.items() if key != "reasoning_content"} for m in messages]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], ChatTokenizer]:
    def build(name: str, merges: bool) -> ChatTokenizer:
        template, named, *_ = FORMATS[name]
        folder: Path = tmp_path_factory.mktemp(name)
        path = checkpoint(folder, template, merges=MERGES if merges else None)
        return ChatTokenizer(path, VOCABULARY, chat_template=named)

    return {(name, merges): build(name, merges) for name in FORMATS for merges in (False, True)}


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), thinking=st.sampled_from([None, None, False]))
def test_each_trained_turn_is_its_prompt_and_its_answer(
    tokenizers: dict[tuple[str, bool], ChatTokenizer], name: str, data: st.DataObject, thinking: bool | None
) -> None:
    _, _, render, answer = FORMATS[name]
    messages = data.draw(conversations(tools=name != "chatml"))
    turns = [n for n, m in enumerate(messages) if m["role"] == "assistant" and is_trained(m)]
    if not turns:
        return
    sequences = tokenizers[name, False].render_conversation(messages, thinking=thinking)
    read = without_reasoning(messages) if thinking is False else messages
    expected = []
    for turn in turns:
        form = "reasoning_content" in read[turn]
        ended = answer(read[: turn + 1], form) + "<|im_end|>"
        expected.append((bytes_of(render(read[:turn], form)), bytes_of(ended)))
    assert trained_turns(sequences) == expected
    # A sequence ends only where the next prompt does not go on with it.
    begins = [turn_prompt for turn_prompt, _ in (trained_turns([s])[0] for s in sequences[1:])]
    assert not any(b[: len(s.tokens)] == s.tokens for s, b in zip(sequences, begins, strict=False))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_trained_turn_begins_with_the_ids_that_an_engine_would_be_given(
    tokenizers: dict[tuple[str, bool], ChatTokenizer], name: str, data: st.DataObject
) -> None:
    _, _, _, answer = FORMATS[name]
    tokenizer = tokenizers[name, True]
    messages = data.draw(conversations(tools=name != "chatml"))
    turns = [n for n, m in enumerate(messages) if m["role"] == "assistant" and is_trained(m)]
    if not turns:
        return
    pairs = trained_turns(tokenizer.render_conversation(messages))
    assert len(pairs) == len(turns)
    for (prompt, tokens), turn in zip(pairs, turns, strict=True):
        form = has_reasoning(messages[turn])
        assert prompt == tokenizer.render_prompt(messages[:turn], thinking=form if name != "chatml" else None)
        text = answer(messages[: turn + 1], form) + "<|im_end|>"
        assert tokenizer.decode(tokens, skip_special=False) == text and tokens[-1] == tokenizer.end_of_turn_id


def test_the_merges_of_the_tests_do_stand_at_borders(tokenizers: dict[tuple[str, bool], ChatTokenizer]) -> None:
    tokenizer = tokenizers["nemotron", True]
    user = {"role": "user", "content": "q"}
    first, second = [user, {"role": "assistant", "content": "a"}], [user, {"role": "assistant", "content": "b"}]
    assert len(tokenizer.render_conversation(first * 2)) == 2, "'>a' is one token in history, and two when sampled"
    assert len(tokenizer.render_conversation(second * 2)) == 1
