"""vLLM with an adapter in PEFT's format answers as vLLM with the merged checkpoint does.

Its adapters of experts run as Triton kernels, so on CPU only what its loader makes of them is compared.
"""

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
from millrace.converters.safetensors_io import HFReader

ENGINE = Path(__file__).with_name("adapter_engine.py")
SETTINGS = {
    "qwen3": AdapterSettings(8, 16.0, False, (ALL_LINEAR,)),
    "llama": AdapterSettings(8, 16.0, True, ("q_proj", "v_proj", "down_proj")),
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


def answers(model: Path, out: Path, *adapter: Path) -> list[list[dict[str, Any]]]:
    command = [sys.executable, str(ENGINE), str(model), str(out), *map(str, adapter)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("family", SETTINGS)
def test_an_adapter_answers_as_its_merged_checkpoint(family: str, tmp_path: Path, record_property: Any) -> None:
    hf = write_checkpoint(family, tmp_path / "hf", num_hidden_layers=2)
    adapter = write_adapter(hf, tmp_path / "adapter", SETTINGS[family])
    merged = merge_adapter(hf, adapter, tmp_path / "merged")
    plain, with_adapter = answers(hf, tmp_path / "adapter.json", adapter)
    (expected,) = answers(merged, tmp_path / "merged.json")
    assert [row["tokens"] for row in with_adapter] == [row["tokens"] for row in expected]
    assert [row["tokens"] for row in plain] != [row["tokens"] for row in expected]
    worst = max(
        abs(a - b)
        for mine, theirs in zip(with_adapter, expected, strict=True)
        for a, b in zip(mine["logprobs"], theirs["logprobs"], strict=True)
    )
    record_property("logprobs", worst)
    assert worst <= 1e-4


def test_vllms_loader_takes_the_adapters_of_experts(tmp_path: Path) -> None:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    hf = write_checkpoint("qwen3_moe", tmp_path / "hf", num_hidden_layers=2)
    adapter = write_adapter(hf, tmp_path / "adapter", AdapterSettings(4, 8.0, True, (ALL_LINEAR,)))
    base, merged = HFReader(hf), HFReader(merge_adapter(hf, adapter, tmp_path / "merged"))
    attention = {f"{x}_proj" for x in "qkvo"}
    experts = {f"experts.{e}.{x}_proj" for e in range(4) for x in ("gate", "up", "down")}
    helper = PEFTHelper.from_local_dir(str(adapter), max_position_embeddings=None)
    loaded = LoRAModel.from_local_checkpoint(
        str(adapter), attention | experts, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    assert len(loaded.loras) == 2 * (4 + 4 * 3)
    for module, factors in loaded.loras.items():
        weight = base.tensor(f"{module}.weight") + factors.scaling * factors.lora_b @ factors.lora_a
        torch.testing.assert_close(weight, merged.tensor(f"{module}.weight"), atol=1e-6, rtol=1e-6)
