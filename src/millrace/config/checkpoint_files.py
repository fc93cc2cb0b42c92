"""Whether the files of a Hugging Face checkpoint are all there and whole, read from their headers alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TEMPLATE_FILE = "chat_template.jinja"
"""Where transformers and vLLM look for a checkpoint's chat template first."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def checkpoint_problems(folder: Path) -> list[str]:
    """What is missing or cut short in a checkpoint's folder, one sentence each; config.json is looked at elsewhere."""
    problems = [] if any((folder / name).exists() for name in TOKENIZER_FILES) else [_no_tokenizer(folder)]
    if (folder / INDEX).exists():
        return problems + _shard_problems(folder)
    if (folder / SINGLE).exists():
        problem = file_problem(folder / SINGLE)
        return problems + ([problem] if problem else [])
    return [*problems, f"{folder} holds neither {SINGLE} nor {INDEX}; download the weights as safetensors"]


def has_chat_template(folder: Path) -> bool:
    """Whether transformers and vLLM would find a chat template beside the tokenizer."""
    if (folder / TEMPLATE_FILE).exists():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):  # no file, no JSON, no object
        return False


def file_problem(file: Path) -> str | None:
    """Why a safetensors file cannot be used: its header says how long it must be."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length <= size else None
    except (struct.error, ValueError):
        header = None
    if not isinstance(header, dict):
        return f"{file} is not a whole safetensors file (its header cannot be read); download it again"
    ends = [facts["data_offsets"][1] for name, facts in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size == expected:
        return None
    state = "cut short" if size < expected else "longer than it says"
    return f"{file} is {state}: {size} bytes instead of {expected}; download it again"


def _shard_problems(folder: Path) -> list[str]:
    try:
        shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{folder / INDEX} is not a safetensors index (JSON with a weight_map); download it again"]
    missing = [name for name in shards if not (folder / name).exists()]
    problems = [f"{folder / name} is named by {INDEX} but does not exist; download it again" for name in missing]
    cut = [file_problem(folder / name) for name in shards if name not in missing]
    return problems + [problem for problem in cut if problem]


def _no_tokenizer(folder: Path) -> str:
    return (
        f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the files of the model's own tokenizer there"
    )
