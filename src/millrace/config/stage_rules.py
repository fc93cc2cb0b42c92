"""What each type of stage must fulfil, one sentence for each broken rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from millrace.config.checkpoint_files import checkpoint_problems
from millrace.config.graph import nearest
from millrace.config.schema import (
    JUDGED,
    AgentConfig,
    DomainConfig,
    EvaluateStage,
    GateConfig,
    JudgeConfig,
    MopdStage,
    OptimizerConfig,
    PythonToolConfig,
    Recipe,
    RlhfStage,
    RlStage,
    SamplingStage,
    SandboxConfig,
    SftStage,
    StageConfig,
    SweAgenticConfig,
    TurnsConfig,
)
from millrace.config.urls import holds_credentials, http_problem

Problems = Iterator[str]


def stage_problems(stage: StageConfig, recipe: Recipe) -> Problems:
    """Every broken rule of one stage."""
    key = f"stages.{stage.name}"
    yield from _gate(stage.gate, f"{key}.gate")
    match stage:
        case SftStage():
            yield from _sft(stage, key, recipe)
        case MopdStage():
            yield from _mopd(stage, key, recipe)
        case RlStage():  # an RLHF stage is one
            yield from _rl(stage, key, recipe)
        case EvaluateStage():
            if not recipe.domains:
                yield f"{key} evaluates, but the recipe has no domains; name some with their held-out sets"


def _gate(gate: GateConfig, key: str) -> Problems:
    if gate.min_gain is not None or gate.max_drop is not None:
        return
    for field in ("against", "certain", "on_failure"):
        if (value := getattr(gate, field)) != getattr(GateConfig(), field):
            said = str(value).lower()
            yield f"{key}.{field} is {said}, but the gate asks for nothing; set min_gain or max_drop, or leave it out"


def _sft(stage: SftStage, key: str, recipe: Recipe) -> Problems:
    if (stage.steps is None) == (stage.epochs is None):
        given = "neither is given" if stage.steps is None else "both are given"
        yield f"{key} needs exactly one of steps and epochs, but {given}"
    if not stage.data:
        yield f"{key}.data is empty; name at least one JSONL file of conversations"
    if stage.global_batch < recipe.parallel.dp:
        yield (
            f"{key}.global_batch is {stage.global_batch}, fewer than the {recipe.parallel.dp} data-parallel replicas; "
            f"raise it or lower parallel.dp"
        )
    yield from _optimizer(stage.optimizer, f"{key}.optimizer", stage.steps)


def _rl(stage: RlStage, key: str, recipe: Recipe) -> Problems:
    yield from _domains(stage.domains, f"{key}.domains", recipe)
    yield from _group_size(stage, key)
    if stage.updates_per_batch > stage.prompts_per_step:
        yield (
            f"{key}.updates_per_batch is {stage.updates_per_batch}, more than the {stage.prompts_per_step} groups of a "
            "step; each update needs a group of its own"
        )
    else:
        yield from _enough_answers(stage, key, recipe, stage.updates_per_batch)
    yield from _rl_loss(stage, key)
    yield from _judged(stage, key, recipe)
    yield from _curriculum(stage, key, recipe)
    yield from _optimizer(stage.optimizer, f"{key}.optimizer", stage.steps * stage.updates_per_batch)


def _rl_loss(stage: RlStage, key: str) -> Problems:
    if stage.loss.kind == "reinforce" and stage.updates_per_batch > 1:
        yield (
            f"{key}.loss.kind is reinforce, which is right for on-policy samples only, but updates_per_batch is "
            f"{stage.updates_per_batch}; use ppo, cispo or gspo, or updates_per_batch=1"
        )
    if stage.one_step_off and stage.off_policy.kind == "none":
        yield (
            f"{key}.one_step_off samples with the weights before the last step, but off_policy.kind is none, so "
            "the loss would take the answers for the present policy's; set off_policy.kind to icepop or tis"
        )
    if stage.off_policy.low >= stage.off_policy.high:
        yield f"{key}.off_policy: low {stage.off_policy.low} must be below high {stage.off_policy.high}"


def _judged(stage: RlStage, key: str, recipe: Recipe) -> Problems:
    """A judge compares the answers of a group, which only an rlhf stage turns into rewards."""
    if isinstance(stage, RlhfStage) and stage.overlong == "zero_reward":
        yield (
            f"{key}.overlong is zero_reward, but an answer that was cut loses its comparisons already, and 0 would be "
            "more than that; use keep or filter"
        )
    for domain in stage.domains:
        if domain not in recipe.domains:
            continue
        judged = recipe.domains[domain].environment == "genrm"
        if judged and not isinstance(stage, RlhfStage):
            yield f"{key}.domains names {domain}, whose answers a judge compares in pairs; make the stage type: rlhf"
        if isinstance(stage, RlhfStage) and not judged:
            yield (
                f"{key}.domains names {domain}, whose environment {recipe.domains[domain].environment} scores each "
                "answer alone; train it in a stage of type: rl"
            )


def _mopd(stage: MopdStage, key: str, recipe: Recipe) -> Problems:
    if stage.domains:
        yield from _domains(stage.domains, f"{key}.teachers and rewarded", recipe)
    if not stage.teachers:
        yield (
            f"{key}.teachers is empty, so there is nothing to distil; name the teacher of at least one domain, or make "
            "the stage type: rl"
        )
    if stage.rewarded:
        yield from _group_size(stage, key)
    yield from _enough_answers(stage, key, recipe, 1)
    for domain in stage.rewarded:
        if domain in recipe.domains and recipe.domains[domain].environment == "genrm":
            yield f"{key}.rewarded names {domain}, whose answers a judge compares in pairs; give it a teacher"
    if stage.ratio_low >= stage.ratio_high:
        yield f"{key}: ratio_low {stage.ratio_low:g} must be below ratio_high {stage.ratio_high:g}"
    if stage.mismatch.mask_above is not None:
        yield (
            f"{key}.mismatch.mask_above is {stage.mismatch.mask_above:g}, which a distillation does not read; its gate "
            "is ratio_low and ratio_high, so set those and leave it out"
        )
    if stage.advantage_clip is not None and stage.signal != "sampled":
        yield (
            f"{key}.advantage_clip is {stage.advantage_clip:g}, which bounds the advantage of the sampled token alone, "
            f"but signal is {stage.signal}; leave it out, or set signal to sampled"
        )
    if stage.placement == "served":
        yield from _served(stage, key, recipe)
    if stage.dynamic_sampling and not stage.rewarded:
        yield f"{key}.dynamic_sampling drops groups by their rewards, which teachers do not look at; leave it out"
    yield from _curriculum(stage, key, recipe)
    yield from _optimizer(stage.optimizer, f"{key}.optimizer", stage.steps)


def _served(stage: MopdStage, key: str, recipe: Recipe) -> Problems:
    """What teachers behind vLLM servers ask for besides."""
    engine, longest = stage.teacher_engine, recipe.fleet.max_model_len
    if stage.signal != "sampled":
        yield (
            f"{key}.signal is {stage.signal}, which needs the teacher's whole distribution, but a served teacher tells "
            "the log-probs of given tokens alone; set placement to time_shared or resident, or signal to sampled"
        )
    if stage.sampling.temperature != 1.0:
        yield (
            f"{key}.sampling.temperature is {stage.sampling.temperature:g}, but a served teacher scores at temperature "
            "1; set it to 1, or placement to time_shared or resident"
        )
    if not engine.engines:
        yield f"{key}.teacher_engine.engines is 0, which starts no teacher; set it to 1 or more"
    if engine.max_model_len < longest + 1:
        yield (
            f"{key}.teacher_engine.max_model_len is {engine.max_model_len}, but a teacher scores whole sequences of up "
            f"to fleet.max_model_len {longest} tokens, and vLLM wants room for one more; set it to at least "
            f"{longest + 1}"
        )
    if engine.dtype == "bfloat16" and recipe.model.dtype == "float32":
        yield (
            f"{key}.teacher_engine.dtype is bfloat16, but model.dtype is float32, so served teachers would say other "
            "numbers than those on the trainer's ranks; set it to float32"
        )


def _domains(domains: Iterable[str], key: str, recipe: Recipe) -> Problems:
    if not domains:
        yield f"{key} is empty; name at least one of the recipe's domains"
    for domain, count in Counter(domains).items():
        if domain not in recipe.domains:
            yield f"{key} names {domain}, which is not a domain of this recipe{nearest(domain, recipe.domains)}"
        if count > 1:
            yield f"{key} names {domain} {count} times; domains are mixed by size, so name it once"


def _group_size(stage: SamplingStage, key: str) -> Problems:
    if stage.samples_per_prompt < 2:
        yield (
            f"{key}.samples_per_prompt is {stage.samples_per_prompt}, but an advantage compares the answers of a "
            "group; use at least 2"
        )


def _enough_answers(stage: SamplingStage, key: str, recipe: Recipe, updates: int) -> Problems:
    smallest = stage.prompts_per_step // max(updates, 1) * stage.samples_per_prompt
    if smallest < recipe.parallel.dp:
        yield (
            f"{key}: an update has {smallest} answers, fewer than the {recipe.parallel.dp} data-parallel replicas; "
            "raise prompts_per_step or samples_per_prompt"
        )


def _curriculum(stage: RlStage | MopdStage, key: str, recipe: Recipe) -> Problems:
    curriculum = stage.curriculum
    if curriculum.order == "shuffled" and curriculum.above is None and curriculum.below is None:
        return
    for domain in stage.domains:
        if domain not in recipe.domains:
            continue
        if recipe.domains[domain].environment == "genrm":
            yield (
                f"{key}.curriculum needs pass rates, but a judge compares the answers of {domain}, which solve nothing "
                "alone; leave the curriculum out, or train the domain in another stage"
            )
        elif recipe.domains[domain].pass_rates is None:
            yield (
                f"{key}.curriculum needs domains.{domain}.pass_rates; measure them with "
                f"`millrace data passrate RECIPE --domain {domain}`"
            )
    if curriculum.above is not None and curriculum.below is not None and curriculum.above >= curriculum.below:
        yield (
            f"{key}.curriculum leaves no prompt: `above` {curriculum.above:g} must be less than `below` "
            f"{curriculum.below:g}"
        )


def _optimizer(optimizer: OptimizerConfig, key: str, steps: int | None) -> Problems:
    if optimizer.min_lr > optimizer.lr:
        yield f"{key}.min_lr {optimizer.min_lr} is above lr {optimizer.lr}; lower it"
    if optimizer.warmup_from > optimizer.lr:
        yield f"{key}.warmup_from {optimizer.warmup_from} is above lr {optimizer.lr}; lower it"
    length = optimizer.decay_steps or steps
    if length is not None and optimizer.warmup_steps > length:
        what = "decay_steps" if optimizer.decay_steps else "the stage's updates"
        yield f"{key}.warmup_steps {optimizer.warmup_steps} is more than {what} ({length}); lower it"


WITH_TURNS = ("python_tool", "workplace_assistant", "swe_agentic", "agent")
"""Environments whose episodes have many turns."""
RUN_PROGRAMS = ("code", "python_tool")
"""Environments that need a sandbox."""

LEAST_PROGRAM_MB, MOST_PROGRAM_MB = 64, 4096
"""Bounds of a program's memory in MiB."""
MOST_TESTS_PER_PROCESS = 32
"""A process holds the inputs of its tests open, and may open 64 files."""


