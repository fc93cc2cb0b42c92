import json
from pathlib import Path

import pytest

from millrace.data.curriculum import read_pass_rates
from millrace.data.errors import DataError
from millrace.evaluation.pass_rates import PassRateFile, PromptPassRate, prompt_pass_rate, summary

SETTINGS = {"model": "base", "samples": 4}
ROWS = [prompt_pass_rate(str(n), [1.0] * n + [0.0] * (4 - n), [10, 20, 30, 40]) for n in range(5)]


def opened(path: Path, **settings) -> PassRateFile:
    return PassRateFile(path, {**SETTINGS, **settings})


def write(path: Path, rows: list[PromptPassRate]) -> None:
    file = opened(path)
    file.append(rows)
    file.close()


def test_a_row_holds_the_mean_reward_and_counts_full_rewards_alone() -> None:
    row = prompt_pass_rate("7", [1.0, 0.5, 0.0, 0.5], [3, 5, 4, 4])
    assert row == PromptPassRate(id="7", pass_rate=0.5, passed=1, samples=4, mean_length=4.0)


def test_what_was_measured_is_known_when_the_file_is_opened_again(tmp_path: Path) -> None:
    write(tmp_path / "rates.jsonl", ROWS[:2])
    file = opened(tmp_path / "rates.jsonl")
    assert file.rows == {"0": ROWS[0], "1": ROWS[1]}
    file.append(ROWS[2:])
    file.close()
    assert read_pass_rates(tmp_path / "rates.jsonl") == {"0": 0.0, "1": 0.25, "2": 0.5, "3": 0.75, "4": 1.0}


def test_a_kill_at_any_byte_costs_at_most_the_line_it_cut(tmp_path: Path) -> None:
    path = tmp_path / "rates.jsonl"
    write(path, ROWS[:3])
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        file = opened(path)
        kept = whole[:size].count(b"\n")
        assert list(file.rows.values()) == ROWS[:kept]
        file.append(ROWS[kept:])
        file.close()
        assert list(opened(path).rows.values()) == ROWS


@pytest.mark.parametrize(
    ("settings", "told"), [({"samples": 8}, r"samples 4 \(now 8\)"), ({"seed": 1}, r"seed None \(now 1\)")]
)
def test_other_settings_are_refused_and_named(tmp_path: Path, settings: dict, told: str) -> None:
    write(tmp_path / "rates.jsonl", ROWS)
    with pytest.raises(
        DataError, match=rf"rates\.jsonl: its pass rates were measured with {told}, .* name another file"
    ):
        opened(tmp_path / "rates.jsonl", **settings)


def test_a_file_without_its_settings_is_not_continued(tmp_path: Path) -> None:
    write(tmp_path / "rates.jsonl", ROWS)
    (tmp_path / "rates.jsonl.settings.json").unlink()
    with pytest.raises(DataError, match=r"there is no rates\.jsonl\.settings\.json beside it"):
        opened(tmp_path / "rates.jsonl")


def test_a_file_in_which_nothing_was_measured_takes_new_settings(tmp_path: Path) -> None:
    opened(tmp_path / "rates.jsonl").close()
    opened(tmp_path / "rates.jsonl", samples=8).close()
    assert json.loads((tmp_path / "rates.jsonl.settings.json").read_text())["samples"] == 8


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rates.jsonl"
    write(path, ROWS)
    path.write_text(path.read_text().replace('"passed": 1,', "", 1))
    with pytest.raises(DataError, match=r"rates\.jsonl:2: the row has no field 'passed'"):
        opened(path)


def test_two_processes_do_not_measure_into_one_file(tmp_path: Path) -> None:
    file = opened(tmp_path / "rates.jsonl")
    with pytest.raises(DataError, match="another process is measuring into this file"):
        opened(tmp_path / "rates.jsonl")
    file.close()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/rates\.jsonl: the file cannot be written: No such file"):
        opened(tmp_path / "nowhere" / "rates.jsonl")


def test_the_summary_shows_how_many_are_never_and_always_solved() -> None:
    rows = [*ROWS, ROWS[0], ROWS[4], ROWS[4]]
    assert summary(rows).splitlines() == [
        "8 prompts, 32 answers of 25 tokens in the mean, pass rate 56.2% ±30.4",
        "never solved   2   25.0%  ███████████████████████████",
        "0% to 25%      0    0.0%",
        "25% to 50%     1   12.5%  █████████████",
        "50% to 75%     1   12.5%  █████████████",
        "75% to 100%    1   12.5%  █████████████",
        "always solved  3   37.5%  ████████████████████████████████████████",
    ]
