"""The benchmark of a GPU, run on the CPU where that is enough to prove it."""

from pathlib import Path

import pytest

from benchmarks.gpu import run_case
from benchmarks.gpu_cases import Case, cases
from benchmarks.gpu_models import MARGIN, choose
from benchmarks.gpu_table import aims_text, table_text
from millrace.config.schema import PrecisionConfig

GIB = 2**30


def test_a_tiny_hybrid_in_emulated_fp8_gives_every_figure_of_a_row(tmp_path: Path) -> None:
    case = Case(
        name="hybrid fp8", kind="train", device="cpu", family="hybrid", fp8="tensorwise", lengths=(32,), tiny=True
    )
    (row,) = run_case(case, 120, tmp_path)
    assert row["precision"] == "tensorwise, emulated" and row["layers"] == "plain torch"
    assert row["tokens_s"] == pytest.approx(row["tokens"] / row["step_s"])
    assert row["flops_s"] > 0 and row["logprob_tokens_s"] > 0
    assert 0.1 < row["peak_bytes"] / row["planned_bytes"] < 10
    assert row["losses"][-1] < row["losses"][0]
    assert "hybrid" in table_text([row, {"case": "rate", "rate bf16": 1e12, "rate fp8": None}])


def test_a_case_that_does_not_end_is_stopped_and_is_a_row(tmp_path: Path) -> None:
    case = Case(name="slow", kind="rate", device="cpu", tiny=True)
    assert run_case(case, 0.2, tmp_path) == [{"case": "slow", "problem": "stopped after 0 s"}]


def test_a_case_that_breaks_says_the_last_thing_it_was_told(tmp_path: Path) -> None:
    (row,) = run_case(Case(name="wrong", kind="train", device="cpu", lengths=(), tiny=True), 60, tmp_path)
    assert "ValueError" in row["problem"]


@pytest.mark.parametrize("family", ["dense", "moe", "hybrid"])
def test_the_largest_model_that_the_plan_lets_in_is_taken(family: str) -> None:
    chosen = [
        choose(family, 8192, gib * GIB, PrecisionConfig(), device="cuda", fused=True, tiny=False)  # type: ignore[arg-type]
        for gib in (40, 80, 140)
    ]
    sizes = [choice.shape.parameter_count() for choice in chosen if choice is not None]
    assert len(sizes) == 3 and sizes == sorted(sizes) and sizes[0] < sizes[-1]
    for choice, gib in zip(chosen, (40, 80, 140), strict=True):
        assert choice is not None and choice.planned <= MARGIN * gib * GIB
    assert choose(family, 8192, GIB, PrecisionConfig(), device="cuda", fused=True, tiny=False) is None  # type: ignore[arg-type]


def test_every_model_is_measured_in_both_precisions_and_at_every_length() -> None:
    listed = list(cases("cuda", "blockwise", False, False))
    assert listed[0].kind == "rate"
    trained = [case for case in listed if case.kind == "train"]
    assert {(c.family, c.fp8) for c in trained} == {
        (family, fp8) for family in ("dense", "moe", "hybrid") for fp8 in ("none", "blockwise")
    }
    of_dense = {length for c in trained if (c.family, c.fp8) == ("dense", "none") for length in c.lengths}
    assert of_dense == {4096, 8192, 16384, 32768}


def test_aims_are_held_against_the_best_row() -> None:
    row = {"tokens_s": 10.0, "flops_s": 0.5e12, "peak_bytes": 103, "planned_bytes": 100}
    rows = [
        {"case": "rate", "rate bf16": 1e12, "rate fp8": 2e12},
        {"case": "dense bf16", **row},
        {"case": "dense fp8", **row, "tokens_s": 12.0},
        {"case": "overhead", "overhead": 1.01},
    ]
    lines = aims_text(rows).splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["met", "missed", "met", "met"]
    assert "50.0%" in lines[0] and "1.20x" in lines[1]
