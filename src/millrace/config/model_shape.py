"""The facts of a Hugging Face config.json that decide how the model is built, cut and converted.

Read with nothing but the standard library, so that `millrace check` needs neither torch nor transformers. Defaults of
keys that a config.json leaves out are those of the transformers classes of the family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.config.errors import ConfigError

FAMILIES = {"Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe", "LlamaForCausalLM": "llama"}
ROPE_TYPES = ("default", "linear", "llama3")
VOCAB_ROWS_PER_RANK = 64
"""Padded vocabulary rows of one tensor-parallel rank are a multiple of this, which keeps the last matmul aligned."""

_DEFAULT_POSITIONS = {"qwen3": 32768, "qwen3_moe": 32768, "llama": 2048}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    family: str
    """qwen3, qwen3_moe or llama."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    """Width of the dense feed-forward layers."""
    vocab_size: int
    tied_embeddings: bool
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    """None for plain RoPE, else the parameters with `rope_type` linear or llama3."""
    norm_eps: float
    max_position_embeddings: int
    qk_norm: bool
    attention_bias: bool
    """Always False: checkpoints with biases are refused."""
    num_experts: int
    """0 for a dense model."""
    experts_per_token: int
    moe_ffn_hidden_size: int
    """Width of one expert."""
    norm_topk_prob: bool
    """Whether the chosen experts' probabilities are scaled to sum to one."""
    moe_layer_mask: tuple[bool, ...]
    """One entry a layer: True where the feed-forward layer is a mixture of experts."""
    torch_dtype: str
    """Data type the checkpoint is stored in, as config.json names it."""

    @classmethod
    def from_hf(cls, path: str | Path) -> ModelShape:
        """Read `path`, a checkpoint's folder or its config.json. Raises ConfigError naming every problem."""
        return _Reader(*_read_config(Path(path))).shape()

    def padded_vocab_size(self, tp: int) -> int:
        """Smallest multiple of 64 * tp that holds the vocabulary."""
        rows = tp * VOCAB_ROWS_PER_RANK
        return -(-self.vocab_size // rows) * rows

    def attention_parameters(self) -> int:
        """Weights of the four projections of one layer."""
        return self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)

    def norm_parameters(self) -> int:
        """RMSNorm weights of one layer: before attention, before the feed-forward, and of queries and keys."""
        return 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)

    def dense_ffn_parameters(self) -> int:
        """Gate, up and down projection of one dense layer."""
        return 3 * self.hidden_size * self.ffn_hidden_size

    def expert_parameters(self) -> int:
        """Gate, up and down projection of one expert."""
        return 3 * self.hidden_size * self.moe_ffn_hidden_size

    def router_parameters(self) -> int:
        """Router weights of one mixture-of-experts layer."""
        return self.hidden_size * self.num_experts

    def parameter_count(self) -> int:
        """Parameters of the whole model; tied embeddings count once, vocabulary padding does not count."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self._count(embeddings, self.num_experts)

    def active_parameter_count(self) -> int:
        """Parameters that one token is multiplied with: its chosen experts', and of the vocabulary the output layer's
        (an embedding is looked up)."""
        return self._count(self.vocab_size * self.hidden_size, self.experts_per_token)

    def _count(self, embeddings: int, experts: int) -> int:
        moe_layers = sum(self.moe_layer_mask)
        per_moe_layer = experts * self.expert_parameters() + self.router_parameters()
        return (
            embeddings
            + self.hidden_size
            + self.num_layers * (self.attention_parameters() + self.norm_parameters())
            + (self.num_layers - moe_layers) * self.dense_ffn_parameters()
            + moe_layers * per_moe_layer
        )


def _read_config(path: Path) -> tuple[Path, dict[str, Any]]:
    file = path if path.suffix == ".json" else path / "config.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{file} does not exist: the model must be the folder of a Hugging Face checkpoint, with its config.json"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not valid JSON (line {error.lineno}: {error.msg}); fetch it again") from None
    if not isinstance(facts, dict):
        raise ConfigError(f"{file} must hold a JSON object, not a {type(facts).__name__}")
    return file, facts


class _Reader:
    """Takes facts out of a config.json and collects what is wrong with them."""

    def __init__(self, file: Path, facts: Mapping[str, Any]) -> None:
        self.file = file
        self.facts = facts
        self.problems: list[str] = []
        self.family = self._family()

    def shape(self) -> ModelShape:
        hidden, heads = self._size("hidden_size"), self._size("num_attention_heads")
        layers, moe = self._size("num_hidden_layers"), self.family == "qwen3_moe"
        theta, scaling = self._rope()
        shape = ModelShape(
            family=self.family,
            num_layers=layers,
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=self._size("num_key_value_heads", heads),
            head_dim=self._size("head_dim", 128 if self.family == "qwen3" else max(hidden // heads, 1)),
            ffn_hidden_size=self._size("intermediate_size"),
            vocab_size=self._size("vocab_size"),
            tied_embeddings=self._flag("tie_word_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=self._number("rms_norm_eps", 1e-6),
            max_position_embeddings=self._size("max_position_embeddings", _DEFAULT_POSITIONS[self.family]),
            qk_norm=self.family != "llama",
            attention_bias=False,
            num_experts=self._experts() if moe else 0,
            experts_per_token=self._size("num_experts_per_tok", 8) if moe else 0,
            moe_ffn_hidden_size=self._size("moe_intermediate_size") if moe else 0,
            norm_topk_prob=self._flag("norm_topk_prob") if moe else False,
            moe_layer_mask=self._moe_layers(layers) if moe else (False,) * layers,
            torch_dtype=str(self.facts.get("dtype") or self.facts.get("torch_dtype") or "float32"),
        )
        self._refuse_what_is_not_built(shape)
        if self.problems:
            raise ConfigError(self.problems)
        return shape

    def _problem(self, text: str) -> None:
        self.problems.append(f"{self.file}: {text}")

    def _family(self) -> str:
        architectures = self.facts.get("architectures") or []
        for name in architectures if isinstance(architectures, list) else [architectures]:
            if name in FAMILIES:
                return FAMILIES[name]
        if not architectures and self.facts.get("model_type") in FAMILIES.values():
            return str(self.facts["model_type"])
        named = ", ".join(map(str, architectures)) or f"model_type {self.facts.get('model_type')!r}"
        raise ConfigError(f"{self.file}: {named} is not supported; the families are {', '.join(FAMILIES)}")

    def _size(self, key: str, default: int | None = None) -> int:
        value = self.facts.get(key)
        value = default if value is None else value
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        self._problem(
            f"{key} is {'missing' if value is None else repr(value)}; a {self.family} needs a positive integer"
        )
        return 1

    def _number(self, key: str, default: float) -> float:
        value = self.facts.get(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        self._problem(f"{key} must be a number, not {value!r}")
        return default

    def _flag(self, key: str) -> bool:
        return bool(self.facts.get(key, False))

    def _experts(self) -> int:
        # transformers 5 writes num_local_experts, transformers 4 wrote num_experts.
        return self._size("num_experts" if "num_experts" in self.facts else "num_local_experts", 128)

    def _moe_layers(self, layers: int) -> tuple[bool, ...]:
        step, dense = self._size("decoder_sparse_step", 1), self.facts.get("mlp_only_layers") or []
        return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))

    def _rope(self) -> tuple[float, dict[str, Any] | None]:
        """RoPE base and scaling, from transformers 5's `rope_parameters` or the older pair of keys."""
        parameters = self.facts.get("rope_parameters") or self.facts.get("rope_scaling") or {}
        if not isinstance(parameters, dict):
            self._problem(f"rope_parameters must be an object, not {parameters!r}")
            return 1e4, None
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in ROPE_TYPES:
            self._problem(f"RoPE of type {kind!r} is not supported; the types are {', '.join(ROPE_TYPES)}")
        theta = parameters.get("rope_theta", self.facts.get("rope_theta", 1e4))
        if not isinstance(theta, int | float) or isinstance(theta, bool):
            self._problem(f"rope_theta must be a number, not {theta!r}")
            theta = 1e4
        if kind == "default":
            return float(theta), None
        scaling = {k: v for k, v in parameters.items() if k not in ("rope_theta", "type")} | {"rope_type": kind}
        return float(theta), scaling

    def _refuse_what_is_not_built(self, shape: ModelShape) -> None:
        facts = self.facts
        if facts.get("use_sliding_window") or "sliding_attention" in (facts.get("layer_types") or []):
            self._problem("sliding-window attention is in use; only full attention is supported")
        for key in ("attention_bias", "mlp_bias"):
            if facts.get(key):
                self._problem(f"{key} is true; only models without biases are supported")
        if facts.get("hidden_act", "silu") != "silu":
            self._problem(f"hidden_act is {facts['hidden_act']!r}; only silu (SwiGLU) is supported")
        if facts.get("quantization_config"):
            self._problem("the checkpoint is quantized; start from its float32 or bfloat16 original")
        if shape.num_heads % shape.num_kv_heads:
            self._problem(
                f"{shape.num_heads} attention heads are not a multiple of {shape.num_kv_heads} key/value heads"
            )
        if shape.head_dim % 2:
            self._problem(f"head_dim {shape.head_dim} is odd; RoPE needs an even one")
        if shape.num_experts and shape.experts_per_token > shape.num_experts:
            self._problem(
                f"num_experts_per_tok {shape.experts_per_token} is larger than the {shape.num_experts} experts"
            )
