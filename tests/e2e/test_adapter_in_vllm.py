"""vLLM with an adapter in PEFT's format answers as vLLM with the merged checkpoint does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import write_checkpoint

from millrace.config.model_shape import ModelShape
from millrace.converters.adapters import (
    ADAPTER_FILE,
    ALL_LINEAR,
    AdapterSettings,
    adapter_entries,
    merge_adapter,
    write_adapter_config,
)
from millrace.converters.mapping import mapping_for

ENGINE = Path(__file__).with_name("adapter_engine.py")
SETTINGS = {
    "qwen3": AdapterSettings(8, 16.0, False, (ALL_LINEAR,)),
    "qwen3_moe": AdapterSettings(4, 8.0, True, (ALL_LINEAR,)),
    "llama": AdapterSettings(8, 16.0, False, ("q_proj", "v_proj", "down_proj")),
}


def write_adapter(hf: Path, folder: Path, settings: AdapterSettings) -> Path:
    """An adapter that moves the model's answers."""
    entries = list(adapter_entries(mapping_for(ModelShape.from_hf(hf)), settings.rank, settings.targets).values())
    generator = torch.Generator().manual_seed(2)
    shapes = {name: shape for entry in entries for name, shape in (*entry.a.hf.items(), *entry.b.hf.items())}
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / ADAPTER_FILE)
    write_adapter_config(folder, settings, hf, entries)
    return folder


def answers(model: Path, out: Path, *adapter: Path) -> list[dict[str, Any]]:
    command = [sys.executable, str(ENGINE), str(model), str(out), *map(str, adapter)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("family", SETTINGS)
def test_an_adapter_answers_as_its_merged_checkpoint(family: str, tmp_path: Path, record_property: Any) -> None:
    hf = write_checkpoint(family, tmp_path / "hf", num_hidden_layers=2)
    adapter = write_adapter(hf, tmp_path / "adapter", SETTINGS[family])
    merged = merge_adapter(hf, adapter, tmp_path / "merged")
    with_adapter = answers(hf, tmp_path / "adapter.json", adapter)
    expected = answers(merged, tmp_path / "merged.json")
    plain = answers(hf, tmp_path / "plain.json")
    assert [row["tokens"] for row in with_adapter] == [row["tokens"] for row in expected]
    assert [row["tokens"] for row in plain] != [row["tokens"] for row in expected]
    worst = max(
        abs(a - b)
        for mine, theirs in zip(with_adapter, expected, strict=True)
        for a, b in zip(mine["logprobs"], theirs["logprobs"], strict=True)
    )
    record_property("logprobs", worst)
    assert worst <= 1e-4
