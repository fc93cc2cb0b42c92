import pytest
from sample_run import write_sample_run

from millrace.observe.report.matrix import change_html, matrix_html, matrix_rows, verdicts_html
from millrace.observe.report.record import read_run


@pytest.fixture
def run(tmp_path):
    return read_run(write_sample_run(tmp_path, answers=False))


def cells(run, label):
    return next(row.cells for row in matrix_rows(run) if row.label == label)


def test_rows_stand_in_the_order_of_the_recipe_with_the_measurements_inside_before_the_end(run):
    labels = [row.label for row in matrix_rows(run)]
    assert labels[:3] == ["start", "sft", "if-rl@5"] and labels[5:7] == ["if-rl", "rlhf@5"] and labels[-1] == "mopd"


def test_a_change_is_against_the_parent_and_not_against_the_row_above(run):
    assert cells(run, "rlhf")["instruction_following"].change == pytest.approx(0.44 - 0.42)
    assert cells(run, "mopd")["instruction_following"].change == pytest.approx(0.675 - 0.54)
    assert cells(run, "math-rl@5")["math"].change == pytest.approx((58.5 - 32.5) / 4 / 100)
    assert cells(run, "start")["math"].change is None


def test_a_drop_beyond_its_interval_differs_from_one_within_it_in_more_than_colour(run):
    beyond, within = cells(run, "math-rl")["instruction_following"], cells(run, "mopd")["math"]
    assert beyond.certain and beyond.direction == "drop" and not within.certain and within.direction == "drop"
    assert beyond.change_half_width == pytest.approx((0.0569**2 + 0.0611**2) ** 0.5, abs=1e-3)
    assert change_html(beyond) == "<span class='change drop certain'>▼ −14.5</span>"
    assert change_html(within) == "<span class='change drop'>▼ −1.0</span>"


def test_the_distance_to_each_teacher_is_to_the_checkpoint_that_was_chosen(run):
    row = cells(run, "mopd")
    assert row["instruction_following"].to_teacher == pytest.approx(0.675 - 0.685)
    assert row["mcqa"].teacher == "math-rl@5" and row["mcqa"].to_teacher == pytest.approx(0.62 - 0.5575)
    assert row["chat"].trained and cells(run, "math-rl")["chat"].to_teacher is None


def test_measurements_inside_stages_are_folded_unless_one_of_them_teaches(run):
    html = matrix_html(run)
    assert "<tr class='inside'><th scope='row'>math-rl@5" in html
    assert "<tr class='inside' hidden><th scope='row'>math-rl@10" in html


def test_gates_and_teachers_are_sentences(run):
    html = verdicts_html(run)
    assert "✓ if-rl</b> passed. instruction_following gained" in html
    assert "✕ math-rl</b> failed: the run went on with a warning." in html
    assert "learns mcqa from <b>math-rl@5</b>, chosen by best(mcqa), 55.8% there" in html
