"""The tables: each ranker once with the numbers of its estimates, and every format."""

import math

import numpy as np
import pandas as pd
import pytest

from kd_ranker.evaluation import results
from kd_ranker.evaluation.metrics.registry import metric_of, title_of
from kd_ranker.reporting import tables
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.intervals import interval
from kd_ranker.reporting.study import read_studies
from tests.reporting import sweeps


def test_the_terminal_shows_means_and_intervals_of_the_test(tmp_path):
    aucs = (0.61, 0.67, 0.75)
    rows = [
        *({"mode": "none", "seed": seed, "user_auc/watch": auc, "passed": 100.0 + seed}
          for seed, auc in enumerate(aucs)),
        # Over seeds of both kinds; a run whose loss is not finite does not count.
        *({"mode": "shared", "seed": seed, "data_seed": order,
           "non_finite_step": None if seed or order else 7, "test": {"user_auc/watch": 0.8}}
          for seed in (0, 1) for order in (0, 1)),
        sweeps.teacher_row() | {"data_seed": None}, sweeps.reference_row("oracle", 9.0),
    ]  # fmt: skip
    sweeps.write_rows(tmp_path, rows)

    text, path = tables.results_text(tmp_path, 30).split("\n\nresults: ")

    assert path == str(tmp_path / results.FILE)
    header, none, shared, teacher, oracle = text.splitlines()
    assert header.split()[:4] == ["mode", "serves", "weight", "seeds"]
    first_words = [line.split()[0] for line in (none, shared, teacher, oracle)]
    assert first_words == ["none", "shared", "teacher", "oracle"]
    # The number of seeds; mode none has no weight.
    assert none.split()[2] == "3"
    assert shared.split()[3] == "3"
    auc = interval(np.array(aucs))
    assert f"{auc.mean:.4f} ± {auc.high - auc.mean:.4f}" in none
    # Whole candidates need no digits.
    assert f"101 ± {4.303 / np.sqrt(3):.0f}" in none
    assert "0.800" in shared


def test_the_terminal_shows_a_teacher_without_students(tmp_path):
    sweeps.write_rows(tmp_path, [sweeps.teacher_row()])

    assert tables.results_text(tmp_path, 30).splitlines()[1].startswith("teacher")


LOWER, HIGHER, ONE = "teacher_kl/watch", "teacher_tau", "user_calibration/watch"
CLEAR = {"none": [1.0, 1.1, 1.2], "aux": [2.0, 2.1, 2.2], "shared": [3.0, 3.2, 3.1]}


@pytest.mark.parametrize(
    ("table", "measure", "expected"),
    [
        (CLEAR, LOWER, ["none"]),
        (CLEAR, HIGHER, ["shared"]),
        # Differences do not show which of two is closer to one.
        (CLEAR, ONE, []),
        # The winner cannot be told from the runner-up; or from the noisy other one.
        (CLEAR | {"none": [1.0, 1.4, 1.2], "aux": [1.3, 1.3, 1.3]}, LOWER, []),
        (CLEAR | {"aux": [1.5, 1.6, 1.7], "shared": [0.5, 3.0, 4.0]}, LOWER, []),
        # One setting, no pair, no difference.
        ({"none": [1.0, 1.1]}, LOWER, []),
        ({"none": [1.0, math.nan], "aux": [math.nan, 2.0]}, LOWER, []),
        ({"none": [1.0, 1.0], "aux": [1.0, 1.0]}, LOWER, []),
    ],
)
def test_the_best_is_marked_if_it_differs_from_every_other(tmp_path, table, measure, expected):
    rows = [
        {"mode": mode, "seed": seed, "test": {measure: value}}
        for mode, values in table.items()
        for seed, value in enumerate(values)
    ]
    study = sweeps.study_of(tmp_path, [sweeps.teacher_row(), *rows])
    # What the dataset does not know is no measure of the table.
    assert not {"alignment_ratio", "true_value_captured@30"} & {*tables.important_columns(study)}
    numbers = tables.comparison(study, Estimates(study))
    found = numbers[numbers["measure"] == measure]
    assert len(found) == len(table)
    assert list(found.loc[found["best"], "mode"]) == expected


@pytest.mark.parametrize(
    ("modes", "passed", "shown"),
    [
        (("none", "shared"), math.nan, ["teacher"]),
        (("aux", "shared"), 100.0, ["teacher", "aux", "shared"]),
    ],
)
def test_tables_without_a_baseline(tmp_path, modes, passed, shown):
    """Where nothing reaches 99%, and where every student needs scores."""
    rows = [{"mode": mode, "passed": passed} for mode in modes]
    study = sweeps.study_of(tmp_path, [sweeps.teacher_row(), *rows])
    estimates = Estimates(study)
    numbers = tables.comparison(study, estimates)
    assert list(tables.main_table(study, estimates, numbers).cells["mode"]) == shown
    assert tables.difference_table(study, estimates) is None


