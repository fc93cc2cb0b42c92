"""`millrace data passrate` with a real engine: what it measures, that a kill costs a portion at most, and a stage that
draws by what was measured."""

import json

import psutil
import pytest
from real_runs import RL, finish, output, run, start, wait_until, write_recipe, write_rows, write_world

PROMPTS, SAMPLES, PORTION = 24, 8, 8
SETTINGS = ("fleet.max_num_seqs=8", "evaluation.sampling.max_response_tokens=150")
"""8 waves of 8 sequences are 8 prompts with 8 answers each, long enough for some to hold a comma and some not."""
CURRICULUM = {"order": "easy_to_hard", "above": 0.25, "below": 0.6}
CLIMB = {**RL, "steps": 1, "dynamic_sampling": False, "curriculum": CURRICULUM}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_world(tmp_path_factory.mktemp("world"))
    rule = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    write_rows(folder / "train.jsonl", [{"prompt": f"write {n}", "id": f"row-{n}", **rule} for n in range(PROMPTS)])
    return folder


def measure(recipe, out, *arguments):
    arguments = (*SETTINGS, "--domain", "if", "--out", str(out), *arguments)
    return start(recipe, *arguments, command=("data", "passrate"))


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def whole(world):
    recipe, out = write_recipe(world, "whole", stages=[CLIMB], domains=True), world / "whole.jsonl"
    assert finish(measure(recipe, out), recipe) == 0, output(recipe)
    return recipe, out


@pytest.mark.slow
def test_every_training_prompt_gets_its_pass_rate_and_a_person_a_summary(whole):
    recipe, out = whole
    rows, said = rows_of(out), output(recipe)
    assert [row["id"] for row in rows] == [f"row-{n}" for n in range(PROMPTS)]
    for row in rows:
        assert row["samples"] == SAMPLES and row["pass_rate"] == row["passed"] / SAMPLES
        assert 1 <= row["mean_length"] <= 150
    assert len({row["pass_rate"] for row in rows}) > 2, "prompts of one pass rate prove nothing here"
    assert f"{PROMPTS} prompts, {PROMPTS * SAMPLES} answers of " in said and "never solved" in said
    assert "if: 24/24 prompts, the last 8 solved to " in said


@pytest.mark.slow
def test_after_a_kill_only_what_is_missing_is_measured_and_comes_out_the_same(world, whole):
    recipe, out = write_recipe(world, "killed", stages=[CLIMB], domains=True), world / "killed.jsonl"
    process = measure(recipe, out)
    assert wait_until(lambda: len(rows_of(out)) >= PORTION, process, recipe), output(recipe)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(family, timeout=20)[1], "an engine outlived the command"
    before = rows_of(out)
    assert PORTION <= len(before) < PROMPTS

    assert finish(measure(recipe, out), recipe) == 0, output(recipe)
    assert f"if: {len(before)} of {PROMPTS} prompts were measured before" in output(recipe)
    assert rows_of(out) == rows_of(whole[1])

    assert finish(measure(recipe, out, "--samples", "4"), recipe) == 1
    assert "its pass rates were measured with samples 8 (now 4), and would not compare" in output(recipe)
    assert rows_of(out) == rows_of(whole[1])


@pytest.mark.slow
def test_a_stage_draws_the_easiest_of_the_prompts_its_curriculum_keeps(world, whole, standing_engine):
    recipe, out = write_recipe(world, "climb", stages=[CLIMB], domains=True, fleet=standing_engine), whole[1]
    rates = {row["id"]: row["pass_rate"] for row in rows_of(out)}
    kept = [rate for rate in rates.values() if CURRICULUM["above"] < rate < CURRICULUM["below"]]
    assert CLIMB["prompts_per_step"] < len(kept) < PROMPTS
    assert run(recipe, f"domains.if.pass_rates={out}") == 0, output(recipe)
    assert f"rl: if draws from {len(kept)} of {PROMPTS} prompts, pass rates {max(kept):.2f} down" in output(recipe)
    _, *answers = rows_of(world / "runs" / "climb" / "rollouts" / "rl" / "step-000000.jsonl")
    drawn = [rates[row] for row in dict.fromkeys(answer["row"] for answer in answers)]
    assert drawn == sorted(kept, reverse=True)[: len(drawn)] and len(drawn) == CLIMB["prompts_per_step"]
