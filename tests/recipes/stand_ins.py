"""Stand-ins for what a recipe names and this machine lacks: data files of one valid row, checkpoints of one tensor."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from millrace.config.schema import Recipe, SftStage

ROOT = Path(__file__).resolve().parents[2]

QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}


def write_files(recipe: Recipe, config: dict[str, Any]) -> None:
    """Everything the recipe names, where it says: its model with this config.json, its judges, and its data."""
    write_checkpoint(Path(recipe.model.path), config)
    for judge in recipe.judges.values():
        if judge.model is not None:
            write_checkpoint(Path(judge.model), QWEN3_8B)
    for stage in recipe.stages:
        if isinstance(stage, SftStage):
            for file in stage.data:
                write_row(Path(file), {"messages": [{"role": "user", "content": "1+1"}]})
    for domain in recipe.domains.values():
        if domain.tables is not None:
            Path(domain.tables).mkdir(parents=True, exist_ok=True)
        for file in (domain.train, domain.held_out):
            write_row(Path(file), {"prompt": "1+1", "reference": "2"})


def write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


def write_row(file: Path, row: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row) + "\n")
