"""The table for a terminal: its lines, their order, and its width."""

import pytest

from kd_ranker.configs import sweeps as shipped
from kd_ranker.reporting.answer import answer
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.study import read_studies
from kd_ranker.reporting.summary import summary
from tests.reporting import sweeps
from tests.reporting.sweeps import reference_row
from tests.reporting.test_answer import SHIPPED, STUDENTS, students


def lines_of(tmp_path, rows):
    """The lines of the table, without its header and its notes."""
    study = sweeps.study_of(tmp_path, [sweeps.teacher_row(), *rows])
    table, _, _ = summary(study, Estimates(study)).partition("\n\n")
    header, _, body = table.partition("-\n")
    assert header
    return body.splitlines()


@pytest.mark.parametrize(("name", "variant"), SHIPPED)
def test_a_shipped_sweeps_table_has_at_most_100_columns(tmp_path, name, variant):
    config = getattr(shipped, name)(variant)
    (study,) = read_studies([sweeps.write_runs(tmp_path, config)])
    text = summary(study, Estimates(study))
    assert max(map(len, text.splitlines())) <= 100
    # Each method has its line, and a count of its own.
    assert text.count(" ± ") >= len(study.chosen)


def test_methods_are_sorted_and_baselines_stand_below_a_line(tmp_path):
    rows = [
        *students(STUDENTS | {"aux": [200, 210, 220]}),
        reference_row("incumbent", 150), reference_row("show_rate", 600),
        reference_row("popularity", 700), reference_row("top_rate", 800),
        reference_row("oracle", 9),
    ]  # fmt: skip
    lines = lines_of(tmp_path, rows)
    firsts = [line.split("  ")[0] for line in lines]
    assert firsts[:3] == ["aux, bce on scores", "shared, bce on scores", "none"]
    assert set(firsts[3]) == {"-"}
    # Of the lists of either kind the best; no funnel could use the oracle.
    assert firsts[4:] == [
        "today's early ranker", "list of items: show_rate", "list of items: top_rate",
    ]  # fmt: skip


def test_a_line_has_the_numbers_of_its_setting(tmp_path):
    rows = students(
        STUDENTS,
        true_value={"none": [0.8, 0.9, 0.7], "shared": [0.81, 0.912, 0.708]},
        **{"user_auc/watch": {"none": 0.7, "shared": 0.75}},
    )
    shared, none = lines_of(tmp_path, rows)
    # 20,000 FLOPs of the student, and 200 of each that passes: 20 of 100, 19.6 of 104 and 20.4 of
    # 108 thousand are saved. 320 ± 4.303 · 19.08 / √3.
    for cell in ("yes", "320 ± 47", "19% (18 to 21)", "0.8100 ± 0.2534", "0.750"):
        assert f" {cell}" in shared
    for cell in ("no", "420 ± 50", "baseline", "0.8000 ± 0.2484", "0.700"):
        assert f" {cell}" in none


def test_numbers_end_at_the_right_of_their_columns(tmp_path):
    rows = students(STUDENTS, **{"user_auc/watch": {"none": 0.7, "shared": 0.75}})
    study = sweeps.study_of(tmp_path, [sweeps.teacher_row(), *rows])

    table, _, _ = summary(study, Estimates(study)).partition("\n\n")

    # The last column: two lines of its title, and two numbers.
    last = ("AUC", "watch", "0.750", "0.700")
    ends = [len(line) for line in table.splitlines() if line.endswith(last)]
    assert ends == [ends[0]] * 4


def test_a_ranker_trained_on_the_final_lists_needs_scores(tmp_path):
    lines = lines_of(tmp_path, [*students(STUDENTS), reference_row("top_rate", 800)])
    assert lines[-1].startswith("list of items: top_rate")
    assert " yes " in lines[-1]


def _forty_ways():
    """Students of twenty widths in two modes."""
    rows = []
    for width in range(20):
        passed = {mode: [seeds[0] - width, seeds[1]] for mode, seeds in STUDENTS.items()}
        rows += [row | {"student.width": 2**width} for row in students(passed)]
    return rows


SWEEPS = {
    "one way": (students({"shared": [300, 322]}), 1),
    "forty ways": (_forty_ways(), 40),
    "no incumbent": (students(STUDENTS), 2),
    "an incumbent": ([*students(STUDENTS), reference_row("incumbent", 1500)], 2),
    "users": (students(STUDENTS, true_value={"none": 0.8, "shared": 0.9}), 2),
    "one seed": (students({"none": [400], "shared": [300]}), 2),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_of_any_size_has_a_table_and_an_answer_that_fit(tmp_path, name):
    rows, ways = SWEEPS[name]
    study = sweeps.study_of(tmp_path, [sweeps.teacher_row(), *rows])
    estimates = Estimates(study)
    assert len(study.chosen) == ways
    table = summary(study, estimates)
    given = answer(study, estimates)
    assert max(map(len, [*table.splitlines(), *given.text.splitlines()])) <= 100
    assert table.count("bce on scores") + table.count("none") >= ways
    assert len(given.sentence.split()) <= 80
