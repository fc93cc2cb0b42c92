"""The vocabulary-parallel reverse KL on one rank, against plain softmaxes in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.data.batch import TokenBatch
from millrace.megatron.divergence import (
    Divergence,
    TaughtTokens,
    TeacherRows,
    TeacherStates,
    TopK,
    VocabParallelReverseKL,
    taught_logprobs,
)
from millrace.megatron.microbatch import MicroBatch, make_micro_batch

TAUGHT, HIDDEN, VOCABULARY, PADDED = (5, 0, 6), 6, 13, 16
SUPPORTS = [None, TopK(4, "student"), TopK(4, "teacher"), TopK(VOCABULARY, "student"), TopK(1, "teacher")]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, list[TeacherRows]]:
    """Of three teachers the second has no token in this micro-batch."""
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    hidden, weight = normal(sum(TAUGHT), HIDDEN).requires_grad_(), normal(PADDED, HIDDEN).requires_grad_()
    teachers = [
        TeacherRows(torch.arange(n), torch.arange(n), normal(n, HIDDEN), normal(PADDED, HIDDEN)) for n in TAUGHT
    ]
    return hidden, weight, torch.randint(0, VOCABULARY, (sum(TAUGHT),), generator=g), teachers


def log_softmaxes(hidden: Tensor, weight: Tensor, teachers: list[TeacherRows], temperature: float) -> list[Tensor]:
    """log p and log q [T, V]"""
    logits = torch.cat([t.hidden @ t.head_weight[:VOCABULARY].T for t in teachers])
    return [(z / temperature).log_softmax(-1) for z in (hidden @ weight[:VOCABULARY].T, logits)]


def plain_reverse_kl(log_p: Tensor, log_q: Tensor, top_k: TopK | None) -> Tensor:
    if top_k is None:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    judge = log_p if top_k.of == "student" else log_q
    inside = torch.zeros_like(log_p, dtype=torch.bool).scatter_(1, judge.topk(top_k.size).indices, True)
    kept = (log_p.exp() * (log_p - log_q) * inside).sum(-1)
    if inside.all():
        return kept
    rest_p, rest_q = ((log.exp() * ~inside).sum(-1) for log in (log_p, log_q))
    return kept + rest_p * (rest_p / rest_q).log()


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("top_k", SUPPORTS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_are_those_of_plain_softmaxes(chunk: int, top_k: TopK | None, temperature: float) -> None:
    hidden, weight, targets, teachers = inputs()
    logp, entropy, found = VocabParallelReverseKL.apply(
        hidden, weight, targets, teachers, top_k, temperature, VOCABULARY, chunk, None, True
    )
    log_p, log_q = log_softmaxes(hidden, weight, teachers, temperature)
    expected = plain_reverse_kl(log_p, log_q, top_k)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logp, log_p.gather(1, targets[:, None])[:, 0].detach())
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1).detach())
    assert not logp.requires_grad and not entropy.requires_grad

    weights = torch.randn(len(found), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((weights * found).sum(), (hidden, weight))
    for gradient, plain in zip(
        gradients, torch.autograd.grad((weights * expected).sum(), (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(gradient, plain, rtol=1e-10, atol=1e-12)


def test_the_divergence_grows_with_the_support_to_the_full_one() -> None:
    hidden, weight, targets, teachers = inputs()
    found = []
    for top_k in (*(TopK(k, "student") for k in range(1, VOCABULARY + 1)), None):
        *_, values = VocabParallelReverseKL.apply(
            hidden, weight, targets, teachers, top_k, 1.0, VOCABULARY, 4, None, False
        )
        found.append(values.detach())
    assert (found[0] > 0).all()
    assert all((larger >= smaller - 1e-12).all() for smaller, larger in itertools.pairwise(found))
    assert (found[0] < found[-1] - 0.01).all()
    torch.testing.assert_close(found[-2], found[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("top_k", SUPPORTS, ids=str)
def test_a_student_equal_to_its_teacher_is_left_alone(top_k: TopK | None) -> None:
    hidden, weight, targets, _ = inputs()
    rows = torch.arange(len(hidden))
    same = [TeacherRows(rows, rows, hidden.detach(), weight.detach())]
    *_, values = VocabParallelReverseKL.apply(hidden, weight, targets, same, top_k, 1.0, VOCABULARY, 4, None, False)
    torch.testing.assert_close(values, torch.zeros_like(values))
    for gradient in torch.autograd.grad(values.sum(), (hidden, weight)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("top_k", [None, TopK(3, "student")], ids=str)
def test_sure_models_give_finite_values(top_k: TopK | None) -> None:
    """Logits in the hundreds leave exactly 0 for most tokens, and for the rest, in float32."""
    hidden, weight, targets, teachers = inputs(torch.float32)
    loud = [teacher._replace(hidden=100 * teacher.hidden) for teacher in teachers]
    *_, values = VocabParallelReverseKL.apply(
        100 * hidden, weight, targets, loud, top_k, 1.0, VOCABULARY, 4, None, False
    )
    values.sum().backward()
    assert values.isfinite().all() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_padding_rows_get_no_gradient_and_bfloat16_gives_float32() -> None:
    hidden, weight, targets, teachers = inputs(torch.bfloat16)
    *_, values = VocabParallelReverseKL.apply(hidden, weight, targets, teachers, None, 1.0, VOCABULARY, 4, None, False)
    values.sum().backward()
    assert values.dtype == torch.float32 and weight.grad.dtype == torch.bfloat16
    assert weight.grad[VOCABULARY:].abs().max() == 0 and weight.grad[:VOCABULARY].abs().min() > 0


class LargestAllocation(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("top_k", [None, TopK(8, "student"), TopK(8, "teacher")], ids=str)
def test_the_chunk_bounds_the_largest_tensor_of_forward_and_backward(top_k: TopK | None) -> None:
    tokens, hidden_size, vocabulary = 1024, 4, 512
    hidden, weight = torch.randn(tokens, hidden_size).requires_grad_(), torch.randn(vocabulary, hidden_size)
    rows = torch.arange(tokens)
    teacher = TeacherRows(rows, rows, torch.randn(tokens, hidden_size), torch.randn(vocabulary, hidden_size))
    targets = torch.randint(0, vocabulary, (tokens,))
    for chunk in (64, 128, 256):
        with LargestAllocation() as largest:
            *_, values = VocabParallelReverseKL.apply(
                hidden, weight.requires_grad_(), targets, [teacher], top_k, 0.7, vocabulary, chunk, None, True
            )
            values.sum().backward()
        assert largest.elements == chunk * vocabulary


def micro_batch() -> tuple[MicroBatch, TokenBatch]:
    """Sequences of reward, the second teacher, the first one; prompts without weight."""
    lengths, taught = (4, 5, 3), (0, 2, 1)
    g = torch.Generator().manual_seed(3)
    batch = TokenBatch.from_sequences([torch.randint(0, VOCABULARY, (n,), generator=g).tolist() for n in lengths])
    ids = batch.segment_ids
    weight = torch.ones(len(ids)).index_fill(0, torch.tensor([0, 4, 5, 9]), 0.0)
    batch = batch.with_streams(weight=weight, taught=torch.tensor(taught, dtype=torch.float32)[ids])
    return make_micro_batch(batch, [0, 1, 2], 8, torch.device("cpu")), batch


def taught_values(states: list[int]) -> tuple[TaughtTokens, Tensor, Tensor]:
    part, _ = micro_batch()
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(part.tokens.numel(), HIDDEN, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(PADDED, HIDDEN, generator=g, dtype=torch.float64)
    teachers = [
        TeacherStates([torch.randn(n, HIDDEN, generator=g, dtype=torch.float64)], torch.randn(PADDED, HIDDEN).double())
        for n in states
    ]
    values = taught_logprobs(
        hidden, weight, part, Divergence(teachers), temperature=1.0, vocab_size=VOCABULARY, chunk=2, group=None
    )
    return values, hidden, weight


def test_each_token_has_a_log_prob_or_a_divergence_with_gradient() -> None:
    values, hidden, weight = taught_values([2, 3])
    part, _ = micro_batch()
    assert values.entropy is None
    rows = part.trained_rows
    log_p = (hidden @ weight[:VOCABULARY].T).log_softmax(-1)
    expected = torch.zeros(part.shown, dtype=torch.float64).index_copy(
        0, rows + 1, log_p[rows].gather(1, part.tokens[rows + 1, None])[:, 0]
    )
    torch.testing.assert_close(values.logp, expected)
    assert (values.divergence != 0).tolist() == [False] * 4 + [False, False, True, True, True] + [False, True, True]
    (from_logp,) = torch.autograd.grad(values.logp.sum(), hidden, retain_graph=True)
    (from_divergence,) = torch.autograd.grad(values.divergence.sum(), hidden)
    assert from_logp.abs().sum(1).nonzero()[:, 0].tolist() == [0, 1, 2]
    assert from_divergence.abs().sum(1).nonzero()[:, 0].tolist() == [5, 6, 7, 9, 10]


def test_states_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="teacher 2 has states of 4 tokens for micro-batch 0, but the batch has 3"):
        taught_values([2, 4])
