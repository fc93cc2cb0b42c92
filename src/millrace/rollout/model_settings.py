"""What a model asks of the vLLM server that runs it, read from its config.json. Imports neither vLLM nor torch.

Any model may be served (a judge is none that Millrace trains), so a config.json that says nothing special asks for
nothing, and a folder without one is left to vLLM, which says what it misses.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CPU_MLA_DIMS = (512, 64)
"""Latent and rotary width that vLLM's CPU kernel for multi-head latent attention is compiled for."""


@dataclass(frozen=True)
class ModelSettings:
    arguments: tuple[str, ...] = ()
    """Further arguments of the server's command line."""
    variables: dict[str, str] = field(default_factory=dict)
    """Further variables of its environment."""


def model_settings(model_path: str, *, on_cpu: bool) -> ModelSettings:
    """Settings of a server of the checkpoint in folder `model_path`."""
    facts = _facts(Path(model_path) / "config.json")
    arguments: list[str] = []
    variables: dict[str, str] = {}
    if _has_state_space_layers(facts):
        # The state is carried through the whole answer: in the model's bfloat16 its rounding would add up.
        arguments += ["--mamba-ssm-cache-dtype", "float32"]
        if on_cpu:
            # Cached prefixes need prompts read in chunks, which the CPU engine does not do.
            arguments += ["--no-enable-prefix-caching"]
    latent = facts.get("kv_lora_rank")
    if on_cpu and latent is not None:
        if (latent, facts.get("qk_rope_head_dim")) == CPU_MLA_DIMS:
            # vLLM takes another kernel where the CPU has AMX, which takes no float32.
            arguments += ["--attention-backend", "CPU_MLA"]
        else:
            variables["VLLM_MLA_DISABLE"] = "1"  # computes the same attention from full keys and values
    return ModelSettings(tuple(arguments), variables)


def _facts(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _has_state_space_layers(facts: dict[str, Any]) -> bool:
    return facts.get("model_type") == "nemotron_h"
