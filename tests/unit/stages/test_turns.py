"""Episodes of many turns: token streams against a slow reference, and what limits and faults do to an episode."""

import asyncio
import dataclasses
import random
import time

import pytest
from chat_checkpoints import CHATML, checkpoint
from tiny_checkpoints import IM_END, VOCABULARY

from millrace.config.schema import SamplingConfig, TurnsConfig
from millrace.data.errors import DataError
from millrace.data.tokenizer import ChatTokenizer
from millrace.environments.base import Reward
from millrace.stages.groups import Episode
from millrace.stages.stream import TurnRules, turn_seed
from millrace.stages.turns import TurnEpisode

from .turn_worlds import (
    END_OF_TEXT,
    FORMS,
    ROOMY,
    ScriptedEnvironment,
    ScriptedPolicy,
    Turn,
    between,
    open_tokenizer,
    random_text,
    slow_tokens,
    spoken,
)

END = Reward(1.0, "solved")


def episode(tokenizer, script, *, thinking=None, prompt="go"):
    environment = ScriptedEnvironment()
    row = {"script": script, "prompt": prompt}
    messages, tools = environment.reset(row), environment.tools(row)
    tokens = tuple(tokenizer.render_prompt(messages, tools=tools, thinking=thinking))
    opening = tokenizer.answer_opening(tokens)
    return Episode("7", "d", row, messages, tokens, 5, thinking=thinking, turns=True, opening=opening)


def play(tokenizer, script, rules=ROOMY, *, thinking=None, seconds=0.0, index=0):
    environment, policy = ScriptedEnvironment(), ScriptedPolicy(script, seconds)
    turns = TurnEpisode(episode(tokenizer, script, thinking=thinking), index, rules, tokenizer, policy)
    scored = asyncio.run(turns.play(environment))
    assert environment.opened == environment.closed
    return scored, policy, turns


# ---- token streams


def expected(form, prompt_length, script, rules):
    """The stream token by token: (token, whether generated, log-prob), and what ended the episode."""
    stream, budget = [], rules.sampling.max_response_tokens
    for number, turn in enumerate(script):
        room = rules.context - prompt_length - len(stream)
        left = min(budget, rules.limits.turn_tokens or budget)
        for place, token in enumerate(turn.tokens):
            if place == min(left, room):
                return stream, "tokens" if left <= room else "context"
            stream.append((token, True, -0.5 - 0.001 * place))
        budget -= len(turn.tokens)
        if isinstance(turn.reply, Reward):
            return stream, None
        if number + 1 == rules.limits.most:
            return stream, "turns"
        if budget == 0:
            return stream, "tokens"
        text = between(form, turn.reply)
        given = slow_tokens(text if turn.tokens[-1] == IM_END else "<|im_end|>" + text)
        if prompt_length + len(stream) + len(given) >= rules.context:
            return stream, "context"
        stream += [(token, False, 0.0) for token in given]
    raise AssertionError("a script ends with a reward")


def random_script(draw):
    turns = draw.randint(1, 6)
    script = []
    for number in range(turns):
        # Bytes cut anywhere: what a model writes need not be what a tokenizer would make of its text.
        tokens = [token for token in slow_tokens(random_text(draw, 12)) if draw.random() < 0.95]
        tokens.append(END_OF_TEXT if draw.random() < 0.1 else IM_END)
        last = number == turns - 1
        script.append(Turn(tokens, END if last else [random_text(draw, 10) for _ in range(draw.randint(1, 3))]))
    return script


@pytest.mark.parametrize("form", FORMS)
def test_streams_of_random_conversations_are_those_of_a_slow_reference(tokenizers, form):
    draw, tokenizer, thinking = random.Random(form), tokenizers[form], FORMS[form][1]
    endings = []
    for _ in range(200):
        script = random_script(draw)
        length = len(episode(tokenizer, script, thinking=thinking).prompt)
        rules = TurnRules(
            SamplingConfig(max_response_tokens=draw.choice([40, 100, 1000])),
            TurnsConfig(most=draw.choice([2, 4, 100]), turn_tokens=draw.choice([None, None, 30])),
            context=length + draw.choice([150, 300, 3000]),
        )
        scored, policy, _ = play(tokenizer, script, rules, thinking=thinking)
        stream, cut = expected(form, length, script, rules)
        rollout = scored.rollout
        assert list(zip(rollout.answer, rollout.generated(), rollout.rollout_logp, strict=True)) == stream
        assert (scored.cut, rollout.length) == (cut, sum(own for _, own, _ in stream))
        assert rollout.finish_reason == ("length" if cut in ("tokens", "context") else "stop")
        for before, after in zip(policy.asked, policy.asked[1:], strict=False):
            said = policy.script[policy.asked.index(before)].tokens
            assert after.prompt[: len(before.prompt) + len(said)] == (*before.prompt, *said)
        spans = [rollout.answer[start:end] for start, end in rollout.spans()]
        assert len(spans) == rollout.turns == len(policy.asked)
        assert all(script[n].tokens[: len(span)] == list(span) for n, span in enumerate(spans))
        endings.append(cut)
    assert {None, "turns", "tokens", "context"} <= set(endings)


