"""`millrace convert` as users run it: killed, interrupted and run again; bad input; a disk that is full."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import hf_shapes, write_checkpoint

from millrace.checkpoint_store import file_record, read_manifest, write_manifest
from millrace.conversion import Options, hf_to_megatron, megatron_to_hf
from millrace.converters.errors import ConversionError
from millrace.converters.safetensors_io import INDEX, HFReader

SHARD_GIB = 0.002
STEP = "step-00000000"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "millrace.cli", "convert", *map(str, arguments)]


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background of a shell, Ctrl-C would be ignored from the start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def files(folder: Path, pattern: str) -> dict[str, int]:
    """Finished files, and their inodes: one that is written anew has another."""
    return {file.name: file.stat().st_ino for file in folder.rglob(pattern)} if folder.exists() else {}


def finished_shards(folder: Path) -> dict[str, int]:
    """A `.distcp` file counts when its record is written."""
    recorded = {f"__0_{record.stem}.distcp" for record in folder.rglob("records/*.json")}
    return {name: inode for name, inode in files(folder, "*.distcp").items() if name in recorded}


def finished_hf_files(folder: Path) -> dict[str, int]:
    return files(folder, "*.safetensors")


def stop_in_the_middle(
    process: subprocess.Popen, finished: Callable[[Path], dict[str, int]], folder: Path, sign: int
) -> dict[str, int]:
    """Send a signal when two files are finished; what was finished when the process had ended."""
    deadline = time.monotonic() + 120
    while len(finished(folder)) < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no file was finished"
        time.sleep(0.001)
    if sign == signal.SIGINT:
        os.killpg(process.pid, sign)  # as a terminal does
    else:
        os.kill(process.pid, sign)
    process.wait(timeout=60)
    time.sleep(1.0)  # in which processes without a parent would go on writing
    return finished(folder)


def run(arguments: list[str]) -> str:
    done = subprocess.run(arguments, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 60 MB, which is long enough to be hit in the middle."""
    folder = tmp_path_factory.mktemp("models") / "base"
    return write_checkpoint("qwen3", folder, hidden_size=512, intermediate_size=2048, vocab_size=4096, shards=3)


