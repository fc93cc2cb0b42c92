"""A run from recipe to export: stages in order, held-out pass rates and a gate after each, resumed where it stood.

Every rank runs these lines. Rank 0 alone reads and writes the ledger; what it says is broadcast.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from millrace.cascade.gates import has_gate, judge
from millrace.cascade.history import History, Row, read_history, stage_of
from millrace.cascade.judges import Judges
from millrace.cascade.ledger import Ledger
from millrace.cascade.opening import load_progress, open_run
from millrace.cascade.provenance import checksum, cost_facts, input_facts, origin_facts
from millrace.cascade.selection import choose_teachers, loadable
from millrace.config.graph import START, stage_graph
from millrace.config.loading import written
from millrace.config.schema import EvaluateStage, MopdStage, Recipe, RlStage, SftStage, StageConfig
from millrace.errors import MillraceError
from millrace.megatron.export import export_hf
from millrace.megatron.topology import init_distributed
from millrace.observe.report import write_report
from millrace.rollout.fleet import Fleet
from millrace.stages.context import Progress, StageContext
from millrace.stages.control import Stopped
from millrace.stages.evaluate import evaluate
from millrace.stages.mopd import run_mopd
from millrace.stages.rl import run_rl
from millrace.stages.sft import run_sft
from millrace.stages.sources import WeightSource, checkpoint_name

Ending = Literal["finished", "paused", "stopped", "gated"]
"""All done; done up to the stage that was asked for; stopped on request, and saved; stopped by a stage's gate."""


class GateFailed(MillraceError):
    """A stage's gate failed, and the recipe says to stop then."""


def run(recipe: Recipe, run_dir: Path, fleet: Fleet | None, judges: Judges, *, until: str | None = None) -> Ending:
    """Run or resume a recipe on this rank; every rank of the trainer calls it. `fleet` and `judges` are rank
    0's, already starting.

    Args:
        until: the last stage to run; the recipe's last one when absent.
    """
    topology = init_distributed(recipe.parallel, recipe.trainer, recipe.seed)
    with ExitStack() as stack:
        stack.callback(topology.close)
        ctx = open_run(recipe, run_dir, fleet, judges, topology, stack)
        cascade = Cascade(recipe, ctx, Ledger(run_dir))
        ending = cascade.run(fleet, judges, until or recipe.stages[-1].name)
        if ctx.console:
            ctx.say(f"report: {write_report(run_dir)}")
    return ending


