"""The tables against the numbers of the study, and in every format."""

import math

import numpy as np
import pandas as pd
import pytest

from kd_ranker.evaluation import results
from kd_ranker.report import tables
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import interval
from tests.report import sweeps


def test_the_terminal_has_a_mean_and_its_interval_on_the_test_split(tmp_path):
    aucs = (0.61, 0.67, 0.75)
    rows = [
        *(
            {"mode": "none", "seed": seed, "user_auc/watch": auc, "passed": 100.0 + seed}
            for seed, auc in enumerate(aucs)
        ),
        # Over seeds of both kinds; a member whose loss is not finite does not count.
        *(
            {"mode": "shared", "seed": seed, "data_seed": order, "student.width": width,
             "non_finite_step": 7 if seed == order == 0 and width == 8 else None,
             "user_auc/watch": 0.6, "test": {"user_auc/watch": 0.8}}
            for width in (8, 16) for seed in (0, 1) for order in (0, 1)
        ),
        sweeps.teacher_row() | {"user_auc/watch": 0.9},
        sweeps.reference_row("oracle", 9.0),
    ]  # fmt: skip
    sweeps.write_rows(tmp_path, rows)
    text, path = tables.results_text(tmp_path, 30).split("\n\nresults: ")
    assert path == str(tmp_path / results.FILE)
    header, none, narrow, wide, teacher, oracle = text.splitlines()
    assert header.split()[:5] == ["mode", "serves", "weight", "width", "seeds"]
    assert none.split()[:4] == ["none", "user", "32", "3"]
    mean = interval(np.array(aucs))
    assert f"{mean.mean:.4f} ± {mean.high - mean.mean:.4f}" in none
    # Whole candidates need no digits.
    assert f"101 ± {4.303 / np.sqrt(3):.0f}" in none
    assert narrow.split()[:5] == ["shared", "user", "1", "8", "3"]
    assert wide.split()[:5] == ["shared", "user", "1", "16", "4"]
    assert "0.800" in narrow
    assert teacher.split()[:2] == ["teacher", "1"]
    assert "0.900" in teacher
    assert oracle.split()[0] == "oracle"


class OfTable:
    """The estimates of one measure, of a table with a line a repeat and a column a setting."""

    def __init__(self, table):
        self.table = table

    def gap(self, setting, other, measure):
        return interval((self.table[setting] - self.table[other]).to_numpy())


def mark(table, direction):
    table = pd.DataFrame(table)
    means = {name: interval(table[name].to_numpy()) for name in table}
    return tables.marked(OfTable(table), "", means, direction)


CLEAR = {"a": [1.0, 1.1, 1.2], "b": [2.0, 2.1, 2.2], "c": [3.0, 3.2, 3.1]}


@pytest.mark.parametrize(
    ("table", "direction", "expected"),
    [
        (CLEAR, "lower", "a"),
        (CLEAR, "higher", "c"),
        (CLEAR, None, None),
        # Differences do not show which of two is closer to one.
        (CLEAR, "one", None),
        # The winner cannot be told from the runner-up.
        (CLEAR | {"a": [1.0, 1.4, 1.2], "b": [1.3, 1.3, 1.3]}, "lower", None),
        # It can be told from the runner-up b, and not from the noisy c.
        (CLEAR | {"b": [1.5, 1.6, 1.7], "c": [0.5, 3.0, 4.0]}, "lower", None),
        # One repeat, one setting, no pair, no difference, nothing known.
        ({"a": [1.0], "b": [2.0]}, "lower", None),
        ({"a": [1.0, 1.1]}, "lower", None),
        ({"a": [1.0, math.nan], "b": [math.nan, 2.0]}, "lower", None),
        ({"a": [1.0, 1.0], "b": [1.0, 1.0]}, "lower", None),
        ({"a": [math.nan, math.nan], "b": [math.nan, math.nan]}, "lower", None),
    ],
)
def test_the_best_is_marked_if_it_differs_from_every_other_setting(table, direction, expected):
    assert mark(table, direction) == expected


@pytest.mark.parametrize("settings", [2, 11])
@pytest.mark.parametrize("shared_noise", [0.0, 3.0])
def test_of_equal_settings_one_is_marked_in_at_most_5_percent(settings, shared_noise):
    generator = np.random.default_rng(settings)
    marks = 0
    for _ in range(400):
        noise = generator.normal(size=(3, settings)) + shared_noise * generator.normal(size=(3, 1))
        marks += mark(pd.DataFrame(noise).rename(columns=str), "higher") is not None
    # Of two equals 5% are expected; three standard errors of 400 draws are 3.3%.
    assert marks / 400 < 0.05 + 0.033


def test_the_numbers_are_means_and_paired_differences_of_the_chosen_on_test(tmp_path):
    rows = [sweeps.teacher_row()]
    for seed, (none, shared) in enumerate(((0.2, 0.15), (0.3, 0.24), (0.4, 0.36))):
        rows += [
            {"mode": "none", "seed": seed, "test": {"kl": none}},
            {"mode": "shared", "seed": seed, "passed": 50, "test": {"kl": shared}},
            {"mode": "shared", "seed": seed, "weight": 2.0, "passed": 60, "test": {"kl": 0.01}},
        ]
    study = sweeps.study_of(tmp_path, rows)
    # What the dataset does not know is no measure of the table.
    assert not {"alignment_ratio", "true_value_captured@30"} & {*tables.important_columns(study)}
    numbers = tables.comparison(study, Estimates(study))
    of_kl = numbers[numbers["measure"] == "teacher_kl/watch"].set_index("setting")
    assert list(of_kl.index) == ["none", "shared, weight 1"]
    means = ["mean", "low", "high", "n"]
    expected = interval(np.array([0.2, 0.3, 0.4]))[:4]
    assert tuple(of_kl.loc["none", means]) == pytest.approx(expected)
    assert math.isnan(of_kl.loc["none", "difference"])
    gap = ["difference", "difference_low", "difference_high", "pairs"]
    expected = interval(np.array([-0.05, -0.06, -0.04]))[:4]
    assert tuple(of_kl.loc["shared, weight 1", gap]) == pytest.approx(expected)
    assert list(of_kl["best"]) == [False, True]
    assert set(of_kl["covers"]) == {"repeats"}


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
    assert tables.difference_table(study, numbers) is None


