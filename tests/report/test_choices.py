"""The setting that the answer describes; the choice within a way is in the tests of savings."""

import pytest

from kd_ranker.report import choices
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
    change = choices.users_change(study, SHARED)
    # Paired over the repeats of validation: 4.303 · noise / √3.
    half = 4.302653 * noise / 3**0.5
    expected = (-losses[0], -losses[0] - half, -losses[0] + half, 3)
    assert change[:4] == pytest.approx(expected, abs=1e-9)
    # At a larger margin, that of the config, both keep users.
    assert choices.best_with_scores(study._replace(margin=0.02)) == SHARED


@pytest.mark.parametrize(("lost", "kept"), [(0.06, True), (0.0, False)])
def test_users_against_a_list_that_is_the_best_without_scores(tmp_path, lost, kept):
    rows = [{"mode": mode} | row for mode in ("none", "shared") for row in of_users(400, 0.05)]
    of_list = sweeps.reference_row("show_rate", 300, true_value=0.9, true_value_for=0.9 - lost)
    study = study_of(tmp_path, of_list, *rows)
    assert study.baseline == "show_rate"
    assert choices.keeps_users(study, SHARED) == kept


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
