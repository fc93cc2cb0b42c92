import json
from pathlib import Path

import pytest

from millrace.config.loading import load_recipe
from millrace.config.model_shape import ModelShape
from millrace.config.plan import Plan, coordinates, make_plan, render_text, to_json
from millrace.config.schema import ParallelConfig


def plan(file: Path, *overrides: str) -> Plan:
    return make_plan(load_recipe(file, overrides))


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tp=2, pp=2, dp=3),
        ParallelConfig(tp=2, cp=2, dp=2, pp=2),
        ParallelConfig(tp=2, dp=4, pp=2, ep=4),
        ParallelConfig(tp=4, dp=2, pp=3, ep=2, etp=2),
    ],
)
def test_places_are_those_of_megatron_core(parallel: ParallelConfig) -> None:
    from megatron.core.parallel_state import RankGenerator

    p, order = parallel, "tp-cp-ep-dp-pp"
    edp = p.tp * p.cp * p.dp // (p.ep * p.etp)
    dense = RankGenerator(tp=p.tp, ep=1, dp=p.dp, pp=p.pp, cp=p.cp, order=order)
    expert = RankGenerator(tp=p.etp, ep=p.ep, dp=edp, pp=p.pp, cp=1, order=order)
    groups = [(dense, "tp", "tp"), (dense, "cp", "cp"), (dense, "dp", "dp"), (dense, "pp", "pp")]
    for generator, token, name in [*groups, (expert, "tp", "etp"), (expert, "ep", "ep")]:
        for group in generator.get_ranks(token):
            assert [coordinates(rank, p)[name] for rank in group] == list(range(len(group)))


@pytest.mark.parametrize("model", ["base", "moe"])
def test_the_ranks_together_hold_every_parameter(recipe_file: Path, model: str) -> None:
    shape = ModelShape.from_hf(recipe_file.parent / model)
    padding = (shape.padded_vocab_size(1) - shape.vocab_size) * shape.hidden_size
    whole = plan(recipe_file, f"model.path={model}").ranks[0]
    assert whole.parameters == shape.parameter_count() + padding
    cut = plan(recipe_file, f"model.path={model}", "parallel={tp: 2, pp: 2, dp: 2}", "parallel.ep=1")
    assert [rank.first_layer for rank in cut.ranks] == [0] * 4 + [2] * 4
    copy = shape.padded_vocab_size(2) * shape.hidden_size // 2
    replicated = sum(r.parameters for r in (cut.ranks[0], cut.ranks[4])) - copy
    assert whole.parameters // 2 < replicated < whole.parameters


def test_bytes_follow_the_data_type_and_the_distributed_optimizer(recipe_file: Path) -> None:
    single = plan(recipe_file, "model.dtype=float32").ranks[0]
    count = single.parameters
    assert (single.weight_bytes, single.gradient_bytes, single.optimizer_bytes) == (4 * count, 4 * count, 8 * count)
    half = plan(recipe_file, "model.dtype=bfloat16").ranks[0]
    assert (half.weight_bytes, half.gradient_bytes, half.optimizer_bytes) == (2 * count, 4 * count, 12 * count)
    shared = plan(recipe_file, "model.dtype=float32", "parallel.dp=2", "trainer.distributed_optimizer=true").ranks[0]
    assert shared.optimizer_bytes == 4 * count


