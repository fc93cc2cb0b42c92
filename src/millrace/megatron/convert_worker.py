"""One rank of `millrace convert`: between Hugging Face checkpoints and Megatron-Core ones, at any layout.

    python -m millrace.megatron.convert_worker hf-to-megatron --hf FOLDER --out FOLDER --tp 2
    python -m millrace.megatron.convert_worker megatron-to-hf --checkpoint FOLDER --out FOLDER --ep 2

No rank holds the whole model: each reads, and writes, what is its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from millrace.config.model_shape import ModelShape
from millrace.config.schema import TrainerConfig
from millrace.converters.errors import ConversionError
from millrace.converters.safetensors_io import HFReader
from millrace.megatron import weights
from millrace.megatron.checkpoint import HF_FOLDER, Checkpointer
from millrace.megatron.checkpoint_store import FACTS
from millrace.megatron.export import export_hf
from millrace.megatron.policy import DTYPES, Policy
from millrace.megatron.worker import PASSED, add_layout_arguments, bytes_bar, end_with, model_config, ranks, say

GIB = 1 << 30


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="millrace convert", description=__doc__)
    ways = parser.add_subparsers(dest="way", required=True)
    to_megatron = ways.add_parser("hf-to-megatron", help="write a Megatron-Core checkpoint that any layout can load")
    to_megatron.add_argument("--hf", required=True, help="folder of the Hugging Face checkpoint")
    to_hf = ways.add_parser("megatron-to-hf", help="write a Hugging Face checkpoint")
    to_hf.add_argument("--checkpoint", required=True, help="one checkpoint, or the folder of which to take the latest")
    to_hf.add_argument("--shard-gib", type=float, default=2.0, help="largest safetensors file")
    to_hf.add_argument("--overwrite", action="store_true", help="replace --out when it exists")
    for way in (to_megatron, to_hf):
        way.add_argument("--out", required=True, help="folder that is written")
        way.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: as in the source")
        add_layout_arguments(way)
    return parser.parse_args(argv)


def stored_dtype(shape: ModelShape) -> str:
    """Data type of parameters that holds every value of the checkpoint."""
    return shape.torch_dtype if shape.torch_dtype in DTYPES else "float32"


def hf_to_megatron(arguments: argparse.Namespace) -> Path:
    """Read a Hugging Face checkpoint into the layout and write it as step 0; the folder of the new checkpoint."""
    trainer = TrainerConfig(device=arguments.device)
    shape = ModelShape.from_hf(arguments.hf)
    dtype = widest_dtype(HFReader(arguments.hf)) if arguments.dtype == "auto" else arguments.dtype
    with ranks(arguments, trainer) as (topology, parallel):
        model = model_config(arguments.hf, dtype)
        policy = Policy(model, shape, parallel, trainer, topology, optimizer=None, seed=arguments.seed)
        load_with_bar(policy, arguments.hf)
        written = Checkpointer(arguments.out, keep=1).save(policy, 0, {}, keep_always=True)
        say(f"{arguments.hf} -> {written} ({dtype})")
    return written


def widest_dtype(reader: HFReader) -> str:
    """bfloat16 when all tensors are stored so, else float32, which holds float16 and bfloat16 exactly."""
    return "bfloat16" if {str(reader.lazy(name).dtype) for name in reader.names} == {"torch.bfloat16"} else "float32"


def load_with_bar(policy: Policy, path: str) -> None:
    parameters = weights.bind(policy.module, policy.shape, policy.topology)
    total = sum(bound.tensor.numel() * bound.tensor.element_size() for bound in parameters)
    with bytes_bar("reading", total) as advance:
        weights.load_hf(parameters, policy.shape, path, advance)


def megatron_to_hf(arguments: argparse.Namespace) -> Path:
    """Load a checkpoint at the layout and write it in Hugging Face format."""
    checkpoint = find_checkpoint(Path(arguments.checkpoint))
    source = checkpoint / HF_FOLDER
    shape = ModelShape.from_hf(source)
    trainer = TrainerConfig(device=arguments.device)
    with ranks(arguments, trainer) as (topology, parallel):
        dtype = stored_dtype(shape) if arguments.dtype == "auto" else arguments.dtype
        model = model_config(str(source), dtype)
        policy = Policy(model, shape, parallel, trainer, topology, optimizer=None, seed=arguments.seed)
        Checkpointer(checkpoint.parent, keep=1).load(policy, checkpoint)
        out = export_hf(
            policy,
            source,
            Path(arguments.out),
            max_shard_bytes=int(arguments.shard_gib * GIB),
            overwrite=arguments.overwrite,
        )
        say(f"{checkpoint} -> {out} ({dtype})")
    return out


def find_checkpoint(path: Path) -> Path:
    """`path` when it is a checkpoint, else the latest one in it. Raises ConversionError when there is none."""
    if (path / FACTS).is_file():
        return path
    latest = Checkpointer(path, keep=1).latest() if path.is_dir() else None
    if latest is None:
        raise ConversionError(f"{path} is no checkpoint and holds none")
    return latest


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    if arguments.way == "hf-to-megatron":
        hf_to_megatron(arguments)
    else:
        megatron_to_hf(arguments)
    return PASSED


if __name__ == "__main__":
    sys.exit(end_with(lambda: main(sys.argv[1:])))
