"""What a person sees of a step."""

from pathlib import Path

import pytest

from millrace.observe.console import RunConsole


def lines(folder: Path, kind: str, values: dict[str, float]) -> list[str]:
    (folder / "logs").mkdir()
    console = RunConsole(folder)
    console.step(kind, "climb", 3, 20, values)
    console.close()
    return [line.split(" ", 2)[2] for line in (folder / "logs" / "run.log").read_text().splitlines()]


def test_a_step_is_one_line_of_the_numbers_that_matter(tmp_path: Path) -> None:
    values = {
        "reward/mean": 0.5,
        "reward/length": 12.0,
        "entropy": 1.25,
        "time/step": 2.0,
        "groups/without_variance": 0.9,
    }
    assert lines(tmp_path, "rl", values) == ["INFO climb 3/20  reward 0.500  length 12.000  entropy 1.250  step 2.0s"]


@pytest.mark.parametrize(("kind", "warned"), [("rl", True), ("rlhf", True), ("mopd", False)])
def test_a_step_in_which_no_reward_differs_from_its_group_s_says_so(tmp_path: Path, kind: str, warned: bool) -> None:
    said = lines(tmp_path, kind, {"reward/mean": 0.0, "groups/without_variance": 1.0})
    assert [line.startswith("WARNING climb 3/20: within each group") for line in said[1:]] == [True] * warned
