from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from millrace.config.errors import ConfigError
from millrace.config.loading import dump_recipe, load_recipe
from millrace.planning.calibration import calibrate, least_squares, render_text

DECODE, TRAIN = (0.02, 0.0003), (0.05, 1e-5)
"""Speeds of the machine that the run pretends to come from."""


@pytest.fixture
def run(recipe_file: Path) -> Path:
    """A run whose times follow from known speeds."""
    folder, draw = recipe_file.parent / "measured", random.Random(3)
    (folder / "rollouts" / "climb").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe_file)))
    rows = []
    for step in range(20):
        answers = [draw.randrange(8, 65) for _ in range(32)]
        lines = [{"step": step}, *({"answer_tokens": [1] * n} for n in answers)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "rollouts" / "climb" / f"step-{step:06d}.jsonl").write_text(text)
        (folder / "rollouts" / "climb" / f"step-{step:06d}.streams.jsonl").write_text("{}\n")
        micro_batches, tokens = draw.randrange(2, 6), float(sum(answers) + 900)
        times = {
            "time/rollout": DECODE[0] * max(answers) + DECODE[1] * sum(answers),
            "time/train": TRAIN[0] * micro_batches + TRAIN[1] * tokens,
            "time/sync": 0.25,
        }
        row = {"step": step, "stage": "climb", "tokens": tokens, "micro_batches": micro_batches, **times}
        rows.append(row | {"time/step": sum(times.values())})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_speeds_behind_a_run_are_found_and_tell_its_later_steps(run: Path) -> None:
    found = calibrate(run)
    speeds = found.speeds["synchronous"]
    assert speeds.decode_fixed_s == pytest.approx(DECODE[0])
    assert speeds.decode_sequence_s == pytest.approx(DECODE[1])
    assert (speeds.micro_batch_s, speeds.token_s) == pytest.approx(TRAIN)
    (one,) = found.comparisons
    assert (one.stage, one.steps) == ("climb", 10)
    assert found.worst < 0.05, "answers are drawn anew from the measured lengths"
    assert "climb: synchronous, a step predicted" in render_text(found)


def test_a_run_one_step_off_is_simulated_one_step_off(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    stage = next(stage for stage in recipe["stages"] if stage["name"] == "climb")
    stage |= {"one_step_off": True, "off_policy": {"kind": "tis"}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    beside = [0.0, *(row["time/train"] for row in rows)]
    for row, train in zip(rows, beside, strict=False):  # sampled while the step before was trained
        sampling = row["time/rollout"]
        row |= {"sampling/seconds": sampling, "time/rollout": max(0.0, sampling - train)}
        row["time/step"] = row["time/rollout"] + row["time/train"] + row["time/sync"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = calibrate(run)
    assert found.speeds["one_step_off"].decode_fixed_s == pytest.approx(DECODE[0])
    assert found.comparisons[0].mode == "one_step_off" and found.worst < 0.05
    assert "climb: one step off, a step predicted" in render_text(found)


def test_a_slower_machine_is_seen_as_an_error(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows[10:]:
        row["time/step"] *= 2
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert calibrate(run).comparisons[0].error == pytest.approx(-0.5, abs=0.05)


def test_what_is_no_run_and_what_is_too_short_say_so(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run with metrics\.jsonl and recipe\.yaml"):
        calibrate(tmp_path / "nowhere")
    for file in sorted((run / "rollouts" / "climb").glob("*.jsonl"))[4:]:
        file.unlink()
    with pytest.raises(ConfigError, match="has no stage of 4 or more steps with rollouts"):
        calibrate(run)


def test_weights_of_a_fit_are_never_negative() -> None:
    assert least_squares([(1.0, 2.0), (2.0, 1.0), (3.0, 3.0)], [5.0, 4.0, 9.0]) == pytest.approx((1.0, 2.0))
    a, b = least_squares([(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)], [5.0, 4.0, 3.0])
    assert (a, b) == pytest.approx((0.0, 4.0)), "the best of all would have a = -1"
    assert least_squares([(1.0, 2.0), (2.0, 4.0)], [2.0, 4.0])[0] >= 0, "both inputs say the same"
