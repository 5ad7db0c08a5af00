"""The setting that the answer describes; the choice within a way is in the tests of savings."""

import math

import pytest

from kd_ranker.report import choices
from kd_ranker.report.estimates import Estimates
from tests.report import sweeps

SHARED, AUX = "shared, weight 1", "aux, weight 1"


def study_of(tmp_path, *rows):
    return sweeps.study_of(tmp_path, [sweeps.teacher_row(), *rows])


@pytest.mark.parametrize(
    ("students", "expected"),
    [
        # Of all ways the best on validation, and the test must not matter.
        ([{"mode": "none", "passed": 10},
          {"mode": "shared", "weight": 1.0, "passed": 310, "test": {"passed": 100}},
          {"mode": "shared", "weight": 3.0, "passed": 290, "test": {"passed": 900}},
          {"mode": "aux", "passed": 300, "test": {"passed": 100}}], "shared, weight 3"),
        # A student of the stage needs no scores; one with another term does.
        ([{"mode": "none", "passed": 400},
          *({"mode": "aux", "distill_loss": loss, "passed": passed, "member": loss}
            for loss, passed in (("topk:stage", 20), ("topk:stage+bce", 200), ("softmax", 300)))],
         "aux, weight 1, loss topk:stage+bce"),
        ([{"mode": "none"}], None),
        # Without a baseline.
        ([{"mode": "aux", "true_value": 0.9, "true_value_for": 0.9}], AUX),
        # The cheapest funnel and not the one that passes fewest:
        # 2000 · 4 + 120 · 200 = 32,000 FLOPs against 2000 · 10 + 90 · 200 = 38,000.
        ([{"mode": "none", "passed": 400, "student.width": 8},
          *({"mode": "shared", "student.width": width, "flops": flops, "passed": passed,
             "member": str(width)} for width, flops, passed in ((8, 4.0, 120), (32, 10.0, 90)))],
         "shared, weight 1, width 8"),
    ],
)  # fmt: skip
def test_the_best_with_scores(tmp_path, students, expected):
    assert choices.best_with_scores(study_of(tmp_path, *students)) == expected


def test_without_a_teacher_the_cost_is_unknown_and_the_fewest_passed_are_best(tmp_path):
    rows = [
        {"mode": "shared", "weight": weight, "flops": flops, "passed": passed}
        for weight, flops, passed in ((8.0, 4.0, 120), (32.0, 10.0, 90))
    ]
    study = sweeps.study_of(tmp_path, [{"mode": "none", "passed": 400}, *rows])
    assert choices.best_with_scores(study) == "shared, weight 32"


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
        ((0.0, 0.0), 0.0, [AUX, SHARED], SHARED),
        # A loss within the margin of 0.002 is none, and so is a gain.
        ((0.0019, -0.1), 0.0, [AUX, SHARED], SHARED),
        ((0.0021, 0.001), 0.0, [AUX], AUX),
        # No loss on average, and not sure: 2.48 standard errors of 0.002 / √3 are 0.005.
        ((0.0, 0.001), 0.002, [AUX], AUX),
        # If none is left, all take part.
        ((0.03, 0.03), 0.0, [], SHARED),
    ],
)
def test_a_cheaper_setting_that_loses_users_is_passed_over(tmp_path, losses, noise, kept, chosen):
    study = ways_of(tmp_path, losses, noise)
    assert [name for name in (AUX, SHARED) if choices.keeps_users(study, name)] == kept
    assert choices.best_with_scores(study) == chosen
    # At a larger margin, that of the config, both keep users.
    assert choices.best_with_scores(study._replace(margin=0.02)) == SHARED


def test_the_change_for_users_is_paired_over_the_repeats_of_validation(tmp_path):
    study = ways_of(tmp_path, (0.01, 0.001), noise=0.002)
    # −0.010, −0.012 and −0.008: 4.303 · 0.002 / √3.
    half = 4.302653 * 0.002 / 3**0.5
    change = choices.users_change(study, SHARED)
    assert change[:4] == pytest.approx((-0.01, -0.01 - half, -0.01 + half, 3))


@pytest.mark.parametrize(("lost", "kept"), [(0.06, True), (0.0, False)])
def test_users_against_a_list_that_is_the_best_without_scores(tmp_path, lost, kept):
    rows = [{"mode": mode} | row for mode in ("none", "shared") for row in of_users(400, 0.05)]
    of_list = sweeps.reference_row("show_rate", 300, true_value=0.9, true_value_for=0.9 - lost)
    study = study_of(tmp_path, of_list, *rows)
    assert study.baseline == "show_rate"
    assert choices.keeps_users(study, SHARED) == kept


def test_one_repeat_is_never_sure(tmp_path):
    rows = ({"mode": mode} | of_users(400, -0.1)[0] for mode in ("none", "shared"))
    study = study_of(tmp_path, *rows)
    change = choices.users_change(study, SHARED)
    assert (change.mean, change.n, math.isnan(change.low)) == (0, 1, True)
    assert not choices.keeps_users(study, SHARED)
    # None is sure, so all take part.
    assert choices.best_with_scores(study) == SHARED


@pytest.mark.parametrize("known", [{"true_value": 0.9}, {"true_value": None}, {}])
def test_labels_measure_users_where_the_truth_is_unknown(tmp_path, known):
    rows = ({"mode": mode, "covered": of} | known for mode, of in (("none", 0.5), ("shared", 0.1)))
    study = study_of(tmp_path, *rows)
    if known.get("true_value"):
        assert choices.users_measure(study) == "true_value_captured@30"
        assert choices.users_at_target(study) == ["true_value_for_99"]
        return
    assert choices.users_measure(study) == "covered_user_value@30"
    # Labels of a log cannot compare funnels that pass different numbers: every setting takes part.
    assert choices.users_at_target(study) == []
    assert choices.users_change(study, SHARED) is None
    assert choices.keeps_users(study, SHARED)


def test_coverage_is_the_least_of_both_and_unknown_with_todays_ranker(tmp_path):
    rows = [
        sweeps.reference_row("incumbent", 500, coverage=0.9),
        *({"mode": mode, "seed": seed, "coverage": of_mode + 0.1 * seed}
          for mode, of_mode in (("none", 0.7), ("shared", 0.2)) for seed in (0, 1)),
    ]  # fmt: skip
    study = study_of(tmp_path / "a", *rows)
    estimates = Estimates(study)
    assert choices.coverage(study, estimates, ["none"]) == pytest.approx(0.75)
    assert choices.coverage(study, estimates, [SHARED, "none"]) == pytest.approx(0.25)
    assert choices.why_unlabelled(study, estimates, ["none"]) == ""
    assert "only 25%" in choices.why_unlabelled(study, estimates, [SHARED, "none"])
    # Its own choice of what was passed makes its covered value far too low.
    assert math.isnan(choices.coverage(study, estimates, [SHARED, "incumbent"]))
    assert "left out" in choices.why_unlabelled(study, estimates, [SHARED, "incumbent"])
    study = study_of(tmp_path / "b", *(row | {"true_value": 0.9} for row in rows))
    assert choices.coverage(study, Estimates(study), [SHARED, "incumbent"]) == 1
