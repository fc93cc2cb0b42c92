import pytest

from millrace.cascade.selection import NoTeacher, choose_teachers
from millrace.config.graph import stage_graph

from .campaign import history, recipe, row

MOPD, GRAPH = recipe().stages[-1], stage_graph(recipe().stages)
ROWS = (
    row("start", 0.0, 0.0, 0.0),
    row("sft", 0.9, 0.3, 0.2),
    row("rl-if@2", 0.95, 0.5, 0.2, checkpoint=False),
    row("rl-if", 0.7, 0.8, 0.2),
    row("rl-math", 0.9, 0.7, 0.1),
    row("chat", 0.6, 0.2, 0.8),
)


def chosen(known) -> dict[str, str]:
    return choose_teachers(MOPD, known, GRAPH)


def test_what_the_stage_itself_measured_is_no_teacher_of_it():
    assert chosen(history(*ROWS, row("mopd@2", 0.99, 0.99, 0.99))) == chosen(history(*ROWS))


def test_the_best_checkpoint_of_a_domain_may_lie_on_a_side_branch_and_the_earliest_of_equals_wins():
    assert chosen(history(*ROWS)) == {"math": "sft", "if": "rl-if", "chat": "chat"}


def test_weights_that_were_not_kept_teach_nobody():
    assert chosen(history(*ROWS))["math"] != "rl-if@2"


def test_a_stage_that_was_gone_back_from_teaches_with_what_it_led_to():
    assert chosen(history(*ROWS, rl_if="sft"))["if"] == "sft"


def test_a_domain_that_nothing_was_measured_on_has_no_best_teacher():
    with pytest.raises(NoTeacher, match=r"stages\.mopd\.teachers\.math is best\(math\), but no checkpoint"):
        chosen(history())