def test_what_a_model_writes_is_not_tokenised_again_where_a_merge_would_change_it(tmp_path):
    tokenizer = ChatTokenizer(checkpoint(tmp_path, merges=["a b", "ab c"]), VOCABULARY)
    written = [*b"abc", tokenizer.end_of_turn_id]
    assert tokenizer.encode("abc") != list(b"abc")
    scored, _, _ = play(tokenizer, [Turn(written, ["abc"]), Turn(written, END)])
    answer, mask = scored.rollout.answer, scored.rollout.generated()
    assert [t for t, own in zip(answer, mask, strict=True) if own] == written * 2
    given = [t for t, own in zip(answer, mask, strict=True) if not own]
    assert set(tokenizer.encode("abc")) <= set(given)  # the environment's text is tokenised as a prompt's


def test_a_session_hears_each_turn_with_what_of_it_stood_in_the_prompt(tokenizers):
    heard = []

    class Listening(ScriptedEnvironment):
        async def open(self, row):
            session = await super().open(row)
            heard.append(session.heard)
            return session

    script = [Turn(spoken("hm</think>call"), ["42"]), Turn(spoken("so</think>it is"), END)]
    made = episode(tokenizers["nemotron thinking"], script, thinking=True)
    turns = TurnEpisode(made, 0, ROOMY, tokenizers["nemotron thinking"], ScriptedPolicy(script))
    asyncio.run(turns.play(Listening()))
    assert heard == [["<think>\nhm</think>call", "<think>\nso</think>it is"]]


def test_a_template_that_rewrites_the_turn_before_a_tool_result_is_refused(tmp_path):
    merging = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}{{ m.content }} -> "
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = open_tokenizer(tmp_path / "merging", merging)
    with pytest.raises(DataError, match="does not keep an assistant's turn, ended by"):
        tokenizer.render_observation([{"role": "tool", "content": "done"}])


def test_a_template_that_renders_tool_results_by_the_tools_is_refused(tmp_path):
    counting = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{% if m.role == 'tool' %}{{ tools }}{% endif %}")
    tokenizer = open_tokenizer(tmp_path / "counting", counting)
    opening, tools = [{"role": "user", "content": "go"}], [{"name": "now", "parameters": {}}]
    tokenizer.require_observations(opening, tools=None, thinking=None)
    with pytest.raises(DataError, match="renders a tool's result otherwise when the conversation has tools"):
        tokenizer.require_observations(opening, tools=tools, thinking=None)


@pytest.mark.parametrize("form", FORMS)
def test_the_templates_of_the_field_render_results_alike_whatever_opened_the_conversation(tokenizers, form):
    opening = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "go"}]
    tools = ScriptedEnvironment().tools({})
    tokenizers[form].require_observations(opening, tools=tools, thinking=FORMS[form][1])


def test_each_turn_of_each_answer_has_its_own_seed_and_a_replay_the_same(tokenizers):
    script = [Turn(spoken("a"), ["b"]), Turn(spoken("c"), END)]
    asked = [play(tokenizers["chatml"], script, index=index)[1].asked for index in (0, 1, 0)]
    seeds = [[request.sampling.seed for request in each] for each in asked]
    assert seeds[0] == seeds[2] == [turn_seed(5, 0), turn_seed(5, 1)]
    assert len({*seeds[0], *seeds[1]}) == 4 and all(0 <= seed < 2**31 for each in seeds for seed in each)


# ---- limits


@pytest.mark.parametrize(
    ("limits", "sampling", "context", "cut"),
    [
        ({"most": 2}, 1000, 1000, "turns"),
        ({}, 12, 1000, "tokens"),
        ({"turn_tokens": 3}, 1000, 1000, "tokens"),
        ({}, 1000, 140, "context"),
        ({"episode_s": 0.05}, 1000, 1000, "time"),
    ],
)
def test_each_limit_ends_an_episode_with_its_reason(tokenizers, limits, sampling, context, cut):
    script = [Turn(spoken("call"), ["result"])] * 50
    rules = TurnRules(SamplingConfig(max_response_tokens=sampling), TurnsConfig(**limits), context)
    scored, _, _ = play(tokenizers["chatml"], script, rules, seconds=0.02 if cut == "time" else 0.0)
    assert scored.cut == cut and scored.reward == Reward(0.25, f"cut by {cut}")
    assert scored.rollout.generated()[-1], "an answer ends with the policy's tokens"


