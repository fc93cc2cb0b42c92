from pathlib import Path

import pytest

from millrace.config.errors import ConfigError
from millrace.config.loading import dump_recipe, load_recipe
from millrace.config.schema import MopdStage, RlhfStage, RlStage, SftStage, WandbConfig

BASE = """\
name: small
run_dir: runs/small
model: {path: base-model}
domains:
  math: {environment: math, train: data/math.jsonl, held_out: data/math-held-out.jsonl}
stages:
  - type: sft
    name: warm
    data: [data/sft.jsonl]
    steps: 10
    optimizer: {lr: 1e-4}
  - type: rl
    name: climb
    domains: [math]
    steps: 5
    optimizer: ${stages.0.optimizer}
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    return write(tmp_path / "recipes" / "base.yaml", BASE)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def test_a_recipe_becomes_typed_dataclasses_with_defaults(base: Path) -> None:
    recipe = load_recipe(base)
    warm, climb = recipe.stages
    assert isinstance(warm, SftStage) and isinstance(climb, RlStage)
    assert warm.optimizer.lr == climb.optimizer.lr == 1e-4
    assert climb.samples_per_prompt == 16 and climb.domains == ("math",)
    assert recipe.parallel.world_size == 1


def test_paths_start_at_the_file_that_wrote_them_and_run_dir_at_the_current_folder(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    child = write(tmp_path / "mine" / "child.yaml", "extends: ../recipes/base.yaml\nmodel: {path: other}\n")
    recipe = load_recipe(child, ["domains.math.held_out=here.jsonl"])
    assert recipe.model.path == str(tmp_path / "mine" / "other")
    assert recipe.stages[0].data == (str(tmp_path / "recipes" / "data" / "sft.jsonl"),)
    assert recipe.domains["math"].held_out == str(tmp_path / "here.jsonl")
    assert recipe.run_dir == str(tmp_path / "runs" / "small")
    repositories = load_recipe(child, ["domains.math.swe.repositories=repos"]).domains["math"].swe.repositories
    assert repositories == str(tmp_path / "repos")
    assert load_recipe(child, ["model.chat_template=a.jinja"]).model.chat_template == str(tmp_path / "a.jinja")
    assert load_recipe(child, ["model.chat_template=nemotron"]).model.chat_template == "nemotron"


def test_the_resolved_recipe_loads_back_equal_from_anywhere(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = r"domains.math.system_prompt='cost ${x} and \${y}: ü #1'"
    recipe = load_recipe(base, [prompt.replace("${x}", r"\${x}"), "stages.warm.optimizer.lr=1e-6"])
    assert recipe.domains["math"].system_prompt == "cost ${x} and ${y}: ü #1"
    dumped = write(tmp_path / "resolved.yaml", dump_recipe(recipe))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_recipe(dumped) == recipe


def test_several_bases_are_merged_in_order_and_lists_are_replaced(base: Path) -> None:
    write(base.parent / "tp.yaml", "parallel: {tp: 4, sequence_parallel: true}\nseed: 3\n")
    stages = "stages: [{type: sft, name: only, data: [x.jsonl], epochs: 1}]\n"
    child = write(base.parent / "child.yaml", f"extends: [base.yaml, tp.yaml]\nparallel: {{tp: 2}}\n{stages}")
    recipe = load_recipe(child)
    assert (recipe.parallel.tp, recipe.parallel.sequence_parallel, recipe.seed) == (2, True, 3)
    assert [stage.name for stage in recipe.stages] == ["only"]


def test_overrides_address_a_stage_by_name_or_position(base: Path) -> None:
    recipe = load_recipe(base, ["stages.climb.sampling.temperature=0.7", "stages.0.steps=3", "fleet.addresses=[a, b]"])
    assert recipe.stages[1].sampling.temperature == 0.7  # type: ignore[union-attr]
    assert recipe.stages[0].steps == 3
    assert recipe.fleet.addresses == ("a", "b")


def test_numbers_may_be_written_in_any_usual_way(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKS", "2")
    monkeypatch.setenv("SP", "true")
    overrides = [
        "stages.warm.optimizer.eps='1e-9'",
        "stages.warm.optimizer.clip_grad=1",
        "stages.warm.optimizer.lr=5E-7",
    ]
    environment = ["parallel.tp=${oc.env:RANKS}", "parallel.sequence_parallel=${oc.env:SP}"]
    recipe = load_recipe(base, overrides + environment)
    optimizer = recipe.stages[0].optimizer
    assert (optimizer.eps, optimizer.clip_grad, optimizer.lr) == (1e-9, 1.0, 5e-7)
    assert isinstance(optimizer.clip_grad, float)
    assert recipe.parallel.tp == 2 and recipe.parallel.sequence_parallel is True


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("modle: {path: x}", "recipes/child.yaml:2: modle is not a known key; did you mean model?"),
        ("trainer: {lr: 1}", "recipes/child.yaml:2: trainer.lr is not a known key; there are device,"),
        ("parallel: {tp: two}", "recipes/child.yaml:2: parallel.tp must be a whole number, not the text 'two'"),
        ("parallel: {tp: true}", "parallel.tp must be a whole number, not true"),
        ("export: 1", "export must be true or false, not 1"),
        ("name: 2024", "name must be text, not 2024; put it in quotes"),
        ("trainer: {recompute: ful}", "must be one of none, selective, full, not the text 'ful' (did you mean full?)"),
        ("trainer: 3", "trainer must be a section with keys, not 3"),
        ("fleet: {addresses: localhost}", "fleet.addresses must be a list, not the text 'localhost'"),
        ("domains: {code: {environment: math}}", "domains.code.train is required: JSONL file of training prompts."),
        ("stages: [{name: x}]", "recipes/child.yaml:2: stages.x needs a `type`: sft, rl, rlhf, mopd or evaluate"),
        ("stages: [{type: ppo, name: x}]", "stages.x.type must be sft, rl, rlhf, mopd or evaluate, not the text 'ppo'"),
        ("seed: ${model.sed}", "recipes/child.yaml:2: seed: Interpolation key 'model.sed' not found"),
        ("seed: 1\nseed: 2", "recipes/child.yaml:3: seed is written twice"),
        ("seed: [1", "recipes/child.yaml:3: not valid YAML"),
        ("evaluation: {sampling: {top_p: .nan}}", "evaluation.sampling.top_p must be a number, not nan"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_key(base: Path, line: str, message: str) -> None:
    child = write(base.parent / "child.yaml", f"extends: base.yaml\n{line}\n")
    assert any(message in problem for problem in problems(child)), problems(child)


def test_all_mistakes_are_reported_at_once(base: Path) -> None:
    child = write(
        base.parent / "child.yaml", "extends: base.yaml\nnam: x\nparallel:\n  tp: x\n  pp: y\nseed: ${nowhere}\n"
    )
    found = problems(child, "stages.warm.optimizer.l=1", "stages.cold.steps=1", "nonsense")
    places = ["child.yaml:2", "child.yaml:4", "child.yaml:5", "child.yaml:6", "optimizer.l ", "'cold'", "'nonsense'"]
    assert len(found) == 8, "the misspelt key also reaches the stage that borrows the optimizer"
    assert all(any(place in problem for problem in found) for place in places)


def test_a_mistake_on_the_command_line_is_said_to_be_there(base: Path) -> None:
    assert problems(base, "stages.warm.optimzer.lr=1") == [
        "command line: stages.warm.optimzer is not a known key; did you mean optimizer?"
    ]
    assert problems(base, "trainer.device=gpu") == [
        "command line: trainer.device must be one of auto, cpu, cuda, not the text 'gpu'"
    ], "cpu is near in letters alone"
    assert problems(base, "seed=x") == ["command line: seed must be a whole number, not the text 'x'"]


def test_files_that_extend_each_other_in_a_circle_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "\nextends: a.yaml\n")
    assert "b.yaml:2: extends: the files extend each other in a circle" in problems(tmp_path / "a.yaml")[0]


def test_a_missing_file_is_named_with_who_wants_it(tmp_path: Path) -> None:
    assert "the recipe" in problems(tmp_path / "a.yaml")[0] and "does not exist" in problems(tmp_path / "a.yaml")[0]
    write(tmp_path / "a.yaml", "name: x\nextends: b.yaml\n")
    assert "a.yaml:2: extends: the recipe" in problems(tmp_path / "a.yaml")[0]
    write(tmp_path / "b.yaml", "- 1\n")
    assert "b.yaml:1: a recipe is a mapping" in problems(tmp_path / "a.yaml")[0]


GRAPH = """\
name: graph
run_dir: runs/graph
model: {path: base-model}
judges:
  genrm: {model: judge-model}
