"""LoRA adapters at every parallel layout, their checkpoints and their exports, against one rank and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_data import example_batch, example_tokens
from ranks import launch
from safetensors.torch import load_file
from test_layouts import _logp, difference
from tiny_checkpoints import write_checkpoint
from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.config.plan import _adapter_parameters
from millrace.config.schema import LoraConfig, ParallelConfig
from millrace.ports import free_port

LORA = {"rank": 4, "alpha": 8.0}
SOME = {"rank": 4, "alpha": 16.0, "rslora": True, "targets": ["q_proj", "v_proj", "down_proj"]}
LATE = {"rank": 4, "alpha": 8.0, "targets": ["up_proj"]}
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3": {
        "tp2": {"tp": 2},
        "tp2sp": {"tp": 2, "sequence_parallel": True},
        "pp2": {"pp": 2},
        "dp2": {"dp": 2},
        "cp2": {"cp": 2},
        "tp2pp2": {"tp": 2, "pp": 2},
    },
    "qwen3_moe": {
        "ep2": {"dp": 2, "ep": 2},
        "pp2": {"pp": 2},
        "tp2etp2": {"tp": 2, "etp": 2, "sequence_parallel": True},
        "tp2etp1": {"tp": 2, "sequence_parallel": True},
        "tp2pp2ep2": {"tp": 2, "pp": 2, "ep": 2, "sequence_parallel": True},
    },
    "deepseek_v3": {"tp2ep2": {"tp": 2, "ep": 2, "sequence_parallel": True}},
    "gemma3_text": {"tp2sp": {"tp": 2, "sequence_parallel": True}},
    "nemotron_h": {"tp2ep2": {"tp": 2, "ep": 2, "sequence_parallel": True}},
}
ONE = [f"{model}-one" for model in LAYOUTS]
IDS = [f"{model}-{layout}" for model, layouts in LAYOUTS.items() for layout in layouts]

Found = dict[str, list[dict[str, Any]]]
"""Name of a case -> what each rank found."""


def case(name: str, model: str, parallel: dict[str, Any], work: str = "layout", **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "model": model,
        "parallel": parallel,
        "work": work,
        "trainer": {},
        "dtype": "float32",
        "lora": LORA,
        **more,
    }


def cases() -> list[dict[str, Any]]:
    """Those of one rank first, then of two, then of four."""
    sharded, full = {"distributed_optimizer": True}, {"recompute": "full"}
    dropout = {**LORA, "dropout": 0.2}
    sp = {"tp": 2, "sequence_parallel": True}
    one = [case(f"{model}-one", model, {}) for model in LAYOUTS]
    one += [case(f"{model}-frozen", model, {}, "frozen") for model in LAYOUTS]
    one += [
        case("qwen3-recomputed", "qwen3", {}, trainer=full),
        case("qwen3-some-one", "qwen3", {}, lora=SOME),
        case("qwen3-export", "qwen3", {}, "export", lora=SOME),
    ]
    two = [
        case("qwen3-some-tp2sp", "qwen3", sp, lora=SOME),
        case("qwen3-dp2-sharded", "qwen3", {"dp": 2}, trainer=sharded),
        case("qwen3-resume-tp2sp", "qwen3", sp, "resume"),
        case("qwen3-resume-dropout", "qwen3", sp, "resume", lora=dropout),
        case("qwen3-resume-bfloat16", "qwen3", {"dp": 2}, "resume", trainer=sharded, dtype="bfloat16"),
        case("qwen3_moe-resume-ep2", "qwen3_moe", {"dp": 2, "ep": 2}, "resume"),
        # The layers of the first stage have no adapters.
        case("nemotron_h-resume-pp2", "nemotron_h", {"pp": 2}, "resume", lora=LATE, dtype="bfloat16"),
        case("qwen3_moe-export-ep2", "qwen3_moe", {"dp": 2, "ep": 2}, "export"),
        case("qwen3-pp2-from-tp2sp", "qwen3", {"pp": 2}, "elsewhere", source="qwen3-resume-tp2sp"),
        case("qwen3_moe-tp2etp2-from-ep2", "qwen3_moe", LAYOUTS["qwen3_moe"]["tp2etp2"], "elsewhere",
             source="qwen3_moe-resume-ep2"),
    ]  # fmt: skip
    four: list[dict[str, Any]] = []
    for model, layouts in LAYOUTS.items():
        for layout, parallel in layouts.items():
            (two if ranks_of(parallel) == 2 else four).append(case(f"{model}-{layout}", model, parallel))
    return one + two + four


def ranks_of(parallel: dict[str, Any]) -> int:
    return ParallelConfig(**parallel).world_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def checkpoints(folder: Path) -> dict[str, Path]:
    return {
        "qwen3": write_checkpoint("qwen3", folder / "qwen3", num_hidden_layers=2, tied=True),
        "qwen3_moe": write_checkpoint("qwen3_moe", folder / "qwen3_moe", num_hidden_layers=2),
        "deepseek_v3": write_checkpoint("deepseek_v3", folder / "deepseek_v3", num_hidden_layers=2),
        "gemma3_text": write_checkpoint("gemma3_text", folder / "gemma3_text", num_hidden_layers=2),
        "nemotron_h": write_checkpoint("nemotron_h", folder / "nemotron_h", hybrid_override_pattern="M*E-"),
    }


@pytest.fixture(scope="module")
def found(checkpoints: dict[str, Path], folder: Path) -> Found:
    """Three launches for all cases of this file."""
    results: Found = {}
    for world in (1, 2, 4):
        at = folder / f"ranks-{world}"
        at.mkdir()
        these = [one for one in cases() if ranks_of(one["parallel"]) == world]
        for one in these:
            one.update(model=str(checkpoints[one["model"]]), port=free_port(), folder=str(folder))
        (at / "cases.json").write_text(json.dumps(these))
        launch(Path(__file__).with_name("lora_worker.py"), world, [str(at / "cases.json"), str(at)], 900)
        for one in these:
            files = [at / f"{one['name']}-{rank}.pt" for rank in range(world)]
            results[one["name"]] = [torch.load(file, weights_only=False) for file in files]
    return results


def whole(ranks: list[dict[str, Any]], key: str) -> dict[str, Tensor]:
    """The tensors of all ranks; each may come from one rank only."""
    tensors: dict[str, Tensor] = {}
    for rank in ranks:
        assert not tensors.keys() & rank[key].keys()
        tensors |= rank[key]
    return tensors


@pytest.mark.parametrize("name", IDS)
def test_each_layout_adapts_as_one_rank_does(name: str, found: Found, record_property: Any) -> None:
    ranks, one = found[name], found[f"{name.split('-')[0]}-one"]
    for key in ("adapters", "merged"):
        assert difference(whole(ranks, key), whole(one, key)) <= 1e-6, key
    worst = difference(whole(ranks, "gradients"), whole(one, "gradients"))
    record_property("gradients", worst)
    assert worst <= 1e-5
    torch.testing.assert_close(ranks[0]["adapted"], one[0]["adapted"], atol=1e-4, rtol=0)
    for metrics, expected in zip(ranks[0]["metrics"], one[0]["metrics"], strict=True):
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_some_modules_of_a_fused_linear_adapt_at_any_layout_as_on_one_rank(found: Found) -> None:
    ranks, one = found["qwen3-some-tp2sp"], found["qwen3-some-one"]
    assert difference(whole(ranks, "gradients"), whole(one, "gradients")) <= 1e-5
    assert not any("k_proj" in name or "o_proj" in name for name in whole(one, "gradients"))


def test_recomputed_layers_give_their_adapters_the_same_gradients(found: Found) -> None:
    mine, expected = found["qwen3-recomputed"], found["qwen3-one"]
    assert difference(whole(mine, "gradients"), whole(expected, "gradients")) <= 1e-6


def test_a_sharded_optimizer_updates_as_a_whole_one(found: Found) -> None:
    mine, expected = found["qwen3-dp2-sharded"], found["qwen3-dp2"]
    assert difference(whole(mine, "updated"), whole(expected, "updated")) <= 1e-4


@pytest.mark.parametrize("name", [*ONE, *IDS])
def test_fresh_adapters_change_nothing(name: str, found: Found, checkpoints: dict[str, Path]) -> None:
    base = load_file(checkpoints[name.split("-")[0]] / "model.safetensors")
    untouched = whole(found[name], "untouched")
    assert untouched.keys() == base.keys()
    assert all(torch.equal(untouched[key], tensor) for key, tensor in base.items())


@pytest.mark.parametrize("model", LAYOUTS)
def test_fresh_adapters_give_the_models_logits_bit_for_bit(model: str, found: Found) -> None:
    assert torch.equal(found[f"{model}-one"][0]["fresh"], found[f"{model}-frozen"][0]["logits"])


@pytest.mark.parametrize("name", [*ONE, *IDS])
def test_training_lowers_the_loss_and_leaves_the_base_bit_for_bit(name: str, found: Found) -> None:
    losses = [metrics["loss"] for metrics in found[name][0]["metrics"]]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1e-3
    for rank in found[name]:
        assert all(map(torch.equal, rank["base"], rank["base afterwards"]))
        assert rank["trained"] == rank["buffers"] > 0


@pytest.mark.parametrize("name", [*ONE, *IDS])
def test_the_plan_counts_what_is_trained(name: str, found: Found, checkpoints: dict[str, Path]) -> None:
    model, layout = name.split("-")
    parallel = ParallelConfig(**LAYOUTS[model].get(layout, {}))
    shape = ModelShape.from_hf(checkpoints[model])
    for rank, results in enumerate(found[name]):
        stage = rank // (parallel.tp * parallel.cp * parallel.dp)
        assert results["trained"] == sum(_adapter_parameters(LoraConfig(**LORA), shape, parallel, stage))


@pytest.mark.parametrize(("name", "scale"), [("qwen3-one", 2.0), ("qwen3_moe-one", 2.0), ("qwen3-some-one", 8.0)])
def test_merged_weights_are_base_and_adapter_up_to_one_rounding(
    name: str, scale: float, found: Found, checkpoints: dict[str, Path]
) -> None:
    base = load_file(checkpoints[name.split("-")[0]] / "model.safetensors")
    adapters, merged = whole(found[name], "adapters"), whole(found[name], "merged")
    changed = 0
    for key, tensor in base.items():
        stem = f"base_model.model.{key.removesuffix('.weight')}.lora_"
        expected = tensor.double()
        if f"{stem}A.weight" in adapters:
            expected = expected + scale * adapters[f"{stem}B.weight"].double() @ adapters[f"{stem}A.weight"].double()
            changed += 1
        torch.testing.assert_close(merged[key].double(), expected, atol=2e-7, rtol=2e-7)
    assert 2 * changed == len(adapters) > 0


def test_gradients_equal_those_of_transformers_with_the_factors_by_hand(
    found: Found, checkpoints: dict[str, Path]
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints["qwen3"], dtype=torch.float32).requires_grad_(False)
    factors = {name: t.clone().requires_grad_() for name, t in whole(found["qwen3-one"], "adapters").items()}
    weights = dict(model.named_parameters())
    for name in [name for name in factors if "lora_A" in name]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        delta = LORA["alpha"] / LORA["rank"] * factors[name.replace("lora_A", "lora_B")] @ factors[name]
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + delta
    batch = example_batch()

    def logits(tokens: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (tokens,), tie_weights=True).logits

    logp = torch.cat([_logp(logits(tokens[None])[0], tokens) for tokens in batch.sequences()])
    (-(batch.streams["weight"] * logp).sum()).backward()
    expected = {name: factor.grad for name, factor in factors.items()}
    assert difference(whole(found["qwen3-one"], "gradients"), expected) <= 1e-5
    with torch.no_grad():
        torch.testing.assert_close(found["qwen3-one"][0]["adapted"], logits(example_tokens()), atol=1e-4, rtol=0)


RESUMED = [
    "qwen3-resume-tp2sp",
    "qwen3-resume-dropout",
    "qwen3-resume-bfloat16",
    "qwen3_moe-resume-ep2",
    "nemotron_h-resume-pp2",
]


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits_from_a_checkpoint_without_the_base(
    name: str, found: Found, checkpoints: dict[str, Path]
) -> None:
    for rank in found[name]:
        assert rank["resumed"] == rank["straight"]
        assert all(torch.equal(rank["adapters again"][key], tensor) for key, tensor in rank["adapters"].items())
        assert rank["same base"]
    assert found[name][0]["bytes"] < (checkpoints[name.split("-")[0]] / "model.safetensors").stat().st_size
    assert "rank is 4, but the policy's is 8" in found[name][0]["refused rank"]
    assert "targets" in found[name][0]["refused targets"]


def test_dropout_changes_what_is_learned(found: Found) -> None:
    assert found["qwen3-resume-dropout"][0]["straight"] != found["qwen3-resume-tp2sp"][0]["straight"]


@pytest.mark.parametrize(
    ("there", "here"),
    [("qwen3-resume-tp2sp", "qwen3-pp2-from-tp2sp"), ("qwen3_moe-resume-ep2", "qwen3_moe-tp2etp2-from-ep2")],
)
def test_a_checkpoint_goes_on_at_another_layout(there: str, here: str, found: Found) -> None:
    assert found[here][0]["losses"] == pytest.approx(found[there][0]["straight"], rel=1e-4)


@pytest.mark.parametrize("name", ["qwen3-resume-tp2sp", "qwen3_moe-resume-ep2"])
def test_teachers_swap_adapters_alone(name: str, found: Found) -> None:
    lent = found[name][0]["lent"]
    assert torch.equal(lent["before"], lent["after"])
    torch.testing.assert_close(lent["theirs"], lent["twin"], atol=1e-5, rtol=0)
    assert not torch.equal(lent["before"], lent["theirs"])


@pytest.mark.parametrize("name", ["qwen3-export", "qwen3_moe-export-ep2"])
def test_an_exported_adapter_is_read_back_bit_for_bit(name: str, found: Found, folder: Path) -> None:
    written, read = whole(found[name], "written"), whole(found[name], "read")
    stored = load_file(folder / name / "adapter" / "adapter_model.safetensors")
    assert written.keys() == read.keys() == stored.keys()
    assert all(torch.equal(read[key], tensor) and torch.equal(stored[key], tensor) for key, tensor in written.items())
    assert "alpha" in found[name][0]["another alpha"]
    assert "c_attn" in found[name][0]["unknown target"]


def test_an_adapter_of_fewer_modules_than_the_targets_is_refused(found: Found) -> None:
    assert "lacks base_model.model.model.layers.0" in found["qwen3-export"][0]["more targets"]


def test_an_exported_adapter_says_what_peft_asks_for(folder: Path, found: Found) -> None:
    config = json.loads((folder / "qwen3-export" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4 and config["lora_alpha"] == 16 and config["use_rslora"]
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize("name", ["qwen3-export", "qwen3_moe-export-ep2"])
def test_merging_the_exported_adapter_gives_the_exported_checkpoint(
    name: str, folder: Path, found: Found, checkpoints: dict[str, Path]
) -> None:
    from millrace.converters.adapters import merge_adapter
    from millrace.converters.safetensors_io import HFReader

    out = merge_adapter(checkpoints[name.split("-")[0]], folder / name / "adapter", folder / name / "again")
    mine, theirs = HFReader(out), HFReader(folder / name / "merged")
    assert sorted(mine.names) == sorted(theirs.names)
    for key in mine.names:
        torch.testing.assert_close(mine.tensor(key), theirs.tensor(key), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", ["qwen3-export", "qwen3_moe-export-ep2"])
def test_transformers_computes_with_the_merged_checkpoint_what_the_policy_does(
    name: str, folder: Path, found: Found
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / name / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(found[name][0]["logits"], model(example_tokens()).logits, atol=1e-4, rtol=0)
