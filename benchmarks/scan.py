"""Time of the Mamba-2 scan and convolution in plain torch against transformers' own torch path, forward and backward.

Both take the same inputs in float32 and must give the same outputs and gradients, or nothing is timed. transformers
(its functions in `modeling_nemotron_h`) works at the chunk size of the model's config.json and, where that is faster,
at 64 or 32; the fastest counts. `packed` is Millrace's on sequences of 1/16 of the length behind one another, which
transformers' torch path cannot keep apart.

    python -m benchmarks.scan [--rounds 15] [--threads 1]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.nemotron_h import modeling_nemotron_h as transformers_hybrid

from benchmarks.setting import race, ratio, say
from millrace.megatron import state_space

CHUNK = 128
"""`chunk_size` of the released models."""
OURS, THEIRS, PACKED = "millrace", "transformers", "packed"


@dataclass(frozen=True)
class Size:
    """Of one mixer and its input."""

    name: str
    length: int
    heads: int
    head_dim: int
    groups: int
    state: int

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim + 2 * self.groups * self.state


SIZES = (
    Size("a laptop's model", length=2048, heads=8, head_dim=32, groups=2, state=16),
    Size("half a mixer of the 30B model", length=2048, heads=32, head_dim=64, groups=4, state=128),
)


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    say(f"scan: float32, forward and backward, {arguments.threads} thread(s), median of {arguments.rounds} rounds")
    for size in SIZES:
        say(f"{size.name}: {size.length} tokens, {size.heads} heads of {size.head_dim}, state {size.state}")
        report("scan", scans(size), arguments)
        report("convolution", convolutions(size), arguments)


def scans(size: Size) -> dict[str, Callable[[], list[Tensor]]]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    inputs = {
        "x": normal(1, size.length, size.heads, size.head_dim),
        "dt": normal(1, size.length, size.heads),
        "A": (-torch.empty(size.heads).uniform_(1, 16, generator=generator)).requires_grad_(),
        "B": normal(1, size.length, size.groups, size.state),
        "C": normal(1, size.length, size.groups, size.state),
    }
    options = {"D": normal(size.heads), "dt_bias": (normal(size.heads).detach() - 4.6).requires_grad_()}
    weight = torch.randn(1, size.length, size.heads, size.head_dim, generator=generator)
    sequences = (torch.arange(size.length) // (size.length // 16)).int()[None]
    leaves = [*inputs.values(), *options.values()]

    def run(scan: Callable[..., Tensor], chunk: int, **more: Any) -> list[Tensor]:
        y = scan(*inputs.values(), chunk, **options, dt_softplus=True, **more)
        return [y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)]

    torch_path = transformers_hybrid.mamba2_chunk_scan
    theirs = {f"{THEIRS}, chunk {chunk}": partial(run, torch_path, chunk) for chunk in (CHUNK, 64, 32)}
    ours = partial(run, state_space.mamba_chunk_scan_combined, CHUNK)
    return {OURS: ours, PACKED: partial(ours, seq_idx=sequences), **theirs}


def convolutions(size: Size) -> dict[str, Callable[[], list[Tensor]]]:
    generator = torch.Generator().manual_seed(2)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).requires_grad_()
        for shape in ((1, size.length, size.channels), (size.channels, 4), (size.channels,))
    )
    direction = torch.randn(x.shape, generator=generator)
    sequences = (torch.arange(size.length) // (size.length // 16)).int()[None]

    def run(y: Tensor) -> list[Tensor]:
        return [y.detach(), *torch.autograd.grad((y * direction).sum(), (x, weight, bias))]

    def theirs() -> list[Tensor]:
        return run(transformers_hybrid.causal_conv1d_fn(x.transpose(1, 2), weight, bias, "silu").transpose(1, 2))

    def ours(seq_idx: Tensor | None = None) -> list[Tensor]:
        return run(F.silu(state_space.causal_conv1d(x, weight, bias, seq_idx)))

    return {OURS: ours, PACKED: partial(ours, sequences), THEIRS: theirs}


def report(what: str, runners: dict[str, Callable[[], list[Tensor]]], arguments: argparse.Namespace) -> None:
    theirs = [name for name in runners if name.startswith(THEIRS)]
    for name in theirs:
        require_equal(what, name, runners[OURS](), runners[name]())
    seconds = race(runners, arguments.rounds, warm_up=2)
    best = min(theirs, key=lambda name: median(seconds[name]))
    for name, of_rounds in seconds.items():
        say(f"  {what:12} {name:24} {1e3 * median(of_rounds):8.1f} ms")
    middle, low, high = ratio(seconds, best, OURS)
    say(f"  {what:12} {best} over {OURS}: {middle:.2f} (quartiles {low:.2f} to {high:.2f})")


def require_equal(what: str, name: str, ours: list[Tensor], theirs: list[Tensor]) -> None:
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        off = float((mine - other).abs().max() / other.abs().max())
        if not off <= 1e-4:
            sys.exit(f"{what}: output or gradient {number} differs from {name} by {off:.1e} of its largest number")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.scan", description="The state-space scan in plain torch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
