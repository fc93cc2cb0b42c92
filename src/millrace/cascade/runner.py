"""A run from recipe to export: stages in order, held-out pass rates and a gate after each, resumed where it stood.

Every rank runs these lines. Rank 0 alone reads and writes the ledger; what it says is broadcast.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from millrace.cascade.gates import has_gate, judge
from millrace.cascade.history import History, Row, read_history
from millrace.cascade.judges import Judges
from millrace.cascade.labels import Labels
from millrace.cascade.ledger import Ledger
from millrace.cascade.opening import load_progress, open_run
from millrace.cascade.provenance import (
    built_on,
    changed_inputs,
    checksum,
    cost_facts,
    input_facts,
    origin_facts,
    recorded_versions,
)
from millrace.cascade.selection import choose_teachers, loadable
from millrace.config.checkpoint_files import TEMPLATE_FILE
from millrace.config.graph import START, stage_graph
from millrace.config.loading import written
from millrace.config.schema import EvaluateStage, MopdStage, Recipe, RlStage, SftStage, StageConfig
from millrace.errors import MillraceError
from millrace.megatron.export import export_adapter, export_hf
from millrace.megatron.topology import init_distributed
from millrace.observe.entries import stage_of
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
        try:
            ctx = open_run(recipe, run_dir, fleet, judges, topology, stack)
        except Stopped:
            return "stopped"
        cascade = Cascade(recipe, ctx, Ledger(run_dir))
        ending = cascade.run(fleet, judges, until or recipe.stages[-1].name)
        if ctx.console:
            ctx.say(f"report: {write_report(run_dir)}")
        ctx.control.barrier()  # the ranks end together
    return ending


class InputsChanged(MillraceError):
    """A file that a stage trains on is not what it was when the stage began."""


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
        self._record("run_started", versions=recorded_versions(self.ctx.run_dir), step=self.ctx.policy.step)
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
        history = self._history()
        result = Labels(self.recipe, history).result(self.names[-1])
        if self.recipe.export:
            self._hold(result, history)
            out, template = self.ctx.run_dir / "export", self.ctx.chat_template
            texts = {} if template is None else {TEMPLATE_FILE: template}
            export_hf(self.ctx.policy, self.recipe.model.path, out, overwrite=True, texts=texts)
            self._record("exported", path="export", of=result, step=self.ctx.policy.step)
            self.ctx.say(f"exported {result} to {out}")
            if self.recipe.model.lora is not None:
                export_adapter(self.ctx.policy, self.recipe.model.path, self.ctx.run_dir / "adapter", overwrite=True)
                self.ctx.say(f"its adapter is in {self.ctx.run_dir / 'adapter'}")
        self._record("finished", stages=self.names)
        if self.ctx.console and history.rows:
            self.ctx.console.matrix("held-out pass rates", _matrix_texts(history))

    # ---- one stage ------------------------------------------------------------------------------------------------

    def _run_stage(self, index: int, progress: Progress) -> None:
        stage, ctx, history = self.recipe.stages[index], self.ctx, self._history()
        if isinstance(stage, EvaluateStage) and stage.name in history.finished:
            return
        teachers = self._build_on(stage, progress, history)
        if progress.step == 0:
            self._hold(ctx.origin.label, history)
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
                run_mopd(stage, ctx, progress, measure, teachers)
            case RlStage():
                run_rl(stage, ctx, progress, measure)
        ctx.save(Progress(index + 1), name=checkpoint_name(index, stage.name))
        self.held = stage.name

    def _build_on(self, stage: StageConfig, progress: Progress, history: History) -> dict[str, WeightSource]:
        """Say what a stage starts from and who teaches it: what it began with, whatever was measured or judged since.

        Returns the teacher of each domain. Raises InputsChanged on every rank.
        """
        begun = history.started.get(stage.name) if progress.step else None
        labels = {} if begun is None else begun.get("teachers", {})
        if begun is None and isinstance(stage, MopdStage):
            labels = choose_teachers(stage, history, self.graph)
        origin = Labels(self.recipe, history).origin(stage.name) if begun is None else begun["parent"]
        self.ctx.origin = self._source(origin, history)
        teachers = {domain: self._source(label, history) for domain, label in labels.items()}
        self.ctx.built_on, changed = self.ctx.control.on_main(
            lambda: (
                built_on([self.ctx.origin, *teachers.values()]),
                changed_inputs(stage, self.recipe, begun) if begun else None,
            )
        )
        if changed:
            raise InputsChanged(changed)
        return teachers

    def _record_start(self, stage: StageConfig, teachers: Mapping[str, WeightSource]) -> None:
        labels = {domain: source.label for domain, source in teachers.items()}
        if self.ctx.control.is_main:
            facts = {"type": stage.type, **origin_facts(self.ctx.origin), "inputs": input_facts(stage, self.recipe)}
            if labels:
                facts["teachers"] = labels
            self._record("stage_started", stage=stage.name, step=self.ctx.policy.step, settings=written(stage), **facts)
        taught = ", ".join(f"{domain} by {label}" for domain, label in labels.items())
        self.ctx.say(f"{stage.name} starts from {self.ctx.origin.label}{f', taught {taught}' if taught else ''}")

    def _conclude(self, index: int) -> None:
        """Put on record what a stage led to, as far as the ledger does not have it. Raises GateFailed."""
        stage, history = self.recipe.stages[index], self._history()
        source = self._source(stage.name, history)
        if stage.name not in history.finished and self.ctx.control.is_main:
            facts = {"checkpoint": source.folder.name, "checksum": checksum(source)}
            costs = cost_facts(self.ctx.run_dir, stage.name)
            self._record("stage_finished", stage=stage.name, step=self.ctx.policy.step, **facts, **costs)
        self._measure(stage.name)
        if has_gate(stage) or stage.name in history.gates:  # one that was taken out of the recipe has no say any more
            self._judge(stage)

    # ---- pass rates and gates -------------------------------------------------------------------------------------

    def _measure(self, label: str) -> None:
        """One row of the stage-by-domain matrix, unless the ledger has it. Collective."""
        history = self._history()
        if self.ctx.player is None or not self.recipe.domains or label in history.rows:
            return
        self._hold(label, history)
        self._evaluate(label, Labels(self.recipe, history).checkpoint(label))

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
            parent = history.rows[Labels(self.recipe, history).origin(stage.name)]
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

    def _source(self, label: str, history: History) -> WeightSource:
        labels = Labels(self.recipe, history)
        checkpoint = labels.checkpoint(label)
        if checkpoint is None:
            return WeightSource(START, Path(self.recipe.model.path), checkpoint=False)
        return WeightSource(labels.weights(label), self.ctx.checkpointer.store.directory / checkpoint, checkpoint=True)

    def _hold(self, label: str, history: History) -> None:
        """Let the policy have the weights of a label. Collective."""
        source = self._source(label, history)
        if self.held != source.label:
            source.load_into(self.ctx.policy, self.ctx.checkpointer)
            self._changed_weights(source.label)

    def _changed_weights(self, label: str | None) -> None:
        self.held = label
        if self.ctx.sync is not None:
            self.ctx.sync.forget()

    # ---- the ledger -----------------------------------------------------------------------------------------------

    def _history(self) -> History:
        """The same on every rank; every rank asks."""
        return self.ctx.control.on_main(lambda: read_history(self.ledger.events(), self.names))

    def _record(self, event: str, **facts: Any) -> None:
        if self.ctx.control.is_main:
            self.ledger.append(event, **facts)


def _matrix_texts(history: History) -> dict[str, dict[str, str]]:
    return {label: {domain: str(score) for domain, score in row.scores.items()} for label, row in history.rows.items()}
