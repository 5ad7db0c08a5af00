"""The setting that the answer describes; the choice within a way is in the tests of savings."""

import math

import pytest

from kd_ranker.report import choices
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.study import read_studies
from tests.report import sweeps


def study_of(tmp_path, *rows):
    (study,) = read_studies([sweeps.write_rows(tmp_path, [sweeps.teacher_row(), *rows])])
    return study


def test_the_best_with_scores_is_chosen_on_validation_of_all_ways(tmp_path):
    study = study_of(
        tmp_path,
        {"mode": "none", "passed": 10},
        {"mode": "shared", "weight": 1.0, "passed": 310, "test": {"passed": 100}},
        {"mode": "shared", "weight": 3.0, "passed": 290, "test": {"passed": 900}},
        {"mode": "aux", "passed": 300, "test": {"passed": 100}},
    )
    assert choices.best_with_scores(study) == "shared, weight 3"


def test_a_student_of_the_stage_needs_no_scores_and_one_with_another_term_does(tmp_path):
    losses = {"topk:stage": 20, "topk:stage+bce": 200, "softmax": 300}
    study = study_of(
        tmp_path,
        {"mode": "none", "passed": 400},
        *({"mode": "aux", "distill_loss": loss, "passed": passed, "member": loss}
          for loss, passed in losses.items()),
    )  # fmt: skip
    assert study.baseline == "aux, weight 1, loss topk:stage"
    assert choices.best_with_scores(study) == "aux, weight 1, loss topk:stage+bce"


def test_without_a_student_with_scores_there_is_none(tmp_path):
    assert choices.best_with_scores(study_of(tmp_path, {"mode": "none"})) is None


def test_without_a_baseline_the_best_with_scores_is_found(tmp_path):
    study = study_of(tmp_path, {"mode": "aux", "true_value": 0.9, "true_value_for": 0.9})
    assert study.baseline is None
    assert choices.best_with_scores(study) == "aux, weight 1"


def of_users(passed, lost, noise=0.0):
    """Rows of three repeats: what users lose at 99% on validation, against 0.9 of the baseline."""
    return [
        {"seed": seed, "passed": passed, "true_value": 0.9,
         "true_value_for": 0.9 - lost + noise * (seed - 1),
         # The test must not decide.
         "test": {"true_value_for": 0.9 + lost}}
        for seed in range(3)
    ]  # fmt: skip


def ways_of(tmp_path, losses, noise=0.0):
    """A study of mode none, of shared at 100 passed and of aux at 120, with these losses."""
    ways = {"none": (400, 0.0, 0.0), "shared": (100, losses[0], noise), "aux": (120, losses[1], 0)}
    rows = [{"mode": mode} | row for mode, of in ways.items() for row in of_users(*of)]
    return study_of(tmp_path, *rows)


@pytest.mark.parametrize(
    ("losses", "noise", "kept", "chosen"),
    [
        ((0.0, 0.0), 0.0, ["aux", "shared"], "shared"),
        # A loss within the margin of 0.002 is none, and so is a gain.
        ((0.0019, -0.1), 0.0, ["aux", "shared"], "shared"),
        ((0.0021, 0.001), 0.0, ["aux"], "aux"),
        # No loss on average, and not sure: 2.48 standard errors of 0.002 / √3 are 0.005.
        ((0.0, 0.001), 0.002, ["aux"], "aux"),
        # If none is left, all take part.
        ((0.01, 0.01), 0.0, [], "shared"),
    ],
)
def test_a_cheaper_setting_that_loses_users_is_passed_over(tmp_path, losses, noise, kept, chosen):
    study = ways_of(tmp_path, losses, noise)
    names = ("aux, weight 1", "shared, weight 1")
    assert [name.split(",")[0] for name in names if choices.keeps_users(study, name)] == kept
    assert choices.best_with_scores(study) == f"{chosen}, weight 1"


def test_the_margin_is_that_of_the_config(tmp_path):
    study = ways_of(tmp_path, (0.01, 0.0))
    assert choices.best_with_scores(study) == "aux, weight 1"
    assert choices.best_with_scores(study._replace(margin=0.02)) == "shared, weight 1"


