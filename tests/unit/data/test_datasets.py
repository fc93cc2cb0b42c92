import json
import os
from pathlib import Path

import pytest
from chat_checkpoints import checkpoint
from tiny_checkpoints import VOCABULARY, write_tokenizer

from millrace.data.datasets import ConversationDataset, PromptDataset, conversation_problem, read_rows
from millrace.data.errors import DataError
from millrace.data.tokenizer import ChatTokenizer


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def conversation(answer: object, **assistant: object) -> dict:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer, **assistant}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return ChatTokenizer(path, VOCABULARY)


def test_rows_come_back_by_index_whatever_their_encoding(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \n{"a": "\xc3\xbc\xe6\x95\xb0"}\r\n{"a": 3}')
    rows = read_rows(path, ["a"])
    assert len(rows) == 3
    assert [row["a"] for row in rows] == [1, "ü数", 3] and rows[-1] == {"a": 3}
    assert rows.where(1) == f"{path}:4"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the data set is empty"),
        (b"\n \n", "the data set is empty"),
        (b'{"a": 1}\n{"a": \n', r":2: not valid JSON at column 6: Expecting value"),
        (b'{"a": 1}\n\n{"b": 1, "c": 2}\n', r":3: the row has no field 'a' \(it has b, c\)"),
        (b'{"a": 1}\n{}\n', r":2: the row has no field 'a' \(it has none\)"),
        (b"[1]\n", ":1: a row must be a JSON object, this is a list"),
        (b'{"a": "\xff"}\n', ":1: not valid UTF-8"),
        (b'{"a": -1}\n', ":1: a is negative"),
    ],
)
def test_a_bad_file_is_named_with_line_and_field(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"rows\.jsonl.*{message}"):
        read_rows(path, ["a"], lambda row: "a is negative" if row["a"] == -1 else None)


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: .*No such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="Is a directory"):
        read_rows(tmp_path)


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "rows.jsonl", {"a": 1}, {"a": 2}))
    assert rows[1] == {"a": 2}
    write(rows.path, {"a": 10}, {"a": 2})
    os.utime(rows.path, ns=(1, 1))
    with pytest.raises(DataError, match="changed while it was in use"):
        rows[1]


def test_row_ids_follow_the_row_and_not_its_place(tmp_path: Path) -> None:
    rows = [{"id": "x1", "p": 1}, {"id": 7, "p": 2}, {"p": 3}, {"p": 4}]
    forward = PromptDataset(write(tmp_path / "f.jsonl", *rows), ["p"])
    backward = PromptDataset(write(tmp_path / "b.jsonl", *rows[::-1]), ["p"])
    ids = [forward.row_id(i) for i in range(len(forward))]
    assert ids[:2] == ["x1", "7"] and len(set(ids)) == 4
    assert [backward.row_id(i) for i in range(4)] == ids[::-1]
    assert forward[2] == {"p": 3}


def test_a_repeated_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:3: the id 'x' is also that of .*rows\.jsonl:1"):
        PromptDataset(write(tmp_path / "rows.jsonl", {"id": "x"}, {"id": "y"}, {"id": "x"}))


