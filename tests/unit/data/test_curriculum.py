import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.data.curriculum import choose_rows, rates_of_rows, read_pass_rates
from millrace.data.datasets import PromptDataset
from millrace.data.errors import DataError


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_bounds_themselves_are_outside() -> None:
    chosen = choose_rows([0.0, 0.25, 1.0, 0.5, 0.0], above=0, below=1, easy_to_hard=False)
    assert (chosen.rows, chosen.rates) == ((1, 3), None)
    assert (chosen.too_hard, chosen.too_easy) == (2, 1)


def test_without_bounds_every_row_is_drawn() -> None:
    chosen = choose_rows([0.0, 1.0], above=None, below=None, easy_to_hard=True)
    assert (chosen.rows, chosen.rates) == ((0, 1), (0.0, 1.0))


bound = st.none() | st.floats(0, 1)


@given(st.lists(st.floats(0, 1)), bound, bound)
def test_every_row_is_drawn_or_counted_as_left_out(rates, above, below) -> None:
    if above is not None and below is not None and above >= below:
        return
    chosen = choose_rows(rates, above=above, below=below, easy_to_hard=True)
    assert len(chosen) + chosen.too_hard + chosen.too_easy == len(rates)
    for row in chosen.rows:
        assert (above is None or rates[row] > above) and (below is None or rates[row] < below)


def test_rates_are_found_by_the_rows_id_wherever_it_stands(tmp_path: Path) -> None:
    rows = [{"id": 7, "prompt": "a"}, {"prompt": "b"}]
    dataset = PromptDataset(write(tmp_path / "train.jsonl", rows))
    rates = [
        {"id": dataset.row_id(1), "pass_rate": 1},
        {"id": "gone", "pass_rate": 0.5},
        {"id": "7", "pass_rate": 0.25},
    ]
    path = write(tmp_path / "rates.jsonl", rates)
    assert rates_of_rows(dataset, read_pass_rates(path), path) == [0.25, 1.0]


def test_a_row_without_a_pass_rate_is_named(tmp_path: Path) -> None:
    dataset = PromptDataset(write(tmp_path / "train.jsonl", [{"id": "a"}, {"id": "b"}]))
    path = write(tmp_path / "rates.jsonl", [{"id": "a", "pass_rate": 0.5}])
    with pytest.raises(
        DataError, match=r"train\.jsonl:2: the row with the id b has no pass rate in .*rates\.jsonl; measure"
    ):
        rates_of_rows(dataset, read_pass_rates(path), path)


@pytest.mark.parametrize("rate", [1.5, -0.1, "0.5", None, True, float("nan")])
def test_what_is_no_share_is_refused(tmp_path: Path, rate: object) -> None:
    path = write(tmp_path / "rates.jsonl", [{"id": "a", "pass_rate": 0.5}, {"id": "b", "pass_rate": rate}])
    with pytest.raises(DataError, match=r"rates\.jsonl:2: pass_rate must be a number from 0 to 1, not"):
        read_pass_rates(path)


def test_two_rates_of_one_row_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rates.jsonl", [{"id": "a", "pass_rate": 0.5}, {"id": "a", "pass_rate": 0.25}])
    with pytest.raises(DataError, match=r"rates\.jsonl:2: the id a has a pass rate already"):
        read_pass_rates(path)
