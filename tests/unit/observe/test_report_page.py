import json
import os
import subprocess
import sys
import time

import pytest
from sample_run import write_sample_run

from millrace.observe.report import write_report
from millrace.observe.report.page import embedded
from millrace.observe.report.texts import duration, points, short_number


def embedded_data(page, name):
    return json.loads(page.split(f'id="{name}">')[1].split("</script>")[0])


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path):
    page = write_report(write_sample_run(tmp_path)).read_text()
    for part in (
        "cascade-sample",
        "574k active",
        "gate failed, warned",
        "▼ −14.5",
        "per solved answer",
        "torch 2.13.0",
    ):
        assert part in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page
    assert '<link rel="stylesheet"' not in page and "src=" not in page.split("</style>")[0]


def test_what_a_model_writes_cannot_leave_its_place(tmp_path):
    run = write_sample_run(tmp_path)
    file = run / "rollouts" / "math-rl" / "step-000000.jsonl"
    file.write_text(file.read_text().replace("Answer briefly.", "</script><script>alert(1)</script><!--"))
    page = write_report(run).read_text()
    assert "alert(1)" in page and "</script><script>alert" not in page
    step = embedded_data(page, "rollout-data")["stages"][2]["steps"][0]
    assert step["groups"][0]["messages"][0]["text"] == "</script><script>alert(1)</script><!--"


def test_embedded_data_comes_back_as_it_was():
    data = {"a": "</script>\u2028<!-- é 谢", "b": [1, None, 2.5]}
    block = embedded("x", data)
    assert block.count("<") == 2 and embedded_data(block, "x") == data


def test_a_run_of_many_steps_gives_a_small_page_quickly(tmp_path):
    run = write_sample_run(tmp_path, steps=4000)
    began = time.monotonic()
    page = write_report(run)
    assert page.stat().st_size < 3_000_000 and time.monotonic() - began < 20
    assert "Long curves are thinned out" in page.read_text()


@pytest.mark.parametrize("until", ["sft", "if-rl", "mopd"])
def test_a_run_in_any_state_has_a_page(tmp_path, until):
    page = write_report(write_sample_run(tmp_path, until=until)).read_text()
    assert f"interrupted at stage {until}, step 10 of 20" in page


def test_the_command_writes_the_page_without_torch(tmp_path):
    run = write_sample_run(tmp_path)
    program = (
        "import sys; from millrace.cli import app; app(['report', sys.argv[1]], standalone_mode=False); "
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    )
    env = {**os.environ, "COLUMNS": "20"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(run)], capture_output=True, text=True, env=env, check=True
    )
    assert done.stdout.strip() == str(run / "report.html") and (run / "report.html").exists()


def test_numbers_are_short_and_signed():
    assert [short_number(v) for v in (None, 0.0, 12.34, 1234567, 3.2e18)] == ["–", "0", "12.3", "1.23M", "3.2E"]
    assert [duration(v) for v in (None, 5.25, 61, 3700, 400_000)] == [
        "–",
        "5.25 s",
        "1 min 1 s",
        "1 h 1 min",
        "4 d 15 h",
    ]
    assert [points(v) for v in (0.1234, -0.05, 0.0)] == ["+12.3", "−5.0", "+0.0"]