def test_conversations_of_several_files_are_tokenised_on_demand(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    one = write(tmp_path / "1.jsonl", conversation("a"), conversation("bb"))
    two = write(tmp_path / "2.jsonl", conversation("ccc"))
    data = ConversationDataset([one, two], tokenizer, max_length=100)
    assert len(data) == 3 and data.dropped == 0
    for index, answer in enumerate(["a", "bb", "ccc"]):
        item = data[index]
        assert [item] == tokenizer.render_conversation(conversation(answer)["messages"])
        assert sum(item.loss_mask) == len(answer) + 1
        assert data.lengths[index] == len(item.tokens) == len(item.loss_mask)


def test_overlong_conversations_are_an_error_or_are_dropped_and_counted(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    rows = [conversation("a"), conversation("b" * 50), conversation("c")]
    path = write(tmp_path / "data.jsonl", *rows)
    longest = len(tokenizer.render_conversation(rows[1]["messages"])[0].tokens)
    with pytest.raises(DataError, match=rf"data\.jsonl:2: the conversation has {longest} tokens, more than max_length"):
        ConversationDataset([path], tokenizer, max_length=longest - 1)
    assert len(ConversationDataset([path], tokenizer, max_length=longest)) == 3
    data = ConversationDataset([path], tokenizer, max_length=longest - 1, drop_overlong=True)
    assert len(data) == 2 and data.dropped == 1
    assert tokenizer.decode(data[1].tokens).endswith("c")
    with pytest.raises(DataError, match="all 3 conversations are longer than max_length 4"):
        ConversationDataset([path], tokenizer, max_length=4, drop_overlong=True)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "at least one message"),
        ({"messages": [{"content": "x"}]}, "message 0 has no 'role'"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "asistant", "content": "y"}]},
            "message 1: the role 'asistant' is not known; did you mean 'assistant'",
        ),
        ({"messages": [{"role": "User", "content": "x"}]}, "message 0: the role 'User' is not known"),
        ({"messages": [{"role": "user"}]}, "message 0 has no 'content'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message to train on"),
        (conversation("x", weight=0), "no assistant message to train on"),
        (conversation("x", train=False), "no assistant message to train on"),
        (conversation("x", weight=0.5), "message 1: 'weight' must be 0 or 1, not 0.5"),
        (conversation("x", train="no"), "message 1: 'train' must be true or false, not 'no'"),
        (conversation("x", train=True, weight=0), "message 1: 'train' and 'weight' contradict"),
        ({"messages": [{"role": "user", "content": "x", "train": True}]}, "message 0: 'train' is true, but only an"),
        ({**conversation("x"), "thinking": "no"}, "'thinking' must be true or false, not 'no'"),
        ({**conversation("x"), "tools": "f"}, "'tools' must be a list of functions, not text"),
        ({**conversation("x"), "tools": [{"type": "function"}]}, "tool 0 has no 'name'"),
        (
            conversation("<think>a</think>x", reasoning="b"),
            "message 1: it has reasoning and a </think>",
        ),
        (conversation([{"type": "image"}]), "message 1: its content has a part of type 'image'"),
        (conversation(7), "message 1: its content must be text, not 7"),
        (conversation("x", tool_calls=[{}]), "message 1: a tool call has no 'name'"),
        (conversation("x", tool_calls=[{"name": "f", "arguments": "{"}]), "the arguments of f are not valid JSON"),
        (
            conversation("x", tool_calls=[{"name": "f", "arguments": "[" * 99_999}]),
            "f are not valid JSON: maximum recurs",
        ),
        (conversation("x", tool_calls=[{"name": "f", "arguments": "9" * 9000}]), "f are not valid JSON: Exceeds"),
        (conversation("x", tool_calls=[{"name": "f", "arguments": [1]}]), "the arguments of f must be an object"),
        (conversation("x", tool_calls=7), "message 1: its tool_calls must be a list, not 7"),
        ({"prompt": "x"}, "no field 'messages'"),
    ],
)
def test_a_bad_conversation_is_named_with_its_line(
    tmp_path: Path, tokenizer: ChatTokenizer, row: dict, message: str
) -> None:
    path = write(tmp_path / "data.jsonl", conversation("fine"), row)
    with pytest.raises(DataError, match=rf"data\.jsonl:2: .*{message}"):
        ConversationDataset([path], tokenizer, max_length=100)


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer(checkpoint(tmp_path_factory.mktemp("nemotron")), VOCABULARY, chat_template="nemotron")


def reasoning(turns: int) -> dict:
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "reasoning_content": "r", "content": "a"}]
    return {"messages": turn * turns}


def test_a_conversation_whose_history_is_rewritten_is_several_sequences(
    tmp_path: Path, nemotron: ChatTokenizer
) -> None:
    path = write(tmp_path / "data.jsonl", reasoning(1), reasoning(3), conversation("x"))
    data = ConversationDataset([path], nemotron, max_length=1000)
    assert data.conversations == 3 and len(data) == 5
    expected = [*nemotron.render_conversation(reasoning(1)["messages"])]
    expected += [*nemotron.render_conversation(reasoning(3)["messages"])]
    assert [data[index] for index in range(4)] == expected
    assert list(data.lengths) == [len(data[index].tokens) for index in range(5)]
    cut = ConversationDataset([path], nemotron, max_length=max(data.lengths) - 1, drop_overlong=True)
    assert (len(cut), cut.dropped) == (4, 1) and cut[3] == data[4]


def test_a_row_says_its_form_and_its_tools(tmp_path: Path, nemotron: ChatTokenizer) -> None:
    tools = [{"name": "f", "parameters": {}}]
    rows = [reasoning(1), {**reasoning(1), "thinking": True}, {**conversation("x"), "tools": tools}]
    path = write(tmp_path / "data.jsonl", *rows)
    data = ConversationDataset([path], nemotron, max_length=1000, thinking=False)
    texts = [nemotron.decode(data[index].tokens, skip_special=False) for index in range(3)]
    assert texts[0].endswith("<think></think>a<|im_end|>")
    assert texts[1].endswith("<think>\nr\n</think>\na<|im_end|>")
    assert "<name>f</name>" in texts[2] and "# Tools" not in texts[0]


def test_an_answer_that_no_prompt_of_the_template_leads_to_is_named_with_its_row(
    tmp_path: Path, nemotron: ChatTokenizer
) -> None:
    path = write(tmp_path / "data.jsonl", reasoning(1), {**conversation("x"), "thinking": True})
    with pytest.raises(DataError, match=r"data\.jsonl:2: the template nemotron renders message 1 otherwise"):
        ConversationDataset([path], nemotron, max_length=1000)


def test_content_in_parts_is_their_text(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    path = write(tmp_path / "data.jsonl", conversation("ab"), conversation(parts))
    data = ConversationDataset([path], tokenizer, max_length=100)
    assert data[0] == data[1]


def test_a_role_of_a_template_of_its_own_is_left_to_it() -> None:
    assert conversation_problem({"messages": [{"role": "ipython", "content": "4"}]}) is None
