"""Episodes that an agent drives over HTTP: token streams, rewritten histories, limits, faults, many at one time."""

import asyncio
import concurrent.futures
import dataclasses
import random
import time

import httpx
import pytest
from tiny_checkpoints import IM_END

from millrace.config.schema import AgentConfig, DomainConfig, SamplingConfig, TurnsConfig
from millrace.environments.agent import AgentServerEnvironment
from millrace.environments.base import AgentEnvironment, Reward, TurnEnvironment
from millrace.environments.registry import make_environment
from millrace.stages.agents import AgentEpisode
from millrace.stages.chat_endpoint import ChatEndpoint
from millrace.stages.collect import rollout_metrics
from millrace.stages.episodes import Play
from millrace.stages.groups import Episode
from millrace.stages.stream import TurnRules

from .agent_worlds import agent_server
from .turn_worlds import (
    END_OF_TEXT,
    FORMS,
    ROOMY,
    AnsweringFleet,
    ScriptedPolicy,
    Turn,
    between,
    random_text,
    slow_tokens,
    spoken,
)

TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
NESTED = {"function": {"name": "now", "arguments": "[" * 100_000}}
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


ROW = {"responses_create_params": {"input": [{"role": "user", "content": "go"}], "metadata": {"of": "a row"}}}


def play(tokenizer, agent, script, rules=ROOMY, *, thinking=None, concurrency=8, url=None, seconds=()):
    """One episode, its policy and the server of its agent."""
    policy = ScriptedPolicy([Turn(tokens, None) for tokens in script])

    async def ask(request):
        policy.seconds = seconds[len(policy.asked)] if seconds else 0.0
        return await policy(request)

    async def played(server):
        environment = AgentServerEnvironment(AgentConfig(url=url or server.url, concurrency=concurrency))
        messages = environment.reset(ROW)
        prompt = tuple(tokenizer.render_prompt(messages, thinking=thinking))
        episode = Episode("7", "d", ROW, messages, prompt, 5, thinking=thinking, turns=True)
        async with ChatEndpoint(None, 0, "d") as endpoint:
            scored = await AgentEpisode(episode, 0, rules, tokenizer, ask).play(environment, endpoint)
        await environment.close()
        return scored

    with agent_server(agent) as server:
        return asyncio.run(played(server)), policy, server


# ---- token streams


@pytest.mark.parametrize("form", FORMS)
def test_streams_that_an_agent_drives_are_those_of_a_slow_reference(tokenizers, form):
    draw, tokenizer, thinking = random.Random(form), tokenizers[form], FORMS[form][1]
    called = 0
    for _ in range(20):
        turns = draw.randint(1, 6)
        # Bytes cut anywhere: what a model writes need not be what a tokenizer would make of its text.
        script = [
            [token for token in slow_tokens(random_text(draw, 8)) if draw.random() < 0.95]
            + slow_tokens(CALL if draw.random() < 0.5 else "")
            + [draw.choice([IM_END, END_OF_TEXT])]
            for _ in range(turns)
        ]
        results = [[random_text(draw, 8) for _ in range(draw.randint(1, 3))] for _ in range(turns - 1)]
        heard = []

        def agent(asking, draw=draw, results=results, heard=heard, turns=turns):
            asking.by_metadata = draw.random() < 0.5
            messages = asking.opening
            for turn in range(turns):
                said = asking.say(messages, tools=TOOLS, temperature=0.1, max_tokens=1)
                heard.append(dict(said))
                if draw.random() < 0.5:  # agents that keep the answer alone, in their own notation
                    said.pop("reasoning_content", None)
                    said["content"] = said["content"] or None
                    for call in said.get("tool_calls", ()):
                        call["function"]["arguments"] = "{ }"
                if turn < turns - 1:
                    messages += [{"role": "tool", "content": text} for text in results[turn]]
            return 0.5

        scored, policy, server = play(tokenizer, agent, script, thinking=thinking)
        assert scored.reward == Reward(0.5, "the agent's reward", {"segments": 1.0}) and scored.cut is None
        rollout = scored.rollout
        assert rollout.prompt == tuple(tokenizer.render_prompt(row_messages(server), tools=TOOLS, thinking=thinking))
        stream = []
        for turn, tokens in enumerate(script):
            stream += [(token, True, -0.5 - 0.001 * place) for place, token in enumerate(tokens)]
            if turn < turns - 1:
                text = between(form, results[turn])
                given = slow_tokens(text if tokens[-1] == IM_END else "<|im_end|>" + text)
                stream += [(token, False, 0.0) for token in given]
        assert list(zip(rollout.answer, rollout.generated(), rollout.rollout_logp, strict=True)) == stream
        for before, after, tokens in zip(policy.asked, policy.asked[1:], script, strict=False):
            assert after.prompt[: len(before.prompt) + len(tokens)] == (*before.prompt, *tokens)
        assert [request.sampling.temperature for request in policy.asked] == [1.0] * turns
        called += sum("tool_calls" in said for said in heard)
    assert called, "some of what is written is a call"


