import json
import struct
from pathlib import Path

import pytest

DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
EXPERTS = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
RECIPE = """\
name: small
run_dir: run
model: {path: base}
trainer: {device: cpu, max_tokens_per_micro_batch: 512}
fleet: {max_model_len: 256}
evaluation: {sampling: {max_response_tokens: 64}}
domains:
  math: {environment: math, train: math.jsonl, held_out: held-out.jsonl}
stages:
  - {type: sft, name: warm, data: [sft.jsonl], steps: 10, max_length: 128}
  - {type: rl, name: climb, domains: [math], steps: 5, sampling: {max_response_tokens: 64}}
"""
CASCADE_RECIPE = """\
name: cascade
run_dir: run
model: {path: base}
trainer: {device: cpu, max_tokens_per_micro_batch: 512}
fleet: {max_model_len: 256}
evaluation: {sampling: {max_response_tokens: 64}}
judges:
  genrm: {url: "http://127.0.0.1:8100/v1"}
domains:
  math: {environment: math, train: math.jsonl, held_out: held-out.jsonl}
  format: {environment: instruction_following, train: math.jsonl, held_out: held-out.jsonl}
  chat: {environment: genrm, judge: genrm, train: math.jsonl, held_out: held-out.jsonl}
stages:
  - {type: sft, name: warm, data: [sft.jsonl], steps: 10, max_length: 128}
  - type: rl
    name: climb
    domains: [math]
    steps: 5
    sampling: {max_response_tokens: 64}
    gate: {min_gain: 0, max_drop: 2}
  - {type: rlhf, name: prefer, from: warm, domains: [chat], steps: 5, sampling: {max_response_tokens: 64}}
  - type: mopd
    name: distil
    from: climb
    steps: 5
    sampling: {max_response_tokens: 64}
    teachers: {math: best(math), chat: stage(prefer), format: stage(start)}
  - {type: evaluate, name: look}
"""
"""Every type of stage and every edge of the graph: start -> warm -> climb -> distil -> look, and warm -> prefer."""


def safetensors_bytes() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


def write_checkpoint(folder: Path, facts: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "model.safetensors").write_bytes(safetensors_bytes())
    return folder


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that fulfils every rule, with base/ (dense) and moe/ (experts) beside it."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "base", DENSE)
    write_checkpoint(tmp_path / "moe", EXPERTS)
    (tmp_path / "sft.jsonl").write_text('\n{"messages": []}\n')
    for name in ("math.jsonl", "held-out.jsonl"):
        (tmp_path / name).write_text('{"prompt": "1+1", "answer": "2", "reference": "2"}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


@pytest.fixture
def cascade_file(recipe_file: Path) -> Path:
    """A recipe of a whole cascade that fulfils every rule, beside the other one and its files."""
    (recipe_file.parent / "cascade.yaml").write_text(CASCADE_RECIPE)
    return recipe_file.parent / "cascade.yaml"