def domain_problems(recipe: Recipe) -> Problems:
    """Every broken rule of domains, judges and the evaluation."""
    for name, domain in recipe.domains.items():
        key = f"domains.{name}"
        if domain.grading == "fraction" and domain.environment not in ("instruction_following", "code"):
            yield f"{key}.grading is fraction, but an answer in {domain.environment} is right or wrong; use binary"
        if domain.environment in JUDGED and domain.judge is None:
            yield f"{key}.judge is required: the entry of `judges` that judges the answers"
        if domain.environment not in JUDGED and domain.judge is not None:
            yield f"{key}.judge is {domain.judge}, but {domain.environment} asks no judge; leave it out"
        if domain.environment == "genrm" and domain.mask_unless_above is not None:
            yield f"{key}.mask_unless_above is set, but rewards of genrm only rank the answers of a group; leave it out"
        if domain.tables is not None and domain.environment != "workplace_assistant":
            yield f"{key}.tables is set, but {domain.environment} has no tables; leave it out"
        yield from _sandbox(domain, f"{key}.sandbox")
        yield from _turns(domain, key)
        yield from _agent(domain, key)
        if domain.judge is not None and domain.judge not in recipe.judges:
            yield f"{key}.judge is {domain.judge}, which is not among the judges{nearest(domain.judge, recipe.judges)}"
    yield from _ports_of_agents(recipe)
    for name, judge in recipe.judges.items():
        yield from _judge(judge, f"judges.{name}")
        if name in recipe.judges_used:
            yield from _model_of_judge(judge, f"judges.{name}")
        yield from _room_for_answers(name, judge, recipe)
    if recipe.evaluation.keep and not recipe.evaluation.every:
        yield "evaluation.keep keeps what evaluation.every measures, which is 0; set evaluation.every or leave keep out"