def row_messages(server):
    return server.rows[-1]["responses_create_params"]["input"]


def test_an_agent_is_given_the_row_and_hears_reasoning_text_and_calls_apart(tokenizers):
    replies = []

    def agent(asking):
        messages = asking.opening
        replies.append(asking.post(messages, tools=TOOLS).json())
        messages.append(replies[0]["choices"][0]["message"])
        messages.append({"role": "tool", "tool_call_id": "call_1_0", "content": "noon"})
        replies.append(asking.post(messages, tools=TOOLS).json())
        return 1

    script = [spoken(f"hm\n</think>I look.\n{CALL}"), spoken("so</think>It is noon.")]
    scored, _, server = play(tokenizers["nemotron thinking"], agent, script, thinking=True)
    first, second = (reply["choices"][0] for reply in replies)
    call = {"id": "call_1_0", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    assert first["message"] == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "hm",
        "tool_calls": [call],
    }
    assert first["finish_reason"] == "tool_calls" and second["finish_reason"] == "stop"
    assert second["message"] == {"role": "assistant", "content": "It is noon.", "reasoning_content": "so"}
    assert replies[0]["usage"]["completion_tokens"] == len(script[0])
    assert scored.text.startswith("<think>\nhm") and scored.rollout.turns == 2
    (given,) = server.rows
    assert given["responses_create_params"]["metadata"]["of"] == "a row"
    assert given["responses_create_params"]["metadata"]["millrace_episode"] == given["model_server"]["api_key"]


# ---- histories


def test_a_rewritten_history_begins_a_segment_and_the_last_one_is_trained_on(tokenizers):
    tokenizer, short = tokenizers["chatml"], [{"role": "user", "content": "in short: go on"}]

    def agent(asking):
        messages = asking.opening
        asking.say(messages)
        messages.append({"role": "user", "content": "and?"})
        asking.say(messages)
        compacted = list(short)
        asking.say(compacted)
        compacted.append({"role": "user", "content": "more"})
        asking.say(compacted)
        return 1.0

    script = [spoken("one"), spoken("two"), spoken("three"), spoken("four")]
    scored, policy, _ = play(tokenizer, agent, script)
    assert scored.reward.details == {"segments": 2.0}
    assert scored.rollout.prompt == tuple(tokenizer.render_prompt(short))
    spans = [scored.rollout.answer[a:b] for a, b in scored.rollout.spans()]
    assert [list(span) for span in spans] == script[2:]
    assert len({request.sampling.seed for request in policy.asked}) == 4, "no turn has the seed of another"
    rules = dataclasses.replace(ROOMY, limits=TurnsConfig(most=3))
    assert play(tokenizer, agent, script, rules)[0].cut == "turns", "limits are those of all segments together"


@pytest.mark.parametrize("change", ["tools", "reply", "opening", "own words"])
def test_what_differs_from_the_record_is_never_taken_for_it(tokenizers, change):
    def agent(asking):
        messages = asking.opening
        asking.say(messages)
        if change == "reply":
            messages[1]["content"] += "!"
        elif change == "opening":
            messages[0] = {"role": "user", "content": "go on"}
        elif change == "own words":
            messages += [{"role": "user", "content": "?"}, {"role": "assistant", "content": "put into its mouth"}]
        messages.append({"role": "user", "content": "and?"})
        asking.say(messages, tools=TOOLS if change == "tools" else [])
        return 1.0

    scored, _, _ = play(tokenizers["chatml"], agent, [spoken("one"), spoken("two")])
    assert scored.reward.details == {"segments": 2.0} and list(scored.rollout.answer) == spoken("two")


