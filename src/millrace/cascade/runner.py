"""A run from recipe to export: stages in order, held-out pass rates after each, resumed where it stood."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from millrace.cascade.judges import Judges
from millrace.cascade.ledger import Ledger
from millrace.config.errors import ConfigError
from millrace.config.model_shape import ModelShape
from millrace.config.schema import OptimizerConfig, Recipe, RlStage, SamplingStage, SftStage, StageConfig
from millrace.data.datasets import ConversationDataset
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.registry import make_environment
from millrace.evaluation.pass_rate import PassRate
from millrace.megatron.checkpoint import Checkpointer
from millrace.megatron.export import export_hf
from millrace.megatron.policy import Policy
from millrace.megatron.topology import Topology, init_distributed
from millrace.observe.console import RunConsole
from millrace.observe.report import write_report
from millrace.observe.writer import MetricsWriter
from millrace.rollout.fleet import Fleet
from millrace.rollout.weight_sync import WeightSync
from millrace.stages.context import Progress, StageContext
from millrace.stages.control import ControlGroup, Stopped
from millrace.stages.episodes import Domain, EpisodePlayer
from millrace.stages.evaluate import evaluate
from millrace.stages.reference import checkpoint_name
from millrace.stages.rl import run_rl
from millrace.stages.sft import open_conversations, run_sft

START = "start"
"""Label of the row measured before the first stage."""


def run(recipe: Recipe, run_dir: Path, fleet: Fleet | None, judges: Judges) -> bool:
    """Run or resume a recipe on this rank; every rank of the trainer calls it. `fleet` and `judges` are rank 0's,
    already starting.

    Returns whether the recipe is finished (False: stopped on request, and saved).
    """
    topology = init_distributed(recipe.parallel, recipe.trainer, recipe.seed)
    with ExitStack() as stack:
        stack.callback(topology.close)
        ctx, progress = _open(recipe, run_dir, fleet, judges, topology, stack)
        ledger = Ledger(run_dir)
        try:
            _meet_engines(ctx, fleet, judges)
            _run_stages(ctx, progress, ledger)
        except Stopped:
            ctx.save_reached()
            ctx.say("stopped as asked; the same command goes on from here")
            _record(ctx, ledger, "stopped", step=ctx.policy.step)
            return False
        if recipe.export:
            export_hf(ctx.policy, recipe.model.path, run_dir / "export", overwrite=True)
            _record(ctx, ledger, "exported", path="export", step=ctx.policy.step)
            ctx.say(f"exported to {run_dir / 'export'}")
        _record(ctx, ledger, "finished", stages=[stage.name for stage in recipe.stages])
        if ctx.console:
            ctx.console.matrix("held-out pass rates", _matrix_texts(ledger))
            ctx.say(f"report: {write_report(run_dir)}")
    return True


def _open(
    recipe: Recipe, run_dir: Path, fleet: Fleet | None, judges: Judges, topology: Topology, stack: ExitStack
) -> tuple[StageContext, Progress]:
    """Everything a stage works with, and where the run stands. What is opened here is closed by `stack`."""
    control = ControlGroup()
    control.stop_on_signals()
    console = RunConsole(run_dir) if control.is_main else None
    shape = ModelShape.from_hf(recipe.model.path)
    tokenizer = ChatTokenizer(recipe.model.path, shape.vocab_size)
    # Bad rows are found before a model is built or an engine waited for.
    domains = _domains(recipe, tokenizer, judges) if control.is_main else {}
    conversations = _conversations(recipe, tokenizer) if control.is_main else {}
    control.barrier()
    policy = Policy(
        recipe.model, shape, recipe.parallel, recipe.trainer, topology, optimizer=OptimizerConfig(), seed=recipe.seed
    )
    checkpointer = Checkpointer(run_dir / "checkpoints", keep=recipe.checkpoint.keep)
    progress = _load(policy, recipe, checkpointer, console)
    sync = player = None
    if recipe.samples:
        sync = WeightSync(policy, fleet, recipe.fleet, topology, group=control.group)
        player = EpisodePlayer(control, sync, tokenizer, fleet, domains, console)
        stack.callback(player.close)
    metrics = MetricsWriter(run_dir, first_step=policy.step + 1) if control.is_main else None
    if console and metrics:
        stack.callback(console.close)
        stack.callback(metrics.close)
    ctx = StageContext(
        recipe=recipe,
        run_dir=run_dir,
        control=control,
        policy=policy,
        checkpointer=checkpointer,
        conversations=conversations,
        sync=sync,
        player=player,
        console=console,
        metrics=metrics,
        reached=progress,
        saved=progress,
    )
    return ctx, progress


def _meet_engines(ctx: StageContext, fleet: Fleet | None, judges: Judges) -> None:
    """Wait for the engines of a run that samples and for its judges, and give the engines the policy's weights."""
    if ctx.sync is not None:
        ctx.control.on_main_until_stopped(judges.wait_ready)
        ctx.control.on_main_until_stopped(lambda: fleet.wait_ready() if fleet else None)
        ctx.push_weights()