def test_with_lora_only_the_adapters_have_gradients_and_optimizer_state(recipe_file: Path) -> None:
    shape = ModelShape.from_hf(recipe_file.parent / "base")
    lora = "model.lora={rank: 2, targets: [q_proj, o_proj]}"
    for tp in (1, 2):
        full = plan(recipe_file, "model.dtype=float32", f"parallel.tp={tp}").ranks[0]
        rank = plan(recipe_file, "model.dtype=float32", f"parallel.tp={tp}", lora).ranks[0]
        heads = shape.num_heads * shape.head_dim
        trained = shape.num_layers * 2 * 2 * (shape.hidden_size + heads // tp)
        assert rank.trained == trained and rank.parameters == full.parameters + trained
        assert (rank.weight_bytes, rank.gradient_bytes) == (4 * rank.parameters, 4 * trained)
        assert rank.optimizer_bytes == 8 * trained


def test_experts_are_divided_over_expert_parallel_ranks(recipe_file: Path) -> None:
    shape = ModelShape.from_hf(recipe_file.parent / "moe")
    one, two = plan(recipe_file, "model.path=moe"), plan(recipe_file, "model.path=moe", "parallel={dp: 2, ep: 2}")
    assert one.ranks[0].parameters - two.ranks[0].parameters == 4 * 2 * shape.layer_parameters(0).expert
    assert [rank.ep for rank in two.ranks] == [0, 1]


def test_the_arithmetic_of_a_batch_is_stated(recipe_file: Path) -> None:
    warm, climb = plan(recipe_file, "parallel.dp=2").stages
    assert (warm.samples_per_update, warm.longest_sequence, warm.micro_batches_at_most) == (64, 128, 8)
    assert (climb.samples_per_update, climb.longest_sequence, climb.micro_batches_at_most) == (2048, 256, 512)


def test_a_plan_is_shown_aligned_and_as_json(recipe_file: Path) -> None:
    made = plan(recipe_file, "parallel.tp=2")
    text = render_text(made)
    assert "2 x python -m millrace.cascade.worker" in text and "2 ranks" in text
    rows = [line for line in text.splitlines() if line.startswith(("rank", "0 ", "1 "))]
    assert len({row.index("0-3") for row in rows[1:]} | {rows[0].index("layers")}) == 1
    assert json.loads(to_json(made))["ranks"][1]["tp"] == 1


def test_stages_tell_what_they_start_from_and_who_teaches_them(cascade_file: Path) -> None:
    stages = {stage.name: stage for stage in plan(cascade_file).stages}
    assert [stages[name].parent for name in ("warm", "climb", "prefer", "distil", "look")] == [
        "start",
        "warm",
        "warm",
        "climb",
        "distil",
    ]
    distil = stages["distil"]
    assert [(t.rule, t.domains) for t in distil.teachers] == [
        ("best(math)", ("math",)),
        ("stage(prefer)", ("chat",)),
        ("stage(start)", ("format",)),
    ]
    assert (distil.placement, distil.teacher_servers) == ("time_shared", 0)
    assert (stages["climb"].placement, stages["climb"].teachers) == (None, ())


def test_domains_of_one_rule_share_a_teacher_and_each_served_one_is_a_server(cascade_file: Path) -> None:
    shared = "stages.distil.teachers={math: stage(climb), format: 'stage( climb )', chat: stage(prefer)}"
    made = plan(
        cascade_file, shared, "stages.distil.placement=served", "stages.distil.teacher_engine.tensor_parallel=2"
    )
    distil = made.stages[3]
    assert [(t.rule, t.domains) for t in distil.teachers] == [
        ("stage(climb)", ("math", "format")),
        ("stage(prefer)", ("chat",)),
    ]
    assert distil.teacher_servers == 2
    expected = "2 x vLLM server of stage(climb), stage(prefer), the teachers of distil, on 127.0.0.1 over 2 ranks"
    assert expected in made.commands


@pytest.mark.parametrize(
    ("settings", "verdicts"),
    [
        ({}, 128 * 120 * 2),
        ({"pairing": "circular"}, 128 * 16 * 2),
        ({"both_orders": "false"}, 128 * 120),
        ({"pairing": "circular", "samples_per_prompt": 2}, 128 * 1 * 2),
        ({"samples_per_prompt": 3, "prompts_per_step": 1, "pairing": "circular"}, 3 * 2),
    ],
)
def test_the_verdicts_of_a_step_are_counted(cascade_file: Path, settings: dict[str, object], verdicts: int) -> None:
    prefer = plan(cascade_file, *(f"stages.prefer.{key}={value}" for key, value in settings.items())).stages[2]
    assert prefer.verdicts_per_step == verdicts


def test_judges_tell_where_they_run(cascade_file: Path) -> None:
    asked = plan(cascade_file)
    assert [(j.name, j.domains, j.url, j.ranks) for j in asked.judges] == [
        ("genrm", ("chat",), "http://127.0.0.1:8100/v1", 0)
    ]
    assert not any("the judge" in command for command in asked.commands)
    own = plan(cascade_file, "judges.genrm={model: base, max_tokens: 64, engine: {tensor_parallel: 4}}")
    assert (own.judges[0].url, own.judges[0].ranks) == (None, 4)
    model = cascade_file.parent / "base"
    assert f"1 x vLLM server of {model}, the judge genrm, on 127.0.0.1 over 4 ranks" in own.commands


def test_the_graph_of_a_plan_is_shown_as_text_and_as_json(cascade_file: Path) -> None:
    made = plan(cascade_file)
    rows = [line.split() for line in render_text(made).splitlines()]
    assert ["prefer", "rlhf", "warm", "5", "2048", "256", "tokens", "1024", "a", "replica"] in rows
    assert ["look", "evaluate", "distil", "-", "-", "-", "-"] in rows
    assert ["distil", "stage(prefer)", "chat", "time_shared"] in rows
    assert ["genrm", "chat", "http://127.0.0.1:8100/v1", "prefer", "30720"] in rows
    facts = json.loads(to_json(made))
    assert [stage["parent"] for stage in facts["stages"]] == ["start", "warm", "warm", "climb", "distil"]
    assert facts["stages"][3]["teachers"][0] == {"rule": "best(math)", "domains": ["math"]}
    assert facts["judges"][0]["url"] == "http://127.0.0.1:8100/v1"


def test_a_plan_without_teachers_and_judges_has_no_tables_of_them(recipe_file: Path) -> None:
    text = render_text(plan(recipe_file))
    assert "teachers of" not in text and "judge" not in text
