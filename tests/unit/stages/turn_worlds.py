"""Environments, policies, fleets and a slow way to lay out token streams, for the tests of episodes with many turns."""

from __future__ import annotations

import asyncio
import concurrent.futures
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from chat_checkpoints import CHATML, THINKING_ONCE
from tiny_checkpoints import IM_END, VOCABULARY, write_tokenizer

from millrace.config.schema import SamplingConfig, TurnsConfig
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.base import Cut, Observation, Reward
from millrace.rollout.member import FleetNeedsSync
from millrace.rollout.types import Request, Rollout
from millrace.stages.stream import TurnRules

SPECIAL = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
END_OF_TEXT = 256

ROOMY = TurnRules(SamplingConfig(max_response_tokens=10_000), TurnsConfig(), context=100_000)

FORMS = {
    "chatml": (CHATML, None),
    "qwen": (THINKING_ONCE, None),
    "qwen plain": (THINKING_ONCE, False),
    "nemotron thinking": ("nemotron", True),
    "nemotron plain": ("nemotron", False),
}
"""The template and whether it is asked to think."""


def open_tokenizer(path, template):
    path.mkdir(exist_ok=True)
    write_tokenizer(path)
    (path / "config.json").write_text("{}")
    named = None
    if template != CHATML:
        named = template if template == "nemotron" else str(path / "own.jinja")
        (path / "own.jinja").write_text(template)
    return ChatTokenizer(path, VOCABULARY, chat_template=named)


def slow_tokens(text: str) -> list[int]:
    """Ids of the byte tokenizer, letter by letter."""
    ids: list[int] = []
    for piece in re.split(r"(<\|[a-z_]+\|>)", text):
        ids += [SPECIAL[piece]] if piece in SPECIAL else list(piece.encode())
    return ids


LETTERS = "ab <>/é漢\n\t{}\"'=0 \U0001f600"
WORDS = (
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "<tool_response>",
    "assistant",
    "\n\n",
    "probe7",
    "{{ x }}",
)


def random_text(draw, most):
    pieces = [draw.choice(WORDS) if draw.random() < 0.2 else draw.choice(LETTERS) for _ in range(draw.randint(0, most))]
    return "".join(pieces)


@dataclass
class Turn:
    """What a scripted policy generates, and what a scripted environment says to it: its tool results, a reward, or
    something that goes wrong."""

    tokens: list[int]
    reply: Any
    """Texts of tool results, a Reward, an exception to raise, or seconds to sleep before a reward of 1."""


class ScriptedEnvironment:
    """Rows are scripts: {"script": [Turn, ...]}."""

    required_fields: Sequence[str] = ()

    def __init__(self) -> None:
        self.closed = self.opened = 0

    def validate(self, row: Mapping[str, Any]) -> str | None:
        return None

    def reset(self, row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [{"role": "user", "content": row.get("prompt", "go")}]

    def tools(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]

    async def open(self, row: Mapping[str, Any]) -> ScriptedSession:
        self.opened += 1
        return ScriptedSession(self, row["script"])

    async def close(self) -> None: ...


@dataclass
class ScriptedSession:
    environment: ScriptedEnvironment
    script: Sequence[Turn]
    heard: list[str] = field(default_factory=list)

    async def step(self, answer: str) -> Observation | Reward:
        reply = self.script[len(self.heard)].reply
        self.heard.append(answer)
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, int | float):
            await asyncio.sleep(reply)
            return Reward(1.0, "slept")
        return reply if isinstance(reply, Reward) else Observation([{"role": "tool", "content": t} for t in reply])

    async def cut(self, by: Cut) -> Reward:
        return Reward(0.25, f"cut by {by}")

    async def close(self) -> None:
        self.environment.closed += 1


@dataclass
class ScriptedPolicy:
    """Answers as an engine does: cut at the request's limit. Keeps what it was asked."""

    script: Sequence[Turn]
    seconds: float = 0.0
    asked: list[Request] = field(default_factory=list)

    async def __call__(self, request: Request) -> Rollout:
        tokens = self.script[len(self.asked)].tokens
        self.asked.append(request)
        await asyncio.sleep(self.seconds)
        kept = tuple(tokens[: request.sampling.max_tokens])
        logp = tuple(-0.5 - 0.001 * place for place in range(len(kept)))
        reason = "stop" if len(kept) == len(tokens) else "length"
        return Rollout(request.id, 0, request.prompt, kept, logp, reason, 7, "http://engine")


class AnsweringFleet:
    """Engines that answer a prompt with what `answer(its text, number of the answer)` says. All of them are lost before
    the turn number `lost_at`, until `sync` is called."""

    def __init__(
        self,
        answer: Callable[[str, int], str],
        *,
        room: int = 30_000,
        lost_at: int | None = None,
        seconds: Callable[[], float] = lambda: 0.005,
    ) -> None:
        self.config = SimpleNamespace(max_model_len=room)
        self.asked: list[Request] = []
        """Turns, in their order."""
        self.batched: list[Request] = []
        self.lost_at, self.syncs = lost_at, 0
        self._answer, self._seconds = answer, seconds
        self._pool = concurrent.futures.ThreadPoolExecutor(16)

    def submit(self, requests):
        self.batched += requests
        answers = [[self._rollout(request, k) for k in range(request.sampling.n)] for request in requests]
        return self._pool.submit(lambda: answers), lambda: (0, 0, 0)

    def submit_turn(self, request):
        self.asked.append(request)
        return self._pool.submit(self._turn, request, len(self.asked))

    def sync(self):
        self.lost_at, self.syncs = None, self.syncs + 1

    def _turn(self, request, number):
        time.sleep(self._seconds())
        if self.lost_at is not None and number >= self.lost_at:
            raise FleetNeedsSync("no engine holds synced weights: push weights, then go on")
        return self._rollout(request, int(request.id.split("/")[-2]))

    def _rollout(self, request, index):
        prompt = bytes(token for token in request.prompt if token < 256).decode()
        answer = (*self._answer(prompt, index).encode(), IM_END)
        return Rollout(request.id, index, request.prompt, answer, (-0.5,) * len(answer), "stop", 3, "http://engine")


def spoken(text: str, end: int = IM_END) -> list[int]:
    return [*slow_tokens(text), end]


def between(form, texts):
    """What stands between two turns, written out by hand for each template."""
    if form == "chatml":
        return "\n" + "".join(f"<|im_start|>tool\n{t}<|im_end|>\n" for t in texts) + "<|im_start|>assistant\n"
    responses = [f"<tool_response>\n{t}\n</tool_response>" for t in texts]
    if form.startswith("nemotron"):
        results = "".join(f"{r}\n" for r in responses)
        opened = "<think>\n" if form == "nemotron thinking" else "<think></think>"
        return f"\n<|im_start|>user\n{results}<|im_end|>\n<|im_start|>assistant\n{opened}"
    opened = "<think>\n\n</think>\n\n" if form == "qwen plain" else ""
    return "\n" + "".join(f"<|im_start|>user\n{r}<|im_end|>\n" for r in responses) + f"<|im_start|>assistant\n{opened}"
