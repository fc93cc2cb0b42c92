"""Talks HTTP to one engine: token ids in, token ids and log-probs out, and the calls that change its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import httpx

from millrace.errors import MillraceError
from millrace.rollout.server import MODEL_NAME
from millrace.rollout.types import SamplingParams

CONTROL_SECONDS = 60.0
"""Limit of a short control call (pause, resume, version)."""


class EngineUnreachable(MillraceError):
    """The engine did not answer, or answered that it is broken: another one may do better."""


class EngineFailed(EngineUnreachable):
    """The engine answered that it could not do what it was asked for."""


class RequestTimeout(MillraceError):
    """The answer did not come within the request's limit."""


class RequestRefused(MillraceError):
    """The engine understood the request and says what is wrong with it: no other engine would take it."""


class RequestAborted(MillraceError):
    """The engine gave the request up half-way, for instance to take new weights."""


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    finish_reason: str
    weight_version: int
    """The oldest version that a token of the answer was drawn with."""


class EngineClient:
    """One engine at `url`. All methods raise EngineUnreachable, RequestTimeout or RequestRefused."""

    def __init__(self, http: httpx.AsyncClient, url: str, token: str) -> None:
        self._http = http
        self._headers = {"Authorization": f"Bearer {token}"}
        self.url = url
        self.asleep = False

    async def healthy(self, limit: float) -> bool:
        """Whether the engine answers within `limit` seconds that it is well."""
        try:
            response = await self._http.get(f"{self.url}/health", timeout=limit)
        except httpx.HTTPError:
            return False
        return response.status_code == httpx.codes.OK

    async def generate(self, prompt: tuple[int, ...], sampling: SamplingParams, limit: float) -> list[Answer]:
        """`sampling.n` answers to one prompt, answer k drawn with seed + k. Raises RequestAborted too."""
        parameters: dict[str, Any] = {
            "n": sampling.n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
            # Stop tokens named by the caller are the only ones; with none named, the model's own end of text holds.
            "ignore_eos": bool(sampling.stop_token_ids),
            "logprobs": 0,
            "detokenize": False,
        }
        if sampling.seed is not None:
            parameters["seed"] = sampling.seed
        reply = await self._inference(prompt, parameters, limit)
        return [_answer(choice) for choice in sorted(reply["choices"], key=lambda choice: choice["index"])]

    async def prompt_logprobs(self, tokens: tuple[int, ...], limit: float) -> list[float]:
        """log p of each given token after those before it, at temperature 1; 0 for the first."""
        reply = await self._inference(
            tokens, {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}, limit
        )
        scores = reply["prompt_logprobs"]
        return [0.0, *(at[str(token)]["logprob"] for token, at in zip(tokens[1:], scores[1:], strict=True))]

    async def chat(self, body: Mapping[str, Any], limit: float) -> Any:
        """The reply to an OpenAI chat completion request."""
        return await self._post("/v1/chat/completions", limit, body=dict(body))

    async def _inference(self, tokens: tuple[int, ...], parameters: dict[str, Any], limit: float) -> dict[str, Any]:
        body = {"model": MODEL_NAME, "token_ids": list(tokens), "sampling_params": parameters}
        return cast(dict[str, Any], await self._post("/inference/v1/generate", limit, body=body))

    async def worker_call(self, method: str, *arguments: str, limit: float) -> list[Any]:
        """Call a method of the weight receiver on every worker of the engine; one result a worker."""
        body = {"method": method, "args": list(arguments), "timeout": limit}
        return cast(list[Any], (await self._post("/collective_rpc", limit, body=body))["results"])

    async def pause(self) -> None:
        """Freeze requests where they are; they go on after `resume`."""
        await self._post("/pause", CONTROL_SECONDS, query={"mode": "keep"})

    async def sleep(self, level: int, limit: float) -> None:
        """Give the GPU's memory back once no request is left: with level 1 weights go to the host, with 2 nowhere."""
        await self._post("/sleep", limit, query={"level": str(level), "mode": "wait"})
        self.asleep = True

    async def wake(self, what: Literal["weights", "kv_cache"], limit: float) -> None:
        """Take memory again for one of the two, unless it was never given back; awake with the cache."""
        if self.asleep:
            await self._post("/wake_up", limit, query={"tags": what})
            self.asleep = what == "weights"

    async def resume(self) -> None:
        await self._post("/resume", CONTROL_SECONDS)

    async def reset_prefix_cache(self) -> None:
        """Forget every cached key and value; frozen requests compute theirs anew."""
        reply = await self._post("/reset_prefix_cache", CONTROL_SECONDS, query={"reset_running_requests": "true"})
        if not reply["success"]:
            raise EngineFailed(f"{self.url} could not reset its prefix cache: blocks are still held")

    async def set_weight_version(self, version: int) -> None:
        await self._post("/update_weight_version", CONTROL_SECONDS, body={"new_version": str(version)})

    async def post(self, path: str, body: dict[str, Any] | None = None, limit: float = CONTROL_SECONDS) -> Any:
        """Any other route of vLLM's weight-transfer plane."""
        return await self._post(path, limit, body=body)

    async def _post(
        self, path: str, limit: float, body: dict[str, Any] | None = None, query: dict[str, str] | None = None
    ) -> Any:
        try:
            response = await self._http.post(
                self.url + path, json=body, params=query, headers=self._headers, timeout=limit
            )
        except httpx.TimeoutException as error:
            raise RequestTimeout(f"{self.url}{path} did not answer within {limit:g} s") from error
        except httpx.HTTPError as error:
            raise EngineUnreachable(f"{self.url}{path}: {error or type(error).__name__}") from error
        if response.is_server_error:
            raise EngineFailed(f"{self.url}{path} failed with {response.status_code}: {_message(response)}")
        if response.is_error:
            raise RequestRefused(f"{self.url}{path} refused with {response.status_code}: {_message(response)}")
        return response.json() if response.content else None


def _message(response: httpx.Response) -> str:
    try:
        reply = response.json()
    except ValueError:
        return response.text[:500]
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _answer(choice: dict[str, Any]) -> Answer:
    if choice["finish_reason"] not in ("stop", "length"):
        raise RequestAborted(f"the engine ended an answer with {choice['finish_reason']!r}")
    content = choice["logprobs"]["content"]
    return Answer(
        tokens=tuple(choice["token_ids"]),
        logp=tuple(entry["logprob"] for entry in content),
        finish_reason=choice["finish_reason"],
        weight_version=min(int(span["version"]) for span in choice["weight_versions"]),
    )
