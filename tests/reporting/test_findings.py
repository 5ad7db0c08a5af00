"""What figures show, by hand."""

import re

import numpy as np
import pandas as pd

from kd_ranker.evaluation.metrics.registry import title_of
from kd_ranker.reporting import findings
from kd_ranker.reporting.estimates import Estimates
from tests.reporting import sweeps
from tests.reporting.test_answer import partly_scored


def test_only_whole_intervals_count_as_saving_and_as_keeping_users():
    data = pd.DataFrame(
        {"saving_low": [0.1, 0.2, -0.1, np.nan], "users_low": [-0.001, -0.003, 0.0, 0.0]}
    )
    assert findings.saving_methods(data, margin=0.002) == (
        "With 95% confidence, 2 of 4 methods save against the best without, and 1 save and keep "
        "users within 0.2%."
    )


def test_the_best_of_two_losses_may_be_one_method_or_two():
    data = pd.DataFrame(
        {"line": ["a", "b"], "user_bce": [0.2, 0.3], "teacher_bce": [0.5, 0.4]}, index=[7, 7]
    )
    assert (
        findings.best_of_losses(data)
        == "“a” predicts users best, and “b” follows the teacher best."
    )
    same = data.assign(teacher_bce=[0.3, 0.4])
    assert findings.best_of_losses(same) == "“a” predicts users best, and follows the teacher best."


LINES = pd.DataFrame(
    {
        "line": ["x", "y", "x", "y", "x", "y"],
        "step": [30, 30, 10, 10, 20, 20],
        "loss": [1.0, 3.0, 2.0, 2.5, 6.0, 2.0],
    }
)


def test_a_line_falls_if_its_last_step_is_below_its_first():
    assert findings.falling_losses(LINES, "loss") == (
        "The loss of 1 of 2 methods ends lower than it began."
    )


def test_the_largest_rise_is_from_a_step_to_the_next_of_the_same_line():
    assert findings.largest_rise(LINES, "loss") == (
        "The largest rise between two logged steps is by a factor of 3.0: “x”."
    )
    assert findings.largest_rise(LINES[LINES["step"] == 10], "loss") == ""


def test_the_waterfall_says_how_many_fewer_candidates(estimates):
    study = estimates.study
    passed = study.tested.groupby("setting")["passed_for_99"].mean()
    share = 1 - passed[study.best_with_scores] / passed[study.baseline]
    word = "fewer" if share >= 0 else "more"
    sentence = findings.fewer_candidates(study, estimates)
    assert f"{abs(share):.0%} {word} than the best without" in sentence


def test_curves_say_what_is_kept_at_the_size_of_the_funnel(estimates):
    study = estimates.study
    column = f"value_captured@{study.passed}"
    kept = study.tested.groupby("setting")[column].mean()[study.best_with_scores]
    sentence = findings.share_kept(study, estimates, "value_captured")
    assert sentence.startswith(
        f"If {study.passed} pass, it is {kept:.1%} with the best with scores"
    )
    assert findings.share_kept(study, estimates, "unknown") == ""


def test_savings_at_other_targets_are_shown_or_not(estimates):
    study = estimates.study
    sentence = findings.savings_at_targets(study, estimates)
    shown, _, others = sentence.partition("The scores are not shown")
    for target in estimates.targets:
        saved = estimates.cost_saved(study.best_with_scores, target)
        text = f"{100 * target:g}%: "
        assert (text in shown) == (target != 0.99 and saved.low > 0)
        assert (text in others) == (target != 0.99 and not saved.low > 0)


def test_a_measure_is_worse_if_its_whole_interval_is(estimates):
    """A measure that is better when lower, one when higher, and one without a direction."""
    study = estimates.study
    sentence = findings.worse_measures(study, estimates)
    worse = {"higher": -1, "lower": 1}
    directions = {"survival@200": "higher", "user_bce/watch": "lower", "user_auc/watch": "higher"}
    for measure, better in directions.items():
        change = estimates.gap(study.best_with_scores, study.baseline, measure)
        is_worse = change.scaled(worse[better]).low > 0
        assert (title_of(measure) in sentence) == is_worse
    # Of these, the two on users are worse, and the one on the teacher is not.
    assert "AUC watch" in sentence
    assert "survival@200" not in sentence


