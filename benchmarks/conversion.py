"""Conversion against cp, both ways: `python -m benchmarks.conversion --folder DIR`.

A checkpoint with the real layer shapes of a 30B-A3B mixture of experts, as many layers as fill the bytes that are asked
for, is written, copied by cp, converted to Megatron-Core's format, and back, each several times in turn. Every
run starts with its source out of the page cache and counts until its result is on the disk: the conversion flushes its
files itself, cp's copy is flushed behind it. The way back is compared with the original byte by byte, and of every
process the peak resident memory is stated, as the system counts it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.released_models import NEMOTRON_3_NANO, QWEN3_30B_A3B, with_layers
from millrace.config.model_shape import ModelShape
from millrace.converters.mapping import FAMILIES, mapping_for
from millrace.converters.safetensors_io import HFReader, header_of
from millrace.converters.torch_dist import memory_of

MODELS = {config["model_type"]: config for config in (NEMOTRON_3_NANO, QWEN3_30B_A3B)}
SHARD_BYTES = 2 << 30
SAMPLE_SECONDS = 0.02


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="conversion-") as name:
        folder = Path(name)
        size = _write_model(folder / "hf", options.family, int(options.gb * 1e9))
        _measure(folder, size, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    known = [family for family in MODELS if family in FAMILIES]
    parser.add_argument("--family", choices=known, default=known[0])
    parser.add_argument(
        "--folder", type=Path, required=True, help="on the disk to measure; 3.2 times --gb must be free"
    )
    parser.add_argument("--gb", type=float, default=8.0, help="bytes of the checkpoint at least, in 10^9")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, help="of the conversion [default: one for each core, at most 8]")
    options = parser.parse_args()
    free = shutil.disk_usage(options.folder).free
    if free < 3.2e9 * (options.gb + 3):
        parser.error(f"{options.folder} has {free / 1e9:.0f} GB free; lower --gb or name another folder")
    return options


# The model


def _write_model(folder: Path, family: str, size: int) -> int:
    """A checkpoint of at least `size` bytes, or of all the layers of the model; its bytes."""
    folder.mkdir()
    layers, most = 1, MODELS[family]["num_hidden_layers"]
    while True:
        (folder / "config.json").write_text(json.dumps(with_layers(MODELS[family], layers)))
        tensors = {
            name: (entry.dtype or torch.bfloat16, shape)
            for entry in mapping_for(ModelShape.from_hf(folder))
            for name, shape in entry.hf.items()
        }
        total = sum(_size(*facts) for facts in tensors.values())
        if total >= size or layers == most:
            break
        layers += 1
    _write_tensors(folder, tensors)
    _tell(f"{family}, {layers} layers of {most}, {len(tensors)} tensors, {total / 1e9:.2f} GB of random bytes")
    return total


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _write_tensors(folder: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    groups: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    held = 0
    for name, facts in sorted(tensors.items(), key=lambda pair: -pair[1][0].itemsize):
        if held + _size(*facts) > SHARD_BYTES and groups[-1]:
            groups.append({})
            held = 0
        groups[-1][name] = facts
        held += _size(*facts)
    index, generator = {}, torch.Generator().manual_seed(1)
    noise = memory_of(kept := torch.randint(0, 256, (64 << 20,), dtype=torch.uint8, generator=generator))
    for number, group in enumerate(groups, start=1):
        file = folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        index.update(dict.fromkeys(group, file.name))
        with file.open("wb") as stream:
            stream.write(header_of(group))
            for tensor, facts in enumerate(group.values()):
                _write_noise(stream, noise, _size(*facts), at=(number * 7919 + tensor) * 104729)
    del kept
    total = sum(_size(*facts) for facts in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def _write_noise(stream: Any, noise: memoryview, size: int, at: int) -> None:
    while size:
        start = at % len(noise)
        piece = noise[start : start + size]
        stream.write(piece)
        size -= len(piece)
        at += len(piece)


# The race


def _measure(folder: Path, size: int, options: argparse.Namespace) -> None:
    hf, copy, megatron, back = (folder / name for name in ("hf", "copy", "megatron", "back"))
    convert = [sys.executable, "-m", "millrace.cli", "convert"]
    more = ["--processes", str(options.processes)] if options.processes else []
    there = [*convert, "hf-to-megatron", "--hf", str(hf), "--out", str(megatron), *more]
    again = [*convert, "megatron-to-hf", "--checkpoint", str(megatron), "--out", str(back), *more]
    seconds: dict[str, list[float]] = {"cp": [], "hf-to-megatron": [], "megatron-to-hf": []}
    peaks: dict[str, list[int]] = {"hf-to-megatron": [], "megatron-to-hf": []}
    for _ in range(options.rounds):
        seconds["cp"].append(_timed(hf, copy, lambda: _run(["cp", "-r", str(hf), str(copy)])))
        shutil.rmtree(copy)
        seconds["hf-to-megatron"].append(_timed(hf, megatron, lambda: _watched(there, peaks["hf-to-megatron"])))
        seconds["megatron-to-hf"].append(_timed(megatron, back, lambda: _watched(again, peaks["megatron-to-hf"])))
        _compare(hf, back)
        shutil.rmtree(megatron)
        shutil.rmtree(back)
    largest = max(HFReader(hf).lazy(name).nbytes for name in HFReader(hf).names)
    base = median(seconds["cp"])
    for what, took in seconds.items():
        spread = ", ".join(f"{second:.1f}" for second in took)
        _tell(f"{what:15} {median(took):7.1f} s  {size / median(took) / 1e9:5.2f} GB/s  ({spread})", end="")
        _tell("" if what == "cp" else f"  {median(took) / base:.2f} x cp")
    for what, sizes in peaks.items():
        listed = ", ".join(f"{peak / 1e9:.2f}" for peak in sorted(sizes, reverse=True))
        _tell(f"{what:15} peak memory of each process of each round, GB: {listed}")
    _tell(f"largest tensor {largest / 1e9:.2f} GB; each way back was the same as the original, byte by byte")


def _timed(source: Path, result: Path, work: Callable[[], None]) -> float:
    """Seconds from a source that is out of the page cache to a result that is on the disk."""
    _flush(source, evict=True)
    started = time.perf_counter()
    work()
    _flush(result)
    return time.perf_counter() - started


def _flush(folder: Path, *, evict: bool = False) -> None:
    for file in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        if evict:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def _watched(command: list[str], peaks: list[int]) -> None:
    """Run a command; add the peak resident memory in bytes of it and of each process under it."""
    process = subprocess.Popen(command)
    found: dict[int, int] = {}
    watch = threading.Thread(target=_watch, args=(process, found))
    watch.start()
    code = process.wait()
    watch.join()
    peaks.extend(found.values())
    if code:
        raise SystemExit(f"{' '.join(command)} ended with exit code {code}")


def _watch(process: subprocess.Popen[bytes], found: dict[int, int]) -> None:
    while process.poll() is None:
        for pid in (process.pid, *_descendants(process.pid)):
            found[pid] = max(found.get(pid, 0), _peak(pid))
        time.sleep(SAMPLE_SECONDS)


def _descendants(pid: int) -> Iterable[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from _descendants(child)


def _peak(pid: int) -> int:
    """The system's own high-water mark: pages of mapped files count."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def _compare(one: Path, other: Path) -> None:
    a, b = HFReader(one), HFReader(other)
    if set(a.names) != set(b.names):
        raise SystemExit(f"{one} and {other} hold different tensors")
    for name in a.names:
        first, second = a.lazy(name).read(), b.lazy(name).read()
        if first.dtype != second.dtype or not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
            raise SystemExit(f"{name} did not come back as it was")


def _tell(text: str, end: str = "\n") -> None:
    sys.stdout.write(text + end)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
