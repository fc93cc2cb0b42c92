"""DeepSeek-V3: latent attention; dense SwiGLU in the first layers, then routed experts beside a shared one."""

from __future__ import annotations

import torch

from millrace.converters.families.blocks import EXPERT, MODEL, NORMS, ROUTER, SWIGLU
from millrace.converters.mapping import Family, Line, ModelFacts, dimensions

QUERY = (Line("self_attention.linear_q_proj.weight", "column", {"self_attn.q_proj.weight": "q hidden"}),)

LOW_RANK_QUERY = (
    Line("self_attention.linear_q_down_proj.weight", "replicated", {"self_attn.q_a_proj.weight": "q_rank hidden"}),
    Line("self_attention.q_layernorm.weight", "replicated", {"self_attn.q_a_layernorm.weight": "q_rank"}),
    Line("self_attention.linear_q_up_proj.weight", "column", {"self_attn.q_b_proj.weight": "q q_rank"}),
)

KEY_VALUE_AND_OUTPUT = (
    Line(
        "self_attention.linear_kv_down_proj.weight",
        "replicated",
        {"self_attn.kv_a_proj_with_mqa.weight": "kv_rank+rope hidden"},
    ),
    Line("self_attention.kv_layernorm.weight", "replicated", {"self_attn.kv_a_layernorm.weight": "kv_rank"}),
    # Head by head its key's part without position, then its value, in both; so is a head's query and its output.
    Line("self_attention.linear_kv_up_proj.weight", "column", {"self_attn.kv_b_proj.weight": "k+v kv_rank"}),
    Line("self_attention.linear_proj.weight", "row", {"self_attn.o_proj.weight": "hidden v"}),
)

ROUTED = (
    *ROUTER,
    Line(
        "mlp.router.expert_bias",
        "replicated",
        {"mlp.gate.e_score_correction_bias": "experts"},
        dtype=torch.float32,
    ),
    Line(
        "mlp.shared_experts.linear_fc1.weight",
        "column",
        {
            "mlp.shared_experts.gate_proj.weight": "shared_ffn hidden",
            "mlp.shared_experts.up_proj.weight": "shared_ffn hidden",
        },
    ),
    Line("mlp.shared_experts.linear_fc2.weight", "row", {"mlp.shared_experts.down_proj.weight": "hidden shared_ffn"}),
)


def layer(facts: ModelFacts, layer: int) -> tuple[Line, ...]:
    queries = QUERY if facts.latent_attention.q_rank is None else LOW_RANK_QUERY
    return NORMS + queries + KEY_VALUE_AND_OUTPUT + (ROUTED if facts.layers[layer].ffn == "experts" else SWIGLU)


def latent_dimensions(facts: ModelFacts) -> dict[str, int]:
    latent, heads = facts.latent_attention, facts.num_heads
    return dimensions(facts) | {
        "q_rank": latent.q_rank or 0,
        "kv_rank": latent.kv_rank,
        "rope": latent.rope_dim,
        "q": heads * (latent.nope_dim + latent.rope_dim),
        "k": heads * latent.nope_dim,
        "v": heads * latent.v_dim,
    }


FAMILY = Family(
    model=MODEL,
    layer=layer,
    expert=EXPERT,
    dimensions=latent_dimensions,
    # Multi-token-prediction layers stand behind the others in a checkpoint.
    unread=lambda facts: tuple(f"model.layers.{facts.num_layers + n}." for n in range(facts.prediction_layers)),
)
