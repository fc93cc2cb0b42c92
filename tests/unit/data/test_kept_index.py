"""Conversations that are opened from what an earlier opening found out."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from chat_checkpoints import checkpoint
from tiny_checkpoints import VOCABULARY

from millrace.data import rendering
from millrace.data.datasets import ConversationDataset
from millrace.data.errors import DataError
from millrace.data.tokenizer import ChatTokenizer

TURN = [{"role": "user", "content": "q"}, {"role": "assistant", "reasoning_content": "r", "content": "a"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("nemotron"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> ChatTokenizer:
    return ChatTokenizer(model, VOCABULARY, chat_template="nemotron")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two, with blank lines, and with conversations of one sequence and of several."""
    one, two, three = (json.dumps({"messages": TURN * turns}).encode() for turns in (1, 2, 3))
    (tmp_path / "1.jsonl").write_bytes(one + b"\n\n \n" + three + b"\r\n" + one + b"\n")
    (tmp_path / "2.jsonl").write_bytes(b"\n" + two + b"\n" + three)
    return [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return tmp_path / "data-index" / "warm"


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the rows stand that are rendered."""
    rows: list[str] = []
    render = rendering.training_sequences

    def noted(file, number, *rest):
        rows.append(file.where(number))
        return render(file, number, *rest)

    monkeypatch.setattr(rendering, "training_sequences", noted)
    return rows


def everything(data: ConversationDataset) -> dict:
    """All that a data set holds, and its items."""
    fields = {name: value for name, value in vars(data).items() if name not in ("_files", "_tokenizer")}
    return {**fields, "files": [vars(file) for file in data._files], "items": [data[n] for n in range(len(data))]}


def opened(files: list[Path], tokenizer: ChatTokenizer, index: Path | None = None, **options) -> dict:
    return everything(ConversationDataset(files, tokenizer, **{"max_length": 1000, **options}, index=index))


def test_a_reopened_data_set_is_the_same_and_renders_nothing(files, tokenizer, index, rendered) -> None:
    plain, first = opened(files, tokenizer), opened(files, tokenizer, index)
    assert [path.name for path in index.parent.iterdir()] == ["warm"]
    rendered.clear()
    told: list[tuple[int, int]] = []
    data = ConversationDataset(files, tokenizer, max_length=1000, index=index, on_row=lambda *count: told.append(count))
    assert rendered == [] and told == [(row + 1, 5) for row in range(5)]
    assert plain == first == everything(data) and len(data) == 10
    assert [data._where(row) for row in range(5)] == [
        f"{files[number]}:{line}" for number, line in ((0, 1), (0, 4), (0, 5), (1, 2), (1, 3))
    ]


def test_the_longest_length_is_asked_of_what_is_kept(files, tokenizer, index, rendered) -> None:
    longest = max(opened(files, tokenizer, index)["lengths"])
    cut = {"max_length": longest - 1, "drop_overlong": True}
    plain = opened(files, tokenizer, **cut)
    assert plain["dropped"] == 2
    with pytest.raises(DataError) as without:
        opened(files, tokenizer, max_length=longest - 1)
    rendered.clear()
    with pytest.raises(DataError, match=r"1\.jsonl:4: the conversation has") as known:
        ConversationDataset(files, tokenizer, max_length=longest - 1, index=index)
    assert str(known.value) == str(without.value)
    with pytest.raises(DataError, match="all 5 conversations are longer than max_length 1"):
        ConversationDataset(files, tokenizer, max_length=1, drop_overlong=True, index=index)
    assert rendered == []
    assert opened(files, tokenizer, index, **cut) == plain


def test_what_is_too_long_altogether_is_known_when_it_is_opened_again(files, tokenizer, index, rendered) -> None:
    with pytest.raises(DataError, match="all 5 conversations are longer"):
        ConversationDataset(files, tokenizer, max_length=1, drop_overlong=True, index=index)
    rendered.clear()
    assert len(ConversationDataset(files, tokenizer, max_length=1000, index=index)) == 10 and rendered == []


def test_bad_rows_leave_no_index(files, tokenizer, index) -> None:
    with files[1].open("ab") as file:
        file.write(b'\n{"messages": [{"role": "user", "content": "q"}]}\n')
    for _ in range(2):
        with pytest.raises(DataError, match=r"2\.jsonl:4: the conversation has no assistant message to train on"):
            ConversationDataset(files, tokenizer, max_length=1000, index=index)
    assert not index.exists()


def _touch(files: list[Path], model: Path) -> dict:
    os.utime(files[1], ns=(1, 1))
    return {}


def _swap(files: list[Path], model: Path) -> dict:
    files.reverse()
    return {}


def _another_tokenizer(files: list[Path], model: Path) -> dict:
    copy = files[0].parent / "copy"
    shutil.copytree(model, copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 77}))
    return {"tokenizer": ChatTokenizer(copy, VOCABULARY, chat_template="nemotron")}


def _another_template(files: list[Path], model: Path) -> dict:
    template = files[0].parent / "template.jinja"
    template.write_text(ChatTokenizer(model, VOCABULARY, chat_template="nemotron").chat_template + "{# #}")
    return {"tokenizer": ChatTokenizer(model, VOCABULARY, chat_template=str(template))}


def _another_library(files: list[Path], model: Path) -> dict:
    return {"version": lambda name: "0.0.1"}


@pytest.mark.parametrize(
    "change",
    [
        _touch,
        _swap,
        _another_tokenizer,
        _another_template,
        _another_library,
        lambda files, model: {"thinking": False},
        lambda files, model: {"FORMAT": 0},
    ],
)
def test_an_index_of_anything_else_is_made_anew(
    files, model, tokenizer, index, rendered, monkeypatch: pytest.MonkeyPatch, change
) -> None:
    opened(files, tokenizer, index)
    changed = change(files, model)
    for name in ("FORMAT", "version"):
        if name in changed:
            monkeypatch.setattr(f"millrace.data.kept_index.{name}", changed.pop(name))
    tokenizer = changed.pop("tokenizer", tokenizer)
    plain = opened(files, tokenizer, **changed)
    rendered.clear()
    data = ConversationDataset(files, tokenizer, max_length=1000, index=index, **changed)
    assert len(rendered) == 5 and everything(data) == plain
    rendered.clear()
    ConversationDataset(files, tokenizer, max_length=1000, index=index, **changed)
    assert rendered == [], "the index of before was replaced"


def test_a_changed_row_of_the_same_size_is_read(files, tokenizer, index) -> None:
    opened(files, tokenizer, index)
    files[0].write_bytes(files[0].read_bytes().replace(b'"q"', b'"\xc3"').replace(b'"\xc3"', b'"k"'))
    os.utime(files[0], ns=(1, 1))
    assert opened(files, tokenizer, index) == opened(files, tokenizer)


def test_a_file_that_is_gone_or_replaced_by_a_folder_is_named_as_without_an_index(files, tokenizer, index) -> None:
    opened(files, tokenizer, index)
    files[1].unlink()
    with pytest.raises(DataError, match=r"2\.jsonl: the data file cannot be read: No such file"):
        opened(files, tokenizer, index)
    files[1].mkdir()
    with pytest.raises(DataError, match=r"2\.jsonl: the data file cannot be read: Is a directory"):
        opened(files, tokenizer, index)


def test_a_torn_or_foreign_index_is_made_anew(files, tokenizer, index, rendered) -> None:
    plain = opened(files, tokenizer, index)
    whole = index.read_bytes()
    bytes_changed = [
        whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(0, len(whole), 37)
    ]
    torn = [whole[:size] for size in range(0, len(whole), 97)]
    zeroed = whole[:-40] + bytes(40)
    foreign = [b"[]\n[]\n", b"\n\n", b"a\n{}\n", b"\xff" * 99, b"a\n" + b"[" * 5, whole + b"\0", zeroed]
    for content in (*bytes_changed, *torn, *foreign):
        index.write_bytes(content)
        rendered.clear()
        data = ConversationDataset(files, tokenizer, max_length=1000, index=index)
        assert len(rendered) == 5 and index.read_bytes() == whole
    assert everything(data) == plain


def test_an_index_that_cannot_be_written_is_told_and_no_error(
    files, tokenizer, index, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    index.parent.write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING, "millrace.data"):
        assert opened(files, tokenizer, index) == opened(files, tokenizer)
    assert [record.getMessage() for record in caplog.records] == [
        f"{index}: what was read of the conversations cannot be kept (File exists), so the next start renders them all "
        "again"
    ]


def test_a_full_disk_leaves_no_half_of_an_index(files, tokenizer, index, caplog: pytest.LogCaptureFixture) -> None:
    index.parent.mkdir()
    index.with_name("warm.tmp").symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING, "millrace.data"):
        opened(files, tokenizer, index)
    assert "No space left on device" in caplog.text and list(index.parent.iterdir()) == []
