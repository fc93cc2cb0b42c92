import asyncio
import random

import pytest

from millrace.config.schema import DomainConfig, SandboxConfig
from millrace.environments.registry import make_environment
from millrace.environments.sandbox.tiers import NoSandboxError, choose_tier

MEANINGS = [
    ("the sum of a and b, times 3, minus 2", {"a": 2, "b": 5}, 19),
    ("a minus b, modulo 7, plus 1", {"a": 2, "b": 5}, 5),
    ("the product of a and b, modulo 4", {"a": 3, "b": 5}, 3),
    ("the larger of a and b, times 2, but at least 9", {"a": -3, "b": 4}, 9),
    ("the smaller of a and b, times 2, but at most 5", {"a": 3, "b": 4}, 5),
    ("the distance of a and b, times 2", {"a": 2, "b": 5}, 6),
    ("half the sum of a and b, rounded down, times 2", {"a": 2, "b": 5}, 6),
    ("the first 3 letters of s, in capitals, 2 times", {"s": "aB cD"}, "AB AB "),
    ("the last 2 letters of s, in small letters", {"s": "aB cD"}, "cd"),
    ("s without its first 2 letters, with dashes for spaces, reversed", {"s": "aB cD"}, "Dc-"),
    ("s without its last 4 letters, in small letters, reversed", {"s": "aB cDef"}, " ba"),
    ("every letter of s in steps of 2, reversed", {"s": "aB cD"}, "D a"),
    ("the sum of the even numbers of v, squared", {"v": [-2, 3, 4]}, 20),
    ("the largest of the odd numbers of v, without signs", {"v": [-3, 1, 8]}, 3),
    ("the smallest of the numbers of v above 4, times 2", {"v": [4, 5, 9]}, 10),
    ("the sum of the numbers of v below 4, plus 1", {"v": [4, 3, -9]}, -4),
    ("the sum of the multiples of 3 in v", {"v": [-3, 4, 9]}, 6),
]


@pytest.fixture(scope="module")
def programs(scripts):
    return scripts("tasks.programs")


@pytest.fixture(scope="module")
def tasks(programs):
    return programs.distinct_code_tasks(random.Random(5), 300)


def body_of(programs, words):
    (body,) = [body for some in programs.all_bodies() for body in some if body.words == words]
    return body


@pytest.mark.parametrize(("words", "inputs", "value"), MEANINGS)
def test_the_right_code_does_what_the_words_say(programs, words, inputs, value):
    body = body_of(programs, words)
    assert programs.results(programs.put_together(part.right for part in body.parts), [inputs]) == [value]


def test_problems_are_distinct_and_of_every_subject_in_both_forms(tasks):
    assert len({task.body.words for task in tasks}) == len(tasks) == 300
    forms = [(task.body.subject.arguments, task.function is None) for task in tasks]
    assert len(set(forms)) == 6 and min(map(forms.count, forms)) >= 30


def test_the_same_seed_draws_the_same_problems(programs):
    first, again, other = (programs.distinct_code_tasks(random.Random(seed), 30) for seed in (1, 1, 2))
    assert [task.row() for task in first] == [task.row() for task in again] != [task.row() for task in other]


def test_mistakes_that_give_the_right_result_are_none(programs):
    body = body_of(programs, "the largest of the numbers of v above 3")
    task = programs.make_task(body, None, random.Random(1))
    assert body.parts[1].wrong == ("{} for x in v if x >= 3", "{} for x in v if x < 3")
    assert task.body.parts[1].wrong == ("{} for x in v if x < 3",)


def test_every_mistake_fails_one_of_few_tests(programs):
    assert programs.choose_tests([{1, 2}, {2}, {5}], candidates=8) == [2, 5, 0, 1]
    assert programs.choose_tests([{i} for i in range(5)], candidates=8) == [0, 1, 2, 3, 4]


def test_the_sandbox_passes_right_programs_and_fails_every_mistake(programs, tasks):
    """Each kind of mistake once, in a problem that it can be made in."""
    try:
        choose_tier("auto")
    except NoSandboxError as error:
        pytest.skip(str(error))
    answers, seen = [], set()
    for task in tasks:
        new = [(wrong, whole) for _, wrong, whole in programs.with_one_mistake(task.parts) if wrong not in seen]
        if new:
            seen |= {wrong for wrong, _ in new}
            answers += [(task.row(), task.work_out(), 1.0), *((task.row(), whole, 0.0) for _, whole in new)]
    config = DomainConfig(environment="code", train="", held_out="", sandbox=SandboxConfig(cpu_s=1, memory_mb=256))
    env = make_environment(config)

    async def score():
        try:
            return await asyncio.gather(*(env.step(row, env.reset(row), answer) for row, answer, _ in answers))
        finally:
            await env.close()

    pairs = zip(answers, asyncio.run(score()), strict=True)
    misjudged = [(row["prompt"], answer) for (row, answer, value), reward in pairs if reward.value != value]
    assert len(seen) > 100 and misjudged == []
