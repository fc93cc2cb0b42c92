"""Experts without a gate, against one token at a time. In a whole engine they run in tests/e2e/test_family_sync.py."""

import pytest
import torch

cpu_experts = pytest.importorskip("millrace.rollout.cpu_experts", reason="needs vLLM's CPU build")


def one_by_one(x, up, down, weights, experts, activation):
    rows = []
    for token in range(len(x)):
        row = torch.zeros(down.shape[1], dtype=torch.float64)
        for weight, expert in zip(weights[token], experts[token], strict=True):
            row += weight.double() * (down[expert].double() @ activation(up[expert].double() @ x[token].double()))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("activation", cpu_experts.ACTIVATIONS, ids=lambda activation: activation.value)
@pytest.mark.parametrize(("tokens", "top", "experts"), [(1, 2, 8), (37, 3, 8), (5, 1, 64), (64, 4, 4)])
def test_every_token_gets_the_weighted_sum_of_its_experts(activation, tokens, top, experts):
    torch.manual_seed(tokens)
    x, up, down = torch.randn(tokens, 32), torch.randn(experts, 48, 32) / 6, torch.randn(experts, 32, 48) / 7
    chosen = torch.rand(tokens, experts).topk(top).indices.to(torch.int32)
    weights = torch.rand(tokens, top)
    function = cpu_experts.ACTIVATIONS[activation]
    result = cpu_experts.apply_experts(x, up, down, weights, chosen, function)
    assert result.dtype == torch.float32
    torch.testing.assert_close(
        result.double(), one_by_one(x, up, down, weights, chosen, function), rtol=1e-5, atol=1e-5
    )


def test_bfloat16_is_summed_in_float32():
    torch.manual_seed(0)
    x, up, down = (torch.randn(*size, dtype=torch.bfloat16) for size in ((9, 32), (4, 64, 32), (4, 32, 64)))
    chosen, weights = torch.rand(9, 4).topk(2).indices, torch.rand(9, 2)
    result = cpu_experts.apply_experts(x, up, down, weights, chosen, torch.relu)
    single = [
        cpu_experts.apply_experts(x, up, down, weights[:, k : k + 1], chosen[:, k : k + 1], torch.relu) for k in (0, 1)
    ]
    torch.testing.assert_close(result, single[0] + single[1], rtol=1e-6, atol=1e-6)


def test_no_tokens_give_no_rows():
    empty = cpu_experts.apply_experts(
        torch.zeros(0, 8),
        torch.zeros(2, 4, 8),
        torch.zeros(2, 8, 4),
        torch.zeros(0, 2),
        torch.zeros(0, 2).long(),
        torch.relu,
    )
    assert empty.shape == (0, 8)
