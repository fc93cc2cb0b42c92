"""How far the simulation is from measured runs: its speeds are fitted to one half of a run's steps and tell the other.

Fitted are, over all stages of one way of working that sample and have no judge (whose time stands in the rollout's),

    rollout seconds = longest answer * c0 + answer tokens * c1      a decoding step of n sequences takes c0 + n c1
    train seconds   = micro-batches * t0 + tokens * t1

to the earlier half of each stage's steps. The later half is predicted by simulating its rollouts with the measured
lengths of its answers; score and sync take their mean of the earlier half. A stage is simulated in its own way of
working: synchronous, or one step off, whose speeds are those of fleet and trainer at work together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from millrace.config.errors import ConfigError
from millrace.config.loading import load_recipe
from millrace.config.schema import FleetConfig, Recipe, RlStage, SamplingStage
from millrace.observe.lines import read_lines
from millrace.planning.simulate import Lengths, Mode, Setting, simulate

MANY_STEPS = 100
"""Simulated one step off, so that the first batch, which is waited for, does not count."""
LEAST_STEPS = 4
"""Steps of a stage below which it is left out."""

Row = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Measured on one machine."""

    decode_fixed_s: float
    """c0: of a decoding step."""
    decode_sequence_s: float
    """c1: of it, for each running sequence."""
    micro_batch_s: float
    """t0"""
    token_s: float
    """t1"""

    def step_time(self, running: int) -> float:
        return self.decode_fixed_s + running * self.decode_sequence_s

    def train_s(self, micro_batches: float, tokens: float) -> float:
        return micro_batches * self.micro_batch_s + tokens * self.token_s


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Mean seconds of the later half of a stage's steps."""

    stage: str
    mode: Mode
    steps: int
    predicted_rollout_s: float
    measured_rollout_s: float
    """What the trainer waits for."""
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    run: str
    speeds: Mapping[Mode, Speeds]
    """Of each way of working: one step off, fleet and trainer share what the machine has."""
    comparisons: tuple[Comparison, ...]

    @property
    def worst(self) -> float:
        return max(abs(one.error) for one in self.comparisons)


@dataclass(frozen=True)
class _Step:
    row: Row
    lengths: tuple[int, ...]
    """Tokens of each answer."""

    @property
    def sampling_s(self) -> float:
        """Seconds in which the answers came about, waited for or not."""
        return self.row.get("sampling/seconds", self.row["time/rollout"])


