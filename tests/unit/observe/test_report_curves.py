import pytest
from sample_run import write_sample_run

from millrace.observe.report.curves import MOST_POINTS, comparison_default, curve_data, thinned
from millrace.observe.report.efficiency import costs, total_cost
from millrace.observe.report.record import read_run


@pytest.fixture
def run(tmp_path):
    return read_run(write_sample_run(tmp_path, answers=False))


def charts(run, stage):
    (found,) = [one["charts"] for one in curve_data(run)["stages"] if one["name"] == stage]
    return {chart["title"]: [series["name"] for series in chart["series"]] for chart in found}


def test_a_stage_has_the_charts_of_what_it_recorded(run):
    mopd = charts(run, "mopd")
    domains = ("math", "instruction_following", "mcqa", "chat")
    assert mopd["Reverse KL to the teacher"] == [f"reverse_kl/{domain}" for domain in domains]
    assert mopd["Reward"] == ["reward/mean", *(f"reward/{domain}" for domain in domains)]
    assert mopd["Time per phase"] == ["time/rollout", "time/teacher", "time/train", "time/sync"]
    assert list(charts(run, "sft")) == ["Held-out pass rate", "Gradient norm", "Loss", "Time per phase"]
    assert "KL to the reference" in charts(run, "rlhf")


def test_steps_are_counted_from_the_beginning_of_each_stage(run):
    for stage in curve_data(run)["stages"]:
        (loss,) = [chart["series"][0] for chart in stage["charts"] if chart["title"] == "Loss"]
        assert loss["x"] == list(range(1, 21))


def test_the_held_out_curve_goes_from_the_parent_through_the_stage_to_its_end(run):
    (stage,) = [one for one in curve_data(run)["stages"] if one["name"] == "math-rl"]
    (held_out,) = [chart for chart in stage["charts"] if chart["title"] == "Held-out pass rate"]
    series = {one["name"]: one for one in held_out["series"]}["held_out/math"]
    assert series["x"] == [0, 5, 10, 15, 20] and series["y"][0] == 0.325 and series["y"][-1] == 0.585


def test_the_comparison_begins_with_siblings_that_share_a_domain(run):
    assert comparison_default(run.stages) == ("reward/instruction_following", ["grpo-again", "mopd"])
    assert comparison_default(run.stages[:3]) == ("reward/mean", ["if-rl", "rlhf"])
    assert comparison_default(run.stages[:1]) == ("loss", ["sft"])


def test_thinning_keeps_the_ends_of_the_range_and_the_order():
    points = [(float(i), 0.0) for i in range(10_000)]
    points[4321], points[7777] = (4321.0, 9.0), (7777.0, -9.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS and kept == sorted(kept)
    assert (4321.0, 9.0) in kept and (7777.0, -9.0) in kept
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_not_a_number_is_left_out_of_a_curve(tmp_path):
    folder = write_sample_run(tmp_path, steps=6, answers=False)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"loss": ', '"loss": NaN, "was": ')
    (folder / "metrics.jsonl").write_text("".join(lines))
    (stage,) = [one for one in curve_data(read_run(folder))["stages"] if one["name"] == "sft"]
    (loss,) = [chart["series"][0] for chart in stage["charts"] if chart["title"] == "Loss"]
    assert loss["x"] == [1, 2, 4, 5, 6]


def test_a_solved_answer_costs_what_the_stage_spent_by_the_answers_with_full_reward(run):
    cost = costs(run)["if-rl"]
    rows = run.stage("if-rl").rows
    solved = sum(row["reward/solved"] * 16 * 4 for row in rows)
    assert cost.solved == pytest.approx(solved)
    assert cost.per_solved(cost.flops) == pytest.approx(sum(row["flops"] for row in rows) / solved)
    assert cost.per_solved(cost.tokens_sampled) == pytest.approx(sum(row["tokens/sampled"] for row in rows) / solved)


def test_stages_without_right_and_wrong_have_no_cost_per_solved_answer(run):
    for stage in ("sft", "rlhf"):
        assert costs(run)[stage].solved is None and costs(run)[stage].per_solved(5.0) is None


def test_a_stage_that_goes_on_is_charged_what_its_steps_recorded(tmp_path):
    run = read_run(write_sample_run(tmp_path, until="if-rl", answers=False))
    spent = costs(run)
    assert list(spent) == ["sft", "if-rl"]
    assert spent["if-rl"].seconds == pytest.approx(sum(row["time/step"] for row in run.stage("if-rl").rows))
    assert total_cost(list(spent.values())).tokens_trained == sum(cost.tokens_trained for cost in spent.values())


def test_what_was_not_recorded_is_not_zero(tmp_path):
    folder = write_sample_run(tmp_path, until="if-rl", answers=False)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace('"flops"', '"x"').replace('"reward/solved"', '"y"'))
    cost = costs(read_run(folder))["if-rl"]
    assert cost.flops is None and cost.solved is None
