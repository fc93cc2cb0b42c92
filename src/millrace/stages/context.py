"""What every stage works with, and what every stage does at the end of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millrace.config.schema import MopdStage, Recipe, RlStage, SftStage
from millrace.data.datasets import ConversationDataset
from millrace.megatron.checkpoint import Checkpointer
from millrace.megatron.policy import Policy
from millrace.observe.console import RunConsole
from millrace.observe.writer import MetricsWriter
from millrace.rollout.weight_sync import WeightSync
from millrace.stages.control import ControlGroup, Stopped
from millrace.stages.episodes import EpisodePlayer
from millrace.stages.sources import WeightSource

TrainingStage = SftStage | RlStage | MopdStage


@dataclass(frozen=True)
class Progress:
    """Where a run stands: what a checkpoint says beside weights and optimizer."""

    stage: int = 0
    """Index of the stage to go on with."""
    step: int = 0
    """Steps of that stage that are done."""
    sampler: Mapping[str, Any] | None = None
    """State of the stage's data sampler; None at its beginning."""

    def to_json(self) -> dict[str, Any]:
        return {"stage": self.stage, "step": self.step, "sampler": self.sampler}


@dataclass
class StageContext:
    recipe: Recipe
    run_dir: Path
    control: ControlGroup
    policy: Policy
    checkpointer: Checkpointer
    conversations: Mapping[str, ConversationDataset]
    """Data of the SFT stages by name, opened before the model is built; rank 0 only, elsewhere empty."""
    sync: WeightSync | None
    """None in a run without rollouts."""
    player: EpisodePlayer | None
    active_parameters: int
    """Parameters that one token meets: all of a dense model, the chosen experts' of a mixture."""
    origin: WeightSource
    """What the present stage started from."""
    built_on: str
    """Tells apart the weights that the present stage starts from and is taught by."""
    console: RunConsole | None
    """Rank 0 only."""
    metrics: MetricsWriter | None
    """Rank 0 only."""
    reached: Progress
    """What is done: where a run that stops now should go on."""
    saved: Progress
    """Where a resumed run would go on."""
    chat_template: str | None = None
    """The chat template, if it is not the one that the model brings; the export then holds it."""
    seconds: dict[str, float] = field(default_factory=dict)

    def say(self, sentence: str) -> None:
        if self.console:
            self.console.say(sentence)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of a phase to this step's `time/PHASE`."""
        start = time.perf_counter()
        yield
        self.seconds[f"time/{phase}"] = self.seconds.get(f"time/{phase}", 0.0) + time.perf_counter() - start

    def begin_stage(self, stage: TrainingStage, progress: Progress, steps: int, updates_per_step: int = 1) -> None:
        """A stage begins with fresh optimizer state; one that goes on keeps it, and its place in the schedule."""
        self.reached = progress
        updates = steps * updates_per_step
        if progress.step == 0:
            self.policy.reset_optimizer(stage.optimizer, updates)
        else:
            self.policy.set_schedule(stage.optimizer, updates, done=progress.step * updates_per_step)

    def end_step(self, stage: TrainingStage, progress: Progress, steps: int, values: Mapping[str, float]) -> None:
        """Record a step, save when it is time, stop when asked to (raises Stopped; what is reached is saved then)."""
        self.reached = progress
        times = {**self.seconds, "time/step": sum(self.seconds.values())}
        self.seconds.clear()
        all_values = {**values, "flops": self._flops(values), **times}
        if self.console and self.metrics:
            self.metrics.write(self.policy.step, stage.name, all_values)
            self.console.step(stage.type, stage.name, progress.step, steps, all_values)
        every = self.recipe.checkpoint.every
        if progress.step == steps:  # the end of a stage is saved by whoever runs the stages
            return
        if every and progress.step % every == 0:
            self.save(progress)
        if self.control.should_stop():
            raise Stopped

    def _flops(self, values: Mapping[str, float]) -> float:
        """Floating-point operations of a step, of the matrix products alone: 2 a parameter and token forward, 4 more
        backward (Kaplan et al., arXiv 2001.08361, section 2.1); attention scores are not counted."""
        forward = values.get("tokens/sampled", 0.0) + values.get("tokens/scored", 0.0)
        return self.active_parameters * (6.0 * values.get("tokens", 0.0) + 2.0 * forward)

    def twin(self, source: WeightSource) -> Policy:
        """A forward-only model of its own beside the policy, with the weights of `source`. Collective."""
        twin = self.policy.frozen_twin()
        source.load_into(twin, self.checkpointer)
        return twin

    def push_weights(self) -> None:
        """Give the engines the policy's present weights unless they have them. Collective."""
        assert self.sync is not None
        if self.sync.version != self.policy.step:
            self.say(str(self.sync.push(self.policy.step)))

    def sync_step(self) -> dict[str, float]:
        """Give the engines what a step made of the policy; metrics of how long that took. Collective."""
        assert self.sync is not None
        with self.timed("sync"):
            report = self.sync.push(self.policy.step)
        if report.slow:  # a usual one is in the metrics
            self.say(str(report))
        return report.metrics()

    def rest_engines(self) -> None:
        """Engines on the trainer's own GPUs give their memory back until the next push, if the recipe says so.
        Collective."""
        if self.sync is not None:
            self.sync.let_engines_sleep()

    def save_reached(self) -> None:
        """Checkpoint what is done, unless that is on disk. Collective."""
        if self.reached != self.saved:
            self.save(self.reached)

    def save(self, progress: Progress, name: str | None = None) -> None:
        """Checkpoint policy, optimizer, random states and progress; a named one is kept for good."""
        state = {**progress.to_json(), "stages": [stage.name for stage in self.recipe.stages]}
        self.checkpointer.save(self.policy, self.policy.step, state, name=name, keep_always=name is not None)
        self.reached = self.saved = progress
