"""What is left if the final ranker times out: the line and the table."""

import math

import pytest

from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.tables import mean_text, percents
from kd_ranker.reporting.timeout import timeout_sentence, timeout_table, timeout_users
from tests.reporting import sweeps

AT_SHOWN = "value_captured@10"


def estimates_by_hand(tmp_path, **columns):
    """Two repeats of two students, an incumbent and a random order; `columns` are of all."""
    held = {"none": (0.60, 0.62), "shared": (0.70, 0.72)}
    rows = [
        {"mode": mode, "seed": seed, AT_SHOWN: value, "value_captured@30": 0.9,
         "passed": 80.0 if mode == "shared" else 100.0, **columns}
        for mode, values in held.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip
    references = {"incumbent": 0.55, "random": 0.01}
    rows += [
        sweeps.reference_row(name, 500.0, **{AT_SHOWN: value}) for name, value in references.items()
    ]
    study = sweeps.study_of(tmp_path, [sweeps.teacher_row() | {AT_SHOWN: 1.0}, *rows])
    return Estimates(study)


def test_the_line_compares_with_scores_without_and_today(tmp_path):
    estimates = estimates_by_hand(tmp_path)
    mean, low, high = percents(estimates.of(estimates.study.best_with_scores, AT_SHOWN))
    assert mean == "71"
    assert timeout_sentence(estimates.study, estimates) == (
        "If the final ranker times out, users get the early ranker's own top 10. Its share of the "
        f"final value: 71% (95% interval {low} to {high}%) with the scores, 61% without "
        "the scores, 55% with today's ranker. The scores change it by +10.0 to +10.0 points."
    )


def test_the_line_has_an_interval_over_requests_too(estimates):
    study = estimates.study
    held = estimates.of(study.best_with_scores, AT_SHOWN)
    assert held.covers == "both"
    mean, low, high = percents(held)
    sentence = timeout_sentence(study, estimates)
    assert f"{mean}% (95% interval {low} to {high}%) with the scores" in sentence


def test_the_line_names_an_incumbent_once_and_leaves_out_what_is_missing(tmp_path):
    rows = [
        sweeps.teacher_row(),
        {"mode": "shared", "passed": 80.0, AT_SHOWN: 0.7},
        sweeps.reference_row("incumbent", 90.0, **{AT_SHOWN: 0.5}),
    ]
    study = sweeps.study_of(tmp_path, rows)
    assert study.baseline == study.incumbent == "incumbent"
    sentence = timeout_sentence(study, Estimates(study))
    assert sentence.endswith(": 70% with the scores, 50% without the scores.")


def test_results_of_earlier_releases_have_no_line_and_no_table(tmp_path):
    rows = [sweeps.teacher_row(), {"mode": "none"}, {"mode": "shared"}]
    study = sweeps.study_of(tmp_path, rows)
    estimates = Estimates(study)
    assert timeout_sentence(study, estimates) == ""
    assert timeout_table(study, estimates) is None


def test_the_table_has_each_ranker_once_the_most_first(estimates):
    study = estimates.study
    table = timeout_table(study, estimates)
    cells = table.cells
    assert set(cells[""]) == set(estimates.settings)
    held = [estimates.of(setting, AT_SHOWN).mean for setting in cells[""]]
    assert held == sorted(held, reverse=True)
    columns = {
        "value at timeout": AT_SHOWN,
        "true value at timeout": "true_value_captured@10",
        f"value@{study.passed}": f"value_captured@{study.passed}",
    }
    assert list(cells) == ["", *columns]
    for title, measure in columns.items():
        expected = [mean_text(estimates.of(setting, measure), 4) for setting in cells[""]]
        assert list(cells[title]) == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, "covered_user_value@10"),
        ({"true_value": 0.9}, "true_value_captured@10"),
        ({"served_ndcg@30": 0.4}, "user_ndcg"),
        ({"true_value": math.nan, "served_ndcg@30": math.nan}, "covered_user_value@10"),
    ],
)
def test_what_users_have_is_measured_by_what_is_known(tmp_path, columns, expected):
    estimates = estimates_by_hand(tmp_path, **columns, **{expected: 0.123})
    assert timeout_users(estimates.study) == expected
    table = timeout_table(estimates.study, estimates)
    _, _, users, _ = table.cells
    first = table.cells.set_index("").loc["shared, weight 1", users]
    assert first.startswith("0.1230")
    says_no_evidence = any("no evidence" in note for note in table.notes)
    assert says_no_evidence == expected.startswith("covered")
