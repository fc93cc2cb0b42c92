"""The tiny checkpoints that other tests stand on: transformers finds every tensor that it looks for, and no other."""

from __future__ import annotations

import pytest
import torch
from tiny_checkpoints import FAMILIES, VOCABULARY, YARN, write_checkpoint
from transformers import AutoModelForCausalLM

VARIANTS = {
    **{family: dict(family=family) for family in FAMILIES},
    "qwen3 tied": dict(family="qwen3", tied=True),
    "qwen3_moe with a dense layer": dict(family="qwen3_moe", mlp_only_layers=[0]),
    "gemma3_text untied": dict(family="gemma3_text", tied=False),
    "deepseek_v3 with YaRN": dict(family="deepseek_v3", rope_scaling=YARN),
    "deepseek_v3 without a query latent": dict(family="deepseek_v3", q_lora_rank=None),
    "nemotron_h with experts": dict(family="nemotron_h", hybrid_override_pattern="ME*-ME"),
    "nemotron_h with a latent": dict(family="nemotron_h", hybrid_override_pattern="ME*E", moe_latent_size=32),
}


def logits(folder, tokens: torch.Tensor) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_the_checkpoint_whole_and_its_logits_spread(tmp_path, variant):
    tokens = torch.randint(VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(1))
    one = logits(write_checkpoint(path=tmp_path / "one", seed=1, shards=2, **VARIANTS[variant]), tokens)
    other = logits(write_checkpoint(path=tmp_path / "other", seed=2, **VARIANTS[variant]), tokens)
    assert one.isfinite().all()
    assert 1 < one.std() < 5
    assert (one.argmax(-1) != other.argmax(-1)).float().mean() > 0.9
    # The answers hang on what was read, not on the head alone.
    assert one.argmax(-1).unique().numel() > 20
