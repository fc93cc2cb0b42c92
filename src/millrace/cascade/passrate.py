"""`millrace data passrate`: how often a model solves each training prompt of a domain. Engines alone, no trainer.

The prompts are played in portions, and each portion is on disk before the next begins; so a kill costs one portion,
and the same command goes on behind the last one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from millrace.config.errors import ConfigError
from millrace.config.graph import nearest
from millrace.config.model_shape import ModelShape
from millrace.config.rules import require_runnable
from millrace.config.schema import JUDGED, DomainConfig, EvaluateStage, ParallelConfig, Recipe
from millrace.config.stage_rules import WITH_TURNS
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.registry import make_environment
from millrace.evaluation.pass_rate import pass_rate
from millrace.evaluation.pass_rates import PassRateFile, PromptPassRate, prompt_pass_rate
from millrace.observe.console import RunConsole
from millrace.rollout.fleet import Fleet
from millrace.rollout.placement import Seats, fleet_gpus
from millrace.stages.control import NoTrainer
from millrace.stages.domains import Domain
from millrace.stages.episodes import EpisodePlayer, Play
from millrace.stages.groups import Group

WAVES = 8
"""A portion fills the engines this many times over: its last answers leave them idle, which more waves make rarer, and
a kill costs a portion, which fewer make smaller."""


def measuring_recipe(recipe: Recipe, domain: str, model: Path | None) -> Recipe:
    """The recipe of a run that does nothing but measure `domain`, by `model` where one is named.

    Raises ConfigError with every broken rule that concerns it, so that a recipe whose curriculum waits for the pass
    rates can be measured by.
    """
    key = f"domains.{domain}"
    if domain not in recipe.domains:
        raise ConfigError(f"{key} is not in the recipe{nearest(domain, recipe.domains)}")
    if recipe.domains[domain].environment == "genrm":
        raise ConfigError(f"{key}: a judge compares its answers with each other, so that no prompt has a pass rate")
    if recipe.domains[domain].environment in JUDGED:
        raise ConfigError(f"{key}: a judge scores its answers, and judges are not started for pass rates")
    if recipe.fleet.addresses:
        raise ConfigError(
            "fleet.addresses names servers that already run, with weights that nobody here knows; set "
            "fleet.addresses=[] and fleet.engines"
        )
    measuring = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, path=str(model.resolve()) if model else recipe.model.path),
        parallel=ParallelConfig(),
        domains={domain: dataclasses.replace(recipe.domains[domain], pass_rates=None)},
        judges={},
        stages=(EvaluateStage(name="passrate"),),
    )
    require_runnable(measuring)
    return measuring


def measure_pass_rates(
    recipe: Recipe, out: Path, *, samples: int, max_prompts: int | None = None
) -> list[PromptPassRate]:
    """Measure the training prompts of the recipe's one domain that `out` does not hold yet; returns all of them.

    Answers are sampled as the recipe's evaluation samples them, `samples` a prompt.
    """
    ((name, config),) = recipe.domains.items()
    vocabulary = ModelShape.from_hf(recipe.model.path).vocab_size
    tokenizer = ChatTokenizer(recipe.model.path, vocabulary, recipe.model.chat_template)
    domain = Domain(name, config, make_environment(config), tokenizer)
    domain.require_room(domain.train, recipe.fleet.max_model_len, recipe.evaluation.sampling.max_response_tokens)
    with closing(PassRateFile(out, _settings(recipe, samples))) as file:
        # Equal rows have one id and are measured once.
        wanted = min(len(domain.train), max_prompts or len(domain.train))
        rows = {domain.train.row_id(row): row for row in range(wanted)}
        missing = [row for row_id, row in rows.items() if row_id not in file.rows]
        if missing:
            with _engines(recipe, domain, tokenizer) as (player, console):
                console.say(f"{name}: {len(rows) - len(missing)} of {len(rows)} prompts were measured before")
                _measure(recipe, domain, missing, samples, player, console, file)
        return [file.rows[row_id] for row_id in rows if row_id in file.rows]


@contextmanager
def _engines(recipe: Recipe, domain: Domain, tokenizer: ChatTokenizer) -> Iterator[tuple[EpisodePlayer, RunConsole]]:
    """Engines that serve the recipe's checkpoint, and the terminal."""
    folder = Path(tempfile.mkdtemp(prefix="millrace-"))
    (folder / "logs").mkdir()
    with ExitStack() as stack:
        console = RunConsole(folder)
        stack.callback(console.close)
        seats = Seats(fleet_gpus(recipe, beside_trainer=False))
        fleet = stack.enter_context(Fleet(recipe.fleet, recipe.model.path, folder, seats=seats))
        player = EpisodePlayer(NoTrainer(), fleet.serve_checkpoint, tokenizer, fleet, {domain.name: domain}, console)
        stack.callback(player.close)
        fleet.wait_ready()
        fleet.serve_checkpoint()
        yield player, console
    shutil.rmtree(folder)  # after a failure it stays, for the logs of the engines


