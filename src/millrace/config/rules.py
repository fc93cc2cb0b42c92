"""What a recipe of valid types must fulfil besides: rules over several keys, and over the files they name.

Each broken rule is one sentence that names the key and the way out. All rules are looked at; none stops the others.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from millrace.config.checkpoint_files import checkpoint_problems, has_chat_template
from millrace.config.errors import ConfigError
from millrace.config.graph import graph_problems
from millrace.config.linears import ALL_LINEAR, linear_names
from millrace.config.model_shape import ModelShape
from millrace.config.precision_rules import precision_problems
from millrace.config.ranges import range_problems
from millrace.config.schema import (
    BUILT_IN_TEMPLATES,
    FAMILY_TEMPLATES,
    ParallelConfig,
    Recipe,
    RlStage,
    SamplingStage,
    SftStage,
)
from millrace.config.server_rules import server_problems, verifier_problems
from millrace.config.stage_rules import domain_problems, stage_problems
from millrace.config.switch_rules import switch_problems
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
    problems += switch_problems(recipe, shape)
    problems += _lengths(recipe, shape)
    problems += server_problems(recipe)
    problems += _names(recipe)
    problems += graph_problems(recipe)
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
        shape = ModelShape.from_hf(folder)
    except ConfigError as error:
        problems += [f"model.path: {problem}" for problem in error.problems]
        return None
    if recipe.model.chat_template is None and shape.family not in FAMILY_TEMPLATES and not has_chat_template(folder):
        problems.append(
            f"model.chat_template is not set, and the tokenizer in {folder} has none; name a Jinja file or a built-in "
            f"one ({', '.join(BUILT_IN_TEMPLATES)})"
        )
    return shape


def layout_of_recipe(recipe: Recipe, shape: ModelShape) -> list[str]:
    """What is wrong with a recipe's parallel layout and its engines' for a model: all that a plan needs to be right."""
    return [
        *range_problems(recipe),
        *_layout(recipe, None),
        *_layout_of_model(recipe, shape),
        *_lora(recipe, shape),
        *precision_problems(recipe, shape),
        *switch_problems(recipe, shape),
        *verifier_problems(recipe),
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


def recipe_warnings(recipe: Recipe) -> list[str]:
    """What works and is likely not what was meant."""
    fp8 = recipe.samples and recipe.fleet.quantization == "fp8"
    return [
        f"stages.{stage.name} samples in FP8 (fleet.quantization) and corrects for no mismatch; set "
        f"stages.{stage.name}.off_policy.kind to icepop or tis"
        for stage in recipe.stages
        if fp8 and isinstance(stage, RlStage) and stage.off_policy.kind == "none"
    ]


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