@pytest.fixture(scope="module")
def study(estimates):
    return estimates.study


def value(text):
    """The mean in a cell."""
    return float(text.partition(" ±")[0].strip("%").replace("−", "-"))


def test_the_differences_are_those_to_the_baseline(estimates, study):
    cells = tables.difference_table(study, tables.comparison(study, estimates)).cells
    assert list(cells["mode"]) == ["aux", "shared"]
    means, found = study.tested.groupby("mode")["passed_for_99"].mean(), cells["passed for 99%"][0]
    assert value(found) == pytest.approx(means["aux"] - means["none"], abs=0.5)
    assert found.startswith("−")


def test_rows_are_sorted_by_passed_for_99_and_those_that_need_scores_are_marked(tmp_path):
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


def test_the_tuning_table_has_all_that_was_tried_and_the_choices(study):
    cells = tables.tuning_table(study).cells
    assert len(cells) == 9
    rows = study.rows[study.rows["split"] == "validation"]
    expected = rows.groupby("setting", sort=False)["passed_for_99"].mean()
    assert [value(of) for of in cells["passed for 99%"]] == pytest.approx(list(expected), abs=0.5)
    chosen = cells[cells[""] == "chosen"]
    assert chosen[["mode", "serves", "weight"]].to_numpy().tolist() == [
        ["none", "user", ""], ["aux", "teacher", "1"], ["shared", "user", "1"],
    ]  # fmt: skip


def test_the_cost_table_has_the_cost_of_99_percent_and_the_users_value_then(estimates, study):
    cells = tables.cost_table(study, estimates).cells.set_index("")
    ours = ["none", "aux (teacher), weight 1", "shared, weight 1"]
    assert list(cells.index) == ["only the teacher", *ours]
    passed = study.tested.loc[study.tested["mode"] == "shared", "passed_for_99"].mean()
    cost = cells["funnel's cost (%)"]
    assert cost["only the teacher"] == "100%"
    assert value(cost[ours[2]]) == pytest.approx(100 * (passed / 2000 + 800 / 150_000), abs=0.05)
    assert cells["FLOPs per candidate"].iloc[0] == "150,000"
    # Its true value is nearly the same curve: 0.02 more of 1.02 at the end.
    found = value(cells.loc[ours[2], "true value for 99%"])
    assert found == pytest.approx((0.99 + 0.02) / 1.02, abs=1e-3)
    # The saving at every target, by hand.
    passed = study.tested.pivot(index="repeat", columns="mode", values="passed_for_95")
    costs = 2000 * study.tested.groupby("mode")["flops_per_candidate"].mean() / 150_000 + passed
    saved = (1 - costs["shared"] / costs["none"]).mean()
    assert value(cells.loc[ours[2], "saving at 95%"]) == pytest.approx(saved, abs=5e-4)
    assert " ± " in cells.loc[ours[2], "saving at 99%"]


def test_costs_of_ones_own_take_the_place_of_flops(tmp_path):
    costs = {"costs.teacher.candidate": 3.0, "costs.teacher.request": 500.0,
             "costs.student.candidate": 0.1}  # fmt: skip
    estimates = sweeps.estimates_of(tmp_path, changes=costs)
    study = estimates.study
    table = tables.cost_table(study, estimates)
    assert "in the units of costs" in table.notes[0]
    of_aux = table.cells.set_index("").loc["aux (teacher), weight 1"]
    passed = study.tested.pivot(index="repeat", columns="mode", values="passed_for_99")
    each = 500 + 2000 * 0.1 + 3 * passed
    share = 100 * each["aux"].mean() / (500 + 2000 * 3)
    assert value(of_aux["funnel's cost (%)"]) == pytest.approx(share, abs=0.05)
    saving = (1 - each["aux"] / each["none"]).mean()
    assert value(of_aux["saving at 99%"]) == pytest.approx(saving, abs=5e-4)


def test_a_table_in_every_format():
    cells = pd.DataFrame({"a_b": ["x & y", "z"], "n": ["−0.5 ± 0.1", ""], "k": ["1,000", "20%"]})
    best = pd.DataFrame({"a_b": [False, False], "n": [True, False], "k": [False, False]})
    table = tables.Table("title", cells, ["note"], best)
    assert table.numeric == [False, True, True]
    assert table.markdown().splitlines() == [
        "# title", "",
        "| a_b   | n              | k     |",
        "|-------|----------------|-------|",
        "| x & y | **−0.5 ± 0.1** | 1,000 |",
        "| z     |                | 20%   |",
        "", "note",
    ]  # fmt: skip
    assert table.latex().splitlines() == [
        "% title", "% note", r"\begin{tabular}{lrr}", r"\toprule", r"a\_b & n & k \\",
        r"\midrule", r"x \& y & \bfseries $-$0.5 $\pm$ 0.1 & 1,000 \\", r"z &  & 20\% \\",
        r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
