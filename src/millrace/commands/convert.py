"""`millrace convert`: checkpoints into one another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from millrace.commands.arguments import HfFolder
from millrace.commands.output import plain
from millrace.commands.ranks import Dp, Ep, Etp, Pp, Tp, on_ranks

convert = typer.Typer(no_args_is_help=True, help="Turn checkpoints into one another, file by file.")
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Data type that is written; auto: each tensor as in the source."),
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Files written side by side [default: one for each core, at most 8]")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@convert.command("hf-to-megatron")
def convert_to_megatron(
    hf: HfFolder,
    out: Annotated[Path, typer.Option(help="Folder of checkpoints; this one is written as its step 0.")],
    dtype: Dtype = "auto",
    processes: Processes = None,
    shard_gib: Annotated[float, typer.Option(min=0.0001, help="Largest .distcp file, GiB.")] = 1.0,
    overwrite: Overwrite = False,
) -> None:
    """Write a Hugging Face checkpoint as a Megatron-Core checkpoint, which any parallel layout loads.

    No process holds more than one parameter. After a kill the same command goes on.

    Example: `millrace convert hf-to-megatron --hf demo/base --out demo/base-megatron`
    """
    from millrace.converters.processes import start_server

    start_server()  # imports torch while this process does
    from millrace.conversion import hf_to_megatron, options

    hf_to_megatron(hf, out, options(dtype, processes, shard_gib, overwrite))


@convert.command("megatron-to-hf")
def convert_to_hf(
    checkpoint: Annotated[Path, typer.Option(help="A Megatron checkpoint, or a folder of which to take the latest.")],
    out: Annotated[Path, typer.Option(help="Folder of the Hugging Face checkpoint to write.")],
    dtype: Dtype = "auto",
    processes: Processes = None,
    shard_gib: Annotated[float, typer.Option(min=0.0001, help="Largest safetensors file, GiB.")] = 2.0,
    overwrite: Overwrite = False,
) -> None:
    """Write a Megatron-Core checkpoint, saved at any parallel layout, as a Hugging Face checkpoint.

    No process holds more than one parameter. After a kill the same command goes on.

    Example: `millrace convert megatron-to-hf --checkpoint runs/x/checkpoints/step-00000010 --out exported`
    """
    from millrace.converters.processes import start_server

    start_server()  # imports torch while this process does
    from millrace.conversion import megatron_to_hf, options

    megatron_to_hf(checkpoint, out, options(dtype, processes, shard_gib, overwrite))


@convert.command("adapter")
def adapter(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint of a run with model.lora, or the folder of several.")],
    out: Annotated[Path, typer.Option(help="Folder of the PEFT adapter to write.")],
    tp: Tp = 1,
    pp: Pp = 1,
    ep: Ep = 1,
    etp: Etp = None,
    dp: Dp = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out when it exists.")] = False,
) -> None:
    """Write the LoRA adapters of a checkpoint in PEFT's format, as peft and vLLM load them.

    Example: `millrace convert adapter --checkpoint runs/x/checkpoints/step-00000010 --out adapter`
    """
    arguments = ["--checkpoint", str(checkpoint), "--out", str(out), *(["--overwrite"] if overwrite else [])]
    on_ranks("megatron.adapter_worker", arguments, tp, pp, 1, ep, etp, dp)


@convert.command("merge")
def merge(
    hf: HfFolder,
    adapter: Annotated[Path, typer.Option(help="Folder of a PEFT adapter of that checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder of the Hugging Face checkpoint to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out when it exists.")] = False,
) -> None:
    """Write a checkpoint with a LoRA adapter merged into its weights.

    Example: `millrace convert merge --hf demo/base --adapter runs/x/adapter --out merged`
    """
    from millrace.converters.adapters import merge_adapter

    written = merge_adapter(hf, adapter, out, overwrite=overwrite)
    plain().print(f"{hf} with {adapter} -> {written}")
