import math

import pytest
import torch

from millrace.config.schema import OptimizerConfig
from millrace.megatron.adam import GroupAdam
from millrace.megatron.optimizer import learning_rate


def test_warmup_rises_in_a_line_from_its_start_to_the_full_rate() -> None:
    config = OptimizerConfig(lr=1e-3, warmup_steps=4, warmup_from=2e-4)
    rates = [learning_rate(step, config, 100) for step in range(6)]
    assert rates == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3])


def test_cosine_passes_the_middle_and_stays_at_its_end() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.2, schedule="cosine", warmup_steps=10)
    assert learning_rate(10, config, 110) == pytest.approx(1.0)
    assert learning_rate(60, config, 110) == pytest.approx(0.6)
    assert learning_rate(35, config, 110) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(110, config, 110) == learning_rate(500, config, 110) == pytest.approx(0.2)


def test_linear_falls_evenly_over_decay_steps_rather_than_the_stage() -> None:
    config = OptimizerConfig(lr=1.0, schedule="linear", decay_steps=10)
    assert [learning_rate(step, config, 1000) for step in (0, 5, 10, 20)] == pytest.approx([1.0, 0.5, 0.0, 0.0])


def test_a_falling_schedule_without_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="decay_steps"):
        learning_rate(0, OptimizerConfig(schedule="cosine"), 0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("decoupled", [True, False])
def test_group_adam_equals_torch_adam_and_keeps_its_step_in_the_group(decoupled: bool, fused: bool) -> None:
    torch.manual_seed(0)
    ours = [torch.randn(5, 3, requires_grad=True), torch.randn(7, requires_grad=True)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    mine = GroupAdam(ours, adam_w_mode=decoupled, fused=fused, **options)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **options)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert set(mine.state[p]) == {"exp_avg", "exp_avg_sq"}
    assert mine.param_groups[0]["step"] == 5
