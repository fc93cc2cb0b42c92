"""One rank of `millrace verify`: proves that a conversion or a layout is right.

    roundtrip         Hugging Face -> this layout -> Hugging Face: every tensor bitwise equal
    logits            this layout against transformers, float32
    layout-reference  logits and gradients of one batch on one rank, into a file
    layout            the same batch at this layout against that of one rank

Each names the first tensor or token that differs and by how much, writes a YAML card with `--card`, and ends with exit
code 1 when the check fails. Every rank is started as
`python -m millrace.megatron.verify_worker roundtrip --hf FOLDER --tp 2`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.config.schema import OptimizerConfig, ParallelConfig, TrainerConfig
from millrace.converters.errors import ConversionError
from millrace.converters.mapping import mapping_for
from millrace.converters.safetensors_io import HFReader
from millrace.data.batch import TokenBatch
from millrace.megatron import weights
from millrace.megatron.policy import DTYPES, Policy
from millrace.megatron.topology import Topology
from millrace.megatron.worker import (
    Verdict,
    add_layout_arguments,
    bytes_bar,
    conclude,
    end_with,
    gather,
    is_main,
    model_config,
    on_rank_zero,
    ranks,
)
from millrace.ports import free_port

LOGITS_TOLERANCE = 1e-4
"""Largest absolute difference of float32 logits; summation order alone gives about 1e-5."""
GRADIENT_TOLERANCE = 1e-5
"""Largest relative difference ||g - g_1|| / ||g_1|| of one tensor's float32 gradient."""
ROWS, LENGTH = 2, 64
"""Size of the seeded batch of token ids."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="millrace verify", description=__doc__)
    checks = parser.add_subparsers(dest="check", required=True)
    for name, what in (
        ("roundtrip", "every tensor comes back bitwise"),
        ("logits", "against transformers"),
        ("layout-reference", "write what one rank computes"),
        ("layout", "against what one rank computed"),
    ):
        check = checks.add_parser(name, help=what)
        check.add_argument("--hf", required=True, help="folder of the Hugging Face checkpoint")
        check.add_argument("--card", help="YAML file that records the check")
        add_layout_arguments(check)
    checks.choices["roundtrip"].add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    checks.choices["logits"].add_argument("--tolerance", type=float, default=LOGITS_TOLERANCE)
    checks.choices["logits"].add_argument("--tokens", help="token ids with commas between; seeded ones when absent")
    checks.choices["layout"].add_argument("--tolerance", type=float, default=GRADIENT_TOLERANCE)
    checks.choices["layout"].add_argument("--reference", help="file of layout-reference; made first when absent")
    checks.choices["layout-reference"].add_argument("--reference", required=True, help="safetensors file to write")
    return parser.parse_args(argv)


# ---- roundtrip


@dataclass(frozen=True)
class TensorDifference:
    name: str
    how: str
    """What differs, as a clause."""


def compare_bitwise(name: str, source: Tensor, back: Tensor) -> TensorDifference | None:
    """None when both hold the same bytes; `back` may be of a wider data type."""
    if source.shape != back.shape:
        return TensorDifference(name, f"has shape {list(back.shape)} instead of {list(source.shape)}")
    back = back.detach().cpu().to(source.dtype)
    if torch.equal(_bytes(source), _bytes(back)):
        return None
    different = int((source != back).sum())
    largest = float((source.double() - back.double()).abs().max())
    return TensorDifference(name, f"differs in {different} of {source.numel()} elements, by {largest:.3g} at most")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def check_roundtrip(policy: Policy, reader: HFReader) -> Verdict:
    """Compare what a policy exports with the checkpoint it was loaded from. Collective."""
    seen, differences = [], []
    for name, tensor in policy.hf_tensors():
        seen.append(name)
        if name in reader and (difference := compare_bitwise(name, reader.tensor(name), tensor)):
            differences.append(difference)
    names = [name for of_rank in gather(seen) for name in of_rank]
    found = {difference.name: difference.how for of_rank in gather(differences) for difference in of_rank}
    expected = mapping_for(policy.shape).hf_shapes()
    problems = [f"{name} {found[name]}" for name in expected if name in found]
    problems += [f"{name} is missing" for name in expected if name not in set(names)]
    problems += [f"{name} is not in the checkpoint" for name in sorted(set(names) - set(expected))]
    problems += [f"{name} was exported by {names.count(name)} ranks" for name in expected if names.count(name) > 1]
    facts = {"dtype": policy.config.dtype, "tensors": len(expected), "bytes": reader.total_bytes}
    if not problems:
        return Verdict(True, f"{len(expected)} tensors came back bitwise equal", {**facts, "equal": len(expected)})
    equal = len(expected) - len({problem.split(" ")[0] for problem in problems} & set(expected))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Verdict(False, f"{problems[0]}{more}", {**facts, "equal": equal, "problems": problems[:20]})


def roundtrip(arguments: argparse.Namespace) -> Verdict:
    reader = HFReader(arguments.hf)
    dtype = widest_dtype(reader, ModelShape.from_hf(arguments.hf)) if arguments.dtype == "auto" else arguments.dtype
    return _at_layout(arguments, dtype, lambda policy: check_roundtrip(policy, reader))


# ---- logits


def seeded_tokens(shape: ModelShape, seed: int, rows: int = ROWS, length: int = LENGTH) -> Tensor:
    """int64 [rows, length] of the model's vocabulary."""
    length = min(length, shape.max_position_embeddings)
    return torch.randint(0, shape.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def given_tokens(text: str, shape: ModelShape) -> Tensor:
    """int64 [1, S] from "12,7,3". Raises ConversionError for what is no token id of the model."""
    parts = [part.strip() for part in text.split(",")]
    if wrong := [part for part in parts if not part.isdigit() or int(part) >= shape.vocab_size]:
        raise ConversionError(f"--tokens: {wrong[0]!r} is no token id below the vocabulary size {shape.vocab_size}")
    return torch.tensor([[int(part) for part in parts]])


def transformers_model(path: str | Path) -> Any:
    """The checkpoint as transformers computes it, in float32 on the CPU.

    Mamba layers take the time steps' limit that config.json names; transformers 5.19 clamps those of whole sequences to
    time_step_min instead, unlike its own generation, vLLM and Megatron-Core (see `state_space`).
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = tuple(model.config.time_step_limit)
    return model


def transformers_logits(path: str, tokens: Tensor, device: torch.device) -> Tensor:
    """float32 [B, S, V] on the CPU."""
    model = transformers_model(path).to(device)
    with torch.no_grad():
        return model(tokens.to(device)).logits.float().cpu()


def compare_logits(tokens: Tensor, ours: Tensor, reference: Tensor, tolerance: float, owner: str) -> Verdict:
    """ours, reference: [B, S, V] for tokens [B, S]; equal within `tolerance` and with the same argmax everywhere."""
    distance = (ours - reference).abs().amax(-1)
    choice, expected = ours.argmax(-1), reference.argmax(-1)
    agree = choice == expected
    # A difference that is not a number is a difference.
    wrong = ~(distance <= tolerance) | ~agree
    facts = {
        "tokens": tokens.numel(),
        "max_abs_diff": float(distance.max()),
        "tolerance": tolerance,
        "argmax_equal": f"{int(agree.sum())} of {agree.numel()}",
    }
    said = f"logits of {tokens.numel()} tokens against {owner}: max |difference| {facts['max_abs_diff']:.2e}"
    if not wrong.any():
        return Verdict(True, f"{said}, argmax equal everywhere", facts)
    row, place = wrong.nonzero()[0].tolist()
    first = (
        f"sequence {row}, position {place}, token {int(tokens[row, place])}: differs by "
        f"{float(distance[row, place]):.3g}, argmax {int(choice[row, place])} instead of {int(expected[row, place])}"
    )
    return Verdict(False, f"{said}; first at {first}", {**facts, "first_difference": first})


def logits(arguments: argparse.Namespace) -> Verdict:
    shape = ModelShape.from_hf(arguments.hf)
    given = arguments.tokens
    tokens = given_tokens(given, shape) if given else seeded_tokens(shape, arguments.seed)

    def check(policy: Policy) -> Verdict:
        ours = policy.logits(tokens)
        device = policy.topology.device
        return on_rank_zero(
            lambda: compare_logits(
                tokens, ours, transformers_logits(arguments.hf, tokens, device), arguments.tolerance, "transformers"
            )
        )

    return _at_layout(arguments, "float32", check)


# ---- layout

GRADIENT = "gradient."
"""What stands before the names of gradients in the file of one rank."""


def example_batch(shape: ModelShape, seed: int) -> TokenBatch:
    """Sequences of uneven length with weights of both signs that are scaled by the number of tokens."""
    generator = torch.Generator().manual_seed(seed)
    longest = min(LENGTH, shape.max_position_embeddings)
    lengths = [longest, 3, longest // 2, 17 % longest + 1, 1, longest // 3 + 1]
    tokens = [torch.randint(0, shape.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    weight = torch.randn(sum(lengths), generator=generator) / sum(lengths)
    return TokenBatch.from_sequences(tokens).with_streams(weight=weight)


def weighted_log_likelihood(logp: Tensor, streams: Any, segment_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return -(streams["weight"] * logp).sum(), {}


def gradients(policy: Policy, batch: TokenBatch) -> Iterable[tuple[str, Tensor]]:
    """The gradient of every tensor that this rank owns, under its Hugging Face name. Collective."""
    taken: list[tuple[str, Tensor]] = []

    def take(metrics: dict[str, float]) -> None:
        bound = weights.bind(policy.module, policy.shape, policy.topology, of=attrgetter("main_grad"))
        taken.extend((name, tensor.detach().cpu().clone()) for name, tensor in weights.hf_tensors(bound))

    policy.train_step(batch, weighted_log_likelihood, before_update=take)
    return taken


def write_reference(arguments: argparse.Namespace) -> Verdict:
    shape = ModelShape.from_hf(arguments.hf)
    tokens, batch = seeded_tokens(shape, arguments.seed), example_batch(shape, arguments.seed)

    def write(policy: Policy) -> Verdict:
        if policy.topology.world != 1:
            raise ConversionError(f"the reference is computed on one rank, not on {policy.topology.world}")
        tensors = {"logits": policy.logits(tokens)}
        tensors |= {GRADIENT + name: gradient for name, gradient in gradients(policy, batch)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, arguments.reference)
        return Verdict(True, f"the reference of one rank is in {arguments.reference}")

    return _at_layout(arguments, "float32", write, optimizer=OptimizerConfig(lr=0.0))


def check_layout_against(
    policy: Policy, tokens: Tensor, batch: TokenBatch, reference: HFReader, tolerance: float
) -> Verdict:
    """Compare logits and gradients with those of one rank. Collective."""
    ours = policy.logits(tokens)
    same_logits = compare_logits(tokens, ours, reference.tensor("logits"), LOGITS_TOLERANCE, "one rank")
    own = {name: _relative(g, reference.tensor(GRADIENT + name)) for name, g in gradients(policy, batch)}
    distances = {name: value for of_rank in gather(own) for name, value in of_rank.items()}
    # Buffers, such as a router's correction bias, have no gradient on one rank either.
    expected = [name.removeprefix(GRADIENT) for name in reference.names if name.startswith(GRADIENT)]
    wrong = [name for name in expected if not distances.get(name, float("inf")) <= tolerance]
    worst = max(expected, key=lambda name: distances.get(name, float("inf")))
    facts = {
        "logits": same_logits.facts,
        "gradients": len(distances),
        "max_relative_gradient_diff": distances.get(worst, float("inf")),
        "worst_gradient": worst,
        "tolerance": tolerance,
    }
    said = (
        f"{same_logits.summary}; gradients of {len(distances)} tensors: relative difference "
        f"{facts['max_relative_gradient_diff']:.2e} at most ({worst})"
    )
    if wrong:
        said += f"; first gradient that differs: {wrong[0]}, by {distances.get(wrong[0], float('inf')):.3g}"
    return Verdict(same_logits.passed and not wrong, said, facts)


def _relative(gradient: Tensor, reference: Tensor) -> float:
    """||g - r|| / ||r||; 0 where both are 0."""
    gradient, reference = gradient.double(), reference.double()
    distance, size = float((gradient - reference).norm()), float(reference.norm())
    return distance / size if size else distance


def layout(arguments: argparse.Namespace) -> Verdict:
    """Compare this layout with one rank, which computes the reference first where no file of it is given."""
    with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
        file = arguments.reference or f"{folder}/reference.safetensors"
        if arguments.reference is None and is_main():
            _compute_reference(arguments, file)
        return _layout_against(arguments, file)


def _layout_against(arguments: argparse.Namespace, file: str) -> Verdict:
    shape = ModelShape.from_hf(arguments.hf)
    tokens, batch = seeded_tokens(shape, arguments.seed), example_batch(shape, arguments.seed)

    def check(policy: Policy) -> Verdict:
        reference = HFReader(on_rank_zero(lambda: file))
        verdict = check_layout_against(policy, tokens, batch, reference, arguments.tolerance)
        gather(None)  # rank 0 removes the file when it returns
        return verdict

    return _at_layout(arguments, "float32", check, optimizer=OptimizerConfig(lr=0.0))


def _compute_reference(arguments: argparse.Namespace, file: str) -> None:
    """One rank in a process of its own; the others wait for rank 0 at the rendezvous meanwhile."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "millrace.megatron.verify_worker", "layout-reference", "--hf", arguments.hf]
    command += ["--reference", file, "--device", arguments.device, "--seed", str(arguments.seed)]
    ended = subprocess.run(command, env={**os.environ, **alone}, stdout=subprocess.DEVNULL, check=False)
    if ended.returncode:
        raise ConversionError(f"the reference of one rank could not be computed (exit code {ended.returncode})")


# ---- all


CHECKS: dict[str, Callable[[argparse.Namespace], Verdict]] = {
    "roundtrip": roundtrip,
    "logits": logits,
    "layout-reference": write_reference,
    "layout": layout,
}


def _at_layout(
    arguments: argparse.Namespace,
    dtype: str,
    check: Callable[[Policy], Verdict],
    optimizer: OptimizerConfig | None = None,
) -> Verdict:
    """Load the checkpoint at the layout of the options and run `check` on it."""
    shape = ModelShape.from_hf(arguments.hf)
    trainer = TrainerConfig(device=arguments.device)
    with ranks(arguments, trainer) as (topology, parallel):
        policy = load_policy(arguments.hf, shape, dtype, parallel, trainer, topology, optimizer, arguments.seed)
        return check(policy)


def load_policy(
    path: str,
    shape: ModelShape,
    dtype: str,
    parallel: ParallelConfig,
    trainer: TrainerConfig,
    topology: Topology,
    optimizer: OptimizerConfig | None,
    seed: int,
) -> Policy:
    model = model_config(path, dtype)
    policy = Policy(model, shape, parallel, trainer, topology, optimizer=optimizer, seed=seed)
    load_with_bar(policy, path)
    if policy.optimizer is not None:
        policy.optimizer.reload_model_params()
    return policy


def widest_dtype(reader: HFReader, shape: ModelShape) -> str:
    """bfloat16 when all tensors are stored so, but for those that have a type of their own in any model (a router's
    correction bias); else float32, which holds float16 and bfloat16 exactly."""
    fixed = {name for entry in mapping_for(shape) if entry.dtype is not None for name in entry.hf}
    found = {reader.lazy(name).dtype for name in reader.names if name not in fixed}
    return "bfloat16" if found == {torch.bfloat16} else "float32"


def load_with_bar(policy: Policy, path: str) -> None:
    parameters = weights.bind(policy.module, policy.shape, policy.topology)
    total = sum(bound.tensor.numel() * bound.tensor.element_size() for bound in parameters)
    with bytes_bar("reading", total) as advance:
        weights.load_hf(parameters, policy.shape, path, advance)


def main(argv: Sequence[str]) -> int:
    arguments, started = parse(argv), time.monotonic()
    verdict = CHECKS[arguments.check](arguments)
    return conclude(f"verify {arguments.check}", arguments, verdict, started)


if __name__ == "__main__":
    sys.exit(end_with(lambda: main(sys.argv[1:])))