def _sandbox(domain: DomainConfig, key: str) -> Problems:
    sandbox = domain.sandbox
    if domain.environment not in RUN_PROGRAMS:
        if sandbox != SandboxConfig():
            yield f"{key} is set, but {domain.environment} runs no programs; leave it out"
        return
    for name in ("workers", "cpu_s", "memory_mb", "output_kb", "compile_cpu_s", "compile_memory_mb"):
        if (value := getattr(sandbox, name)) is not None and value <= 0:
            yield f"{key}.{name} is {value}; it must be above 0"
    if sandbox.wall_over_cpu < 1:
        yield f"{key}.wall_over_cpu is {sandbox.wall_over_cpu}, so that wall time ends before cpu_s; set 1 or more"
    if 0 < sandbox.memory_mb < LEAST_PROGRAM_MB or sandbox.memory_mb > MOST_PROGRAM_MB:
        yield (
            f"{key}.memory_mb is {sandbox.memory_mb}; an interpreter needs {LEAST_PROGRAM_MB}, and the most is "
            f"{MOST_PROGRAM_MB}"
        )
    if not sandbox.languages or len(set(sandbox.languages)) < len(sandbox.languages):
        yield f"{key}.languages is [{', '.join(sandbox.languages)}]; name at least one, each once"
    if not 1 <= sandbox.tests_per_process <= MOST_TESTS_PER_PROCESS:
        yield (
            f"{key}.tests_per_process is {sandbox.tests_per_process}; take 1 (each test alone) to "
            f"{MOST_TESTS_PER_PROCESS}"
        )


