import re
from xml.etree import ElementTree

from sample_run import write_sample_run

from millrace.observe.report.graph import BOX_H, BOX_W, gate_words, graph_html, places, teachings
from millrace.observe.report.record import read_run

PAPER = {
    "sft": "start",
    "if": "sft",
    "multi": "if",
    "rlhf-teacher": "sft",
    "mopd": "multi",
    "rlhf": "mopd",
    "code": "rlhf",
}


def test_the_lineage_of_the_last_stage_lies_on_one_lane_and_side_branches_beside_it():
    at = places(PAPER)
    assert {name for name, place in at.items() if place.lane == 0} == {"start", *PAPER} - {"rlhf-teacher"}
    assert at["rlhf-teacher"].lane == 1 and at["rlhf-teacher"].depth == 2
    assert [at[name].order for name in ("start", *PAPER)] == list(range(8))


def test_two_branches_at_one_depth_get_lanes_of_their_own():
    at = places({"sft": "start", "x": "sft", "y": "sft", "y2": "y", "z": "sft", "main": "sft"})
    assert (at["x"].lane, at["y"].lane, at["z"].lane, at["main"].lane) == (1, 2, 3, 0)
    assert at["y2"].lane == 2


def test_no_two_nodes_overlap_in_either_drawing(tmp_path):
    html = graph_html(read_run(write_sample_run(tmp_path, answers=False)))
    for svg in re.findall(r"<svg.*?</svg>", html):
        boxes = [(int(r.get("x")), int(r.get("y"))) for r in ElementTree.fromstring(svg).iter("rect")]
        assert len(boxes) == 7
        for i, (x, y) in enumerate(boxes):
            assert all(abs(x - a) >= BOX_W or abs(y - b) >= BOX_H for a, b in boxes[i + 1 :])


def test_teachers_are_the_chosen_checkpoints_and_before_that_those_that_rules_name(tmp_path):
    chosen = teachings(read_run(write_sample_run(tmp_path / "done", answers=False)).stages)
    assert {(t.teacher, t.text) for t in chosen} == {
        ("math-rl", "math, mcqa @5"),
        ("if-rl", "instruction_following"),
        ("rlhf", "chat"),
    }
    planned = teachings(read_run(write_sample_run(tmp_path / "begun", until="if-rl", answers=False)).stages)
    assert {(t.teacher, t.text) for t in planned} == {("if-rl", "instruction_following"), ("rlhf", "chat")}


def test_the_gate_stands_on_the_node(tmp_path):
    run = read_run(write_sample_run(tmp_path, until="grpo-again", answers=False))
    assert gate_words(run.stage("if-rl")) == ("good", "✓ gate passed")
    assert gate_words(run.stage("math-rl")) == ("bad", "✕ gate failed, warned")
    assert gate_words(run.stage("mopd")) == ("none", "no gate")
    early = read_run(write_sample_run(tmp_path / "early", until="if-rl", answers=False))
    assert gate_words(early.stage("math-rl")) == ("open", "gate not reached")


def test_a_deep_cascade_is_drawn_from_top_to_bottom_only(tmp_path):
    folder = write_sample_run(tmp_path, answers=False)
    text = (folder / "recipe.yaml").read_text()
    more = "".join(f"- {{type: evaluate, name: look-{n}}}\n" for n in range(4))
    head, stages = text.split("stages:\n")
    (folder / "recipe.yaml").write_text(f"{head}stages:\n{stages.replace('export:', more + 'export:')}")
    html = graph_html(read_run(folder))
    assert "graph always" in html and "graph wide" not in html and "look-3" in html
