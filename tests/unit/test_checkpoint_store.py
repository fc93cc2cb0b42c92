"""The checkpoint folder: publishing, pointer, retention, manifests, and what a killed run leaves behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from millrace.checkpoint_store import (
    FACTS,
    CheckpointError,
    CheckpointStore,
    file_problem,
    file_record,
    read_json,
    read_manifest,
    readable_bytes,
    write_json,
    write_manifest,
)


def put_together(store: CheckpointStore, name: str, *, keep_always: bool = False) -> Path:
    aside = store.open_aside(name)
    (aside / "weights").write_bytes(name.encode() * 100)
    write_json(aside / FACTS, {"sequence": store.next_sequence(), "keep_always": keep_always})
    write_manifest(aside, {file.name: file_record(file) for file in aside.iterdir()})
    return aside


def publish(store: CheckpointStore, name: str, *, keep_always: bool = False) -> Path:
    return store.publish(put_together(store, name, keep_always=keep_always), name)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_nothing_is_there_before_the_first_save(store):
    assert store.latest() is None and store.published() == [] and store.clean_up() == []


def test_latest_is_what_was_published_last(store):
    publish(store, "step-00000009")
    newest = publish(store, "step-00000003")  # a run that was taken back to an earlier checkpoint
    assert store.latest() == newest
    assert (store.directory / "latest").read_text() == "step-00000003\n"


def test_latest_follows_the_pointer_a_user_wrote(store):
    older = publish(store, "step-00000001")
    publish(store, "step-00000002")
    (store.directory / "latest").write_text("step-00000001")
    assert store.latest() == older


@pytest.mark.parametrize("content", ["", "step-99", "."])
def test_a_pointer_to_nothing_falls_to_the_newest(store, content):
    newest = publish(store, "step-00000001")
    (store.directory / "latest").write_text(content)
    assert store.latest() == newest


def test_only_the_newest_stay_besides_those_kept_for_good(store):
    publish(store, "stage-0-sft", keep_always=True)
    for step in range(1, 5):
        publish(store, f"step-{step:08d}")
    assert store.retire() == ["step-00000001", "step-00000002"]
    assert [p.name for p in store.published()] == ["stage-0-sft", "step-00000003", "step-00000004"]


def test_the_checkpoint_a_run_resumes_from_is_never_retired(store):
    for step in range(1, 5):
        publish(store, f"step-{step:08d}")
    (store.directory / "latest").write_text("step-00000001")
    store.retire()
    assert "step-00000001" in [p.name for p in store.published()]


def test_a_checkpoint_with_damaged_facts_is_not_deleted_and_blocks_nothing(store):
    damaged = publish(store, "step-00000001")
    (damaged / FACTS).write_text("{")
    for step in range(2, 6):
        publish(store, f"step-{step:08d}")
    store.retire()
    assert damaged in store.published()
    assert store.latest().name == "step-00000005"


def test_an_unfinished_folder_is_not_seen_and_is_removed_at_the_next_start(store):
    published = publish(store, "step-00000001")
    unfinished = put_together(store, "step-00000002")
    assert store.latest() == published
    assert store.clean_up() == [unfinished.name]
    assert not unfinished.exists() and published.exists()


def test_a_checkpoint_of_the_same_name_is_replaced(store):
    publish(store, "step-00000001")
    aside = put_together(store, "step-00000001")
    (aside / "weights").write_bytes(b"new")
    final = store.publish(aside, "step-00000001")
    assert (final / "weights").read_bytes() == b"new"
    assert sorted(os.listdir(store.directory)) == ["latest", "step-00000001"]


def test_a_kill_between_the_two_renames_of_a_replacement_brings_the_old_one_back(store):
    final = publish(store, "step-00000001")
    final.rename(store.directory / ".step-00000001.replaced")
    put_together(store, "step-00000001")
    store.clean_up()
    assert store.latest() == final
    assert sorted(os.listdir(store.directory)) == ["latest", "step-00000001"]


def test_each_kind_of_damage_is_named(store):
    folder = publish(store, "step-00000001")
    weights, record = folder / "weights", read_manifest(folder)["weights"]
    assert file_problem(folder, "weights", record) is None
    content = weights.read_bytes()
    weights.write_bytes(b"X" + content[1:])
    assert "altered" in file_problem(folder, "weights", record) and str(weights) in file_problem(
        folder, "weights", record
    )
    weights.write_bytes(content[:-1])
    assert f"{len(content) - 1} bytes instead of {len(content)}" in file_problem(folder, "weights", record)
    weights.unlink()
    assert "missing" in file_problem(folder, "weights", record)


def test_too_little_space_is_said_with_both_numbers(store):
    store.directory.mkdir()
    store.require_space(1)
    with pytest.raises(CheckpointError, match=r"needs about 1000\.0 TB .*only .*are free"):
        store.require_space(10**15)


@pytest.mark.parametrize("name", [".hidden", "a/b", "latest"])
def test_names_that_would_break_the_folder_are_refused(store, name):
    with pytest.raises(CheckpointError, match="cannot be named"):
        store.open_aside(name)


def test_keeping_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"checkpoint\.keep is 0"):
        CheckpointStore(tmp_path, keep=0)


@pytest.mark.parametrize(
    ("content", "says"), [(None, "no complete checkpoint"), ("[]", "no JSON object"), ("{", "damaged")]
)
def test_a_bad_json_file_is_named(tmp_path, content, says):
    if content is not None:
        (tmp_path / FACTS).write_text(content)
    with pytest.raises(CheckpointError, match=says):
        read_json(tmp_path / FACTS)


def test_sizes_read_well():
    assert [readable_bytes(n) for n in (12, 3_400, 5e9, 2e12)] == ["12 B", "3.4 kB", "5.0 GB", "2.0 TB"]
