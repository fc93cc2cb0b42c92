"""Reading and writing Hugging Face checkpoints, and what is said about damaged ones."""

from __future__ import annotations

import json
import os
import resource

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import write_checkpoint

from millrace.converters.errors import ConversionError
from millrace.converters.safetensors_io import INDEX, HFReader, HFWriter, prepare_export, publish, write_hf


def test_slices_are_read_from_single_and_sharded_checkpoints(tmp_path):
    one = HFReader(write_checkpoint("llama", tmp_path / "one"))
    many = HFReader(write_checkpoint("llama", tmp_path / "many", shards=3))
    assert set(one.names) == set(many.names) and one.total_bytes == many.total_bytes
    name = "model.layers.3.mlp.down_proj.weight"
    assert torch.equal(many.lazy(name)[:, 32:64], one.tensor(name)[:, 32:64])
    assert many.lazy(name).shape == (64, 128) and many.lazy(name).dtype == torch.float32


def test_scalars_are_read(tmp_path):
    save_file({"scale": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    assert HFReader(tmp_path).tensor("scale") == 3


def test_a_truncated_file_is_named_with_both_sizes(tmp_path):
    write_checkpoint("qwen3", tmp_path, shards=2)
    file = tmp_path / "model-00002-of-00002.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    with pytest.raises(ConversionError, match=rf"{file.name} is truncated: it has {size - 100} bytes.*{size}"):
        HFReader(tmp_path)
    os.truncate(file, 40)
    with pytest.raises(ConversionError, match=rf"{file.name} is truncated: 40 bytes"):
        HFReader(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_checkpoint("qwen3", tmp_path, shards=2)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"model-00001-of-00002.safetensors is missing"):
        HFReader(tmp_path)


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path):
    write_checkpoint("qwen3", tmp_path, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r"places model.extra.weight in model-00001"):
        HFReader(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ConversionError, match=r"is not a valid index"):
        HFReader(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    with pytest.raises(ConversionError, match=r"holds no safetensors file"):
        HFReader(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConversionError, match=r"convert its .bin files"):
        HFReader(tmp_path)


def test_an_absent_tensor_is_named(tmp_path):
    reader = HFReader(write_checkpoint("qwen3", tmp_path))
    with pytest.raises(ConversionError, match=r"holds no tensor lm_tail"):
        reader.tensor("lm_tail")


def test_a_checkpoint_is_written_in_shards_with_all_its_companions(tmp_path):
    source = write_checkpoint("qwen3", tmp_path / "source", dtype="bfloat16")
    reader = HFReader(source)
    pairs = [(name, reader.tensor(name)) for name in reader.names]
    out = write_hf(tmp_path / "out", pairs, source=source, max_shard_bytes=100_000)
    again = HFReader(out)
    assert all(torch.equal(again.tensor(name), tensor) for name, tensor in pairs)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 1
    assert max((out / file).stat().st_size for file in files) < 110_000
    assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] == reader.total_bytes
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1
    assert not list(tmp_path.glob("*.writing"))


def test_ranks_write_their_own_tensors(tmp_path):
    source = write_checkpoint("llama", tmp_path / "source")
    prepare_export(tmp_path / "out")
    manifests = []
    for rank in range(2):
        writer = HFWriter(tmp_path / "out", rank=rank)
        writer.add(f"tensor.{rank}", torch.full((3,), float(rank)))
        manifests.append(writer.close())
    assert not (tmp_path / "out").exists()
    publish(tmp_path / "out", manifests, source=source, dtype="float32", texts={"chat_template.jinja": "{{ ü }}"})
    assert HFReader(tmp_path / "out").tensor("tensor.1").tolist() == [1, 1, 1]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == "{{ ü }}"


def test_a_tensor_that_two_ranks_wrote_is_refused(tmp_path):
    prepare_export(tmp_path / "out")
    manifests = []
    for rank in range(2):
        writer = HFWriter(tmp_path / "out", rank=rank)
        writer.add("tensor", torch.zeros(1))
        manifests.append(writer.close())
    with pytest.raises(ConversionError, match=r"tensor was written twice"):
        publish(tmp_path / "out", manifests, source=tmp_path)


def test_an_existing_folder_is_only_replaced_on_demand_and_as_a_whole(tmp_path):
    source = write_checkpoint("llama", tmp_path / "source")
    write_hf(tmp_path / "out", [("a", torch.zeros(2))], source=source)
    with pytest.raises(ConversionError, match=r"exists already"):
        write_hf(tmp_path / "out", [("b", torch.zeros(2))], source=source)
    assert HFReader(tmp_path / "out").names == ["a"]
    write_hf(tmp_path / "out", [("b", torch.zeros(2))], source=source, overwrite=True)
    assert HFReader(tmp_path / "out").names == ["b"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source"]


def test_views_of_one_storage_are_written_apart(tmp_path):
    source = write_checkpoint("llama", tmp_path / "source")
    whole = torch.arange(12.0).reshape(6, 2)
    write_hf(tmp_path / "out", [("first", whole[:3]), ("second", whole[3:5])], source=source)
    assert torch.equal(HFReader(tmp_path / "out").tensor("second"), whole[3:5])


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    prepare_export(tmp_path / "out")
    writer = HFWriter(tmp_path / "out")
    writer.add("a", torch.zeros(100_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # files may not grow, as on a full disk
    try:
        with pytest.raises(ConversionError, match=r"rank-00000-00000.safetensors cannot be written"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