@pytest.fixture(scope="module")
def straight(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same conversions, not interrupted: `megatron` and `hf`."""
    folder = tmp_path_factory.mktemp("straight")
    run(command("hf-to-megatron", "--hf", model, "--out", folder / "megatron", "--shard-gib", SHARD_GIB))
    run(
        command("megatron-to-hf", "--checkpoint", folder / "megatron", "--out", folder / "hf", "--shard-gib", SHARD_GIB)
    )
    return folder


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_conversion_to_megatron_goes_on_and_ends_the_same(model, straight, tmp_path, sign):
    arguments = command("hf-to-megatron", "--hf", model, "--out", tmp_path, "--shard-gib", SHARD_GIB)
    whole = read_manifest(straight / "megatron" / STEP)
    expected = {name: record for name, record in whole.items() if name.endswith(".distcp")}
    process = start([*arguments, "--processes", "1"])
    before = stop_in_the_middle(process, finished_shards, tmp_path, sign)
    assert 2 <= len(before) < len(expected) and not (tmp_path / STEP).exists()
    if sign == signal.SIGINT:
        assert process.stderr.read().endswith("stopped; the same command goes on where it stopped\n")
    assert f"{len(before)} of {len(expected)} files are finished already" in run(arguments)
    after = files(tmp_path / STEP, "*.distcp")
    assert {name: after[name] for name in before} == before
    again = read_manifest(tmp_path / STEP)
    assert again.keys() == whole.keys() and {name: again[name] for name in expected} == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", STEP]


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_conversion_to_hugging_face_goes_on_and_ends_the_same(model, straight, tmp_path, sign):
    out = tmp_path / "out"
    arguments = command("megatron-to-hf", "--checkpoint", straight / "megatron", "--out", out, "--shard-gib", SHARD_GIB)
    before = stop_in_the_middle(start([*arguments, "--processes", "1"]), finished_hf_files, tmp_path, sign)
    expected = {file.name: file.read_bytes() for file in (straight / "hf").iterdir()}
    assert 2 <= len(before) < len(expected) and not out.exists()
    assert f"{len(before)} of" in run(arguments)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == expected
    after = files(out, "*.safetensors")
    assert {name: after[name] for name in before} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again, source = HFReader(out), HFReader(model)
    assert all(torch.equal(again.tensor(name), source.tensor(name)) for name in source.names)


def test_another_source_is_not_mixed_with_what_a_kill_left(model, tmp_path):
    arguments = command("hf-to-megatron", "--hf", model, "--out", tmp_path / "out", "--shard-gib", SHARD_GIB)
    stop_in_the_middle(start([*arguments, "--processes", "1"]), finished_shards, tmp_path, signal.SIGKILL)
    os.utime(model / "model-00002-of-00003.safetensors")
    assert "finished already" not in run(arguments)
    megatron_to_hf(tmp_path / "out", tmp_path / "back", Options(processes=1))
    source, back = HFReader(model), HFReader(tmp_path / "back")
    assert all(torch.equal(back.tensor(name), source.tensor(name)) for name in source.names)


def test_a_disk_that_fills_up_is_said_with_the_file(model, tmp_path):
    limit = 3 << 20
    done = subprocess.run(
        command("hf-to-megatron", "--hf", model, "--out", tmp_path, "--processes", "1"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert done.stderr.startswith("no space left on the disk for ") and "__0_1.distcp" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / STEP).exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_disk_without_room_is_refused_at_once(tmp_path):
    """A file of many zero bytes takes no room, so that a checkpoint of tebibytes can stand on any disk."""
    model = write_checkpoint("llama", tmp_path / "model", num_hidden_layers=1)
    enormous = dict(vocab_size=1 << 22, hidden_size=1 << 17)
    config = json.loads((model / "config.json").read_text()) | enormous
    (model / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in hf_shapes(config).items():
        start_at, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start_at, end]}
    text = json.dumps(header).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    with pytest.raises(ConversionError, match=r"needs about 4\d{3}\.\d\d GB more, but only .* GB are free"):
        hf_to_megatron(model, tmp_path / "out", Options(processes=1))
    assert not (tmp_path / "out" / STEP).exists()


NAME = "model.layers.2.mlp.down_proj.weight"
ONES = torch.ones(64, 128)


def change(model: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of a checkpoint in one file, add them, or take them away."""
    kept = {**load_file(model / "model.safetensors"), **tensors}
    save_file({name: t for name, t in kept.items() if t is not None}, model / "model.safetensors")


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({NAME: None}, rf"the checkpoint lacks {NAME}, which config.json asks for"),
        ({"model.layers.9.extra": torch.ones(2)}, r"holds model.layers.9.extra, for which the model has no parameter"),
        ({NAME: torch.ones(64, 64)}, rf"{NAME} in .*safetensors has shape \[64, 64\], but .* asks for \[64, 128\]"),
        ({NAME: ONES.to(torch.int8)}, rf"{NAME} in .* is int8, where weights must be float32, bfloat16"),
        ({NAME: ONES.to(torch.float8_e4m3fn)}, rf"{NAME} in .* is float8_e4m3fn, .* before it was quantized"),
        (
            {NAME: ONES.bfloat16()},
            rf"{NAME} in .* is bfloat16, but model.layers.0.* is float32: are these files of one",
        ),
    ],
    ids=["missing", "extra", "shape", "int8", "fp8", "mixed"],
)
def test_a_tensor_that_is_not_as_it_should_be_is_named(tmp_path, tensors, says):
    model = write_checkpoint("llama", tmp_path / "model")
    change(model, **tensors)
    with pytest.raises(ConversionError, match=says):
        hf_to_megatron(model, tmp_path / "out", Options(processes=1))
    assert not (tmp_path / "out").exists()


