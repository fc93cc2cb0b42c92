"""A trainer's policy made of a transformers model: what a weight sync needs, and the truth to compare engines with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from millrace.config.schema import FleetConfig
from millrace.data.batch import TokenBatch
from millrace.rollout.weight_sync import WeightSync


class TransformersPolicy:
    def __init__(self, checkpoint: Path) -> None:
        self.load(checkpoint)

    def load(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def hf_tensors(self, *, few_owners: bool = False) -> Iterator[tuple[str, Tensor]]:
        with safe_open(self._checkpoint / "model.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)

    def owned_bytes(self, *, few_owners: bool = False) -> int:
        return sum(tensor.nbytes for _, tensor in self.hf_tensors())

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch, *, temperature: float = 1.0) -> tuple[Tensor, None]:
        scores = []
        for tokens in batch.sequences():
            logp = torch.log_softmax(self._model(tokens[None]).logits[0].float() / temperature, -1)
            scores += [torch.zeros(1), logp[:-1].gather(1, tokens[1:, None])[:, 0]]
        return torch.cat(scores), None

    def sequence_logprobs(self, tokens: tuple[int, ...], temperature: float = 1.0) -> list[float]:
        return self.logprobs(TokenBatch.from_sequences([tokens]), temperature=temperature)[0].tolist()

    @torch.no_grad()
    def is_greedy(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> bool:
        """Whether each token of the answer is the likeliest after those before it: `greedy` at the cost of one pass."""
        best = self._model(torch.tensor([prompt + answer])).logits[0].argmax(-1).tolist()
        return tuple(best[len(prompt) - 1 : -1]) == answer

    @torch.no_grad()
    def greedy(self, prompt: tuple[int, ...], length: int) -> tuple[int, ...]:
        tokens = list(prompt)
        for _ in range(length):
            tokens.append(int(self._model(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tuple(tokens[len(prompt) :])


class ShareOfPolicy(TransformersPolicy):
    """One of `world` ranks: owns every world-th tensor, so that fused layers get their parts from several ranks."""

    def __init__(self, checkpoint: Path, rank: int, world: int) -> None:
        super().__init__(checkpoint)
        self._rank, self._world = rank, world

    def hf_tensors(self, *, few_owners: bool = False) -> Iterator[tuple[str, Tensor]]:
        for number, pair in enumerate(super().hf_tensors()):
            if number % self._world == self._rank:
                yield pair


def join_trainer(rank: int, world: int, port: int) -> None:
    """Become one of the ranks of a gloo group on this machine."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)


def _other_rank(checkpoint: str, port: str) -> None:
    """Rank 1 of a trainer of two, which has no fleet: one sync, and its report on stdout."""
    join_trainer(1, 2, int(port))
    config = FleetConfig(bucket_bytes=64 << 10, probe_tolerance=1e-4)
    sync = WeightSync(ShareOfPolicy(Path(checkpoint), 1, 2), None, config, SimpleNamespace(rank=1, world=2))
    sys.stdout.write(f"{sync.push(11).version}")
    dist.destroy_process_group()


if __name__ == "__main__":
    _other_rank(*sys.argv[1:])
