import pytest
import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from millrace.megatron.expert_groups import choose_groups_by_their_best_two


@pytest.mark.parametrize(("topk", "groups", "chosen"), [(8, 8, 4), (3, 4, 2), (6, 4, 2), (5, 4, 3), (2, 8, 2)])
def test_megatrons_router_chooses_and_weighs_the_experts_that_transformers_does(
    topk: int, groups: int, chosen: int
) -> None:
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    config = DeepseekV3Config(
        hidden_size=32,
        n_routed_experts=32,
        num_experts_per_tok=topk,
        n_group=groups,
        topk_group=chosen,
        routed_scaling_factor=2.5,
    )
    router, generator = DeepseekV3TopkRouter(config), torch.Generator().manual_seed(1)
    router.weight.data = torch.randn(32, 32, generator=generator)
    router.e_score_correction_bias.copy_(0.3 * torch.randn(32, generator=generator))
    logits, weights, experts = router(torch.randn(400, 32, generator=generator))
    choose_groups_by_their_best_two()
    probabilities, chosen_map = topk_routing_with_score_function(
        logits,
        topk,
        num_groups=groups,
        group_topk=chosen,
        scaling_factor=2.5,
        score_function="sigmoid",
        expert_bias=router.e_score_correction_bias,
    )
    expected = torch.zeros_like(logits).scatter(1, experts, weights)
    assert torch.equal(chosen_map, expected > 0)
    torch.testing.assert_close(probabilities, expected)
