"""Chat completions from a fleet that serves a fixed checkpoint, such as a judge's."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

from millrace.rollout.client import EngineClient, EngineFailed, RequestRefused, RequestTimeout
from millrace.rollout.dispatch import Dispatcher, Job
from millrace.rollout.fleet import Fleet

NO_BOUND = sys.maxsize
"""Of the requests at one engine: the caller bounds them, and an engine that is full queues the rest."""


async def chat(fleet: Fleet, body: Mapping[str, Any], limit: float) -> Any:
    """The reply of the least loaded engine to a chat completion request; another one is asked when it dies meanwhile.

    Raises RequestTimeout, EngineFailed or RequestRefused for what the engine says, FleetError when none can be asked.
    """
    return await asyncio.wrap_future(fleet.begin(_chat(fleet, body, limit)))


async def _chat(fleet: Fleet, body: Mapping[str, Any], limit: float) -> Any:
    async def ask(client: EngineClient) -> Any:
        try:
            return await client.chat(body, limit)
        except (RequestTimeout, EngineFailed, RequestRefused) as error:
            return error  # an outcome like another: whether to ask again is for the caller to say

    reply, _ = await Dispatcher(fleet, capacity=NO_BOUND, limit=limit).submit(Job("a chat request", 1, ask))
    if isinstance(reply, Exception):
        raise reply
    return reply
