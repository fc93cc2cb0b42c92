import json

from millrace.cascade.ledger import Ledger
from millrace.observe.report import write_report
from millrace.observe.writer import MetricsWriter, read_metrics


def write_steps(run_dir, first, steps):
    writer = MetricsWriter(run_dir, first)
    for step in range(first, first + steps):
        writer.write(step, "sft", {"loss": 1.0 / (step + 1)})
    writer.close()


def test_a_resumed_run_has_each_step_once(tmp_path):
    write_steps(tmp_path, 0, 6)
    write_steps(tmp_path, 3, 4)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(7))


def test_half_a_line_is_passed_over(tmp_path):
    write_steps(tmp_path, 0, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "sta')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_the_report_shows_matrix_curves_and_escaped_answers(tmp_path):
    write_steps(tmp_path, 0, 3)
    ledger = Ledger(tmp_path)
    for after, rate in (("start", 0.25), ("sft", 0.5)):
        ledger.append("evaluated", after=after, scores={"math": {"pass_rate": rate, "half_width": 0.05}})
    folder = tmp_path / "rollouts" / "sft"
    folder.mkdir(parents=True)
    answer = {
        "messages": [{"role": "user", "content": "1 < 2?"}],
        "answer": "<b>yes</b>",
        "reward": 1.0,
        "reason": "correct",
        "answer_tokens": [1, 2],
        "finish_reason": "stop",
    }
    (folder / "step-000000.jsonl").write_text('{"step": 0}\n' + json.dumps(answer) + "\n")
    page = write_report(tmp_path).read_text()
    assert "+25.0" in page and "50.0%" in page
    assert "<polyline" in page
    assert "&lt;b&gt;yes&lt;/b&gt;" in page and "<b>yes</b>" not in page
