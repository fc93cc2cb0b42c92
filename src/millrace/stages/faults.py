"""What environments do wrong: it costs their own episode, which is masked, and not the run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from millrace.environments.base import Reward

T = TypeVar("T")

log = logging.getLogger("millrace.stages")


class EnvironmentFault(Exception):
    """What an environment did wrong, in a few words."""

    def reward(self) -> Reward:
        return Reward(0.0, str(self), masked=True)


async def within(what: str, call: Coroutine[Any, Any, T] | asyncio.Future[T], seconds: float) -> T:
    """What an environment returns within so many seconds. One that does not even end when it is cancelled is left
    behind. Raises EnvironmentFault for all that it does wrong."""
    task = asyncio.ensure_future(call)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise EnvironmentFault(f"{what} took longer than {seconds:g} s")
        if task.cancelled():
            raise EnvironmentFault(f"{what} was cancelled from inside")
    finally:
        task.cancel()
    error = task.exception()
    if isinstance(error, Exception):  # an environment's defect is its episode's, not the run's
        log.warning("%s failed", what, exc_info=error)
        raise EnvironmentFault(f"{what} failed: {type(error).__name__}: {error}") from error
    return task.result()
