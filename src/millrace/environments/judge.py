"""A judge: a language model behind an OpenAI-compatible endpoint that is asked for verdicts.

An environment asks a question and says how its verdict is read from the reply. Where two answers are compared it is the
last JSON object of the judge's final text: score_1 and score_2 from 1 to 5, and a ranking from 1 (the first answer is
far better) to 6 (the second one is). A try fails when nothing comes back within its limit, when the server is broken,
and when the text holds no verdict; it is repeated with another seed. A verdict that no try has brought stands undecided
and is counted. A judge that decides nothing any more ends the run instead: rewards of lengths alone would teach the
policy to be short.

The seed of a try follows from what is asked, so the same answers get the same verdicts.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import httpx

from millrace.algorithms.preferences import UNDECIDED, Judgement
from millrace.config.schema import JudgeConfig
from millrace.environments.answer import final_text
from millrace.environments.base import Message
from millrace.environments.judge_prompt import judge_messages
from millrace.errors import MillraceError

RETRY_SECONDS = 0.5
"""Pause before the second try of a request that failed; it doubles with each further one."""
MOST_UNDECIDED = 64
"""So many verdicts in a row that no try has brought, and the judge counts as lost."""
WAY_OUT_OF_UNPARSABLE = (
    "raise its max_tokens if replies are cut, for genrm set its form to the other one, or take another judge"
)
LONGEST_OBJECT = 4096
"""Characters at the end of a text in which its verdict is looked for."""


class JudgeError(MillraceError):
    """The judge is lost, or refuses everything it is asked."""


class NoReply(Exception):
    """One try brought no reply; another one may."""


class Rejected(Exception):
    """The endpoint understood the request and rejects it: it would do so again."""


class Endpoint(Protocol):
    """Where a judge is reached."""

    where: str
    """For messages."""

    async def chat(self, body: Mapping[str, Any], limit_s: float) -> Any:
        """The reply to a chat completion request. Raises NoReply, Rejected or a MillraceError that ends the run."""
        ...

    async def close(self) -> None: ...


Outcome = Literal["judged", "failed", "unparsable"]
"""failed: the last try brought no reply; unparsable: it brought one without a verdict in it."""


@dataclass(frozen=True)
class Verdict:
    judgement: Judgement
    outcome: Outcome
    seconds: float
    """That its tries took, without the wait for a free place."""


T = TypeVar("T")


@dataclass(frozen=True)
class Asked(Generic[T]):
    """What became of one question to a judge."""

    value: T | None
    """The verdict; None where no try brought one."""
    outcome: Outcome
    reason: str
    """Why there is none."""
    seconds: float

    def details(self) -> dict[str, float]:
        """The tally that stands with an answer on record, and by which verdicts are counted."""
        return {
            "verdicts": 1.0,
            "failed": float(self.outcome == "failed"),
            "unparsable": float(self.outcome == "unparsable"),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class _Try(Generic[T]):
    outcome: Outcome
    value: T | None = None
    reason: str = ""
    again: bool = True
    """Whether another try may end otherwise."""


class Judge:
    """Asks for verdicts, at most `concurrency` at one time. Belongs to the event loop that uses it first."""

    def __init__(self, name: str, config: JudgeConfig, endpoint: Endpoint) -> None:
        self._name, self._config, self._endpoint = name, config, endpoint
        self._places = asyncio.Semaphore(config.concurrency)
        self._in_a_row: Counter[Outcome] = Counter()
        """What became of the verdicts since the last one that was judged."""

    async def compare(self, conversation: Sequence[Message], first: str, second: str) -> Verdict:
        """The judge's verdict of two final answers to a conversation.

        Raises:
            JudgeError: the endpoint refuses Millrace, or many verdicts in a row stand undecided.
        """
        asked = await self.ask(judge_messages(self._config.form, conversation, first, second), parse_judgement)
        return Verdict(asked.value or UNDECIDED, asked.outcome, asked.seconds)

    async def ask(self, messages: Sequence[Message], read: Callable[[str], T | None]) -> Asked[T]:
        """A verdict, as `read` finds it in the judge's text; None there stands for a text without one.

        Raises:
            JudgeError: the endpoint refuses Millrace, or many verdicts in a row stand undecided.
        """
        seconds = 0.0
        for attempt in range(self._config.retries + 1):
            async with self._places:
                began = time.monotonic()
                tried = await self._try(messages, read, attempt)
                seconds += time.monotonic() - began
            if tried.value is not None or not tried.again:
                break
            if tried.outcome == "failed" and attempt < self._config.retries:
                await asyncio.sleep(RETRY_SECONDS * 2**attempt)
        self._count(tried)
        return Asked(tried.value, tried.outcome, tried.reason, seconds)

    async def close(self) -> None:
        await self._endpoint.close()

    async def _try(self, messages: Sequence[Message], read: Callable[[str], T | None], attempt: int) -> _Try[T]:
        try:
            reply = await self._endpoint.chat(self._body(messages, attempt), self._config.timeout_s)
            text = _text(reply)
        except NoReply as error:
            return _Try("failed", reason=str(error))
        except Rejected as error:
            return _Try("failed", reason=str(error), again=False)
        if text is None:
            return _Try("unparsable", reason=f"its reply was cut at max_tokens {self._config.max_tokens}")
        value = read(text)
        if value is None:
            return _Try("unparsable", reason=f"its reply holds no verdict: {text[-200:]!r}")
        return _Try("judged", value)

    def _body(self, messages: Sequence[Message], attempt: int) -> dict[str, Any]:
        return {
            "model": self._config.served_name,
            "messages": list(messages),
            "temperature": self._config.temperature,
            "top_p": self._config.top_p,
            "max_tokens": self._config.max_tokens,
            "seed": _seed(messages, attempt),
        }

    def _count(self, tried: _Try[Any]) -> None:
        if tried.value is not None:
            self._in_a_row.clear()
            return
        self._in_a_row[tried.outcome] += 1
        if self._in_a_row.total() >= MOST_UNDECIDED:
            seen = self._in_a_row
            way_out = f"; {WAY_OUT_OF_UNPARSABLE}" if seen["unparsable"] else "; see to it"
            raise JudgeError(
                f"judge {self._name} at {self._endpoint.where} has left {seen.total()} verdicts in a row undecided "
                f"({seen['failed']} unanswered, {seen['unparsable']} unparsable), the last one because {tried.reason}"
                f"{way_out}, and start the run again, which goes on from its last checkpoint"
            )


def _text(reply: Any) -> str | None:
    """The text of a chat completion; None where it was cut at the length limit, in its reasoning perhaps."""
    try:
        choice = reply["choices"][0]
        content = choice["message"].get("content")
        return None if choice.get("finish_reason") == "length" else content or ""
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise NoReply(f"the reply is no chat completion: {str(reply)[:200]}") from error


def parse_judgement(text: str) -> Judgement | None:
    """The last JSON object of the final text as a judgement; None where there is none, or a number is out of range."""
    found = last_object(text)
    if found is None:
        return None
    score_1, score_2 = _number(found.get("score_1"), 5), _number(found.get("score_2"), 5)
    ranking = _number(found.get("ranking"), 6)
    if score_1 is None or score_2 is None or ranking is None:
        return None
    return Judgement(score_1, score_2, ranking)


def _number(value: Any, highest: int) -> float | None:
    """The value as a number from 1 to `highest`, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= highest:
        return None
    return float(value)


