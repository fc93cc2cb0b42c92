"""Environments as a recipe makes them, and rewards of answers."""

import asyncio

from millrace.config.schema import DomainConfig
from millrace.environments.registry import make_environment


def environment(name, **options):
    return make_environment(DomainConfig(environment=name, train="train.jsonl", held_out="held-out.jsonl", **options))


def score(env, *pairs):
    """Rewards of (row, answer) pairs."""

    async def session():
        try:
            return await asyncio.gather(*(env.step(row, env.reset(row), answer) for row, answer in pairs))
        finally:
            await env.close()

    return asyncio.run(session())
