"""Every recipe on every cluster file: it is planned, or says in a sentence why it cannot stand there."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from stand_ins import QWEN3_8B, ROOT, write_checkpoint, write_files

from benchmarks.released_models import NEMOTRON_3_NANO
from millrace.config.errors import ConfigError
from millrace.config.loading import load_cluster, load_recipe
from millrace.config.model_shape import ModelShape
from millrace.config.schema import Recipe
from millrace.planning.cluster_plan import ClusterPlan, as_data, plan_on_cluster, render_text
from millrace.planning.clusters import cluster_named
from millrace.planning.suggest import render_text as render_suggestions
from millrace.planning.suggest import suggest

CLUSTERS = sorted((ROOT / "slurm" / "clusters").glob("*.yaml"))
RECIPES = sorted(
    path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "base"
)
TINY: dict[str, Any] = QWEN3_8B | {
    "vocab_size": 768,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""The size of the laptop's base model, with as many positions as the one for long sequences."""
TINY_EXPERTS = TINY | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
}
TINY_HYBRID = NEMOTRON_3_NANO | {
    "hybrid_override_pattern": "ME*ME",
    "num_hidden_layers": 5,
    "vocab_size": 768,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "n_groups": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 128,
}
AWAY = "fleet.transport is shared_memory, which does not reach the 1 engines on other nodes"
WANTS_CUDA = "fleet.transport is nccl, which needs CUDA, but the nodes of cpu have no GPUs"
REFUSED = {
    ("laptop/cascade.yaml", "cpu"): AWAY,
    ("laptop/code.yaml", "cpu"): AWAY,
    ("laptop/dense.yaml", "cpu"): AWAY,
    ("laptop/long-context.yaml", "cpu"): AWAY,
    ("laptop/moe.yaml", "cpu"): AWAY,
    ("laptop/mopd-vs-grpo.yaml", "cpu"): AWAY,
    ("laptop/nemotron_h.yaml", "cpu"): AWAY,
    ("laptop/python-tool.yaml", "cpu"): AWAY,
    ("laptop/swe-agentic.yaml", "cpu"): AWAY,
    ("laptop/swe-agentless.yaml", "cpu"): AWAY,
    ("laptop/tools.yaml", "cpu"): AWAY,
    ("nemotron-cascade-2/cascade.yaml", "cpu"): "judge-genrm wants 8 ranks on one node, but a node of cpu takes 2",
    ("nemotron-cascade-2/cascade.yaml", "dgx-h100"): AWAY,
    ("nemotron-cascade-2/cascade.yaml", "hgx-h200"): AWAY,
    ("nemotron-cascade-2/cluster-h200.yaml", "cpu"): WANTS_CUDA,
    ("qwen3/cascade-8b.yaml", "cpu"): WANTS_CUDA,
}
"""What a recipe says to a cluster that it does not stand on as it is."""
MENDED = {
    ("laptop", "cpu"): ["fleet.transport=disk"],
    ("nemotron-cascade-2", "dgx-h100"): ["fleet.transport=nccl"],
    ("nemotron-cascade-2", "hgx-h200"): ["fleet.transport=nccl"],
}
"""What the sentence tells to set: then the recipe is planned."""
SHORT = {
    ("nemotron-cascade-2/cascade.yaml", "dgx-h100"): "trainer needs",
    ("nemotron-cascade-2/cascade.yaml", "hgx-h200"): "trainer needs",
    ("nemotron-cascade-2/cluster-h200.yaml", "dgx-h100"): "trainer, pipeline stage 0 needs 83",
}
"""What is short where there are places enough."""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MILLRACE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MILLRACE_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_with_files(name: Path, folder: Path, *overrides: str) -> Recipe:
    """The recipe with a model that has its config.json; those of the laptop are written by its demo."""
    if name.parts[0] != "laptop":
        recipe = load_recipe(ROOT / "recipes" / name, overrides)
        write_files(recipe, NEMOTRON_3_NANO if "nemotron" in name.parts[0] else QWEN3_8B)
        return recipe
    config = {"moe.yaml": TINY_EXPERTS, "nemotron_h.yaml": TINY_HYBRID}.get(name.name, TINY)
    write_checkpoint(folder / "base", config)
    own = [f"model.path={folder / 'base'}"]
    if "small" in load_recipe(ROOT / "recipes" / name).judges:
        own.append(f"judges.small.model={folder / 'base'}")
    return load_recipe(ROOT / "recipes" / name, [*own, *overrides])