def test_a_statement_that_fails_by_several_measures_is_named_once():
    claims = pd.DataFrame(
        {
            "statement": ["a", "a", "b", "c"],
            "verdict": ["does not hold", "does not hold", "holds", "does not hold"],
        }
    )
    assert (
        findings.failed_claims(claims) == "Claims that do not hold, by one measure or more: a; c."
    )
    assert findings.failed_claims(claims[claims["verdict"] == "holds"]) == ""


def test_the_waterfall_says_what_passes_today_and_what_keeps_as_much(estimates):
    study = estimates.study
    sentence = findings.fewer_candidates(study, estimates)
    kept = estimates.of("incumbent", "value_captured@200").mean
    assert f"keeps {kept:.0%} of the final value with the 200 that pass" in sentence
    rankers = {"the best with scores": study.best_with_scores, "the best without": study.baseline}
    for name, setting in rankers.items():
        number = int(re.search(f"{name} needs (\\d+)( and |\\.$)", sentence)[1])
        curve = estimates.curve(setting, "value_captured")
        assert number >= curve.loc[curve["mean"] < kept, "k"].max()
        assert number <= curve.loc[curve["mean"] >= kept, "k"].min()


def test_a_log_with_some_scores_says_nothing_of_today_and_of_other_targets(tmp_path):
    rows = [row | {"value_captured@30": 1.0} for row in partly_scored(passed_auc=0.6)]
    study = sweeps.study_of(tmp_path, rows)
    estimates = Estimates(study)
    assert estimates.are_partly_scored
    assert "keeps" not in findings.fewer_candidates(study, estimates)
    assert findings.savings_at_targets(study, estimates) == ""


def test_without_intervals_no_measure_is_called_worse_or_not(tmp_path):
    rows = [sweeps.teacher_row(), {"mode": "none", "passed": 400}, {"mode": "aux", "passed": 300}]
    study = sweeps.study_of(tmp_path, rows)
    assert study.best_with_scores is not None
    assert findings.worse_measures(study, Estimates(study)) == ""


def test_the_saving_over_today_is_of_the_compute(estimates):
    study = estimates.study
    cost = pd.concat([study.rows, study.references])
    cost = cost[cost["split"] == "test"].pivot_table("funnel_cost", "repeat", "setting")
    saved = (1 - cost[study.best_with_scores] / cost["incumbent"]).mean()
    sentence = findings.saved_over_today(study, estimates)
    assert f"saves {saved:.0%} of the funnel's compute" in sentence


def test_a_chosen_number_at_an_end_of_its_grid_is_named(tmp_path):
    """The weight of mode shared, which the best with scores has, is in the middle or at an end."""
    rows = [sweeps.teacher_row(), {"mode": "none", "passed": 400}]
    rows += [{"mode": "shared", "weight": 0.3, "passed": 330}]
    rows += [{"mode": "shared", "weight": 1.0, "passed": 300}]
    study = sweeps.study_of(tmp_path / "end", rows)
    assert findings.at_an_end(study) == (
        "At an end of the values tried, so a better one may lie beyond: weight 1 of the best with "
        "scores (tried: 0.3, 1)."
    )
    rows += [{"mode": "shared", "weight": 3.0, "passed": 320}]
    assert findings.at_an_end(sweeps.study_of(tmp_path / "middle", rows)) == ""


def test_a_worse_end_to_end_hit_rate_is_explained(tmp_path):
    rows = [sweeps.teacher_row()]
    for mode, passed, hit_rate in (("none", 400, 0.8), ("shared", 300, 0.7)):
        rows += [
            {"mode": mode, "seed": seed, "passed": passed + seed, "user_auc/watch": 0.7 + seed / 50,
             "end_to_end_hit_rate@30/watch": hit_rate + seed / 100 * (mode == "none")}
            for seed in range(3)
        ]  # fmt: skip
    study = sweeps.study_of(tmp_path, rows)
    sentence = findings.worse_measures(study, Estimates(study))
    assert "end-to-end hit rate@30 watch (" in sentence
    assert sentence.endswith("so it falls with almost any change.")