def last_object(text: str) -> dict[str, Any] | None:
    """The last JSON object near the end of the final text."""
    text = final_text(text)[-LONGEST_OBJECT:]
    decoder, found, at = json.JSONDecoder(), None, text.find("{")
    while at >= 0:
        try:
            found, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        at = text.find("{", end)
    return found


def _seed(messages: Sequence[Message], attempt: int) -> int:
    asked = json.dumps([list(messages), attempt], sort_keys=True).encode()
    return int.from_bytes(hashlib.sha256(asked).digest()[:4]) >> 1  # 31 bits: every server takes them


class HttpEndpoint:
    """An OpenAI-compatible server that already runs, `url` being its base such as http://node7:8000/v1."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.where = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http: httpx.AsyncClient | None = None

    async def chat(self, body: Mapping[str, Any], limit_s: float) -> Any:
        if self._http is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            # The environment's proxies are for the outside; neither prompts nor the key must reach them.
            self._http = httpx.AsyncClient(headers=self._headers, limits=limits, timeout=None, trust_env=False)
        try:
            async with asyncio.timeout(limit_s):  # httpx's own limit is one between two bytes
                response = await self._http.post(f"{self.where}/chat/completions", json=dict(body))
        except TimeoutError as error:
            raise NoReply(f"no answer came within {limit_s:g} s") from error
        except httpx.HTTPError as error:
            raise NoReply(f"the request broke off: {error or type(error).__name__}") from error
        return _checked(response, self.where)

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()


def _checked(response: httpx.Response, where: str) -> Any:
    status, said = response.status_code, response.text[:300]
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise JudgeError(f"the judge at {where} refuses access ({status}): {said}; set its api_key_variable")
    if status == httpx.codes.NOT_FOUND:
        raise JudgeError(f"the judge at {where} does not know what is asked for (404): {said}; see url and served_name")
    if status == httpx.codes.TOO_MANY_REQUESTS or response.is_server_error:
        raise NoReply(f"the server failed with {status}: {said}")
    if response.is_error:
        raise Rejected(f"the server rejects the request with {status}: {said}")
    try:
        return response.json()
    except ValueError as error:
        raise NoReply(f"the reply is not JSON: {said}") from error
