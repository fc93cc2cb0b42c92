"""One rank of `millrace convert adapter`: the LoRA adapters of a checkpoint in PEFT's format.

python -m millrace.megatron.adapter_worker --checkpoint FOLDER --out FOLDER --tp 2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from millrace.checkpoint_store import FACTS, read_json
from millrace.config.model_shape import ModelShape
from millrace.config.schema import LoraConfig, ModelConfig, TrainerConfig
from millrace.converters.errors import ConversionError
from millrace.megatron.checkpoint import Checkpointer
from millrace.megatron.export import export_adapter
from millrace.megatron.policy import Policy
from millrace.megatron.worker import PASSED, add_layout_arguments, end_with, ranks, say


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="millrace convert adapter", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="one checkpoint, or the folder of which to take the latest")
    parser.add_argument("--out", required=True, help="folder that is written")
    parser.add_argument("--overwrite", action="store_true", help="replace --out when it exists")
    add_layout_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    checkpoint = Path(arguments.checkpoint)
    if not (checkpoint / FACTS).is_file():
        latest = Checkpointer(checkpoint, keep=1).latest() if checkpoint.is_dir() else None
        if latest is None:
            raise ConversionError(f"{checkpoint} is no checkpoint and holds none")
        checkpoint = latest
    model = adapted_model(checkpoint)
    trainer = TrainerConfig(device=arguments.device)
    with ranks(arguments, trainer) as (topology, parallel):
        shape = ModelShape.from_hf(model.path)
        policy = Policy(model, shape, parallel, trainer, topology, optimizer=None, seed=arguments.seed)
        Checkpointer(checkpoint.parent, keep=1).load(policy, checkpoint)
        out = export_adapter(policy, model.path, Path(arguments.out), overwrite=arguments.overwrite)
        say(f"{checkpoint} -> {out}")
    return PASSED


def adapted_model(checkpoint: Path) -> ModelConfig:
    """The model that a checkpoint's adapters stand on, with their settings. Raises ConversionError when it holds
    none, or when the model is gone."""
    facts = read_json(checkpoint / FACTS)
    settings = facts.get("lora")
    if settings is None:
        raise ConversionError(f"{checkpoint} holds all weights and no adapters; use millrace convert megatron-to-hf")
    base = Path(facts["base"])
    if not base.is_dir():
        raise ConversionError(f"the model {base}, on which the adapters of {checkpoint} stand, is not there any more")
    lora = LoraConfig(
        rank=settings["rank"],
        alpha=settings["alpha"],
        rslora=settings["rslora"],
        targets=tuple(settings["targets"]),
    )
    return ModelConfig(path=str(base), dtype=facts["dtype"], lora=lora)


if __name__ == "__main__":
    sys.exit(end_with(lambda: main(sys.argv[1:])))
