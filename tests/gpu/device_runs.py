"""Runs `measure.py` on a device and keeps what it found, so that tests share it."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
        ],
    ),
]
"""Every test runs on both: on the CPU with a few small models, so that none of its lines meets a GPU unproven."""

Found = dict[str, Any]
MEASURE = Path(__file__).with_name("measure.py")


def alone() -> dict[str, str]:
    """The environment of the one rank of a run."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    exact = {"TRITON_F32_DEFAULT": "ieee"}  # mamba-ssm's kernels would multiply float32 with 10 bits of fraction
    port = {"MASTER_PORT": str(random.randrange(15000, 32000))}
    return {**os.environ, **rank, **port, **exact, "PYTHONWARNINGS": "ignore"}


def measured(
    folder: Path, device: str, jobs: dict[str, dict[str, Any]], timeout: float = 300, program: Path = MEASURE
) -> dict[str, Found]:
    """What each job found, by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{number}.pt" for number, name in enumerate(jobs)}
    listed = [{**job, "device": device, "out": str(files[name])} for name, job in jobs.items()]
    (folder / "jobs.json").write_text(json.dumps(listed))
    command = [sys.executable, str(program), str(folder / "jobs.json")]
    done = subprocess.run(command, env=alone(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: torch.load(file, weights_only=False) for name, file in files.items()}


def in_turn(folder: Path, turns: list[tuple[str, dict[str, dict[str, Any]]]]) -> dict[str, Found]:
    """What the jobs of each turn found, one device after the other."""
    found: dict[str, Found] = {}
    by_device = [(device, list(jobs)) for device, jobs in itertools.groupby(turns, key=lambda turn: turn[0])]
    for number, (device, jobs) in enumerate(by_device):
        merged = {name: job for _, named in jobs for name, job in named.items()}
        found |= measured(folder / f"turn {number}", device, merged)
    return found


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest ||found - expected|| / ||expected|| of any tensor."""
    assert found.keys() == expected.keys()
    return max(float((found[name].float() - tensor).norm() / tensor.norm()) for name, tensor in expected.items())


def mean_distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().mean())


def alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Cosine of the angle between two gradients, each of all tensors."""
    one, other = (torch.cat([t[name].flatten().float() for name in expected]) for t in (found, expected))
    return float(torch.cosine_similarity(one, other, 0))