def calibrate(run_dir: str | Path) -> Calibration:
    """Read a run's recipe, metrics and rollouts. Raises ConfigError when it has too few steps that can be compared."""
    run = Path(run_dir)
    if not (run / "metrics.jsonl").is_file() or not (run / "recipe.yaml").is_file():
        raise ConfigError(
            f"{run} is no run with metrics.jsonl and recipe.yaml; name the folder of a run that has trained"
        )
    recipe = load_recipe(run / "recipe.yaml")
    stages = {name: steps for name, steps in _steps(run, recipe).items() if len(steps) >= LEAST_STEPS}
    if not stages:
        raise ConfigError(
            f"{run} has no stage of {LEAST_STEPS} or more steps with rollouts on disk and no judge; let it run on"
        )
    early = {name: steps[: len(steps) // 2] for name, steps in stages.items()}
    modes = {name: _mode(recipe, name) for name in stages}
    speeds = {
        mode: fit([step for name, steps in early.items() if modes[name] == mode for step in steps])
        for mode in dict.fromkeys(modes.values())
    }
    found = [
        _compare(name, modes[name], early[name], steps[len(steps) // 2 :], speeds[modes[name]], recipe)
        for name, steps in stages.items()
    ]
    return Calibration(run=str(run), speeds=speeds, comparisons=tuple(found))


def _steps(run: Path, recipe: Recipe) -> dict[str, list[_Step]]:
    """The steps of each stage that have their answers on disk."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_lines(run / "metrics.jsonl"):
        if "time/rollout" in row and "judge/verdicts" not in row:
            rows[row["stage"]].append(row)
    found: dict[str, list[_Step]] = {}
    for stage in recipe.stages:
        if not isinstance(stage, SamplingStage) or stage.name not in rows:
            continue
        files = sorted(
            file for file in (run / "rollouts" / stage.name).glob("step-*.jsonl") if file.name.count(".") == 1
        )
        found[stage.name] = []
        for row, file in zip(rows[stage.name], files, strict=False):
            lengths = tuple(len(line["answer_tokens"]) for line in read_lines(file) if "answer_tokens" in line)
            if lengths:
                found[stage.name].append(_Step(row, lengths))
    return found


def fit(steps: Sequence[_Step]) -> Speeds:
    """Speeds that tell the measured seconds best (least squares, none below 0)."""
    decode = least_squares(
        [(float(max(step.lengths)), float(sum(step.lengths))) for step in steps],
        [step.sampling_s for step in steps],
    )
    train = least_squares(
        [(step.row["micro_batches"], step.row["tokens"]) for step in steps],
        [step.row["time/train"] for step in steps],
    )
    return Speeds(decode_fixed_s=decode[0], decode_sequence_s=decode[1], micro_batch_s=train[0], token_s=train[1])


def least_squares(inputs: Sequence[tuple[float, float]], outputs: Sequence[float]) -> tuple[float, float]:
    """Weights a, b >= 0 for which a x + b y is nearest to the outputs."""
    xx = sum(x * x for x, _ in inputs)
    xy = sum(x * y for x, y in inputs)
    yy = sum(y * y for _, y in inputs)
    xo = sum(x * out for (x, _), out in zip(inputs, outputs, strict=True))
    yo = sum(y * out for (_, y), out in zip(inputs, outputs, strict=True))
    determinant = xx * yy - xy * xy
    if determinant > 1e-9 * xx * yy:
        a, b = (xo * yy - yo * xy) / determinant, (yo * xx - xo * xy) / determinant
        if a >= 0 and b >= 0:
            return a, b
    alone = ((xo / xx, 0.0), (0.0, yo / yy))
    return min(
        alone,
        key=lambda ab: sum((ab[0] * x + ab[1] * y - out) ** 2 for (x, y), out in zip(inputs, outputs, strict=True)),
    )


def _mode(recipe: Recipe, name: str) -> Mode:
    stage = next(stage for stage in recipe.stages if stage.name == name)
    return "one_step_off" if isinstance(stage, RlStage) and stage.one_step_off else "synchronous"


def _compare(
    name: str, mode: Mode, early: Sequence[_Step], later: Sequence[_Step], speeds: Speeds, recipe: Recipe
) -> Comparison:
    rest = fmean(
        step.row["time/step"] - step.row["time/rollout"] - step.row["time/train"] for step in early
    )  # teachers, scores, the sync
    # One step off a batch is sampled beside the training of another, so the steps are simulated as one sequence.
    parts = [later] if mode == "one_step_off" else [[step] for step in later]
    outcomes = [simulate(_setting(mode, part, speeds, rest, recipe.fleet, recipe.seed)) for part in parts]
    return Comparison(
        stage=name,
        mode=mode,
        steps=len(later),
        predicted_rollout_s=fmean(outcome.rollout_s for outcome in outcomes),
        measured_rollout_s=fmean(step.row["time/rollout"] for step in later),
        predicted_s=fmean(outcome.step_s for outcome in outcomes),
        measured_s=fmean(step.row["time/step"] for step in later),
    )


def _setting(mode: Mode, steps: Sequence[_Step], speeds: Speeds, rest: float, fleet: FleetConfig, seed: int) -> Setting:
    lengths = [length for step in steps for length in step.lengths]
    return Setting(
        mode=mode,
        engines=max(1, fleet.engines or len(fleet.addresses)),
        slots=fleet.max_num_seqs,
        step_time=speeds.step_time,
        prefill_s=0.0,
        batch=round(len(lengths) / len(steps)),
        lengths=Lengths(mean=fmean(lengths), longest=max(lengths), measured=lengths),
        train_s=fmean(speeds.train_s(step.row["micro_batches"], step.row["tokens"]) for step in steps),
        sync_s=rest,
        steps=MANY_STEPS if mode == "one_step_off" else 1,
        seed=seed,
    )


def render_text(found: Calibration) -> str:
    lines = [
        f"calibrated on {found.run}, {mode.replace('_', ' ')}: a decoding step of n sequences takes "
        f"{1e3 * speeds.decode_fixed_s:.2f} + {1e3 * speeds.decode_sequence_s:.3f} n ms, a micro-batch "
        f"{1e3 * speeds.micro_batch_s:.0f} ms and {1e6 * speeds.token_s:.1f} us a token"
        for mode, speeds in found.speeds.items()
    ]
    for one in found.comparisons:
        lines.append(
            f"  {one.stage}: {one.mode.replace('_', ' ')}, a step predicted {one.predicted_s:.2f} s, "
            f"measured {one.measured_s:.2f} s over {one.steps} later steps: {one.error:+.1%} "
            f"(waiting for rollouts {one.predicted_rollout_s:.2f} s, measured {one.measured_rollout_s:.2f} s)"
        )
    return "\n".join(lines)
