"""One rank of the conversion tests: runs convert and verify commands one after the other in one set of processes.

Usage: conversion_worker.py STEPS.json CODES.json; a step is {"program", "arguments", "port"}; rank 0 writes exit codes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from millrace.config.model_shape import ModelShape
from millrace.config.schema import TrainerConfig
from millrace.converters.safetensors_io import HFReader
from millrace.megatron import verify_worker
from millrace.megatron.checkpoint import Checkpointer
from millrace.megatron.export import export_hf
from millrace.megatron.policy import Policy
from millrace.megatron.worker import add_layout_arguments, conclude, end_with, model_config, ranks


def altered_roundtrip(argv: list[str]) -> int:
    """The round trip of a model of which the last rank has changed one value."""
    arguments: argparse.Namespace = verify_worker.parse(argv)
    shape, trainer = ModelShape.from_hf(arguments.hf), TrainerConfig(device="cpu")
    with ranks(arguments, trainer) as (topology, parallel):
        policy = verify_worker.load_policy(arguments.hf, shape, "float32", parallel, trainer, topology, None, 1)
        if topology.rank == topology.world - 1:
            policy.module.decoder.layers[-1].mlp.linear_fc1.weight.data[5, 7] += 0.5
        verdict = verify_worker.check_roundtrip(policy, HFReader(arguments.hf))
    return conclude("verify roundtrip", arguments, verdict, time.monotonic())


def save_or_load(argv: list[str]) -> int:
    """`--save`: a policy read from `--hf` writes a checkpoint; `--load`: one with other weights takes those of a
    checkpoint and is exported."""
    parser = argparse.ArgumentParser()
    for name in ("hf", "save", "load", "out"):
        parser.add_argument(f"--{name}")
    add_layout_arguments(parser)
    arguments = parser.parse_args(argv)
    shape, trainer = ModelShape.from_hf(arguments.hf), TrainerConfig(device="cpu")
    with ranks(arguments, trainer) as (topology, parallel):
        policy = Policy(
            model_config(arguments.hf, "bfloat16"), shape, parallel, trainer, topology, optimizer=None, seed=1
        )
        if arguments.save:
            verify_worker.load_with_bar(policy, arguments.hf)
            Checkpointer(arguments.save, keep=1).save(policy, 0, {})
        else:
            Checkpointer(arguments.load, keep=1).load(policy)
            export_hf(policy, arguments.hf, Path(arguments.out))
    return 0


PROGRAMS = {"checkpoint": save_or_load, "verify": verify_worker.main, "altered": altered_roundtrip}


def main(steps: list[dict], codes: Path) -> None:
    ended = []
    for step in steps:
        os.environ["MASTER_PORT"] = str(step["port"])
        program, arguments = PROGRAMS[step["program"]], [*step["arguments"], "--device", "cpu"]
        ended.append(end_with(lambda program=program, arguments=arguments: program(arguments)))
    if os.environ["RANK"] == "0":
        codes.write_text(json.dumps(ended))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