domains:
  chat: {environment: genrm, judge: genrm, train: chat.jsonl, held_out: chat-held-out.jsonl, pass_rates: rates.jsonl}
  math: {environment: math, train: math.jsonl, held_out: math-held-out.jsonl}
observe:
  wandb: {project: cascade}
stages:
  - {type: sft, name: warm, data: [sft.jsonl], steps: 1}
  - {type: rlhf, name: prefer, from: start, domains: [chat], steps: 1}
  - {type: mopd, name: distil, from: warm, steps: 1, teachers: {chat: stage(prefer)}, rewarded: [math]}
"""


@pytest.fixture
def graph(base: Path) -> Path:
    return write(base.parent / "graph.yaml", GRAPH)


def test_from_is_the_key_of_the_field_that_python_calls_otherwise(graph: Path) -> None:
    warm, prefer, distil = load_recipe(graph).stages
    assert (warm.from_, prefer.from_, distil.from_) == (None, "start", "warm")
    assert load_recipe(graph, ["stages.prefer.from=warm"]).stages[1].from_ == "warm"
    assert problems(graph, "stages.prefer.from_=warm") == [
        "command line: stages.prefer.from_ is not a known key; did you mean from?"
    ]
    assert "  from: start\n" in dump_recipe(load_recipe(graph))


def test_stages_take_their_own_defaults_over_those_of_their_kind(graph: Path) -> None:
    _, prefer, distil = load_recipe(graph).stages
    assert isinstance(prefer, RlhfStage) and isinstance(distil, MopdStage)
    assert (prefer.type, prefer.kl.coefficient, prefer.samples_per_prompt) == ("rlhf", 0.03, 16)
    assert (distil.samples_per_prompt, distil.domains) == (4, ("chat", "math"))
    assert dict(distil.teachers) == {"chat": "stage(prefer)"}


def test_an_optional_section_is_typed_when_it_is_there_and_absent_without(graph: Path, tmp_path: Path) -> None:
    recipe = load_recipe(graph)
    assert recipe.observe.wandb == WandbConfig(project="cascade") and recipe.observe.mlflow is None
    assert load_recipe(graph, ["observe.wandb=null"]).observe.wandb is None
    dumped = write(tmp_path / "resolved.yaml", dump_recipe(recipe))
    assert load_recipe(dumped) == recipe
    (missing,) = problems(graph, "observe.mlflow={tracking_uri: 'sqlite:///x'}")
    assert missing == "command line: observe.mlflow.experiment is required: Name of the experiment."
    (unknown,) = problems(graph, "observe.wandb.projekt=x")
    assert unknown == "command line: observe.wandb.projekt is not a known key; did you mean project?"
    (scalar,) = problems(graph, "observe.wandb=true")
    assert scalar == "command line: observe.wandb must be a section with keys, not true"


def test_judges_and_pass_rates_lie_beside_the_recipe_that_names_them(graph: Path) -> None:
    recipe, folder = load_recipe(graph), graph.parent
    assert recipe.judges["genrm"].model == str(folder / "judge-model")
    assert recipe.domains["chat"].pass_rates == str(folder / "rates.jsonl")


def test_teachers_are_text_by_domain(graph: Path) -> None:
    (problem,) = problems(graph, "stages.distil.teachers.chat=3")
    assert problem == "command line: stages.distil.teachers.chat must be text, not 3; put it in quotes"
    (problem,) = problems(graph, "stages.distil.teachers=[a]")
    assert problem == "command line: stages.distil.teachers must be a section with names, not a list"


def test_null_takes_a_domain_or_a_judge_out_that_a_base_file_wrote(graph: Path) -> None:
    child = write(graph.parent / "child.yaml", "extends: graph.yaml\ndomains: {chat: null}\njudges: {genrm: null}\n")
    recipe = load_recipe(child)
    assert list(recipe.domains) == ["math"] and not recipe.judges
    assert problems(graph, "stages.distil.teachers.chat=null") == [
        "command line: stages.distil.teachers.chat must be text, not null"
    ]


def test_sections_merged_by_an_anchor_give_way_to_what_is_written_beside_them(base: Path) -> None:
    text = """\