def _measure(
    recipe: Recipe,
    domain: Domain,
    missing: Sequence[int],
    samples: int,
    player: EpisodePlayer,
    console: RunConsole,
    file: PassRateFile,
) -> None:
    """Play the missing rows in portions and record each."""
    portion = max(1, WAVES * recipe.fleet.engines * recipe.fleet.max_num_seqs // samples)
    for begin in range(0, len(missing), portion):
        rows = missing[begin : begin + portion]
        what = f"{domain.name}: {begin + len(rows)}/{len(missing)} prompts"
        # A row's seeds are its own, whatever was measured before.
        episodes = [domain.episode(domain.train, row, seed=row * samples) for row in rows]
        groups = player.play(Play(episodes, recipe.evaluation.sampling, samples, what))
        judged = [group for group in groups if group.rewards]  # the others are measured the next time
        file.append(map(_pass_rate_of, judged))
        console.say(f"{what}, the last {len(judged)} solved to {pass_rate([group.rewards for group in judged])}")


def _pass_rate_of(group: Group) -> PromptPassRate:
    lengths = [answer.rollout.length for answer in group.answers if not answer.reward.masked]
    return prompt_pass_rate(group.episode.id, group.rewards, lengths)


def _settings(recipe: Recipe, samples: int) -> dict[str, Any]:
    """What a pass rate depends on."""
    ((name, domain),) = recipe.domains.items()
    weights = max(file.stat().st_mtime for file in Path(recipe.model.path).glob("*.safetensors"))
    return {
        "model": recipe.model.path,
        "chat_template": recipe.model.chat_template,
        "weights_of": datetime.fromtimestamp(weights, UTC).isoformat(),
        "engine_dtype": recipe.fleet.dtype,
        "domain": name,
        "environment": domain.environment,
        "grading": domain.grading,
        "system_prompt": domain.system_prompt,
        "thinking": domain.thinking,
        "verify_timeout_s": domain.verify_timeout_s,
        "train": domain.train,
        "train_sha256": hashlib.sha256(Path(domain.train).read_bytes()).hexdigest(),
        **of_environment(domain),
        "samples": samples,
        **dataclasses.asdict(recipe.evaluation.sampling),
    }


def of_environment(domain: DomainConfig) -> dict[str, Any]:
    """What a domain says that its environment reads, without what changes no answer: how many work, and where."""
    found: dict[str, Any] = {}
    if domain.environment in WITH_TURNS:
        found["turns"] = domain.turns
    match domain.environment:
        case "python_tool":
            found["python"] = domain.python
        case "workplace_assistant":
            found["tables"] = domain.tables
        case "swe_agentic":
            found["swe"] = dataclasses.replace(domain.swe, at_once=None)
        case "agent":
            found["agent"] = domain.agent.url
    if domain.environment in ("code", "python_tool"):
        found["sandbox"] = dataclasses.replace(domain.sandbox, tier="auto", workers=None)
    # As they are read back.
    return json.loads(json.dumps(found, default=dataclasses.asdict))
