import json
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins import QWEN3_8B, ROOT, write_files

from benchmarks.released_models import NEMOTRON_3_NANO
from millrace.config.errors import ConfigError
from millrace.config.loading import dump_recipe, load_recipe
from millrace.config.model_shape import ModelShape
from millrace.config.plan import make_plan, render_text
from millrace.config.rules import check_recipe
from millrace.config.schema import Recipe

RECIPES = sorted(path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.yaml"))
WHOLE = [path for path in RECIPES if path.parts[0] != "base"]
CASCADE, CLUSTER = Path("nemotron-cascade-2/cascade.yaml"), Path("nemotron-cascade-2/cluster-h200.yaml")
QWEN3 = Path("qwen3/cascade-8b.yaml")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder where recipes look for data and models."""
    monkeypatch.setenv("MILLRACE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MILLRACE_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(name: Path, *overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / name, overrides)


def with_files(name: Path, config: dict, *overrides: str) -> Recipe:
    recipe = load(name, *overrides)
    write_files(recipe, config)
    return recipe


@pytest.mark.parametrize("name", WHOLE, ids=str)
def test_every_recipe_loads_and_lacks_nothing_but_files(elsewhere: Path, name: Path) -> None:
    recipe = load(name)
    problems = check_recipe(recipe)
    rest = [p for p in problems if "does not exist" not in p]
    assert rest == []
    copy = elsewhere / "resolved.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe


def test_a_base_is_no_recipe_and_says_what_it_lacks() -> None:
    with pytest.raises(ConfigError) as caught:
        load(Path("base/cascade.yaml"))
    assert sorted(p.split(": ")[1].split()[0] for p in caught.value.problems) == ["model", "name", "run_dir", "stages"]


def test_everything_that_is_missing_is_listed_in_one_go(elsewhere: Path) -> None:
    problems = check_recipe(load(CASCADE))
    data = [p for p in problems if "the file" in p and "does not exist" in p]
    folders = [p for p in problems if "the folder" in p and "does not exist" in p]
    assert len(data) == 8 + 2 * 10
    assert [p.split(":")[0] for p in folders] == [
        "model.path",
        "judges.genrm.model",
        "judges.equivalence.model",
        "judges.repair.model",
        "domains.workplace_assistant.tables",
    ]
    assert len(problems) == len(data) + len(folders)


@pytest.mark.parametrize("name", [CASCADE, CLUSTER], ids=str)
def test_with_all_files_present_nothing_is_missing(elsewhere: Path, name: Path) -> None:
    assert check_recipe(with_files(name, NEMOTRON_3_NANO)) == []


def test_the_model_has_the_parameters_of_its_report(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(NEMOTRON_3_NANO))
    shape = ModelShape.from_hf(tmp_path)
    assert round(shape.parameter_count() / 1e9, 1) == 31.6
    assert round(shape.active_parameter_count() / 1e9, 1) == 3.2


def test_the_cluster_layout_has_engines_and_the_judge_of_the_environment(elsewhere: Path) -> None:
    recipe = load(CLUSTER)
    assert recipe.parallel.world_size == 128
    assert recipe.fleet.engines * recipe.fleet.tensor_parallel == 128
    assert recipe.judges["genrm"].model is None and recipe.judges["genrm"].url == "http://127.0.0.1:8100/v1"
    assert recipe.stages == load(CASCADE).stages, "a layout changes nothing that is learnt"


def test_the_stages_are_those_of_the_paper(elsewhere: Path) -> None:
    stages = {stage.name: stage for stage in load(CASCADE).stages}
    order = ["sft", "if-rl", "multi-domain", "rlhf-teacher", "mopd", "rlhf", "long-context", "code"]
    assert list(stages) == [*order, "swe-agentless", "swe-agentic"]
    assert (stages["rlhf-teacher"].from_, stages["mopd"].from_) == ("sft", "multi-domain")
    table = {  # tables 8 to 10: longest answer, prompts, answers, lr, steps, temperature, top-p, overlong, KL
        "if-rl": (49152, 128, 16, 3e-6, 180, 1.0, 1.0, "zero_reward", 0),
        "multi-domain": (49152, 128, 16, 3e-6, 70, 1.0, 1.0, "filter", 0),
        "rlhf": (16384, 128, 16, 3e-6, 25, 1.0, 1.0, "filter", 0.03),
        "long-context": (16384, 128, 16, 3e-6, 30, 1.0, 1.0, "filter", 0),
        "code": (118000, 128, 16, 3e-6, 22, 1.0, 0.95, "filter", 0),
        "swe-agentless": (65536, 128, 16, 3e-6, 50, 1.0, 1.0, "filter", 0),
        "swe-agentic": (229376, 16, 64, 3e-6, 50, 0.8, 1.0, "filter", 0),
    }
    for name, values in table.items():
        s = stages[name]
        shape = (s.sampling.max_response_tokens, s.prompts_per_step, s.samples_per_prompt, s.optimizer.lr, s.steps)
        assert (*shape, s.sampling.temperature, s.sampling.top_p, s.overlong, s.kl.coefficient) == values, name
        assert s.optimizer.betas == (0.9, 0.95) and s.updates_per_batch == 1 and s.loss.kind == "reinforce", name
    mopd = stages["mopd"]
    assert (mopd.sampling.max_response_tokens, mopd.prompts_per_step, mopd.samples_per_prompt) == (98304, 128, 4)
    assert (mopd.steps, mopd.optimizer.lr, mopd.optimizer.warmup_from, mopd.optimizer.warmup_steps) == (
        52,
        2e-6,
        2e-7,
        30,
    )
    assert (mopd.ratio_low, mopd.ratio_high, mopd.signal, mopd.aggregation) == (0.5, 2.0, "sampled", "sequence")


def test_the_recipe_for_qwen3_is_sound_when_its_files_are_there(elsewhere: Path) -> None:
    recipe = with_files(QWEN3, QWEN3_8B)
    assert check_recipe(recipe) == []
    rows = [line.split() for line in render_text(make_plan(recipe)).splitlines()]
    assert ["rlhf-teacher", "rlhf", "sft"] in [row[:3] for row in rows]
    assert ["mopd", "best(stem_mcqa)", "stem_mcqa,", "structured_outputs", "time_shared"] in rows
    assert ["rlhf-teacher", "1024"] in [row[-2:] for row in rows], "64 prompts of 8 pairs in both orders"


def test_a_domain_is_taken_out_by_null(elsewhere: Path) -> None:
    recipe = with_files(CASCADE, NEMOTRON_3_NANO, "domains.code=null", "stages=[{type: evaluate, name: measure}]")
    assert check_recipe(recipe) == [] and "code" not in recipe.domains


@pytest.mark.parametrize("command", ["check", "plan"])
def test_the_commands_take_less_than_a_second_of_processor_time_and_no_torch(elsewhere: Path, command: str) -> None:
    with_files(QWEN3, QWEN3_8B)
    program = f"""
import sys, time, millrace.cli
sys.argv = ["millrace", {command!r}, {str(ROOT / "recipes" / QWEN3)!r}]
try:
    millrace.cli.main()
except SystemExit as ending:
    assert not ending.code, ending.code
assert "torch" not in sys.modules and "vllm" not in sys.modules
assert time.process_time() < 1, time.process_time()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