def test_users_against_a_list_that_is_the_best_without_scores(tmp_path):
    rows = [{"mode": mode} | row for mode in ("none", "shared") for row in of_users(400, 0.05)]
    for lost, kept in ((0.06, True), (0.0, False)):
        of_list = sweeps.reference_row("show_rate", 300, true_value=0.9, true_value_for=0.9 - lost)
        study = study_of(tmp_path, of_list, *rows)
        assert study.baseline == "show_rate"
        assert choices.keeps_users(study, "shared, weight 1") == kept


@pytest.mark.parametrize(
    ("known", "measure", "at_target"),
    [
        ({"true_value": 0.9}, "true_value_captured@30", ["true_value_for_99"]),
        # Labels of a log cannot tell funnels that pass different numbers.
        ({"true_value": None}, "covered_user_value@30", []),
        ({}, "covered_user_value@30", []),
    ],
)
def test_labels_measure_users_where_the_truth_is_unknown(tmp_path, known, measure, at_target):
    study = study_of(tmp_path, {"mode": "none"} | known)
    assert choices.users_measure(study) == measure
    assert choices.users_at_target(study) == at_target


def test_the_change_for_users_is_paired_over_the_repeats_of_validation(tmp_path):
    study = ways_of(tmp_path, (0.01, 0.001), noise=0.002)
    # −0.010, −0.012 and −0.008: 4.303 · 0.002 / √3.
    half = 4.302653 * 0.002 / 3**0.5
    change = choices.users_change(study, "shared, weight 1")
    assert change[:4] == pytest.approx((-0.01, -0.01 - half, -0.01 + half, 3))


def test_one_repeat_is_never_sure(tmp_path):
    rows = ({"mode": mode} | of_users(400, -0.1)[0] for mode in ("none", "shared"))
    study = study_of(tmp_path, *rows)
    change = choices.users_change(study, "shared, weight 1")
    assert (change.mean, change.n) == (0, 1)
    assert math.isnan(change.low)
    assert not choices.keeps_users(study, "shared, weight 1")
    # None is sure, so all take part.
    assert choices.best_with_scores(study) == "shared, weight 1"


def test_without_the_truth_no_change_is_known_and_every_setting_takes_part(tmp_path):
    covered = {"covered": 0.5, "coverage": 0.9}
    study = study_of(
        tmp_path, {"mode": "none"} | covered, {"mode": "shared"} | covered | {"covered": 0.1}
    )
    assert choices.users_change(study, "shared, weight 1") is None
    assert choices.keeps_users(study, "shared, weight 1")


def test_the_cheapest_funnel_is_taken_and_not_the_one_that_passes_fewest(tmp_path):
    # 2000 · 4 + 120 · 200 = 32,000 FLOPs against 2000 · 10 + 90 · 200 = 38,000.
    sizes = [
        {"mode": "shared", "student.width": width, "flops": flops, "passed": passed,
         "member": str(width)}
        for width, flops, passed in ((8, 4.0, 120), (32, 10.0, 90))
    ]  # fmt: skip
    rows = [{"mode": "none", "passed": 400, "student.width": 8}, *sizes]
    assert choices.best_with_scores(study_of(tmp_path / "a", *rows)) == "shared, weight 1, width 8"
    # What a candidate costs is unknown without a teacher: fewest passed.
    (study,) = read_studies([sweeps.write_rows(tmp_path / "b", rows)])
    assert choices.best_with_scores(study) == "shared, weight 1, width 32"


def test_coverage_is_the_least_of_both_and_unknown_with_todays_ranker(tmp_path):
    rows = [
        sweeps.reference_row("incumbent", 500, coverage=0.9),
        *({"mode": mode, "seed": seed, "coverage": of_mode + 0.1 * seed}
          for mode, of_mode in (("none", 0.7), ("shared", 0.2)) for seed in (0, 1)),
    ]  # fmt: skip
    study = study_of(tmp_path / "a", *rows)
    estimates = Estimates(study)
    shared = "shared, weight 1"
    assert choices.coverage(study, estimates, ["none"]) == pytest.approx(0.75)
    assert choices.coverage(study, estimates, [shared, "none"]) == pytest.approx(0.25)
    assert choices.coverage(study, estimates, [shared, "none"]) < choices.COVERED
    # Its own choice of what was passed makes its covered value far too low.
    assert math.isnan(choices.coverage(study, estimates, [shared, "incumbent"]))
    study = study_of(tmp_path / "b", *(row | {"true_value": 0.9} for row in rows))
    assert choices.coverage(study, Estimates(study), [shared, "incumbent"]) == 1