def test_an_unknown_family_is_refused(tmp_path):
    model = write_checkpoint("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["RwkvForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        command("hf-to-megatron", "--hf", model, "--out", tmp_path / "out"), stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 2 and "RwkvForCausalLM is not supported" in done.stderr


def test_shards_of_two_checkpoints_are_refused(tmp_path):
    one = write_checkpoint("llama", tmp_path / "one", shards=2)
    other = write_checkpoint("llama", tmp_path / "other", shards=3)
    shard = "model-00001-of-00002.safetensors"
    (one / shard).write_bytes((other / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(ConversionError, match=rf"model.layers.* is both in .*{shard} and in .*00002-of-00002"):
        hf_to_megatron(one, tmp_path / "out", Options(processes=1))
    index = json.loads((other / INDEX).read_text())
    named = "model.layers.1.mlp.gate_proj.weight"
    del index["weight_map"][named]
    (other / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=rf"holds {named}, which .*{INDEX} does not name"):
        hf_to_megatron(other, tmp_path / "out", Options(processes=1))


def test_each_tensor_keeps_its_data_type_or_takes_the_one_that_is_named(tmp_path):
    """Norms in float32 beside matrices in bfloat16."""
    model = write_checkpoint("llama", tmp_path / "model", dtype="bfloat16", num_hidden_layers=2)
    change(model, **{n: t.float() for n, t in load_file(model / "model.safetensors").items() if t.dim() == 1})
    hf_to_megatron(model, tmp_path / "kept", Options(processes=1))
    megatron_to_hf(tmp_path / "kept", tmp_path / "back", Options(processes=1))
    source, back = HFReader(model), HFReader(tmp_path / "back")
    assert {back.lazy(n).dtype for n in back.names} == {torch.bfloat16, torch.float32}
    assert all(back.lazy(n).dtype == source.lazy(n).dtype for n in source.names)
    assert all(torch.equal(back.tensor(n), source.tensor(n)) for n in source.names)
    megatron_to_hf(tmp_path / "kept", tmp_path / "float32", Options(processes=1, dtype="float32"))
    wide = HFReader(tmp_path / "float32")
    assert {wide.lazy(n).dtype for n in wide.names} == {torch.float32}
    assert all(torch.equal(wide.tensor(n), source.tensor(n).float()) for n in source.names)
    assert json.loads((tmp_path / "float32" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.fixture
def megatron(tmp_path: Path) -> Path:
    """A tiny Megatron checkpoint."""
    model = write_checkpoint("llama", tmp_path / "model", num_hidden_layers=2)
    return hf_to_megatron(model, tmp_path / "megatron", Options(processes=1))


def test_a_megatron_checkpoint_that_is_not_whole_is_refused(megatron, tmp_path):
    shard = megatron / "shards" / "__0_1.distcp"
    whole, table = shard.read_bytes(), (megatron / "shards" / ".metadata").read_bytes()
    with pytest.raises(ConversionError, match="holds none"):
        megatron_to_hf(tmp_path / "model", tmp_path / "out", Options(processes=1))
    shard.write_bytes(whole[:-5000])
    with pytest.raises(ConversionError, match=rf"{shard} has {len(whole) - 5000} bytes instead of {len(whole)}"):
        megatron_to_hf(megatron, tmp_path / "out", Options(processes=1))
    altered = bytearray(whole)
    altered[len(altered) // 2] ^= 1
    shard.write_bytes(altered)
    with pytest.raises(ConversionError, match=rf"decoder\..* cannot be read from {shard}: its checksum"):
        megatron_to_hf(megatron, tmp_path / "out", Options(processes=1))
    shard.write_bytes(whole)
    for change_table, says in (
        (lambda tensors: tensors.pop("decoder.final_layernorm.weight"), "lacks decoder.final_layernorm.weight, which"),
        (lambda tensors: tensors.update(odd=tensors["output_layer.weight"]), "odd"),
    ):
        read = pickle.loads(table)
        change_table(read.state_dict_metadata)
        (megatron / "shards" / ".metadata").write_bytes(pickle.dumps(read))
        records = read_manifest(megatron)
        write_manifest(megatron, records | {"shards/.metadata": file_record(megatron / "shards" / ".metadata")})
        with pytest.raises(ConversionError, match=says):
            megatron_to_hf(megatron, tmp_path / "out", Options(processes=1))
    assert not (tmp_path / "out").exists()


def test_nothing_is_replaced_unasked(megatron, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConversionError, match=r"out exists already; remove it, .* or give --overwrite"):
        megatron_to_hf(megatron, tmp_path / "out", Options(processes=1))
    with pytest.raises(ConversionError, match=f"{STEP} exists already"):
        hf_to_megatron(tmp_path / "model", tmp_path / "megatron", Options(processes=1))
    megatron_to_hf(megatron, tmp_path / "out", Options(processes=1, overwrite=True))
    hf_to_megatron(tmp_path / "model", tmp_path / "megatron", Options(processes=1, overwrite=True))
    assert HFReader(tmp_path / "out").names and (megatron / "manifest.json").is_file()