def test_a_time_limit_in_the_first_turn_leaves_an_answer_without_tokens(tokenizers):
    rules = dataclasses.replace(ROOMY, limits=TurnsConfig(episode_s=0.01))
    scored, _, _ = play(tokenizers["chatml"], [Turn(spoken("a"), END)], rules, seconds=5)
    assert (scored.cut, scored.rollout.answer, scored.rollout.turns) == ("time", (), 1)


# ---- faults


class Stubborn(ScriptedEnvironment):
    """Its step does not end when it is cancelled."""

    async def open(self, row):
        session = await super().open(row)
        if row["script"][0].reply == "stubborn":
            session.step = self._never
        return session

    async def _never(self, answer):
        for _ in range(40):
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                continue
        return END


def test_stuck_raising_and_slow_sessions_cost_only_themselves(tokenizers):
    tokenizer, environment = tokenizers["chatml"], Stubborn()
    rules = dataclasses.replace(ROOMY, limits=TurnsConfig(step_s=0.3))
    call = Turn(spoken("call"), ["result"])
    scripts = {
        "stuck": [call, Turn(spoken("x"), 60)],
        "stubborn": [Turn(spoken("x"), "stubborn")],
        "raising": [call, Turn(spoken("x"), RuntimeError("lost its container"))],
        "slow": [call, Turn(spoken("x"), 0.1)],
        **{f"quick {n}": [call, call, Turn(spoken("x"), END)] for n in range(50)},
    }
    ended = {}

    async def one(name, script, began):
        turns = TurnEpisode(episode(tokenizer, script), 0, rules, tokenizer, ScriptedPolicy(script))
        scored = await turns.play(environment)
        ended[name] = (scored, time.monotonic() - began)

    async def all_of_them():
        began = time.monotonic()
        await asyncio.gather(*(one(name, script, began) for name, script in scripts.items()))

    asyncio.run(all_of_them())
    rewards = {name: scored.reward for name, (scored, _) in ended.items()}
    assert rewards["stuck"] == Reward(0.0, "a step of its environment took longer than 0.3 s", masked=True)
    assert rewards["stubborn"].masked
    assert rewards["raising"].reason == "a step of its environment failed: RuntimeError: lost its container"
    assert rewards["raising"].masked and rewards["slow"] == Reward(1.0, "slept")
    assert all(rewards[f"quick {n}"] == END for n in range(50))
    assert max(seconds for name, (_, seconds) in ended.items() if name.startswith("quick")) < ended["stuck"][1]
    assert environment.closed == environment.opened == len(scripts)
    assert ended["stuck"][0].rollout.turns == 2, "what was generated is kept"


def test_a_session_that_never_opens_costs_only_itself(tokenizers):
    class Full(ScriptedEnvironment):
        async def open(self, row):
            await asyncio.sleep(60)

    rules = dataclasses.replace(ROOMY, limits=TurnsConfig(open_s=0.05))
    script = [Turn(spoken("a"), END)]
    turns = TurnEpisode(episode(tokenizers["chatml"], script), 0, rules, tokenizers["chatml"], ScriptedPolicy(script))
    scored = asyncio.run(turns.play(Full()))
    assert scored.reward == Reward(0.0, "opening its session took longer than 0.05 s", masked=True)
    assert scored.rollout.answer == ()


def test_what_an_environment_says_that_is_no_text_costs_only_its_episode(tokenizers):
    scored, _, _ = play(tokenizers["chatml"], [Turn(spoken("a"), ["half \ud83d"]), Turn(spoken("b"), END)])
    assert scored.reward.masked and "cannot be rendered: the text has half of a surrogate pair" in scored.reward.reason
    assert list(scored.rollout.answer) == spoken("a")


@pytest.mark.parametrize("loops", range(6))
def test_a_session_that_opens_in_the_moment_in_which_its_episode_is_cancelled_is_closed(tokenizers, loops):
    class Waiting(ScriptedEnvironment):
        async def open(self, row):
            await room.wait()
            return await super().open(row)

    environment, script, room = Waiting(), [Turn(spoken("a"), 60)], asyncio.Event()
    turns = TurnEpisode(episode(tokenizers["chatml"], script), 0, ROOMY, tokenizers["chatml"], ScriptedPolicy(script))

    async def cancelled():
        task = asyncio.ensure_future(turns.play(environment))
        await asyncio.sleep(0.01)
        room.set()
        for _ in range(loops):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert environment.opened == environment.closed == 1


def test_a_session_is_closed_when_its_episode_is_cancelled_in_the_middle_of_a_step(tokenizers):
    environment, script = ScriptedEnvironment(), [Turn(spoken("a"), 60)]
    turns = TurnEpisode(episode(tokenizers["chatml"], script), 0, ROOMY, tokenizers["chatml"], ScriptedPolicy(script))

    async def cancelled():
        task = asyncio.ensure_future(turns.play(environment))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert environment.opened == environment.closed == 1