def assert_cell(text, estimate, digits):
    """A cell has a mean and half its interval, rounded to its digits or fewer."""
    numbers = [float(number.strip("%").replace("−", "-")) for number in text.split(" ± ")]
    expected = [estimate.mean]
    half = estimate.high - estimate.mean
    if half > 1e-9:
        expected.append(half)
    assert numbers == pytest.approx(expected, abs=0.51 * 10.0**-digits)


def assert_numbers(table, settings, columns, estimate):
    """A table has a line for each setting, with the estimates of the measures that it shows."""
    assert len(table.cells) == len(settings)
    for column in columns:
        for setting, text in zip(settings, table.cells[title_of(column)], strict=True):
            mean = estimate(setting, column)
            assert bool(text) != math.isnan(mean.mean)
            if text:
                assert_cell(text, mean, metric_of(column).digits)


def test_every_ranker_is_once_in_a_table_with_its_estimates(estimates):
    study = estimates.study

    table = tables.main_table(study, estimates, tables.comparison(study, estimates))

    settings = sorted(estimates.settings, key=lambda name: estimates.of(name, "passed_for_99").mean)
    assert_numbers(table, settings, tables.important_columns(study), estimates.of)


def test_the_difference_table_has_the_gaps_to_the_baseline(estimates):
    study = estimates.study

    table = tables.difference_table(study, estimates)

    def gap(setting, column):
        return estimates.gap(setting, "none", column)

    assert study.baseline == "none"
    settings = [study.chosen[mode] for mode in ("aux", "shared")]
    # A saving is a difference already.
    left_out = ("funnel_cost_saving", "alignment_ratio")
    columns = [name for name in tables.important_columns(study) if name not in left_out]
    assert_numbers(table, settings, columns, gap)


def test_rows_are_sorted_and_say_whether_they_need_scores(tmp_path):
    passed = {"oracle": 5, "top_rate": 320, "show_rate": 350, "incumbent": 380, "random": 1900}
    rows = [
        sweeps.teacher_row(),
        {"mode": "none", "passed": 400},
        {"mode": "shared", "passed": 300},
        {"mode": "aux", "distill_loss": "topk:stage", "passed": 340},
        *(sweeps.reference_row(name, at) for name, at in passed.items()),
        # Unknown numbers are last.
        sweeps.reference_row("popularity", np.nan),
    ]
    study = sweeps.study_of(tmp_path, rows)
    estimates = Estimates(study)
    table = tables.main_table(study, estimates, tables.comparison(study, estimates))
    found = table.cells[["mode", "scores", "passed for 99%"]].itertuples(index=False, name=None)
    assert list(found) == [
        ("oracle", "", "5"), ("teacher", "", "10"), ("shared", "yes", "300"),
        ("top_rate", "yes", "320"), ("aux", "no", "340"), ("show_rate", "no", "350"),
        ("incumbent", "no", "380"), ("none", "no", "400"), ("random", "", "1900"),
        ("popularity", "no", ""),
    ]  # fmt: skip


def test_the_tuning_table_has_every_setting_and_the_choices(estimates):
    study, cells = estimates.study, tables.tuning_table(estimates.study).cells
    rows = study.rows[study.rows["split"] == "validation"]
    groups = rows.groupby("setting", sort=False)["passed_for_99"]
    assert len(cells) == len(groups) == 9
    for text, (_, values) in zip(cells["passed for 99%"], groups, strict=True):
        assert_cell(text, interval(values.to_numpy()), 0)
    chosen = cells[cells[""] == "chosen"]
    assert chosen[["mode", "serves", "weight"]].to_numpy().tolist() == [
        ["none", "user", ""], ["aux", "teacher", "1"], ["shared", "user", "1"],
    ]  # fmt: skip


def test_the_tuning_table_says_where_halving_stopped_a_setting(tmp_path):
    halving = {"sweep.halving": (300,)}
    workdir = sweeps.write_sweep(tmp_path, modes=("none", "shared"), changes=halving)
    sweeps.change(workdir, _stop_the_small_weight)
    (study,) = read_studies([workdir])
    table = tables.tuning_table(study)
    assert list(table.cells["steps"]) == ["1500", "300, stopped", "1500"]
    assert "halving stopped it" in table.notes[-1]


def _stop_the_small_weight(rows):
    is_stopped = (rows["mode"] == "shared") & (rows["distill_weight"] == 0.3)
    return rows.assign(step=np.where(is_stopped, 300, 1500))


