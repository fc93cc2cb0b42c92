import time

import pytest

from millrace.environments.answer import final_text, last_boxed, reasoning_text


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("plain", "plain"),
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),
        ("<think>a</think>b</think>c", "c"),
        ("<think>never closed", ""),
        ("<think>a</think>", ""),
    ],
)
def test_only_what_follows_the_reasoning_is_judged(answer, final):
    assert final_text(answer) == final


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{}", ""),
        (r"boxed{1}", None),
        (r"\boxed{1", None),
        ("", None),
    ],
)
def test_the_last_closed_box_counts(text, boxed):
    assert last_boxed(text) == boxed


def test_many_unclosed_boxes_are_read_in_linear_time():
    start = time.process_time()
    assert last_boxed("\\boxed{" * 100_000) is None
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("answer", "reasoning"),
    [
        ("<think>why</think>so", "why"),
        ("why</think>so", "why"),  # the template has opened it
        ("\n<think>\nwhy</think>so", "\nwhy"),
        ("<think>why", "why"),
        ("a</think>b</think>so", "a</think>b"),
        ("<think></think>so", ""),
        ("so", ""),
    ],
)
def test_the_reasoning_is_what_stands_before_the_final_text(answer, reasoning):
    assert reasoning_text(answer) == reasoning
