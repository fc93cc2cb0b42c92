"""Reading the config.json of the Nemotron-H hybrid."""

import json
from pathlib import Path

import pytest
from tiny_checkpoints import write_checkpoint

from millrace.config.errors import ConfigError
from millrace.config.model_shape import LayerShape, ModelShape

PATTERN = "ME*-ME"
LAYERS = {
    "M": LayerShape(mixer="mamba", ffn=None),
    "E": LayerShape(mixer=None, ffn="experts"),
    "*": LayerShape(mixer="attention", ffn=None),
    "-": LayerShape(mixer=None, ffn="dense"),
}


def config(folder: Path, **facts: object) -> Path:
    """A config.json with `facts` in it, and without those that are None."""
    write_checkpoint("nemotron_h", folder, hybrid_override_pattern=PATTERN)
    written = json.loads((folder / "config.json").read_text()) | facts
    (folder / "config.json").write_text(json.dumps({key: value for key, value in written.items() if value is not None}))
    return folder


@pytest.mark.parametrize("latent", [None, 32])
def test_a_hybrid_is_read_and_its_parameters_are_counted_as_transformers_counts_them(
    tmp_path: Path, latent: int | None
) -> None:
    import torch
    import transformers

    folder = config(tmp_path, moe_latent_size=latent)
    shape = ModelShape.from_hf(folder)
    assert shape.layers == tuple(LAYERS[letter] for letter in PATTERN)
    assert (shape.position, shape.gated, shape.activation) == ("none", False, "relu2")
    assert (shape.router_score, shape.router_bias, shape.router_scale) == ("sigmoid", True, 2.5)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    assert shape.parameter_count() == sum(p.numel() for p in model.parameters())


def test_what_transformers_saves_reads_as_what_was_released(tmp_path: Path) -> None:
    import transformers

    released = config(tmp_path / "released")
    transformers.AutoConfig.from_pretrained(released).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "hybrid_override_pattern" not in saved and saved["layers_block_type"][1] == "moe"
    (tmp_path / "saved" / "config.json").write_text(json.dumps(saved | {"architectures": ["NemotronHForCausalLM"]}))
    assert ModelShape.from_hf(tmp_path / "saved") == ModelShape.from_hf(released)
    old = [{"linear_attention": "mamba", "full_attention": "attention"}.get(k, k) for k in saved["layers_block_type"]]
    assert ModelShape.from_hf(config(tmp_path / "old", hybrid_override_pattern=None, layers_block_type=old)) == (
        ModelShape.from_hf(released)
    )


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"hybrid_override_pattern": "MX*-ME"}, "hybrid_override_pattern names a layer 'X'"),
        ({"hybrid_override_pattern": None}, "layers_block_type is missing"),
        ({"num_hidden_layers": 7}, "num_hidden_layers is 7, but hybrid_override_pattern names 6 layers"),
        ({"mamba_num_heads": 7}, "mamba_num_heads 7 is not a multiple of n_groups 2"),
        ({"use_conv_bias": False}, "use_conv_bias is false"),
        ({"time_step_limit": [0.001, 1.0]}, "without a limit only, as Megatron-Core and vLLM do"),
        ({"mlp_hidden_act": "gelu"}, "mlp_hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"tie_word_embeddings": True}, "a head of its own"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is not 0"),
        ({"residual_in_fp32": True}, "residual_in_fp32 is true"),
    ],
)
def test_what_is_not_built_is_refused_by_its_key(tmp_path: Path, facts: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        ModelShape.from_hf(config(tmp_path, **facts))
    assert any(reason in problem for problem in refusal.value.problems), refusal.value.problems
    assert str(tmp_path / "config.json") in refusal.value.problems[0]