def assert_costs(estimates, *, teacher, request, aux, none):
    """The savings and the cost of mode aux in the cost table, from costs by hand."""
    study = estimates.study
    cells = tables.cost_table(study, estimates).cells.set_index("")
    assert list(cells.index) == ["only the teacher", *study.chosen.values()]
    assert list(cells.iloc[0])[1:3] == ["150,000", "100%"]
    means = cells.loc[study.chosen["aux"]].str.partition(" ±")[0]
    for target in (95, 99):
        passed = study.tested.pivot(index="repeat", columns="mode", values=f"passed_for_{target}")
        cost = request + 2000 * aux + teacher * passed["aux"]
        saved = 1 - cost / (request + 2000 * none + teacher * passed["none"])
        assert float(means[f"saving at {target}%"]) == pytest.approx(saved.mean(), abs=5e-4)
    share = 100 * cost.mean() / (request + 2000 * teacher)
    assert float(means["funnel's cost (%)"]) == pytest.approx(share, abs=0.05)


def test_the_cost_table_has_the_value_for_users(estimates):
    cells = tables.cost_table(estimates.study, estimates).cells
    for measure in estimates.study.users_measures[1:]:
        for setting in estimates.study.chosen.values():
            text = cells.set_index("").loc[setting, tables.title_of(measure)]
            assert text == tables.mean_text(estimates.of(setting, measure), 4)


def test_the_cost_table_in_flops_by_hand(estimates):
    (note, *_) = tables.cost_table(estimates.study, estimates).notes

    assert "in the units of costs" not in note
    assert_costs(estimates, teacher=150_000, request=0, aux=900, none=800)


def test_the_share_of_the_cost_has_one_decimal(estimates):
    cells = tables.cost_table(estimates.study, estimates).cells
    shares = cells["funnel's cost (%)"][1:]
    assert shares.str.fullmatch(r"\d+\.\d ± \d+\.\d").all()


def test_the_cost_table_in_own_costs_by_hand(tmp_path):
    changes = {
        "costs.teacher.candidate": 3.0,
        "costs.teacher.request": 500.0,
        "costs.student.candidate": 0.1,
    }
    estimates = sweeps.estimates_of(tmp_path, changes=changes)

    (note, *_) = tables.cost_table(estimates.study, estimates).notes

    assert "in the units of costs" in note
    assert_costs(estimates, teacher=3, request=500, aux=0.1, none=0.1)


def test_a_table_in_every_format():
    cells = pd.DataFrame({"a_b": ["x & y", "z"], "n": ["−0.5 ± 0.1", ""], "k": ["1,000", "20%"]})
    best = pd.DataFrame({"a_b": [False, False], "n": [True, False], "k": [False, False]})
    table = tables.Table("title", cells, ["note"], best)
    assert table.numeric == [False, True, True]
    assert table.markdown().splitlines()[2:5] == [
        "| a_b       | n              | k     |",
        "|-----------|----------------|-------|",
        "| x &amp; y | **−0.5 ± 0.1** | 1,000 |",
    ]
    assert table.latex().splitlines()[2:7] == [
        r"\begin{tabular}{lrr}", r"\toprule", r"a\_b & n & k \\", r"\midrule",
        r"x \& y & \bfseries $-$0.5 $\pm$ 0.1 & 1,000 \\",
    ]  # fmt: skip
    for text in (table.markdown(), table.latex()):
        assert "title" in text
        assert "note" in text


HOSTILE = "<img src=x>|*[y](z)\n\\input{w} & $1"


def hostile_table():
    """A table in which the title, a column, a marked cell and a note are names from a log."""
    cells, best = pd.DataFrame({HOSTILE: [HOSTILE]}), pd.DataFrame({HOSTILE: [True]})
    return tables.Table(HOSTILE, cells, [HOSTILE], best)


def test_markdown_shows_names_as_they_are():
    shown = r"&lt;img src=x&gt;\|\*\[y\](z) \\input{w} &amp; $1"
    lines = hostile_table().markdown().splitlines()
    row = f"**{shown}**"
    assert lines == [
        f"# {shown}", "", f"| {shown:{len(row)}} |", f"|{'-' * (len(row) + 2)}|", f"| {row} |",
        "", shown,
    ]  # fmt: skip


def test_latex_shows_names_as_they_are():
    comment = r"% <img src=x>|*[y](z) \input{w} & $1"
    shown = r"<img src=x>|*[y](z) \textbackslash input\{w\} \& \$1"
    assert hostile_table().latex().splitlines() == [
        comment, comment, r"\begin{tabular}{l}", r"\toprule", rf"{shown} \\", r"\midrule",
        rf"\bfseries {shown} \\", r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