def test_the_same_request_again_gets_the_same_reply(tokenizers):
    replies = []

    def agent(asking):
        replies.extend(asking.post(asking.opening).json() for _ in range(3))
        return 1.0

    scored, policy, _ = play(tokenizers["chatml"], agent, [spoken("one"), spoken("two")])
    assert replies[0] == replies[1] == replies[2] and len(policy.asked) == 1
    assert scored.rollout.turns == 1 and scored.reward.details == {"segments": 1.0}


# ---- limits


@pytest.mark.parametrize("gives_up", [True, False])
@pytest.mark.parametrize(
    ("limits", "sampling", "context", "cut"),
    [
        ({"most": 2}, 1000, 1000, "turns"),
        ({}, 12, 1000, "tokens"),
        ({"turn_tokens": 3}, 1000, 1000, "tokens"),
        ({}, 1000, 140, "context"),
    ],
)
def test_a_limit_refuses_the_next_request_and_cuts_the_episode(tokenizers, limits, sampling, context, cut, gives_up):
    refused = []

    def agent(asking):
        messages = asking.opening
        while (response := asking.post(messages)).is_success:
            messages.append(response.json()["choices"][0]["message"])
            messages.append({"role": "user", "content": "result"})
        refused.append((response.status_code, response.json()["error"]))
        return (500, {"detail": "no model"}) if gives_up else 0.5

    rules = TurnRules(SamplingConfig(max_response_tokens=sampling), TurnsConfig(**limits), context)
    scored, _, _ = play(tokenizers["chatml"], agent, [spoken("call")] * 50, rules)
    ((status, error),) = refused
    assert status == 400 and error["code"] == "context_length_exceeded" and "context length" in error["message"]
    assert scored.cut == cut and not scored.reward.masked
    value, reason = (0.0, f"cut by {cut}, without a reward of the agent") if gives_up else (0.5, f"cut by {cut}: ")
    assert scored.reward.value == value and scored.reward.reason.startswith(reason)
    assert scored.rollout.finish_reason == ("length" if cut in ("tokens", "context") else "stop")
    assert scored.rollout.generated()[-1], "an answer ends with the policy's tokens"


def test_an_opening_without_room_is_refused_before_the_engine_is_asked(tokenizers):
    rules = dataclasses.replace(ROOMY, context=20)
    scored, policy, _ = play(tokenizers["chatml"], lambda asking: asking.post(asking.opening).status_code, [], rules)
    assert scored.cut == "context" and not policy.asked and scored.rollout.answer == () and scored.reward.masked


def test_a_segment_that_the_policy_said_nothing_in_is_not_trained_on(tokenizers):
    def agent(asking):
        asking.say(asking.opening)
        with pytest.raises(httpx.ReadTimeout):
            asking.http.timeout = 0.3
            asking.post([{"role": "user", "content": "something else"}])
        return 1.0

    scored, policy, _ = play(tokenizers["chatml"], agent, [spoken("one"), spoken("two")], seconds=[0.0, 5.0])
    assert len(policy.asked) == 2 and list(scored.rollout.answer) == spoken("one")
    assert scored.reward == Reward(1.0, "the agent's reward", {"segments": 1.0})


# ---- faults


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ((500, {"detail": "no container"}), 'AgentError: its server answered with 500: {"detail": "no container"}'),
        ((200, b"<html>"), "AgentError: its server's reply is not JSON: <html>"),
        ((200, {"reward": None}), "AgentError: its server's reply holds no number as reward"),
        ((200, b'{"reward": NaN}'), "AgentError: its server's reply holds no number as reward"),
        ((200, [1.0]), "AgentError: its server's reply holds no number as reward"),
    ],
)
def test_an_agent_without_a_reward_masks_its_episode_and_keeps_what_was_generated(tokenizers, said, reason):
    def agent(asking):
        asking.say(asking.opening)
        return said

    scored, _, _ = play(tokenizers["chatml"], agent, [spoken("one")])
    assert scored.reward.masked and scored.reward.reason.startswith(f"the agent failed: {reason}")
    assert list(scored.rollout.answer) == spoken("one")


