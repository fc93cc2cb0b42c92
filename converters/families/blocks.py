"""Lines that several families share: embeddings, grouped-query attention, SwiGLU, routed experts.

First the Megatron-Core parameter, then how it is cut over tensor-parallel ranks, then its Hugging Face tensors with
their dimensions.
"""

from __future__ import annotations

from millrace.converters.mapping import Line, ModelFacts

MODEL = (
    Line("embedding.word_embeddings.weight", "vocabulary", {"model.embed_tokens.weight": "vocab hidden"}),
    Line("decoder.final_layernorm.weight", "replicated", {"model.norm.weight": "hidden"}),
    Line("output_layer.weight", "vocabulary", {"lm_head.weight": "vocab hidden"}),
)

NORMS = (
    Line("input_layernorm.weight", "replicated", {"input_layernorm.weight": "hidden"}),
    Line("pre_mlp_layernorm.weight", "replicated", {"post_attention_layernorm.weight": "hidden"}),
)

ATTENTION = (
    Line(
        "self_attention.linear_qkv.weight",
        "gqa",
        {
            "self_attn.q_proj.weight": "q hidden",
            "self_attn.k_proj.weight": "kv hidden",
            "self_attn.v_proj.weight": "kv hidden",
        },
    ),
    Line("self_attention.linear_proj.weight", "row", {"self_attn.o_proj.weight": "hidden q"}),
)

ATTENTION_BIAS = (
    Line(
        "self_attention.linear_qkv.bias",
        "gqa",
        {"self_attn.q_proj.bias": "q", "self_attn.k_proj.bias": "kv", "self_attn.v_proj.bias": "kv"},
    ),
)

QK_NORM = (
    Line("self_attention.q_layernorm.weight", "replicated", {"self_attn.q_norm.weight": "head"}),
    Line("self_attention.k_layernorm.weight", "replicated", {"self_attn.k_norm.weight": "head"}),
)

SWIGLU = (
    Line(
        "mlp.linear_fc1.weight",
        "column",
        {"mlp.gate_proj.weight": "ffn hidden", "mlp.up_proj.weight": "ffn hidden"},
    ),
    Line("mlp.linear_fc2.weight", "row", {"mlp.down_proj.weight": "hidden ffn"}),
)

ROUTER = (Line("mlp.router.weight", "replicated", {"mlp.gate.weight": "experts hidden"}),)

EXPERT = (
    Line(
        "linear_fc1.weight",
        "column",
        {"gate_proj.weight": "expert_ffn hidden", "up_proj.weight": "expert_ffn hidden"},
    ),
    Line("linear_fc2.weight", "row", {"down_proj.weight": "hidden expert_ffn"}),
)


def attention_layer(facts: ModelFacts) -> tuple[Line, ...]:
    """Norms and attention of one layer, with biases and head norms where the family has them."""
    return NORMS + ATTENTION + (ATTENTION_BIAS if facts.attention_bias else ()) + (QK_NORM if facts.qk_norm else ())
