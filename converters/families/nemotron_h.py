"""Nemotron-H: a hybrid whose layers are one part each, a Mamba-2 mixer, attention, a feed-forward or experts.

No positional embedding, feed-forward parts without a gate, routed experts beside one that every token goes through.
"""

from __future__ import annotations

import torch

from millrace.converters.mapping import Family, Line, ModelFacts, dimensions

MODEL = (
    Line("embedding.word_embeddings.weight", "vocabulary", {"backbone.embeddings.weight": "vocab hidden"}),
    Line("decoder.final_layernorm.weight", "replicated", {"backbone.norm_f.weight": "hidden"}),
    Line("output_layer.weight", "vocabulary", {"lm_head.weight": "vocab hidden"}),
)

MAMBA = (
    Line("norm.weight", "replicated", {"norm.weight": "hidden"}),
    # What a token is projected to: gate z, input x, B and C of each group, a time step for each head.
    Line("mixer.in_proj.weight", "sections", {"mixer.in_proj.weight": "inner+inner+states+states+heads hidden"}),
    Line("mixer.conv1d.weight", "sections", {"mixer.conv1d.weight": "inner+states+states 1 taps"}),
    Line("mixer.conv1d.bias", "sections", {"mixer.conv1d.bias": "inner+states+states"}),
    Line("mixer.dt_bias", "column", {"mixer.dt_bias": "heads"}),
    Line("mixer.A_log", "column", {"mixer.A_log": "heads"}),
    Line("mixer.D", "column", {"mixer.D": "heads"}),
    Line("mixer.norm.weight", "column", {"mixer.norm.weight": "inner"}),
    Line("mixer.out_proj.weight", "row", {"mixer.out_proj.weight": "hidden inner"}),
)

ATTENTION = (
    Line("input_layernorm.weight", "replicated", {"norm.weight": "hidden"}),
    Line(
        "self_attention.linear_qkv.weight",
        "gqa",
        {"mixer.q_proj.weight": "q hidden", "mixer.k_proj.weight": "kv hidden", "mixer.v_proj.weight": "kv hidden"},
    ),
    Line("self_attention.linear_proj.weight", "row", {"mixer.o_proj.weight": "hidden q"}),
)

FFN_NORM = (Line("pre_mlp_layernorm.weight", "replicated", {"norm.weight": "hidden"}),)

FFN = (
    Line("mlp.linear_fc1.weight", "column", {"mixer.up_proj.weight": "ffn hidden"}),
    Line("mlp.linear_fc2.weight", "row", {"mixer.down_proj.weight": "hidden ffn"}),
)

ROUTER = (
    Line("mlp.router.weight", "replicated", {"mixer.gate.weight": "experts hidden"}),
    Line(
        "mlp.router.expert_bias", "replicated", {"mixer.gate.e_score_correction_bias": "experts"}, dtype=torch.float32
    ),
)

LATENT = (
    Line("mlp.fc1_latent_proj.weight", "replicated", {"mixer.fc1_latent_proj.weight": "expert_hidden hidden"}),
    Line("mlp.fc2_latent_proj.weight", "replicated", {"mixer.fc2_latent_proj.weight": "hidden expert_hidden"}),
)

SHARED_EXPERT = (
    Line(
        "mlp.shared_experts.linear_fc1.weight", "column", {"mixer.shared_experts.up_proj.weight": "shared_ffn hidden"}
    ),
    Line("mlp.shared_experts.linear_fc2.weight", "row", {"mixer.shared_experts.down_proj.weight": "hidden shared_ffn"}),
)

EXPERT = (
    Line("linear_fc1.weight", "column", {"up_proj.weight": "expert_ffn expert_hidden"}),
    Line("linear_fc2.weight", "row", {"down_proj.weight": "expert_hidden expert_ffn"}),
)


def layer(facts: ModelFacts, layer: int) -> tuple[Line, ...]:
    kind = facts.layers[layer]
    if kind.mixer == "mamba":
        return MAMBA
    if kind.mixer == "attention":
        return ATTENTION
    if kind.ffn == "dense":
        return FFN_NORM + FFN
    return FFN_NORM + ROUTER + SHARED_EXPERT + (LATENT if facts.moe_latent_size else ())


def sizes(facts: ModelFacts) -> dict[str, int]:
    """The words of this table: of the Mamba-2 mixers, and the width that routed experts read and write."""
    words = dimensions(facts) | {"expert_hidden": facts.moe_latent_size or facts.hidden_size}
    if (mamba := facts.mamba) is None:
        return words
    states = mamba.groups * mamba.state
    return words | {"inner": mamba.inner, "states": states, "heads": mamba.heads, "taps": mamba.conv_kernel}


FAMILY = Family(
    model=MODEL,
    layer=layer,
    hf_layer="backbone.layers.{layer}.",
    expert=EXPERT,
    hf_expert="backbone.layers.{layer}.mixer.experts.{expert}.",
    dimensions=sizes,
)
