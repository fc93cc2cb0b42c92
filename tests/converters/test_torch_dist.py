"""Reading torch.distributed.checkpoint's files piece by piece, against what torch itself writes and reads."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from millrace.converters.errors import ConversionError
from millrace.converters.torch_dist import Chunk, OutputFile, StoredTensor, append_tensor, read_box, settle_file
from millrace.converters.torch_metadata import METADATA, read_metadata, stored_tensors, with_places, write_metadata


def saved_by_torch(folder: Path, **tensors: torch.Tensor) -> Path:
    checkpoint.save(tensors, storage_writer=FileSystemWriter(folder, thread_count=1), no_dist=True)
    return folder


def test_boxes_of_what_torch_saved_are_read(tmp_path):
    whole = torch.randn(6, 5, 4)
    # A column of a larger storage, and a transposed matrix: what lies in the file is not in the order of the rows.
    others = {"column": torch.randn(3, 8)[:, 2], "turned": torch.randn(4, 7).t(), "scalar": torch.tensor(2.5)}
    stored = stored_tensors(saved_by_torch(tmp_path, whole=whole, **others))
    box = torch.zeros(2, 3, 4)
    assert read_box(tmp_path, "whole", stored["whole"], (3, 1, 0), box) == 24
    assert torch.equal(box, whole[3:5, 1:4])
    for name, tensor in others.items():
        target = torch.zeros(tensor.shape)
        read_box(tmp_path, name, stored[name], (0,) * tensor.dim(), target)
        assert torch.equal(target, tensor), name


def test_a_box_is_put_together_from_several_pieces(tmp_path):
    whole = torch.arange(48, dtype=torch.bfloat16).view(6, 8)
    file = OutputFile(tmp_path / "x.distcp")
    pieces = {(r, c): append_tensor(file, whole[r : r + 3, c : c + 4].contiguous()) for r in (0, 3) for c in (0, 4)}
    file.close()
    settle_file(tmp_path / "x.distcp")
    chunks = tuple(Chunk(at, (3, 4), "x.distcp", *place) for at, place in pieces.items())
    stored = StoredTensor((6, 8), torch.bfloat16, chunks)
    box = torch.zeros(4, 5, dtype=torch.bfloat16)
    assert read_box(tmp_path, "x", stored, (1, 2), box) == 20
    assert torch.equal(box, whole[1:5, 2:7])


def test_torch_reads_what_is_appended(tmp_path):
    whole = torch.randn(6, 8)
    table = read_metadata(saved_by_torch(tmp_path / "before", x=torch.zeros(6, 8, dtype=torch.bfloat16)))
    (tmp_path / "after").mkdir()
    file = OutputFile(tmp_path / "after" / "a.distcp")
    append_tensor(file, torch.ones(3))
    place = append_tensor(file, whole)
    file.close()
    settle_file(tmp_path / "after" / "a.distcp")
    table.storage_data = {}
    done = with_places(table, {"x": torch.float32}, {("x", (0, 0)): ("a.distcp", *place)})
    write_metadata(tmp_path / "after", done)
    loaded = {"x": torch.zeros(6, 8)}
    checkpoint.load(loaded, storage_reader=FileSystemReader(tmp_path / "after"), no_dist=True)
    assert torch.equal(loaded["x"], whole)
    with pytest.raises(ConversionError, match=r"x was not written at \[0, 0\]"):
        with_places(table, {"x": torch.float32}, {})


def test_altered_bytes_are_noticed(tmp_path):
    saved_by_torch(tmp_path, weight=torch.ones(100, 7))
    (file,) = tmp_path.glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[data.index(torch.ones(8).numpy().tobytes()) + 40] ^= 1
    file.write_bytes(data)
    stored = stored_tensors(tmp_path)
    with pytest.raises(ConversionError, match=rf"weight cannot be read from {file}: its checksum"):
        read_box(tmp_path, "weight", stored["weight"], (0, 0), torch.zeros(100, 7))


def test_a_missing_and_a_truncated_file_are_found_before_reading(tmp_path):
    saved_by_torch(tmp_path, weight=torch.ones(100, 7))
    (file,) = tmp_path.glob("*.distcp")
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ConversionError, match=rf"{file}, which holds weight, is truncated: it has {len(whole) - 10}"):
        stored_tensors(tmp_path)
    file.unlink()
    with pytest.raises(ConversionError, match=rf"{file}, which holds weight, is missing"):
        stored_tensors(tmp_path)


def test_a_table_that_runs_code_is_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.mkdir, (tmp_path / "ran",))

    (tmp_path / METADATA).write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ConversionError, match="which no checkpoint needs"):
        read_metadata(tmp_path)
    assert not (tmp_path / "ran").exists()
