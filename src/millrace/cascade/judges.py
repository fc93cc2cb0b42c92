"""The judges of a run: those that Millrace serves, and those that already run elsewhere. Rank 0 holds them."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from millrace.config.errors import ConfigError
from millrace.config.schema import JudgeConfig, Recipe
from millrace.environments.judge import Endpoint, HttpEndpoint, Judge, JudgeError, NoReply, Rejected
from millrace.rollout.chat import chat
from millrace.rollout.client import EngineFailed, RequestRefused, RequestTimeout
from millrace.rollout.fleet import Fleet
from millrace.rollout.member import FleetError, FleetLost
from millrace.rollout.placement import judge_seats

WAIT_LOG_SECONDS = 10.0
PROBE_SECONDS = 1.0

log = logging.getLogger("millrace")


class ServedEndpoint:
    """A fleet of vLLM servers that Millrace runs with the judge's checkpoint."""

    def __init__(self, fleet: Fleet, stop_token_ids: list[int]) -> None:
        self.where = "its own engines"
        self._fleet, self._stop_token_ids = fleet, stop_token_ids

    async def chat(self, body: Mapping[str, Any], limit_s: float) -> Any:
        # The engines read no generation_config.json, so what it says of stop tokens goes with the request.
        asked = {**body, "stop_token_ids": self._stop_token_ids}
        try:
            return await chat(self._fleet, asked, limit_s)
        except RequestRefused as error:
            raise Rejected(str(error)) from error
        except FleetLost:
            raise
        except (RequestTimeout, EngineFailed, FleetError) as error:
            raise NoReply(str(error)) from error

    async def close(self) -> None:
        """Nothing: the engines live until the run ends."""


@dataclass(frozen=True)
class Judges:
    """What a run knows of its judges; empty on every rank but the first, and in a run without a judged domain."""

    by_name: Mapping[str, Judge]
    fleets: Mapping[str, Fleet]
    remote: Mapping[str, JudgeConfig]
    """Those that already run."""

    def wait_ready(self) -> None:
        """Return when every judge answers. Raises EngineStartError or JudgeError for one that does not."""
        for fleet in self.fleets.values():
            fleet.wait_ready()
            fleet.serve_checkpoint()
        for name, config in self.remote.items():
            _wait_for_remote(name, config)

    def close(self) -> None:
        """End the engines that were started."""
        for fleet in self.fleets.values():
            fleet.close()


def start_judges(recipe: Recipe, run_dir: Path) -> Judges:
    """Start the judges that the recipe's domains name, on rank 0; returns at once."""
    if int(os.environ.get("RANK", "0")) != 0:
        return Judges({}, {}, {})
    judges: dict[str, Judge] = {}
    fleets: dict[str, Fleet] = {}
    remote: dict[str, JudgeConfig] = {}
    for name, config in recipe.judges_used.items():
        endpoint: Endpoint
        if config.model is None:
            remote[name] = config
            endpoint = HttpEndpoint(_url(config), _api_key(name, config))
        else:
            seats = judge_seats(recipe, name)
            kind = f"judge-{name}"
            fleets[name] = Fleet(
                config.engine, config.model, run_dir, seats=seats, kind=kind, served_name=config.served_name
            )
            endpoint = ServedEndpoint(fleets[name], stop_token_ids(Path(config.model)))
        judges[name] = Judge(name, config, endpoint)
    for fleet in fleets.values():
        fleet.start()
    return Judges(judges, fleets, remote)


def stop_token_ids(checkpoint: Path) -> list[int]:
    """The ids that end an answer by the checkpoint's generation_config.json, if it has one."""
    file = checkpoint / "generation_config.json"
    if not file.exists():
        return []
    ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _url(config: JudgeConfig) -> str:
    assert config.url is not None, "the recipe's rules ask for model or url"
    return config.url.rstrip("/")


def _api_key(name: str, config: JudgeConfig) -> str | None:
    if config.api_key_variable is None:
        return None
    key = os.environ.get(config.api_key_variable)
    if not key:
        raise ConfigError(
            f"judges.{name}.api_key_variable names the environment variable {config.api_key_variable}, which is not "
            "set; set it to the endpoint's API key"
        )
    return key


def _wait_for_remote(name: str, config: JudgeConfig) -> None:
    """Wait until the endpoint answers anything at all, at most as long as an engine may take to start."""
    url, limit = _url(config), config.engine.start_timeout_s
    key = _api_key(name, config)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    began = logged = time.monotonic()
    while (problem := _probe(f"{url}/models", headers)) is not None:
        now = time.monotonic()
        if now - began > limit:
            raise JudgeError(
                f"waited {limit:g} s for judge {name}, but {url} does not answer ({problem}); start it, or correct "
                f"judges.{name}.url"
            )
        if now - logged >= WAIT_LOG_SECONDS:
            logged = now
            log.info("waiting for judge %s at %s: %.0f s of %.0f s; %s", name, url, now - began, limit, problem)
        time.sleep(PROBE_SECONDS)


def _probe(url: str, headers: Mapping[str, str]) -> str | None:
    """Why the server does not answer, or None. An error that it answers with is an answer."""
    try:
        httpx.get(url, headers=dict(headers), timeout=WAIT_LOG_SECONDS, trust_env=False)
    except httpx.HTTPError as error:
        return str(error) or type(error).__name__
    return None