class Cascade:
    """Walks through the stages of a recipe and keeps the ledger."""

    def __init__(self, recipe: Recipe, ctx: StageContext, ledger: Ledger) -> None:
        self.recipe, self.ctx, self.ledger = recipe, ctx, ledger
        self.names = [stage.name for stage in recipe.stages]
        self.graph = stage_graph(recipe.stages)
        self.held: str | None = None
        """Label whose weights the policy has; None inside a stage."""

    def run(self, fleet: Fleet | None, judges: Judges, until: str) -> Ending:
        """Settle what is behind the run, run the stages before it up to `until`, export."""
        progress = self.ctx.reached
        try:
            self._begin(progress)
            self._meet_engines(fleet, judges)
            self._settle(progress)
            for index in range(progress.stage, self.names.index(until) + 1):
                self._run_stage(index, progress if index == progress.stage else Progress(index))
                self._conclude(index)
                if self.ctx.control.should_stop():
                    raise Stopped
        except Stopped:
            self.ctx.save_reached()
            self.ctx.say("stopped as asked; the same command goes on from here")
            self._record("stopped", reason="asked", step=self.ctx.policy.step)
            return "stopped"
        except GateFailed as gate:
            self.ctx.say(f"{gate}; to go on, change the gate in the recipe or run a stage again by --from STAGE")
            self._record("stopped", reason="gate", step=self.ctx.policy.step)
            return "gated"
        if until != self.names[-1]:
            self.ctx.say(f"{until} is done, where --until asked to stop; without it the same command goes on")
            self._record("stopped", reason="until", step=self.ctx.policy.step)
            return "paused"
        self._finish()
        return "finished"

    # ---- beginning and end ----------------------------------------------------------------------------------------

    def _begin(self, progress: Progress) -> None:
        if progress.step == 0:
            self.held = START if progress.stage == 0 else self.names[progress.stage - 1]
        if self.ctx.policy.step and progress.stage < len(self.names):
            name = self.names[progress.stage]
            self.ctx.say(f"resuming at step {progress.step} of stage {name} (update {self.ctx.policy.step})")

    def _meet_engines(self, fleet: Fleet | None, judges: Judges) -> None:
        """Wait for the engines of a run that samples and for its judges, and give the engines the policy's weights."""
        if self.ctx.sync is not None:
            self.ctx.control.on_main_until_stopped(judges.wait_ready)
            self.ctx.control.on_main_until_stopped(lambda: fleet.wait_ready() if fleet else None)
            self.ctx.push_weights()

    def _settle(self, progress: Progress) -> None:
        """Measure and judge what should be on record and is not: a kill may come at any moment, and a damaged ledger is
        cut short."""
        self._measure(START)
        for index in range(progress.stage):
            self._conclude(index)
        if progress.step and self.held is not None:  # other weights were loaded over those of the stage
            load_progress(self.ctx.policy, self.recipe, self.ctx.checkpointer)
            self._changed_weights(None)

    def _finish(self) -> None:
        """Export what the last stage led to."""
        result = self._result(self.names[-1])
        if self.recipe.export:
            self._hold(result)
            export_hf(self.ctx.policy, self.recipe.model.path, self.ctx.run_dir / "export", overwrite=True)
            self._record("exported", path="export", of=result, step=self.ctx.policy.step)
            self.ctx.say(f"exported {result} to {self.ctx.run_dir / 'export'}")
        self._record("finished", stages=self.names)
        history = self._history()
        if self.ctx.console:
            self.ctx.console.matrix("held-out pass rates", _matrix_texts(history))

    # ---- one stage ------------------------------------------------------------------------------------------------

    def _run_stage(self, index: int, progress: Progress) -> None:
        stage, ctx = self.recipe.stages[index], self.ctx
        ctx.origin = self._source(self._result(self.graph.parents[stage.name]))
        teachers = self._teachers(stage, progress) if isinstance(stage, MopdStage) else {}
        if progress.step == 0:
            self._hold(ctx.origin.label)
            self._record_start(stage, teachers)
        if isinstance(stage, EvaluateStage):
            return
        self.held = None

        def measure(step: int) -> None:
            self._measure_inside(index, step)

        match stage:
            case SftStage():
                run_sft(stage, ctx, progress)
            case MopdStage():
                run_mopd(stage, ctx, progress, measure, {d: self._source(label) for d, label in teachers.items()})
            case RlStage():
                run_rl(stage, ctx, progress, measure)
        ctx.save(Progress(index + 1), name=checkpoint_name(index, stage.name))
        self.held = stage.name

    def _teachers(self, stage: MopdStage, progress: Progress) -> dict[str, str]:
        """The label of each domain's teacher: those that the stage began with, whatever was measured since."""
        history = self._history()
        begun = history.started.get(stage.name, {}) if progress.step else {}
        return begun.get("teachers") or choose_teachers(stage, history, self.graph)

    def _record_start(self, stage: StageConfig, teachers: dict[str, str]) -> None:
        if self.ctx.control.is_main:
            facts = {"type": stage.type, **origin_facts(self.ctx.origin), "inputs": input_facts(stage, self.recipe)}
            if teachers:
                facts["teachers"] = teachers
            self._record("stage_started", stage=stage.name, step=self.ctx.policy.step, settings=written(stage), **facts)
        taught = ", ".join(f"{domain} by {label}" for domain, label in teachers.items())
        self.ctx.say(f"{stage.name} starts from {self.ctx.origin.label}{f', taught {taught}' if taught else ''}")

    def _conclude(self, index: int) -> None:
        """Put on record what a stage led to, as far as the ledger does not have it. Raises GateFailed."""
        stage = self.recipe.stages[index]
        if stage.name not in self._history().finished and self.ctx.control.is_main:
            source = self._source(stage.name)
            facts = {"checkpoint": source.folder.name, "checksum": checksum(source)}
            costs = cost_facts(self.ctx.run_dir, stage.name)
            self._record("stage_finished", stage=stage.name, step=self.ctx.policy.step, **facts, **costs)
        self._measure(stage.name)
        if has_gate(stage):
            self._judge(stage)

    # ---- pass rates and gates -------------------------------------------------------------------------------------

    def _measure(self, label: str) -> None:
        """One row of the stage-by-domain matrix, unless the ledger has it. Collective."""
        if self.ctx.player is None or not self.recipe.domains or label in self._history().rows:
            return
        self._hold(label)
        self._evaluate(label, None if label == START else self._source(label).folder.name)

    def _measure_inside(self, index: int, step: int) -> None:
        """A row at a step inside a stage, of weights that are kept where the recipe says so."""
        name = self.names[index]
        label, checkpoint = f"{name}@{step}", checkpoint_name(index, name, step)
        if not self.recipe.domains or label in self._history().rows:
            return
        if self.recipe.evaluation.keep:
            self.ctx.save(self.ctx.reached, name=checkpoint)
        self._evaluate(label, checkpoint if self.recipe.evaluation.keep else None)

    def _evaluate(self, label: str, checkpoint: str | None) -> None:
        self.ctx.push_weights()
        scores = {domain: score.to_json() for domain, score in evaluate(self.ctx, label).items()}
        self._record("evaluated", after=label, step=self.ctx.policy.step, checkpoint=checkpoint, scores=scores)

    def _judge(self, stage: StageConfig) -> None:
        """A stage's verdict, on record once for each gate that the recipe gave it. Raises GateFailed."""
        history, gate = self._history(), written(stage.gate)
        verdict = history.gates.get(stage.name)
        if verdict is None or verdict["gate"] != gate:
            before = {stage.name, *self.graph.before(stage.name)}
            earlier = [
                row for row in history.rows.values() if stage_of(row.label) in before and row.label != stage.name
            ]
            parent = history.rows[self._result(self.graph.parents[stage.name])]
            earlier, fallbacks = self._earlier(stage, history), self._fallbacks(stage, history)
            verdict = judge(stage, self.recipe, history.rows[stage.name], parent, earlier, fallbacks).to_json()
            self._record("gate", gate=gate, **verdict)
            self.ctx.say(verdict["reason"])
        if verdict["action"] == "stop":
            raise GateFailed(verdict["reason"])

    def _earlier(self, stage: StageConfig, history: History) -> list[Row]:
        """What was measured before the stage's end, in its middle too."""
        until_here = {stage.name, *self.graph.before(stage.name)}
        rows = [row for row in history.rows.values() if stage_of(row.label) in until_here]
        return [row for row in rows if row.label != stage.name]

    def _fallbacks(self, stage: StageConfig, history: History) -> list[Row]:
        """What a gate may go back to: kept weights of the stage's lineage and of its own middle, but for those that a
        gate went back from before."""
        line = {stage.name, *self.graph.lineage(stage.name)}
        rows = [row for row in loadable(history.rows.values()) if stage_of(row.label) in line]
        return [row for row in rows if row.label != stage.name and history.result(row.label) == row.label]

    # ---- weights --------------------------------------------------------------------------------------------------

    def _result(self, stage: str) -> str:
        """Label of the weights that later stages start from; a stage that only evaluates leads to what it was given."""
        if stage == START:
            return START
        label = self._history().result(stage)
        return self._result(self.graph.parents[label]) if self._only_evaluates(label) else label

    def _only_evaluates(self, label: str) -> bool:
        return label in self.names and isinstance(self.recipe.stages[self.names.index(label)], EvaluateStage)

    def _source(self, label: str) -> WeightSource:
        if label == START:
            return WeightSource(START, Path(self.recipe.model.path), checkpoint=False)
        if self._only_evaluates(label):
            return self._source(self._result(label))
        stage, _, step = label.partition("@")
        name = checkpoint_name(self.names.index(stage), stage, int(step) if step else None)
        return WeightSource(label, self.ctx.checkpointer.store.directory / name, checkpoint=True)

    def _hold(self, label: str) -> None:
        """Let the policy have the weights of a label. Collective."""
        source = self._source(label)
        if self.held != source.label:
            source.load_into(self.ctx.policy, self.ctx.checkpointer)
            self._changed_weights(source.label)

    def _changed_weights(self, label: str | None) -> None:
        self.held = label
        if self.ctx.sync is not None:
            self.ctx.sync.forget()

    # ---- the ledger -----------------------------------------------------------------------------------------------

    def _history(self) -> History:
        """The same on every rank."""
        return self.ctx.control.on_main(lambda: read_history(self.ledger.events(), self.names))

    def _record(self, event: str, **facts: Any) -> None:
        if self.ctx.control.is_main:
            self.ledger.append(event, **facts)


def _matrix_texts(history: History) -> dict[str, dict[str, str]]:
    return {label: {domain: str(score) for domain, score in row.scores.items()} for label, row in history.rows.items()}