def _turns(domain: DomainConfig, key: str) -> Problems:
    if domain.environment not in WITH_TURNS and domain.turns != TurnsConfig():
        yield f"{key}.turns is set, but an episode in {domain.environment} ends with its first answer; leave it out"
    if domain.environment == "swe_agentic":
        yield from _swe_agentic(domain, key)
    elif domain.swe != SweAgenticConfig():
        yield f"{key}.swe is set, but {domain.environment} has no agent; leave it out"
    if domain.environment != "python_tool":
        if domain.python != PythonToolConfig():
            yield f"{key}.python is set, but {domain.environment} has no Python tool; leave it out"
    elif domain.turns.step_s <= domain.python.all_calls_s:
        yield (
            f"{key}.turns.step_s is {domain.turns.step_s:g}, but calls of the Python tool in one turn may take "
            f"python.all_calls_s {domain.python.all_calls_s:g} s; raise the one or lower the other"
        )


def _agent(domain: DomainConfig, key: str) -> Problems:
    agent = domain.agent
    if domain.environment != "agent":
        if agent != AgentConfig():
            yield f"{key}.agent is set, but no agent's server drives {domain.environment}; leave it out"
        return
    if domain.system_prompt is not None:
        yield f"{key}.system_prompt is set, but an agent writes its own prompts; put it into the rows' instructions"
    if agent.url is None:
        yield f"{key}.agent.url is required: the server of the agent, such as http://node7:8001"
    elif holds_credentials(agent.url):
        yield f"{key}.agent.url holds credentials, which would stand in the run's files; leave them out"
    elif problem := http_problem(agent.url):
        yield f"{key}.agent.url {problem}"
    if agent.listen in ("0.0.0.0", "::", "", "*"):
        yield (
            f"{key}.agent.listen is {agent.listen!r}, which listens on every network of this machine; name the one "
            "address that the agent reaches"
        )


def _ports_of_agents(recipe: Recipe) -> Problems:
    """Endpoints of one batch's domains are open at the same time."""
    taken: dict[tuple[str | None, int], str] = {}
    for name, domain in recipe.domains.items():
        place = domain.agent.listen, domain.agent.port
        if domain.agent.port and (other := taken.setdefault(place, name)) != name:
            yield f"domains.{name}.agent.port is {domain.agent.port}, as that of domains.{other}; take another one"