extends: base.yaml
x-rl: &rl
  type: rl
  steps: 7
  domains: [math]
  optimizer: {lr: 1e-5, warmup_steps: 2}
x-short: &short {steps: 3, prompts_per_step: 9}
stages:
  - <<: *rl
    name: plain
  - <<: *rl
    name: other
    steps: 9
    optimizer: {lr: 2e-5}
  - <<: [*short, *rl]
    name: both
"""
    plain, other, both = load_recipe(write(base.parent / "child.yaml", text)).stages
    assert (plain.steps, plain.optimizer.warmup_steps) == (7, 2)
    assert (other.steps, other.optimizer.lr, other.optimizer.warmup_steps) == (9, 2e-5, 0), "sections are not mixed"
    assert (both.steps, both.prompts_per_step) == (3, 9), "the first one named wins"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("x-a: &a {tpp: 2}\nparallel: {<<: *a}", "child.yaml:2: parallel.tpp is not a known key; did you mean tp?"),
        ("x-a: &a {tp: 2}\nparallel: {<<: *a, tp: x}", "child.yaml:3: parallel.tp must be a whole number"),
        ("x-a: &a {tp: 2}\nparallel: {<<: *a, tp: 1, tp: 2}", "child.yaml:3: parallel.tp is written twice"),
        ("x-a: &a [1]\nparallel: {<<: *a}", "child.yaml:3: << merges sections only; write <<: *anchor"),
        ("x-a: &a {b: [*a]}", "child.yaml:2: x-a.b.0 is an anchor that holds itself; write it out"),
        ("x-a: &a {b: {<<: *a}}", "child.yaml:2: << merges a section into itself; leave it out"),
        ("x-a: &a {<<: *a}", "child.yaml:2: << merges a section into itself; leave it out"),
        ("x-a: &a {<<: [{<<: *a}]}", "child.yaml:2: << merges a section into itself; leave it out"),
        ("parallel: {x-tp: 2}", "child.yaml:2: parallel.x-tp is not a known key"),
        ("seed: ${x-nowhere}", "child.yaml:2: seed: Interpolation key 'x-nowhere' not found"),
    ],
)
def test_a_mistake_in_what_is_shared_is_named_where_it_stands(base: Path, lines: str, message: str) -> None:
    child = write(base.parent / "child.yaml", f"extends: base.yaml\n{lines}\n")
    assert any(message in problem for problem in problems(child)), problems(child)


def test_shared_values_reach_the_files_that_extend_theirs_and_are_no_part_of_the_recipe(base: Path) -> None:
    shared = write(base.parent / "shared.yaml", "extends: base.yaml\nx-data: data\nx-adam: {lr: 1e-5}\n")
    child = write(
        base.parent / "child.yaml",
        "extends: shared.yaml\nx-adam: {eps: 1e-7}\n"
        "domains: {math: {train: '${x-data}/a.jsonl'}}\n"
        "stages: [{type: sft, name: a, data: ['${x-data}/b.jsonl'], steps: 1, optimizer: '${x-adam}'}]\n",
    )
    recipe = load_recipe(child)
    assert recipe.domains["math"].train == str(shared.parent / "data" / "a.jsonl")
    assert (recipe.stages[0].optimizer.lr, recipe.stages[0].optimizer.eps) == (1e-5, 1e-7)
    assert load_recipe(child, ["x-data=/elsewhere"]).stages[0].data == ("/elsewhere/b.jsonl",)
    assert "x-" not in dump_recipe(recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=[1", "command line: the value of 'seed=[1' is not valid YAML"),
        ("name.first=x", "command line: name.first: name holds a value, not keys"),
        ("stages.climb.optimizer=3", "stages.climb.optimizer must be a section with keys, not 3"),
        ("stages.climb=3", "stages.1 must be a section with `type` (sft, rl, rlhf, mopd or evaluate), not 3"),
        ("stages.warm.optimizer.betas=[0.9]", "stages.warm.optimizer.betas must hold 2 values, not 1"),
        ("domains=[math]", "domains must be a section with names, not a list"),
        ("parallel.tp=${oc.env:RANKS,two}", "parallel.tp must be a whole number, not the text 'two'"),
        ("trainer.collective_timeout_s=true", "trainer.collective_timeout_s must be a number, not true"),
        ("trainer.collective_timeout_s=soon", "trainer.collective_timeout_s must be a number, not the text 'soon'"),
    ],
)
def test_a_value_that_cannot_be_is_named_on_the_command_line(base: Path, override: str, message: str) -> None:
    assert any(message in problem for problem in problems(base, override)), problems(base, override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"extends: {a: b}\n", "a.yaml:1: extends must be a path or a list of paths, not {'a': 'b'}"),
        (b"extends: [1]\n", "a.yaml:1: extends must be a path or a list of paths, not [1]"),
        (b"name: \x00\n", "a.yaml: not valid YAML: special characters are not allowed at character 6"),
        (b"name: \xff\n", "cannot be read ('utf-8' codec"),
        (b"name: [\n", "a.yaml:2: not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    assert message in problems(tmp_path / "a.yaml")[0]
