"""One weight sync on one GPU: the engine beside the trainer takes its weights through CUDA IPC.

`millrace verify sync` proves it: after the swap the engine answers as a fresh one on the exported weights, and its
log-probs are the trainer's and transformers'.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from device_runs import alone
from tiny_checkpoints import write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

TOLERANCE = "0.02"
"""Largest |difference| of log-probs: engines multiply float32 on a GPU with 10 bits of fraction (TF32)."""


def test_an_engine_on_the_trainers_gpu_takes_its_weights(tmp_path: Path) -> None:
    model = write_checkpoint("qwen3_moe", tmp_path / "model")
    card = tmp_path / "card.yaml"
    options = ["--hf", str(model), "--device", "cuda", "--transport", "ipc", "--tolerance", TOLERANCE]
    done = subprocess.run(
        [sys.executable, "-m", "millrace.cascade.verify_sync", *options, "--card", str(card)],
        env=alone(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "verdict: passed" in card.read_text()
