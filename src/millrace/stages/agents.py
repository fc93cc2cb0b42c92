"""Episodes that an agent outside of Millrace drives: it asks the policy at a chat endpoint and says its reward at last.

A request whose messages go on from the last ones (all of them, the policy's reply, then what tools and users said) is
served from the tokens of the stream: what the policy wrote is not tokenised again, what is new is rendered as a
difference. The same request again, of a client that gave up waiting, gets the same reply. Any other request rewrites
the history: it is rendered anew and begins a segment. What is trained on is the last segment, which the reward came
behind; the limits are those of all segments together. `segments` stands with the answer on record.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field, replace
from typing import Any

from millrace.data.errors import DataError
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.base import AgentEnvironment, Cut, ModelAddress, Reward
from millrace.errors import MillraceError
from millrace.rollout.json_server import Reply
from millrace.stages.chat_endpoint import ChatEndpoint
from millrace.stages.chat_form import (
    BadRequest,
    ChatRequest,
    assistant_message,
    completion,
    read_request,
    refusal,
    told,
)
from millrace.stages.faults import EnvironmentFault, within
from millrace.stages.groups import Episode, Scored
from millrace.stages.stream import Ask, Spent, TokenStream, TurnRules


@dataclass
class _Segment:
    """A conversation that only grew; it is kept as soon as the policy has replied in it."""

    opening: ChatRequest
    stream: TokenStream
    asked: list[str] = field(init=False)
    """What the messages of the last request say."""
    replied: str = field(init=False)
    """What the policy's reply to it says."""
    reply: Reply = field(init=False)

    def tools_are(self, request: ChatRequest) -> bool:
        return _as_text(request) == _as_text(self.opening)

    def goes_on_with(self, request: ChatRequest, said: list[str]) -> bool:
        """Whether the request is the last one with the policy's reply and something of others behind it."""
        before = [*self.asked, self.replied]
        new = request.messages[len(before) :]
        return (
            bool(new)
            and said[: len(before)] == before
            and all(message["role"] != "assistant" for message in new)
            and self.tools_are(request)
        )


def _as_text(request: ChatRequest) -> str:
    return json.dumps(list(request.tools), sort_keys=True)


