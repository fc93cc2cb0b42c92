from millrace.cascade.outlook import outlook
from millrace.config.schema import GateConfig

from .campaign import history, recipe, row

ROWS = (row("start", 0.0, 0.0, 0.0), row("sft", 0.9, 0.3, 0.2))


def test_each_stage_says_whether_it_is_done_goes_on_or_is_ahead():
    lines = outlook(recipe(chat=GateConfig(max_drop=3)), history(*ROWS), stage=1, step=2)
    assert [line.split()[0] for line in lines] == ["sft", "rl-if", "rl-math", "chat", "mopd"]
    assert "from start" in lines[0] and "done: math 90.0% ±5.0" in lines[0]
    assert "goes on at step 2 of 4 steps" in lines[1]
    assert lines[3].endswith("from sft      to do of 4 steps; gate: max_drop 3, else stop")
    assert "taught math by best(math) (now sft), if by stage(rl-if) (now rl-if)" in lines[4]


def test_before_anything_is_measured_teachers_are_their_rules():
    assert "taught math by best(math), if by stage(rl-if)" in outlook(recipe(), history(), 0, 0)[-1]


def test_stages_behind_the_last_one_are_left_for_later():
    lines = outlook(recipe(), history(*ROWS), stage=1, step=0, until="rl-if")
    assert "to do" in lines[1]
    assert all("not now (--until rl-if)" in line for line in lines[2:])


def test_an_origin_that_a_gate_went_back_from_is_said():
    lines = outlook(recipe(), history(*ROWS, rl_if="sft"), stage=2, step=0)
    assert "from rl-if (its gate went back to sft)" in lines[2]
