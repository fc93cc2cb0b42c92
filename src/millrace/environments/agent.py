"""An agent's server that drives the episodes, as NeMo-Gym's agents do.

A row is one of NeMo-Gym: a `responses_create_params` and whatever the agent and its resource servers read beside it.
For each episode it is posted to `/run`, whose reply holds the `reward`. Two things are added, by which the agent finds
the policy under the episode's key: `model_server` with base_url, api_key and model, for an agent that opens a client of
its own, and `millrace_episode` in the request's metadata, which NeMo-Gym's model servers hand on.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import httpx

from millrace.config.schema import AgentConfig
from millrace.environments.base import EPISODE_FIELD, Message, ModelAddress, Reward
from millrace.environments.gym_rows import REQUEST, GymRowError, request_messages, request_tools
from millrace.errors import MillraceError


class AgentError(MillraceError):
    """The agent's server gave no reward."""


class AgentServerEnvironment:
    required_fields: Sequence[str] = (REQUEST,)

    def __init__(self, config: AgentConfig) -> None:
        assert config.url is not None, "the recipe's rules ask for it"
        self._run_url = f"{config.url.rstrip('/')}/run"
        self.places = asyncio.Semaphore(config.concurrency)
        self.listen, self.port = config.listen, config.port
        self._http: httpx.AsyncClient | None = None

    def validate(self, row: Mapping[str, Any]) -> str | None:
        try:
            request_messages(row[REQUEST])
            request_tools(row[REQUEST])
        except GymRowError as error:
            return str(error)
        metadata = row[REQUEST].get("metadata")
        return None if isinstance(metadata, Mapping | None) else f"{REQUEST}.metadata must be an object"

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        return [*request_messages(row[REQUEST])]

    def tools(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return request_tools(row[REQUEST])

    async def drive(self, row: Mapping[str, Any], model: ModelAddress) -> Reward:
        """Raises AgentError, or what httpx raises where the server cannot be reached."""
        if self._http is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            # The environment's proxies are for the outside; the key must not reach them. Time is the caller's.
            self._http = httpx.AsyncClient(limits=limits, timeout=None, trust_env=False)
        request = row[REQUEST]
        metadata = {**(request.get("metadata") or {}), EPISODE_FIELD: model.api_key}
        body = {**row, REQUEST: {**request, "metadata": metadata}, "model_server": asdict(model)}
        return _reward(await self._http.post(self._run_url, json=body))

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()


def _reward(response: httpx.Response) -> Reward:
    if response.is_error:
        raise AgentError(f"its server answered with {response.status_code}: {response.text[:200]}")
    try:
        reply = response.json()
    except ValueError as error:
        raise AgentError(f"its server's reply is not JSON: {response.text[:200]}") from error
    value = reply.get("reward") if isinstance(reply, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AgentError(f"its server's reply holds no number as reward: {response.text[:200]}")
    return Reward(float(value), "the agent's reward")
