from millrace.cascade.history import read_history
from millrace.observe.entries import stage_of

STAGES = ["sft", "rl", "mopd"]
SCORE = {"pass_rate": 0.5, "half_width": 0.1, "prompts": 10, "answers": 20}


def evaluated(after: str, **facts) -> dict:
    return {"event": "evaluated", "after": after, "checkpoint": f"c-{after}", "scores": {"math": SCORE}, **facts}


def run_through(stages=STAGES) -> list[dict]:
    events = [evaluated("start")]
    for stage in stages:
        events += [
            {"event": "stage_started", "stage": stage},
            evaluated(f"{stage}@2"),
            {"event": "stage_finished", "stage": stage, "flops": 1.0},
            evaluated(stage),
            {"event": "gate", "stage": stage, "result": stage},
        ]
    return events


def test_a_history_holds_rows_in_the_order_they_were_measured():
    history = read_history(run_through(), STAGES)
    assert list(history.rows) == ["start", "sft@2", "sft", "rl@2", "rl", "mopd@2", "mopd"]
    assert history.rows["rl"].scores["math"].pass_rate == 0.5
    assert history.rows["rl"].checkpoint == "c-rl"
    assert history.rows["start"].checkpoint is None
    assert list(history.finished) == STAGES


def test_what_a_rewind_took_back_does_not_count():
    history = read_history([*run_through(), {"event": "rewound", "to": "rl"}], STAGES)
    assert list(history.rows) == ["start", "sft@2", "sft"]
    assert list(history.finished) == list(history.started) == list(history.gates) == ["sft"]


def test_what_was_done_after_a_rewind_counts():
    again = evaluated("rl") | {"scores": {"math": SCORE | {"pass_rate": 0.9}}}
    history = read_history([*run_through(), {"event": "rewound", "to": "rl"}, again], STAGES)
    assert history.rows["rl"].scores["math"].pass_rate == 0.9


def test_a_result_is_the_stages_end_unless_its_gate_went_back():
    events = [*run_through(), {"event": "gate", "stage": "rl", "result": "sft"}]
    history = read_history(events, STAGES)
    assert (history.result("rl"), history.result("mopd"), history.result("unseen")) == ("sft", "mopd", "unseen")


def test_labels_name_their_stage():
    assert (stage_of("rl@20"), stage_of("rl"), stage_of("start")) == ("rl", "rl", "start")