def _swe_agentic(domain: DomainConfig, key: str) -> Problems:
    swe = domain.swe
    if swe.container == "bubblewrap" and swe.repositories is None:
        yield f"{key}.swe.repositories is required with container bubblewrap: the folder of the rows' repositories"
    if swe.container == "bubblewrap" and swe.images is not None:
        yield f"{key}.swe.images is set, but container bubblewrap runs in no image; leave it out"
    if swe.container == "apptainer" and swe.repositories is not None:
        yield f"{key}.swe.repositories is set, but an image of container apptainer holds its own; leave it out"
    if swe.images is not None and "{instance_id}" not in swe.images:
        yield f"{key}.swe.images is {swe.images}, the same for every row; put {{instance_id}} into it"
    if domain.turns.step_s <= max(swe.tests_s, swe.command_s):
        yield (
            f"{key}.turns.step_s is {domain.turns.step_s:g}, but a step may take swe.tests_s {swe.tests_s:g} s or "
            f"swe.command_s {swe.command_s:g} s; raise the one or lower the others"
        )


def _judge(judge: JudgeConfig, key: str) -> Problems:
    if (judge.model is None) == (judge.url is None):
        given = "neither is given" if judge.model is None else "both are given"
        yield f"{key} needs exactly one of model and url, but {given}"
    if judge.url is not None and holds_credentials(judge.url):
        yield f"{key}.url holds credentials, which would stand in the run's files; give them by {key}.api_key_variable"
    elif judge.url is not None and (problem := http_problem(judge.url)):
        yield f"{key}.url {problem}"


def _model_of_judge(judge: JudgeConfig, key: str) -> Problems:
    """Of a judge that runs: one that no domain names is never started, and needs no checkpoint."""
    if judge.model is not None and Path(judge.model).is_dir():
        yield from (f"{key}.model: {problem}" for problem in checkpoint_problems(Path(judge.model)))
    elif judge.model is not None:
        yield f"{key}.model: the folder {judge.model} does not exist; name a Hugging Face checkpoint"


def _room_for_answers(name: str, judge: JudgeConfig, recipe: Recipe) -> Problems:
    """A verdict and the answers it is about fit into a judge that Millrace serves, with the conversation besides."""
    key, room = f"judges.{name}", judge.engine.max_model_len
    if judge.model is None:
        return
    if judge.max_tokens >= room:
        yield (
            f"{key}.max_tokens is {judge.max_tokens}, which leaves no room for two answers within "
            f"{key}.engine.max_model_len {room}; lower the one or raise the other"
        )
        return
    needed = [
        (judge.max_tokens + count * length, f"{count} x {whose}.sampling.max_response_tokens {length}")
        for whose, count, length in _judged_answers(name, recipe)
    ]
    tokens, answers = max(needed, default=(0, ""))
    if tokens >= room:
        yield (
            f"{key}.engine.max_model_len is {room}, but a verdict of max_tokens {judge.max_tokens} about {answers} "
            f"takes up to {tokens} tokens and the conversation besides; raise the one or lower the others"
        )


def _judged_answers(name: str, recipe: Recipe) -> Iterator[tuple[str, int, int]]:
    """Who shows answers to a judge, how many at one time, and of how many tokens each."""
    domains = {domain for domain, config in recipe.domains.items() if config.judge == name}
    for stage in recipe.stages:
        if isinstance(stage, SamplingStage) and domains & (set(stage.domains) - _taught_without_a_judge(stage, recipe)):
            yield f"stages.{stage.name}", 2 if isinstance(stage, RlhfStage) else 1, stage.sampling.max_response_tokens
    if domains:  # held out, an answer is compared with the reference of its row
        yield "evaluation", 1, recipe.evaluation.sampling.max_response_tokens


def _taught_without_a_judge(stage: SamplingStage, recipe: Recipe) -> set[str]:
    """Domains whose answers a judge compares with one another, which nobody asks for where a teacher speaks of them."""
    taught = stage.teachers if isinstance(stage, MopdStage) else ()
    return {name for name in taught if name in recipe.domains and recipe.domains[name].environment == "genrm"}
