"""What a recipe of valid types must fulfil besides: rules over several keys, and over the files they name.

Each broken rule is one sentence that names the key and the way out. All rules are looked at; none stops the others.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from millrace.config.checkpoint_files import checkpoint_problems
from millrace.config.errors import ConfigError
from millrace.config.graph import graph_problems
from millrace.config.linears import ALL_LINEAR, linear_names
from millrace.config.model_shape import LayerShape, ModelShape
from millrace.config.precision_rules import precision_problems
from millrace.config.ranges import range_problems
from millrace.config.schema import (
    BUILT_IN_TEMPLATES,
    OUTPUT_DISCARDING,
    ParallelConfig,
    Recipe,
    RlStage,
    SamplingStage,
    SftStage,
    TrainerConfig,
)
from millrace.config.stage_rules import domain_problems, stage_problems
from millrace.config.urls import holds_credentials

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

PROMPT_FIELDS = ("prompt", "responses_create_params")
"""Where a row holds its prompt: Millrace's own field, or NeMo-Gym's."""
MORE_PROMPT_FIELDS = {
    "code": ("question", "question_content"),
    "swe_agentless": ("original_prompt",),
    "swe_agentic": ("problem_statement",),
}
"""The same in the data sets that an environment reads besides."""

Problems = Iterator[str]


def check_recipe(recipe: Recipe, *, world_size: int | None = None) -> list[str]:
    """Every broken rule of a recipe; empty when it can run. `world_size`: the number of ranks there are, if known."""
    problems: list[str] = []
    shape = _shape(recipe, problems)
    problems += range_problems(recipe)
    problems += _layout(recipe, world_size)
    if shape is not None:
        problems += _layout_of_model(recipe, shape)
    problems += _lora(recipe, shape)
    problems += precision_problems(recipe, shape)
    problems += _switches(recipe, shape)
    problems += _lengths(recipe, shape)
    problems += _fleet(recipe)
    problems += _servers(recipe)
    problems += _verifiers(recipe)
    problems += _names(recipe)
    problems += graph_problems(recipe)
    problems += _judges(recipe)
    problems += domain_problems(recipe)
    for stage in recipe.stages:
        problems += stage_problems(stage, recipe)
    problems += _observe(recipe)
    problems += _files(recipe)
    return problems


def require_runnable(recipe: Recipe, *, world_size: int | None = None) -> None:
    """Raises ConfigError with every broken rule."""
    problems = check_recipe(recipe, world_size=world_size)
    if problems:
        raise ConfigError(problems)


def _shape(recipe: Recipe, problems: list[str]) -> ModelShape | None:
    folder = Path(recipe.model.path)
    if not folder.is_dir():
        problems.append(f"model.path: the folder {folder} does not exist; name a Hugging Face checkpoint")
        return None
    problems += [f"model.path: {problem}" for problem in checkpoint_problems(folder)]
    try:
        return ModelShape.from_hf(folder)
    except ConfigError as error:
        problems += [f"model.path: {problem}" for problem in error.problems]
        return None


def layout_of_recipe(recipe: Recipe, shape: ModelShape) -> list[str]:
    """What is wrong with a recipe's parallel layout and its engines' for a model: all that a plan needs to be right."""
    return [
        *range_problems(recipe),
        *_layout(recipe, None),
        *_layout_of_model(recipe, shape),
        *_lora(recipe, shape),
        *precision_problems(recipe, shape),
        *_switches(recipe, shape),
        *_verifiers(recipe),
    ]


def _layout(recipe: Recipe, world_size: int | None) -> Problems:
    p = recipe.parallel
    asked = f"tp {p.tp} x pp {p.pp} x cp {p.cp} x dp {p.dp}"
    if world_size is not None and p.world_size != world_size:
        yield (
            f"parallel: {asked} = {p.world_size} ranks, but there are {world_size}; "
            "set parallel.dp to fill them or start as many as the layout needs"
        )
    if p.sequence_parallel and p.tp == 1:
        yield "parallel.sequence_parallel needs parallel.tp of at least 2; switch it off or raise tp"
    if p.ep > 0 and p.etp > 0 and (p.tp * p.cp * p.dp) % (p.ep * p.etp):
        yield (
            f"parallel: ep {p.ep} x etp {p.etp} does not divide the {p.tp * p.cp * p.dp} ranks of one pipeline stage "
            f"(tp x cp x dp), so no whole number of expert replicas fits; change ep, etp or dp"
        )


def _layout_of_model(recipe: Recipe, shape: ModelShape) -> Problems:
    yield from layout_problems(recipe.parallel, shape)
    if recipe.parallel.cp > 1 and shape.mamba is not None and recipe.trainer.device == "cpu":
        yield (
            f"parallel.cp is {recipe.parallel.cp} on CPU, but Megatron-Core shares the sequences of Mamba layers "
            "through Transformer Engine only; set parallel.cp=1"
        )
    yield from _must_divide("fleet.tensor_parallel", recipe.fleet.tensor_parallel, shape.num_heads, "attention heads")
    for key, engine in recipe.teacher_engines.items():
        yield from _must_divide(f"{key}.tensor_parallel", engine.tensor_parallel, shape.num_heads, "attention heads")


def layout_problems(p: ParallelConfig, shape: ModelShape) -> Problems:
    """Why a layout cannot hold a model, a sentence each."""
    yield from _must_divide("parallel.tp", p.tp, shape.num_heads, "attention heads")
    yield from _must_divide("parallel.tp", p.tp, shape.num_kv_heads, "key/value heads")
    if shape.has_dense_ffn:
        yield from _must_divide("parallel.tp", p.tp, shape.ffn_hidden_size, "feed-forward columns")
    if p.pp > shape.num_layers:
        yield f"parallel.pp is {p.pp}, but the model has {shape.num_layers} layers; set it to that or less"
    if shape.mamba is not None:
        yield from _must_divide("parallel.tp", p.tp, shape.mamba.heads, "heads of a Mamba layer")
        yield from _must_divide("parallel.tp", p.tp, shape.mamba.groups, "groups of a Mamba layer")
    if p.tp > 1 and not p.sequence_parallel and (shape.num_experts or shape.latent_attention is not None):
        what = "a mixture of experts" if shape.num_experts else "latent attention"
        yield (
            f"parallel.tp is {p.tp} with {what}, which needs sequence parallelism; set parallel.sequence_parallel=true"
        )
    if not shape.num_experts:
        for key, ranks in (("ep", p.ep), ("etp", p.etp)):
            if ranks > 1:
                yield f"parallel.{key} is {ranks}, but the model has no experts; set parallel.{key}=1"
        return
    yield from _must_divide("parallel.ep", p.ep, shape.num_experts, "experts")
    yield from _must_divide("parallel.etp", p.etp, shape.moe_ffn_hidden_size, "columns of an expert")
    if shape.shared_ffn_hidden_size:
        yield from _must_divide("parallel.tp", p.tp, shape.shared_ffn_hidden_size, "columns of the shared expert")


def _lora(recipe: Recipe, shape: ModelShape | None) -> Problems:
    lora = recipe.model.lora
    if lora is None:
        return
    if not lora.targets:
        yield f"model.lora.targets is empty, so that nothing would be trained; name linear layers, or {ALL_LINEAR}"
    known = linear_names(shape) if shape is not None else list(lora.targets)
    for target in lora.targets:
        if target != ALL_LINEAR and target not in known:
            yield f"model.lora.targets: the model has no {target}; name {ALL_LINEAR}, or of {', '.join(known)}"
    if lora.adapter is not None:
        for file in (Path(lora.adapter, name) for name in ("adapter_config.json", "adapter_model.safetensors")):
            if not file.is_file():
                yield f"model.lora.adapter: {file} does not exist; name the folder of a PEFT adapter"


def _switches(recipe: Recipe, shape: ModelShape | None) -> Problems:
    """Switches that nothing would read, or that the model and the devices have no kernels for."""
    trainer, p = recipe.trainer, recipe.parallel
    of_experts = {"token_dispatcher": trainer.token_dispatcher != "alltoall", "permute_fusion": trainer.permute_fusion}
    of_gpus = {
        **of_experts,
        "expandable_segments": trainer.expandable_segments,
        "offload_optimizer": trainer.offload_optimizer,
        "overlap_tensor_parallel": trainer.overlap_tensor_parallel,
    }
    for key in (key for key, asked in of_experts.items() if asked):
        if shape is not None and not shape.num_experts:
            yield f"trainer.{key} is about experts, but the model has none; leave it out"
    for key in (key for key, asked in of_gpus.items() if asked):
        if trainer.device == "cpu":
            yield f"trainer.{key} needs CUDA, but trainer.device is cpu; leave it out"
    if of_experts["token_dispatcher"] and p.ep * p.etp == 1:
        yield (
            "trainer.token_dispatcher is deepep, but with ep and etp of 1 no token leaves its rank; set "
            "trainer.token_dispatcher=alltoall or raise parallel.ep"
        )
    if not trainer.grouped_gemm and shape is not None and not shape.num_experts:
        yield "trainer.grouped_gemm is about experts, but the model has none; leave it out"
    yield from _recomputation(trainer, shape, p)
    yield from _parameter_gather(trainer)
    if trainer.overlap_tensor_parallel:
        yield from _tensor_overlap(recipe, shape)
    if trainer.expandable_segments and recipe.fleet.transport == "ipc":
        yield (
            "trainer.expandable_segments and fleet.transport=ipc exclude each other, for such memory has no handle "
            "that another process could open; leave it out, or use nccl"
        )


def _parameter_gather(trainer: TrainerConfig) -> Problems:
    if not trainer.overlap_parameter_gather:
        return
    needed = {
        "distributed_optimizer": "which leaves parameters to gather",
        "overlap_gradient_reduction": "which cuts them into buckets",
    }
    for key, reason in needed.items():
        if not getattr(trainer, key):
            yield f"trainer.overlap_parameter_gather needs trainer.{key}, {reason}; set trainer.{key}=true"


def _tensor_overlap(recipe: Recipe, shape: ModelShape | None) -> Problems:
    """What user buffers of Transformer Engine do not hold, or would not hold whole."""
    key, p, tokens = "trainer.overlap_tensor_parallel", recipe.parallel, recipe.trainer.max_tokens_per_micro_batch
    if p.tp < 2 or not p.sequence_parallel:
        yield f"{key} needs a parallel.tp of at least 2 and parallel.sequence_parallel; set both, or leave it out"
    if p.tp > 0 and tokens % p.tp:
        yield (
            f"{key} pads every micro-batch to trainer.max_tokens_per_micro_batch, but parallel.tp {p.tp} does not "
            f"divide its {tokens} tokens; set it to {tokens + -tokens % p.tp}"
        )
    if p.cp > 1:
        yield f"{key} pads whole micro-batches, but parallel.cp {p.cp} each of their sequences; set parallel.cp=1"
    if recipe.model.dtype != "bfloat16":
        yield f"{key} needs layers of Transformer Engine, which take model.dtype=bfloat16; set that, or leave it out"
    for other, asked in {"model.lora": recipe.model.lora, "precision.fp8": recipe.precision.fp8 != "none"}.items():
        if asked:
            yield f"{key} and {other} exclude each other: it takes bfloat16 weights that are all trained; leave one out"
    plain = LayerShape(mixer="attention", ffn="dense", window=None)
    if shape is not None and (shape.latent_attention or shape.sandwich_norms or set(shape.layers) != {plain}):
        yield (
            f"{key} is for layers of plain attention and a dense feed-forward, whose norms Transformer Engine fuses "
            f"into the products behind them, but {shape.family} has others; leave it out"
        )


def _recomputation(trainer: TrainerConfig, shape: ModelShape | None, p: ParallelConfig) -> Problems:
    fresh = TrainerConfig()
    readers = {"recompute_modules": "selective", "recompute_method": "full", "recompute_layers": "full"}
    for key, reader in readers.items():
        if getattr(trainer, key) != getattr(fresh, key) and trainer.recompute != reader:
            yield (
                f"trainer.{key} is read with trainer.recompute={reader} alone, but that is {trainer.recompute}; leave "
                "it out"
            )
    if not trainer.recompute_modules:
        yield "trainer.recompute_modules is empty; set trainer.recompute=none to compute nothing again"
    if trainer.recompute_layers < 1:
        yield f"trainer.recompute_layers is {trainer.recompute_layers}; it must be at least 1"
    for module in trainer.recompute_modules:
        if module in OUTPUT_DISCARDING and trainer.device == "cpu":
            yield (
                f"trainer.recompute_modules names {module}, which is computed again through Transformer Engine, but "
                "trainer.device is cpu; leave it out"
            )
    if "moe_act" in trainer.recompute_modules and not trainer.grouped_gemm:
        yield "trainer.recompute_modules names moe_act, which needs trainer.grouped_gemm; leave one of them out"
    if shape is None:
        return
    most = -(-shape.num_layers // max(p.pp, 1))
    if trainer.recompute_layers > most:
        yield f"trainer.recompute_layers is {trainer.recompute_layers}, but a pipeline stage has at most {most} layers"
    needs = {
        "moe_act": ("experts", bool(shape.num_experts)),
        "moe": ("experts", bool(shape.num_experts)),
        "shared_experts": ("shared experts", bool(shape.shared_ffn_hidden_size)),
        "mla_up_proj": ("latent attention", shape.latent_attention is not None),
    }
    for module in trainer.recompute_modules:
        if module in needs and not needs[module][1]:
            yield f"trainer.recompute_modules names {module}, but the model has no {needs[module][0]}; leave it out"


def _must_divide(key: str, ranks: int, count: int, what: str) -> Problems:
    if ranks > 0 and count % ranks:
        fitting = [n for n in range(1, min(count, 1024) + 1) if count % n == 0]
        lower = max((n for n in fitting if n < ranks), default=1)
        upper = next((n for n in fitting if n > ranks), None)
        near = f"{lower} or {upper}" if upper else f"{lower}"
        yield f"{key} is {ranks}, which does not divide the model's {count} {what}; use {near}"


def _lengths(recipe: Recipe, shape: ModelShape | None) -> Problems:
    capacity, positions = recipe.trainer.max_tokens_per_micro_batch, shape.max_position_embeddings if shape else None
    longest = {f"stages.{s.name}.max_length": s.max_length for s in recipe.stages if isinstance(s, SftStage)}
    if any(isinstance(stage, SamplingStage) for stage in recipe.stages):
        longest["fleet.max_model_len"] = recipe.fleet.max_model_len
    for key, length in longest.items():
        if length > capacity:
            yield (
                f"{key} is {length}, but a micro-batch holds {capacity} tokens; "
                f"raise trainer.max_tokens_per_micro_batch to at least {length} or lower {key}"
            )
    longest |= {f"{key}.max_model_len": engine.max_model_len for key, engine in recipe.teacher_engines.items()}
    for key, length in longest.items():
        if positions is not None and length > positions:
            yield f"{key} is {length}, but the model has {positions} positions (max_position_embeddings); lower {key}"
    if not recipe.samples:
        return
    answers = {f"stages.{s.name}": s.sampling for s in recipe.stages if isinstance(s, SamplingStage)}
    for key, sampling in {**answers, "evaluation": recipe.evaluation.sampling}.items():
        if sampling.max_response_tokens >= recipe.fleet.max_model_len:
            yield (
                f"{key}.sampling.max_response_tokens is {sampling.max_response_tokens}, which leaves no room for a "
                f"prompt within fleet.max_model_len {recipe.fleet.max_model_len}; lower the one or raise the other"
            )


OWN_SERVER_ARGUMENTS = frozenset({"--host", "--port", "--middleware", "--worker-extension-cls", "--model"})
"""Arguments of a vLLM server that must be what Millrace says: they keep it on its interface and behind its token."""


def recipe_warnings(recipe: Recipe) -> list[str]:
    """What works and is likely not what was meant."""
    fp8 = recipe.samples and recipe.fleet.quantization == "fp8"
    return [
        f"stages.{stage.name} samples in FP8 (fleet.quantization) and corrects for no mismatch; set "
        f"stages.{stage.name}.off_policy.kind to icepop or tis"
        for stage in recipe.stages
        if fp8 and isinstance(stage, RlStage) and stage.off_policy.kind == "none"
    ]


def _fleet(recipe: Recipe) -> Problems:
    fleet = recipe.fleet
    if not recipe.samples:
        return
    if not fleet.engines and not fleet.addresses:
        yield "fleet: the run samples answers, but there are no engines; set fleet.engines or fleet.addresses"
    if fleet.engines and fleet.addresses:
        yield "fleet: engines and addresses are both given; set fleet.engines=0 to use the servers that already run"
    for address in fleet.addresses:
        if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
            yield f"fleet.addresses: {address!r} is not a URL such as http://node7:8000"
    if fleet.transport in ("nccl", "ipc") and recipe.trainer.device == "cpu":
        yield f"fleet.transport is {fleet.transport}, which needs CUDA; use shared_memory, disk or gloo on CPU"
    if fleet.transport == "gloo" and recipe.trainer.device == "cuda":
        yield "fleet.transport is gloo, which is for trainer and engines on CPU; use nccl on GPUs"
    if fleet.sleep != "never" and fleet.transport != "ipc":
        yield (
            f"fleet.sleep is {fleet.sleep}, but with transport {fleet.transport} engines do not share the "
            "trainer's GPUs; leave it out, or use ipc"
        )
    for stage in recipe.stages if fleet.sleep != "never" else ():
        if isinstance(stage, RlStage) and stage.one_step_off:
            yield (
                f"stages.{stage.name}.one_step_off samples while the trainer trains, but fleet.sleep "
                f"{fleet.sleep} lets the engines sleep then; leave out the one or the other"
            )
    waited = max(fleet.start_timeout_s, fleet.request_timeout_s)
    if recipe.parallel.world_size > 1 and recipe.trainer.collective_timeout_s < waited:
        yield (
            f"trainer.collective_timeout_s is {recipe.trainer.collective_timeout_s:g}, but at a weight sync the ranks "
            f"wait for engines up to {waited:g} s (fleet.start_timeout_s, fleet.request_timeout_s); raise the one or "
            "lower the others"
        )
    remote = [address for address in fleet.addresses if not _is_this_host(address)]
    if fleet.transport in ("shared_memory", "ipc") and remote:
        yield (
            f"fleet.transport is {fleet.transport}, which works on one host only, but {remote[0]} is another; "
            "use nccl or disk"
        )


def _verifiers(recipe: Recipe) -> Problems:
    """Nodes that verify must find programs there."""
    if recipe.placement.verifier_nodes > 0 and not recipe.runs_code:
        yield (
            f"placement.verifier_nodes is {recipe.placement.verifier_nodes}, but no domain has the environment code, "
            "whose programs they test; leave it out"
        )


def _servers(recipe: Recipe) -> Problems:
    """Every vLLM server that the run starts stays on one interface and behind its token, and keeps to its data type."""
    servers = {"fleet": recipe.fleet} if recipe.samples else {}
    own = {f"judges.{name}.engine": judge.engine for name, judge in recipe.judges.items() if judge.model is not None}
    own |= recipe.teacher_engines
    for key, server in (servers | own).items():
        for taken in sorted(OWN_SERVER_ARGUMENTS & {argument.split("=")[0] for argument in server.extra_args}):
            yield f"{key}.extra_args: {taken} is set by Millrace and guards the engines; leave it out"
        if server.interface in ("0.0.0.0", "::", "", "*"):
            yield (
                f"{key}.interface is {server.interface!r}, which listens on every network of this machine; "
                "name the one interface address that the trainer reaches"
            )
        if server.quantization == "fp8" and server.dtype != "bfloat16":
            yield f"{key}.quantization is fp8, which keeps all else in bfloat16, but {key}.dtype is {server.dtype}"
    for key, server in own.items():
        if server.addresses:
            yield f"{key}.addresses are not used, for this server is started by Millrace; leave them out"


def _is_this_host(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _observe(recipe: Recipe) -> Problems:
    for package, asked in (("wandb", recipe.observe.wandb), ("mlflow", recipe.observe.mlflow)):
        if asked is not None and find_spec(package) is None:
            yield (
                f"observe.{package} is set, but the package {package} is not installed; "
                f"pip install 'millrace[{package}]', or leave observe.{package} out"
            )
    if recipe.observe.mlflow is not None and holds_credentials(recipe.observe.mlflow.tracking_uri):
        yield (
            "observe.mlflow.tracking_uri holds credentials, which would stand in the run's files; take them out and "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
        )


def _names(recipe: Recipe) -> Problems:
    if not recipe.stages:
        yield "stages is empty; a run needs at least one stage"
    for name, count in Counter(stage.name for stage in recipe.stages).items():
        if count > 1:
            yield f"stages: {count} stages are named {name}; give each a name of its own"
    sections = {"stages": [stage.name for stage in recipe.stages], "domains": recipe.domains, "judges": recipe.judges}
    for section, names in sections.items():
        for name in dict.fromkeys(names):
            if not NAME.fullmatch(name):
                yield f"{section}: the name {name!r} becomes part of file names; use letters, digits, - and _"


def _judges(recipe: Recipe) -> Problems:
    for name, judge in recipe.judges.items():
        if judge.model is not None and not judge.engine.engines:
            yield f"judges.{name}.engine.engines is 0, which starts no judge; set it to 1 or more, or name a url"


def _files(recipe: Recipe) -> Problems:
    run_dir = Path(recipe.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        yield f"run_dir: {run_dir} is a file; name a folder"
    template = recipe.model.chat_template
    if template is not None and template not in BUILT_IN_TEMPLATES and not Path(template).is_file():
        yield (
            f"model.chat_template: the file {template} does not exist; name a Jinja file, or a built-in one "
            f"({', '.join(BUILT_IN_TEMPLATES)})"
        )
    for stage in recipe.stages:
        if isinstance(stage, SftStage):
            for file in stage.data:
                yield from _data_file(f"stages.{stage.name}.data", Path(file), "messages")
    for name, domain in recipe.domains.items():
        fields = (*PROMPT_FIELDS, *MORE_PROMPT_FIELDS.get(domain.environment, ()))
        yield from _data_file(f"domains.{name}.train", Path(domain.train), *fields)
        yield from _data_file(f"domains.{name}.held_out", Path(domain.held_out), *fields)
        if domain.environment == "genrm" and Path(domain.held_out).is_file():
            yield from _data_file(f"domains.{name}.held_out", Path(domain.held_out), "reference")
        if domain.tables is not None and not Path(domain.tables).is_dir():
            yield f"domains.{name}.tables: the folder {domain.tables} does not exist; leave it out for generated tables"
        if domain.pass_rates is not None:
            yield from _data_file(f"domains.{name}.pass_rates", Path(domain.pass_rates), "pass_rate")
        if domain.train == domain.held_out:
            yield f"domains.{name}: train and held_out are the same file, so what is measured would be trained on"


def _data_file(key: str, file: Path, *needed: str) -> Problems:
    """The file exists and its first row is JSON with one of the fields; every row is read when the run starts."""
    if not file.is_file():
        yield f"{key}: the file {file} does not exist"
        return
    try:
        with file.open(encoding="utf-8") as rows:
            first = next(((number, row) for number, row in enumerate(rows, 1) if row.strip()), None)
        row: Any = json.loads(first[1]) if first else None
    except (OSError, ValueError) as error:
        yield f"{key}: {file} is not readable as JSON lines ({error})"
        return
    if first is None:
        yield f"{key}: {file} is empty; it must hold one JSON object a line"
    elif not isinstance(row, dict) or not any(name in row for name in needed):
        yield f"{key}: {file}:{first[0]} has no field {' or '.join(map(repr, needed))}"
