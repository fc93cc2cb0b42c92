from millrace.cascade.ledger import Ledger


def test_events_come_back_in_order_and_scores_by_label(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append("evaluated", after="start", scores={"math": {"pass_rate": 0.25}})
    ledger.append("stage_started", stage="sft")
    ledger.append("evaluated", after="sft", scores={"math": {"pass_rate": 0.5}})
    assert [entry["event"] for entry in ledger.events()] == ["evaluated", "stage_started", "evaluated"]
    assert ledger.scores() == {"start": {"math": {"pass_rate": 0.25}}, "sft": {"math": {"pass_rate": 0.5}}}


def test_half_a_line_left_by_a_kill_costs_only_itself(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append("stage_started", stage="sft")
    with ledger.path.open("a") as file:
        file.write('{"event": "evalua')
    ledger.append("stage_finished", stage="sft")
    assert [entry["event"] for entry in ledger.events()] == ["stage_started", "stage_finished"]


def test_a_run_is_finished_when_it_came_to_the_end_of_these_very_stages(tmp_path):
    ledger = Ledger(tmp_path)
    assert not ledger.is_finished(["sft"])
    ledger.append("finished", stages=["sft"])
    assert ledger.is_finished(["sft"])
    assert not ledger.is_finished(["sft", "rl"])