@dataclass
class AgentEpisode:
    """One answer to an episode's prompt, on its way."""

    episode: Episode
    index: int
    """Which of the answers to the prompt."""
    rules: TurnRules
    tokenizer: ChatTokenizer
    ask: Ask
    _spent: Spent = field(default_factory=Spent)
    _segment: _Segment | None = None
    """The last one that the policy said something in."""
    _segments: int = 0
    _cut: Cut | None = None
    _deadline: float = 0.0
    _lost: asyncio.Future[None] = field(init=False)
    """Fails with what the fleet raises."""
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _requests: set[asyncio.Task[Any]] = field(default_factory=set)

    async def play(self, environment: AgentEnvironment, endpoint: ChatEndpoint) -> Scored:
        """To its end. What the agent does wrong is a masked reward; raises what the fleet raises."""
        limits, loop = self.rules.limits, asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limits.open_s):
                await environment.places.acquire()
        except TimeoutError:
            return self._scored(EnvironmentFault(f"the agent had no place for {limits.open_s:g} s").reward())
        self._deadline, self._lost = loop.time() + limits.episode_s, loop.create_future()
        try:
            with endpoint.seat(self.complete) as model:
                return self._scored(await self._driven(environment, model))
        finally:
            environment.places.release()
            self._lost.cancel()
            for request in self._requests:
                request.cancel()

    async def _driven(self, environment: AgentEnvironment, model: ModelAddress) -> Reward:
        drive = environment.drive(self.episode.row, model)
        agent = asyncio.ensure_future(within("the agent", drive, self.rules.limits.episode_s))
        try:
            either: set[asyncio.Future[Any]] = {agent, self._lost}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._lost.done():
                self._lost.result()
            reward = agent.result()
        except EnvironmentFault as fault:
            if asyncio.get_running_loop().time() >= self._deadline:
                self._cut = "time"
            if self._segment is None or self._cut in (None, "time"):
                return fault.reward()
            # An agent that gives up at a limit did nothing wrong: the policy did not come to an end.
            return Reward(0.0, f"cut by {self._cut}, without a reward of the agent")
        finally:
            agent.cancel()
        if self._segment is None:
            return EnvironmentFault("the agent gave a reward without asking the policy").reward()
        if self._cut is None:
            return reward
        return replace(reward, reason=f"cut by {self._cut}: {reward.reason}", masked=self._cut == "time")

    def _scored(self, reward: Reward) -> Scored:
        stream = self._segment.stream if self._segment else self._stream(self.episode.prompt)
        rollout = stream.rollout(self._cut)
        text = self.tokenizer.answer_opening(rollout.prompt) + self.tokenizer.decode(rollout.answer)
        details = {**reward.details, "segments": float(self._segments)}
        return Scored(rollout, text, replace(reward, details=details), self._cut)

    def _stream(self, prompt: tuple[int, ...]) -> TokenStream:
        return TokenStream(self.episode, self.index, prompt, self.rules, self.tokenizer, self.ask, self._spent)

    # ---- what the agent asks

    async def complete(self, body: Any) -> Reply:
        """The reply to one of the agent's requests, which are served one after the other."""
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        try:
            request = read_request(body)
            async with self._turn:
                return await self._reply(request)
        except (BadRequest, DataError) as error:
            return refusal(400, str(error), "invalid_request")
        except MillraceError as error:
            if not self._lost.done():
                self._lost.set_exception(error)
            return refusal(503, f"the fleet is lost: {error}", "server_error")
        finally:
            self._requests.discard(task)

    async def _reply(self, request: ChatRequest) -> Reply:
        said, segment = [told(message) for message in request.messages], self._segment
        if segment and segment.asked == said and segment.tools_are(request):
            return segment.reply
        if self._cut is None:
            if segment and segment.goes_on_with(request, said):
                self._cut = self._hear(segment, request)
            else:
                segment = self._new_segment(request)
                self._cut = segment.stream.limit(self._deadline)
        if self._cut is not None:
            return self._over(self._cut)
        assert segment is not None, "one goes on, or is new"
        self._cut = await segment.stream.generate(self._deadline)
        if self._cut == "time":
            return self._over(self._cut)
        turn = segment.stream.last
        message = assistant_message(segment.stream.last_text(), request.tools, self._spent.turns)
        segment.asked, segment.replied = said, told(message)
        segment.reply = completion(
            turn.request_id, int(time.time()), message, turn.finish_reason, len(turn.prompt), len(turn.answer)
        )
        if segment is not self._segment:
            self._segment, self._segments = segment, self._segments + 1
        return segment.reply

    def _new_segment(self, request: ChatRequest) -> _Segment:
        tools, thinking = request.tools or None, self.episode.thinking
        prompt = self.tokenizer.render_prompt(request.messages, tools=tools, thinking=thinking)
        return _Segment(request, self._stream(tuple(prompt)))

    def _hear(self, segment: _Segment, request: ChatRequest) -> Cut | None:
        """Put what is new behind the policy's turn, unless a limit leaves no room for another one."""
        opening = segment.opening
        if len(segment.asked) == len(opening.messages):  # what follows its first turn; the later ones are alike
            tools, thinking = opening.tools or None, self.episode.thinking
            self.tokenizer.require_observations(opening.messages, tools=tools, thinking=thinking)
        return segment.stream.observe(request.messages[len(segment.asked) + 1 :], self._deadline)

    def _over(self, cut: Cut) -> Reply:
        """Refuses a request behind the end, in the words by which agents know that a conversation can grow no more."""
        limits, sampling = self.rules.limits, self.rules.sampling
        why = {
            "turns": f"it has {limits.most} turns at most",
            "tokens": f"it may generate {sampling.max_response_tokens} tokens"
            + (f", {limits.turn_tokens} in a turn" if limits.turn_tokens else ""),
            "context": f"prompt and answer have room for {self.rules.context} tokens",
            "time": f"it may take {limits.episode_s:g} s",
        }[cut]
        return refusal(400, f"the episode is over, its context length is exceeded: {why}", "context_length_exceeded")