def test_a_server_that_is_not_there_and_an_agent_that_asks_for_nothing_mask_the_episode(tokenizers):
    scored, _, _ = play(tokenizers["chatml"], lambda asking: 1.0, [])
    assert scored.reward.masked and scored.reward.reason == "the agent gave a reward without asking the policy"
    scored, _, _ = play(tokenizers["chatml"], lambda asking: 1.0, [], url="http://127.0.0.1:9")
    assert scored.reward.masked and scored.reward.reason.startswith("the agent failed: ConnectError")


def test_an_agent_that_hangs_costs_its_episode_and_can_ask_no_more(tokenizers):
    late = concurrent.futures.Future()

    def agent(asking):
        asking.say(asking.opening)
        time.sleep(1.0)
        try:
            late.set_result(asking.post(asking.opening).status_code)
        except httpx.ConnectError:
            late.set_result("closed")
        return 1.0

    rules = dataclasses.replace(ROOMY, limits=TurnsConfig(episode_s=0.5))
    began = time.monotonic()
    scored, _, _ = play(tokenizers["chatml"], agent, [spoken("one")], rules)
    assert time.monotonic() - began < 5
    assert scored.reward.masked and scored.reward.reason == "the agent took longer than 0.5 s" and scored.cut == "time"
    assert late.result(5) in (401, "closed")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"stream": True}, "not streamed"),
        ({"n": 2}, "one continuation"),
        ({"tool_choice": "required"}, "chooses for itself"),
        ({"response_format": {"type": "json_object"}}, "held to no response_format"),
        ({"tools": [1]}, "tools must be a list of functions"),
        ({"messages": []}, "a list of at least one message"),
        ({"messages": [{"content": "x"}]}, "message 0 has no role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text can be read"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "tool_calls must be a list, not 5"),
        ({"messages": [{"role": "assistant", "tool_calls": [NESTED]}]}, "the arguments of now are not valid JSON"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_sentence_and_spends_nothing(tokenizers, more, sentence):
    refused = []

    def agent(asking):
        refused.append(asking.post(asking.opening, **more) if "messages" not in more else asking.post(more["messages"]))
        asking.say(asking.opening)
        return 1.0

    scored, _, _ = play(tokenizers["chatml"], agent, [spoken("one")])
    assert refused[0].status_code == 400 and sentence in refused[0].json()["error"]["message"]
    assert scored.reward == Reward(1.0, "the agent's reward", {"segments": 1.0})


def test_a_key_of_nobody_is_refused_and_the_model_is_listed(tokenizers):
    said = []

    def agent(asking):
        base, key = asking.row["model_server"]["base_url"], {"Authorization": "Bearer guessed"}
        said.append(asking.http.post(f"{base}/chat/completions", json={"messages": asking.opening}, headers=key))
        said.append(asking.http.get(f"{base}/models"))
        said.append(asking.http.post(f"{base}/completions", json={}))
        asking.say(asking.opening)
        return 1.0

    play(tokenizers["chatml"], agent, [spoken("one")])
    assert [response.status_code for response in said] == [401, 200, 404]
    assert said[1].json()["data"][0]["id"] == "policy"


# ---- side by side, as the player plays them


def echo(prompt, index):
    """The user's first word and the number of the turn."""
    word = prompt.partition("user\n")[2].split()[0]
    return f"{word} {prompt.count('assistant')}"


def echoing_fleet(lost_at=None):
    return AnsweringFleet(echo, lost_at=lost_at, seconds=lambda: random.random() * 0.02)


@pytest.fixture
def open_player(player_of, rows_file):
    def open_player(rows, fleet, url, n, **agent):
        file = rows_file(rows)
        config = DomainConfig(environment="agent", train=file, held_out=file, agent=AgentConfig(url=url, **agent))
        player, domains = player_of(fleet, d=(config, make_environment(config)))
        domain = domains["d"]
        assert isinstance(domain.environment, AgentEnvironment)
        assert not isinstance(domain.environment, TurnEnvironment)
        episodes = [domain.episode(domain.train, place, seed=100 * place) for place in range(len(rows))]
        return player, Play(episodes, SamplingConfig(max_response_tokens=1000), n, "rl 1/2 rollouts")

    return open_player


def words(count):
    return [
        {"responses_create_params": {"input": [{"role": "user", "content": f"word{n} please"}]}, "turns": 1 + n % 4}
        for n in range(count)
    ]


def conversing(asking):
    """As many turns as the row says; the reward is the share of replies that are the episode's own."""
    messages, own = asking.opening, 0
    word = messages[0]["content"].split()[0]
    for turn in range(asking.row["turns"]):
        own += asking.say(messages)["content"] == f"{word} {2 * turn + 1 - turn}"
        messages.append({"role": "user", "content": "go on"})
    return own / asking.row["turns"]


def test_episodes_side_by_side_do_not_mix(open_player):
    with agent_server(conversing) as server:
        player, play = open_player(words(12), echoing_fleet(), server.url, 3, concurrency=16)
        groups = player.play(play)
        again = player.play(play)
    assert server.most_at_one_time > 4 and len(server.rows) == 72
    assert len({row["model_server"]["api_key"] for row in server.rows}) == 72
    for place, group in enumerate(groups):
        assert group.rewards == [1.0] * 3
        for answer in group.answers:
            spans = [answer.rollout.answer[a : b - 1] for a, b in answer.rollout.spans()]
            assert [bytes(span).decode() for span in spans] == [f"word{place} {n + 1}" for n in range(1 + place % 4)]
    assert [group.answers for group in again] == [group.answers for group in groups]
    metrics = rollout_metrics(groups)
    assert metrics["episode/turns"] == 2.5 and metrics["reward/masked"] == 0


def test_when_all_engines_were_lost_the_agents_open_episodes_start_again(open_player):
    fleet = echoing_fleet(lost_at=9)
    with agent_server(conversing) as server:
        player, play = open_player(words(6), fleet, server.url, 2)
        groups = player.play(play)
    assert fleet.syncs == 1 and all(group.rewards == [1.0, 1.0] for group in groups)
    assert len(server.rows) > 12


def test_an_agent_is_given_so_many_episodes_at_one_time(open_player):
    with agent_server(conversing) as server:
        player, play = open_player(words(8), echoing_fleet(), server.url, 1, concurrency=2)
        assert all(group.rewards == [1.0] for group in player.play(play))
    assert server.most_at_one_time == 2


def test_an_agent_without_a_place_in_time_masks_the_episode(tokenizers):
    def agent(asking):
        time.sleep(0.3)
        return float(asking.post(asking.opening).is_success)

    async def played(url):
        environment, tokenizer = AgentServerEnvironment(AgentConfig(url=url, concurrency=1)), tokenizers["chatml"]
        rules = dataclasses.replace(ROOMY, limits=TurnsConfig(open_s=0.05))
        policy = ScriptedPolicy([Turn(spoken("one"), None)])
        episode = Episode("7", "d", ROW, [], tuple(b"go"), 5, turns=True)
        async with ChatEndpoint(None, 0, "d") as endpoint:
            episodes = [AgentEpisode(episode, n, rules, tokenizer, policy) for n in range(2)]
            scored = await asyncio.gather(*(each.play(environment, endpoint) for each in episodes))
        await environment.close()
        return scored

    with agent_server(agent) as server:
        first, second = asyncio.run(played(server.url))
    assert first.reward.value == 1.0
    assert second.reward.masked and second.reward.reason == "the agent had no place for 0.05 s"


def test_rows_that_no_agent_can_be_given_are_named(open_player):
    with pytest.raises(Exception, match=r"rows.jsonl:1: responses_create_params.input must be a string or"):
        open_player([{"responses_create_params": {"input": []}}], echoing_fleet(), "http://127.0.0.1:9", 1)
