"""MOPD's equations (arXiv 2603.19220, 2 to 4) on transformers models in float64, one sequence after the other.

Nothing of Millrace computes here. The batch that it makes is trained on by the ranks of test_distillation_layouts.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.data.batch import TokenBatch

LENGTHS = (7, 21, 12, 30, 9, 18, 5, 16)
PROMPTS = (2, 6, 3, 8, 2, 5, 1, 4)
TAUGHT = (1, 2, 0, 1, 2, 2, 0, 1)
"""The first teacher's sequences, the second's, and those that learn from their reward."""
TEACHERS = ("math", "chat")
TEMPERATURE = 0.8
LOW, HIGH = 0.5, 2.0
TOP_K = 24


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager").eval()


def log_softmaxes(model: Any, batch: TokenBatch) -> Tensor:
    """[N, V]: the distribution that each token was drawn from; first tokens of sequences have a row of zeros."""
    rows = []
    for tokens in batch.sequences():
        logits = model(tokens[None]).logits[0, :-1] / TEMPERATURE
        rows += [logits.new_zeros(1, logits.shape[1]), logits.log_softmax(-1)]
    return torch.cat(rows)


@torch.no_grad()
def make_batch(student: Any) -> TokenBatch:
    """Prompts have weight 0; about one answer token in five is far out of the band, the others well inside."""
    g = torch.Generator().manual_seed(11)
    tokens = [torch.randint(0, 320, (n,), generator=g).tolist() for n in LENGTHS]
    batch = TokenBatch.from_sequences(tokens)
    trained = torch.cat([torch.arange(n) >= p for n, p in zip(LENGTHS, PROMPTS, strict=True)])
    per_sequence = torch.tensor([1.0 / (n - p) / len(LENGTHS) for n, p in zip(LENGTHS, PROMPTS, strict=True)])
    sign = 2.0 * torch.randint(0, 2, trained.shape, generator=g) - 1
    far = torch.rand(trained.shape, generator=g) < 0.2
    mismatch = sign * torch.where(far, 1.2, 0.5 * torch.rand(trained.shape, generator=g))
    logp = log_softmaxes(student, batch).gather(1, batch.tokens[:, None])[:, 0]
    return batch.with_streams(
        weight=per_sequence[batch.segment_ids] * trained,
        taught=torch.tensor(TAUGHT, dtype=torch.float32)[batch.segment_ids],
        advantage=torch.randn(len(LENGTHS), generator=g)[batch.segment_ids],
        rollout_logp=(logp - mismatch).float(),
    )


def loss(
    student: Any, teachers: list[Any], batch: TokenBatch, signal: str, support: str, top_k: int
) -> tuple[Tensor, dict[str, float]]:
    """The loss in float64 with its graph, and the mean reverse KL to each teacher that has tokens."""
    streams = {name: values.double() for name, values in batch.streams.items()}
    ours = log_softmaxes(student, batch)
    with torch.no_grad():
        theirs = torch.stack([log_softmaxes(teacher, batch) for teacher in teachers])
    index = (streams["taught"].long() - 1).clamp(min=0)
    teacher = theirs[index, torch.arange(len(index))]
    logp, teacher_logp = (values.gather(1, batch.tokens[:, None])[:, 0] for values in (ours, teacher))

    ratio = (logp.detach() - streams["rollout_logp"]).exp()
    band = ((ratio >= LOW) & (ratio <= HIGH)).double()
    taught = streams["taught"] > 0
    if signal == "sampled":
        advantage = torch.where(taught, (teacher_logp - logp).detach(), streams["advantage"])
        per_token, reverse_kl = -ratio * band * advantage * logp, (logp - teacher_logp).detach()
    else:
        reverse_kl = full(ours, teacher) if signal == "full" else coarse(ours, teacher, support, top_k)
        per_token = band * torch.where(taught, reverse_kl, -ratio * streams["advantage"] * logp)
    means = {}
    for number, name in enumerate(TEACHERS, start=1):
        share = streams["weight"] * (streams["taught"] == number)
        if share.any():
            means[name] = float((share * reverse_kl.detach()).sum() / share.sum())
    return (streams["weight"] * per_token).sum(), means


def full(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours.exp() * (ours - theirs)).sum(-1)


def coarse(ours: Tensor, theirs: Tensor, support: str, top_k: int) -> Tensor:
    """The reverse KL over the support's tokens and one more token that stands for all others."""
    inside = (ours.detach() if support == "student" else theirs).topk(top_k).indices
    outside = torch.ones_like(ours).scatter(1, inside, 0.0)
    kept = (ours.exp() * (ours - theirs)).gather(1, inside).sum(-1)
    p, q = (ours.exp() * outside).sum(-1), (theirs.exp() * outside).sum(-1)
    rest = p > 0
    p, q = torch.where(rest, p, 1.0), torch.where(rest, q, 1.0)
    return kept + p * (p / q).log()


def gradients(student: Any, loss: Tensor) -> dict[str, Tensor]:
    """The loss's gradients under the names of the checkpoint's tensors."""
    student.zero_grad()
    loss.backward()
    found = {}
    for name, parameter in student.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(parameter.grad):
                at = name.removesuffix("gate_up_proj") + str(expert)
                found[f"{at}.gate_proj.weight"], found[f"{at}.up_proj.weight"] = both.chunk(2)
        elif name.endswith("experts.down_proj"):
            for expert, one in enumerate(parameter.grad):
                found[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = one
        else:
            found[name] = parameter.grad
    return {name: tensor.clone() for name, tensor in found.items()}