@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda file: file.stem)
@pytest.mark.parametrize("name", RECIPES, ids=str)
def test_every_recipe_is_planned_on_every_cluster(elsewhere: Path, name: Path, cluster: Path) -> None:
    recipe, key = recipe_with_files(name, elsewhere), (str(name), cluster.stem)
    if key in REFUSED:
        with pytest.raises(ConfigError) as caught:
            plan_on_cluster(recipe, load_cluster(cluster))
        assert REFUSED[key] in str(caught.value)
        if (mend := MENDED.get((name.parts[0], cluster.stem))) is None:
            return
        recipe = recipe_with_files(name, elsewhere, *mend)
    plan = plan_on_cluster(recipe, load_cluster(cluster))
    text = render_text(plan)
    assert json.loads(json.dumps(as_data(plan)))["fits"] == plan.fits
    if key in SHORT:
        assert SHORT[key] in text
        for unfit in plan.unfit:
            assert 1 <= len(unfit.changes) <= 3
            assert [c.saves for c in unfit.changes] == sorted((c.saves for c in unfit.changes), reverse=True)
    else:
        assert plan.fits, text
        assert "everything fits" in text
    assert ("no times: the nodes of cpu have no GPUs" in text) == (cluster.stem == "cpu")


def test_a_pasted_change_saves_what_it_says(elsewhere: Path) -> None:
    name = Path("nemotron-cascade-2/cluster-h200.yaml")
    recipe, cluster = recipe_with_files(name, elsewhere), cluster_named("dgx-h100")
    plan = plan_on_cluster(recipe, cluster)
    before = trainer_bytes(plan)
    for change in plan.unfit[0].changes:
        pasted = load_recipe(ROOT / "recipes" / name, str(change).split())
        assert before - trainer_bytes(plan_on_cluster(pasted, cluster)) == change.saves


def test_the_30b_recipe_gives_nodes_of_its_engines_to_verifying(elsewhere: Path) -> None:
    name, cluster = Path("nemotron-cascade-2/cluster-h200.yaml"), cluster_named("hgx-h200")
    with pytest.raises(ConfigError, match=r"34 nodes, .* and 2 to verify programs, but hgx-h200 has 32"):
        plan_on_cluster(recipe_with_files(name, elsewhere, "placement.verifier_nodes=2"), cluster)
    plan = plan_on_cluster(
        recipe_with_files(name, elsewhere, "placement.verifier_nodes=2", "fleet.engines=28"), cluster
    )
    text = render_text(plan)
    assert "30-31  112 verifiers" in text and "everything fits" in text
    assert plan.memory.roles[-1].name == "verifier" and plan.memory.roles[-1].ranks == 224


def trainer_bytes(plan: ClusterPlan) -> int:
    return max(role.device_bytes for role in plan.memory.roles if role.name.startswith("trainer"))


def test_the_30b_recipe_is_planned_within_two_seconds_of_processor_time_without_torch(elsewhere: Path) -> None:
    name = Path("nemotron-cascade-2/cluster-h200.yaml")
    recipe_with_files(name, elsewhere)
    program = f"""
import sys, time, millrace.cli
sys.argv = ["millrace", "plan", {str(ROOT / "recipes" / name)!r}, "--cluster", "hgx-h200"]
try:
    millrace.cli.main()
except SystemExit as ending:
    assert not ending.code, ending.code
assert not {{"torch", "megatron", "transformers", "vllm", "numpy"}} & set(sys.modules)
assert time.process_time() < 2, time.process_time()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "everything fits" in done.stdout


def test_layouts_of_the_30b_recipe_are_suggested_beside_the_published_one(elsewhere: Path) -> None:
    name = Path("nemotron-cascade-2/cluster-h200.yaml")
    recipe = recipe_with_files(name, elsewhere)
    started = time.process_time()
    found = suggest(recipe, cluster_named("hgx-h200"), ModelShape.from_hf(recipe.model.path))
    assert time.process_time() - started < 20
    assert found.published is not None
    label, layout = found.published
    assert "TP2 PP2 CP4 EP8 ETP1" in label and layout is not None, "it fits"
    assert layout.step_s >= found.best[0].step_s
    assert "NeMo-RL's grpo_nanov3" in render_suggestions(found) and "times the fastest step" in render_suggestions(
        found
    )
    for one in (*found.best, layout):
        pasted = load_recipe(ROOT / "recipes" / name, str(one).split())
        assert plan_on_cluster(pasted, cluster_named("hgx-h200")).fits


def test_a_cluster_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'dgx-h10'; there are cpu, dgx-h100, hgx-h200, or give the path of a file"):
        cluster_named("dgx-h10")
    own = tmp_path / "own.yaml"
    own.write_text("name: own\nnodes: 1\nnode: {gpus: 2, gpu: h100, cores: 8, memory_gib: 100}\n")
    assert cluster_named(str(own)).nodes == 1
