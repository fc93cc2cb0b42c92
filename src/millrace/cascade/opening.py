"""Everything a run works with, opened in an order in which mistakes are found before anything heavy is built."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from millrace.cascade.judges import Judges
from millrace.cascade.rewind import require_same_stages
from millrace.config.graph import START
from millrace.config.model_shape import ModelShape
from millrace.config.schema import OptimizerConfig, Recipe, SamplingStage, SftStage
from millrace.data.datasets import ConversationDataset
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.registry import make_environment
from millrace.megatron.checkpoint import Checkpointer
from millrace.megatron.policy import Policy
from millrace.megatron.topology import Topology
from millrace.observe.console import RunConsole
from millrace.observe.trackers import open_trackers
from millrace.observe.writer import MetricsWriter
from millrace.rollout.fleet import Fleet
from millrace.rollout.weight_sync import WeightSync
from millrace.stages.context import Progress, StageContext
from millrace.stages.control import ControlGroup, Stopped
from millrace.stages.domains import Domain
from millrace.stages.episodes import EpisodePlayer
from millrace.stages.sft import open_conversations
from millrace.stages.sources import WeightSource


def open_run(
    recipe: Recipe, run_dir: Path, fleet: Fleet | None, judges: Judges, topology: Topology, stack: ExitStack
) -> StageContext:
    """The context of a run that stands where its last checkpoint left it. Collective.

    `fleet` and `judges` are rank 0's; `stack` closes what is opened. Raises Stopped on every rank when the run is asked
    to stop while conversations are read.
    """
    control = ControlGroup()
    control.stop_on_signals()
    console = RunConsole(run_dir) if control.is_main else None
    shape = ModelShape.from_hf(recipe.model.path)
    tokenizer = ChatTokenizer(recipe.model.path, shape.vocab_size, recipe.model.chat_template)
    # Bad rows are found before a model is built or an engine waited for.
    domains = _domains(recipe, tokenizer, judges) if control.is_main else {}
    conversations: dict[str, ConversationDataset] = {}

    def read_conversations() -> None:
        assert console is not None, "rank 0 has it"
        conversations.update(_conversations(recipe, run_dir, tokenizer, console))

    try:
        control.on_main_until_stopped(read_conversations)
    except Stopped:
        if console:
            console.say("stopped as asked while the data were read; the same command goes on from here")
        raise
    policy = Policy(
        recipe.model,
        shape,
        recipe.parallel,
        recipe.trainer,
        topology,
        optimizer=OptimizerConfig(),
        seed=recipe.seed,
        precision=recipe.precision,
    )
    checkpointer = Checkpointer(run_dir / "checkpoints", keep=recipe.checkpoint.keep)
    progress = load_progress(policy, recipe, checkpointer)
    sync = player = None
    if recipe.samples:
        sync = WeightSync(policy, fleet, recipe.fleet, topology, group=control.group)
        player = EpisodePlayer(control, sync.resync_if_needed, tokenizer, fleet, domains, console)
        stack.callback(player.close)
    metrics = _metrics_writer(recipe, run_dir, policy.step + 1) if control.is_main else None
    if console and metrics:
        stack.callback(console.close)
        stack.callback(metrics.close)
    return StageContext(
        recipe=recipe,
        run_dir=run_dir,
        control=control,
        policy=policy,
        checkpointer=checkpointer,
        conversations=conversations,
        sync=sync,
        player=player,
        active_parameters=shape.active_parameter_count(),
        origin=WeightSource(START, Path(recipe.model.path), checkpoint=False),
        built_on="",
        console=console,
        metrics=metrics,
        reached=progress,
        saved=progress,
        chat_template=None if tokenizer.brings_template else tokenizer.chat_template,
    )


def _metrics_writer(recipe: Recipe, run_dir: Path, first_step: int) -> MetricsWriter:
    return MetricsWriter(run_dir, first_step, open_trackers(recipe, run_dir, first_step))


def load_progress(policy: Policy, recipe: Recipe, checkpointer: Checkpointer) -> Progress:
    """Give the policy what the run's last checkpoint holds, or the model of the recipe; where the run stands."""
    state = checkpointer.load(policy)
    if state is None:
        policy.load_hf(recipe.model.path)
        return Progress()
    require_same_stages(recipe, state)
    return Progress(state["stage"], state["step"], state["sampler"])


def _domains(recipe: Recipe, tokenizer: ChatTokenizer, judges: Judges) -> dict[str, Domain]:
    return {name: _open_domain(name, recipe, tokenizer, judges) for name in recipe.domains}


def _open_domain(name: str, recipe: Recipe, tokenizer: ChatTokenizer, judges: Judges) -> Domain:
    config, context = recipe.domains[name], recipe.fleet.max_model_len
    domain = Domain(name, config, make_environment(config, judges.by_name), tokenizer)
    stages = [stage for stage in recipe.stages if isinstance(stage, SamplingStage) and name in stage.domains]
    if stages:
        domain.require_room(domain.train, context, max(stage.sampling.max_response_tokens for stage in stages))
    for stage in stages:
        domain.training_rows(stage.curriculum)
    domain.require_room(domain.held_out, context, recipe.evaluation.sampling.max_response_tokens)
    return domain


def _conversations(
    recipe: Recipe, run_dir: Path, tokenizer: ChatTokenizer, console: RunConsole
) -> dict[str, ConversationDataset]:
    stages = [stage for stage in recipe.stages if isinstance(stage, SftStage)]
    folder = run_dir / "data-index"
    return {stage.name: open_conversations(stage, tokenizer, console.say, folder / stage.name) for stage in stages}