def _load(policy: Policy, recipe: Recipe, checkpointer: Checkpointer, console: RunConsole | None) -> Progress:
    state = checkpointer.load(policy)
    if state is None:
        policy.load_hf(recipe.model.path)
        return Progress()
    _require_same_stages(recipe, state.pop("stages"), state["stage"])
    progress = Progress(**state)
    if console and progress.stage < len(recipe.stages):
        name = recipe.stages[progress.stage].name
        console.say(f"resuming at step {progress.step} of stage {name} (update {policy.step})")
    return progress


def _require_same_stages(recipe: Recipe, names: list[str], reached: int) -> None:
    """A run may change what it has not begun; what it has done must stand in the recipe as it was."""
    begun, now = names[: reached + 1], [stage.name for stage in recipe.stages]
    if now[: len(begun)] != begun:
        raise ConfigError(
            f"stages: the run's checkpoint has been through {', '.join(begun)}, but the recipe begins with "
            f"{', '.join(now[: len(begun)])}; name the same stages, or start afresh in another run_dir"
        )


def _domains(recipe: Recipe, tokenizer: ChatTokenizer, judges: Judges) -> dict[str, Domain]:
    return {name: _open_domain(name, recipe, tokenizer, judges) for name in recipe.domains}


def _open_domain(name: str, recipe: Recipe, tokenizer: ChatTokenizer, judges: Judges) -> Domain:
    config, context = recipe.domains[name], recipe.fleet.max_model_len
    domain = Domain(name, config, make_environment(config, judges.by_name), tokenizer)
    stages = [stage for stage in recipe.stages if isinstance(stage, SamplingStage) and name in stage.domains]
    if stages:
        domain.require_room(domain.train, context, max(stage.sampling.max_response_tokens for stage in stages))
    domain.require_room(domain.held_out, context, recipe.evaluation.sampling.max_response_tokens)
    return domain


def _conversations(recipe: Recipe, tokenizer: ChatTokenizer) -> dict[str, ConversationDataset]:
    stages = (stage for stage in recipe.stages if isinstance(stage, SftStage))
    return {stage.name: open_conversations(stage, tokenizer) for stage in stages}


def _run_stages(ctx: StageContext, progress: Progress, ledger: Ledger) -> None:
    stages = ctx.recipe.stages
    _measure(ctx, ledger, START if progress.stage == 0 else stages[progress.stage - 1].name, fresh=progress.step == 0)
    for index in range(progress.stage, len(stages)):
        here = progress if index == progress.stage else Progress(index)
        _run_stage(stages[index], ctx, here, ledger)
        ctx.save(Progress(index + 1), name=checkpoint_name(index, stages[index].name))
        _record(ctx, ledger, "stage_finished", stage=stages[index].name, step=ctx.policy.step)
        _measure(ctx, ledger, stages[index].name)
        if ctx.control.should_stop():
            raise Stopped


def _run_stage(stage: StageConfig, ctx: StageContext, progress: Progress, ledger: Ledger) -> None:
    if progress.step == 0:
        _record(ctx, ledger, "stage_started", stage=stage.name, step=ctx.policy.step)
    if isinstance(stage, SftStage):
        run_sft(stage, ctx, progress)
    elif isinstance(stage, RlStage):
        run_rl(stage, ctx, progress, lambda label: _measure(ctx, ledger, label))


def _measure(ctx: StageContext, ledger: Ledger, after: str, fresh: bool = True) -> None:
    """One row of the stage-by-domain matrix, unless the ledger has it or the policy has moved on since."""
    known = ctx.control.on_main(lambda: after in ledger.scores())
    if ctx.player is None or not ctx.recipe.domains or known or not fresh:
        return
    ctx.push_weights()
    scores = evaluate(ctx, after)
    _record(
        ctx, ledger, "evaluated", after=after, step=ctx.policy.step, scores={d: s.to_json() for d, s in scores.items()}
    )


def _record(ctx: StageContext, ledger: Ledger, event: str, **facts) -> None:
    if ctx.control.is_main:
        ledger.append(event, **facts)


def _matrix_texts(ledger: Ledger) -> Mapping[str, Mapping[str, str]]:
    return {
        label: {domain: str(PassRate(**score)) for domain, score in scores.items()}
        for label, scores in ledger.scores().items()
    }
