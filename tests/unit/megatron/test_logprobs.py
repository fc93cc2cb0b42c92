import pytest
import torch

from millrace.megatron.logprobs import VocabParallelLogProb, VocabularyShard, token_logprobs

TOKENS, HIDDEN, VOCABULARY, PADDED = 11, 6, 13, 16


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_are_exact_in_float64(chunk: int, temperature: float) -> None:
    hidden, weight, targets = inputs()

    def logp(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return VocabParallelLogProb.apply(hidden, weight, targets, temperature, VOCABULARY, chunk, None, False)[0]

    assert torch.autograd.gradcheck(logp, (hidden, weight))


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_logprobs_and_entropy_are_those_of_a_plain_softmax_over_the_real_vocabulary(chunk: int) -> None:
    hidden, weight, targets = inputs()
    logp, entropy = token_logprobs(
        hidden, weight, targets, temperature=0.8, vocab_size=VOCABULARY, chunk=chunk, group=None, entropy=True
    )
    expected = ((hidden @ weight[:VOCABULARY].T) / 0.8).log_softmax(-1)
    torch.testing.assert_close(logp, expected.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1).detach())
    assert not entropy.requires_grad


def test_padding_rows_get_no_gradient() -> None:
    hidden, weight, targets = inputs()
    logp, entropy = token_logprobs(hidden, weight, targets, temperature=1.0, vocab_size=VOCABULARY, chunk=4, group=None)
    logp.sum().backward()
    assert entropy is None
    assert weight.grad[VOCABULARY:].abs().max() == 0
    assert weight.grad[:VOCABULARY].abs().min() > 0


def test_rows_pick_which_hidden_states_speak() -> None:
    hidden, weight, targets = inputs()
    rows = torch.tensor([1, 4, 9])
    options = {"temperature": 1.0, "vocab_size": VOCABULARY, "chunk": 2, "group": None}
    whole, _ = token_logprobs(hidden, weight, targets, **options)
    some, _ = token_logprobs(hidden, weight, targets[rows], rows=rows, **options)
    torch.testing.assert_close(some, whole[rows])


def test_bfloat16_hidden_states_give_float32_logprobs() -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    logp, _ = token_logprobs(hidden, weight, targets, temperature=1.0, vocab_size=VOCABULARY, chunk=4, group=None)
    assert logp.dtype == torch.float32
    logp.sum().backward()
    assert weight.grad.dtype == hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("rank", "shard"), [(0, (0, 64)), (1, (64, 36)), (2, (128, 0)), (3, (192, 0))])
def test_a_rank_may_hold_padding_only(rank: int, shard: tuple[int, int]) -> None:
    assert VocabularyShard.of_rank(64, 100, rank) == shard
