"""Every claim on sweeps written by hand, with the number and the verdict that it must have."""

import math

import numpy as np
import pytest

from kd_ranker.reporting.claims import claims
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.intervals import interval
from tests.reporting import sweeps
from tests.reporting.sweeps import reference_row

AUX, SHARED = "aux, weight 1", "shared, weight 1"
HOLDS, FAILS, OPEN, UNKNOWN = "holds", "does not hold", "undecided", "not measured"


def study_on(tmp_path, *settings, references=(), teacher=None):
    """The study of settings given as (its keys, the numbers that vary by seed: name -> values).

    Mode none predicts users better than chance, unless a setting gives its AUC.
    """
    rows = [sweeps.teacher_row() | (teacher or {}), *references]
    for setting, numbers_by_seed in settings:
        for seed, numbers in enumerate(zip(*numbers_by_seed.values(), strict=True)):
            row = {"user_auc/watch": 0.7, "seed": seed} | setting
            rows.append(row | dict(zip(numbers_by_seed, numbers, strict=True)))
    return sweeps.study_of(tmp_path, rows)


def claims_on(tmp_path, *settings, **options):
    study = study_on(tmp_path, *settings, **options)
    return claims(study, Estimates(study))


def lines_of(frame, claim, contains=""):
    """The lines of a claim whose statement contains a text."""
    lines = frame[(frame["claim"] == claim) & frame["statement"].str.contains(contains)]
    return lines.to_dict("records")


def test_each_claim_names_its_dataset_first(tmp_path):
    frame = claims_on(tmp_path, ({"mode": "none"}, {"passed": [400, 420, 440]}))
    assert list(frame.columns[:2]) == ["dataset", "claim"]


GOOD = [0.70, 0.71, 0.69]


@pytest.mark.parametrize(
    ("ratios", "areas_of_none", "area_of_teacher", "expected", "remark"),
    [
        ([0.20, 0.21, 0.19], GOOD, 0.8, HOLDS, ""),
        ([0.30, 0.31, 0.32], GOOD, 0.8, FAILS, ""),
        ([0.20, 0.30, 0.24], GOOD, 0.8, OPEN, ""),
        ([0.20], [0.7], 0.8, OPEN, "one repeat gives no interval"),
        # A student that is better than its teacher is not misaligned.
        ([-0.3, -0.32, -0.31], GOOD, 0.8, FAILS, "better than this teacher"),
        # The ratio of an exact copy of the teacher is 0 over 0.
        ([math.nan] * 3, GOOD, 0.8, UNKNOWN, "agrees with the teacher"),
        # An interval that includes 0.5.
        ([0.1] * 3, [0.50, 0.56, 0.52], 0.8, FAILS, "by chance"),
        ([0.1] * 3, GOOD, 0.49, FAILS, "by chance"),
    ],
)
def test_a_misalignment_without_distillation(
    tmp_path, ratios, areas_of_none, area_of_teacher, expected, remark
):
    numbers = {"alignment": ratios, "user_auc/watch": areas_of_none}
    # The ratio of the post has a line of its own.
    students = {"mode": "none", "alignment_ratio_bce": 0.1}

    frame = claims_on(tmp_path, (students, numbers), teacher={"user_auc/watch": area_of_teacher})

    line, line_of_bce = lines_of(frame, "a")
    assert line_of_bce["measure"] == "alignment_ratio_bce"
    assert line_of_bce["mean"] == pytest.approx(0.1)
    assert line["verdict"] == expected
    assert line["threshold"] == 0.25
    assert remark in line["remark"]
    known = np.array([ratio for ratio in ratios if not math.isnan(ratio)])
    numbers_of_line = (line["mean"], line["low"], line["high"], line["n"])
    assert numbers_of_line == pytest.approx(interval(known)[:4], nan_ok=True)


SAME = [400, 400, 400]
# By name: settings; and by (claim, part of its statement) the expected lines in their order: the
# setting, its verdict and its mean.
TABLE = {
    "b: at the best weight, against the best without scores": (
        [({"mode": "none"}, {"tau": [0.40, 0.30, 0.20], "passed": SAME}),
         # Closer in every repeat, though the repeats differ more than the modes.
         ({"mode": "aux"}, {"tau": [0.42, 0.32, 0.21], "passed": [300] * 3}),
         # Further away at the best weight, closer at another one.
         ({"mode": "shared"}, {"tau": [0.38, 0.27, 0.18], "passed": [200] * 3}),
         ({"mode": "shared", "weight": 9.0, "test": {"passed": 1}},
          {"tau": [0.50, 0.40, 0.30], "passed": [300] * 3})],
        {("b", "aux"): [(AUX, HOLDS, 0.05 / 3)], ("b", "shared"): [(SHARED, FAILS, -0.07 / 3)]},
    ),
    "c: all else equal, over all weights, on validation": (
        [({"mode": "none"}, {"tau": [0.3, 0.3]}),
         ({"mode": "aux", "test": {"tau": 0.9}}, {"tau": [0.40, 0.39]}),
         ({"mode": "aux", "serve": "teacher"}, {"tau": [0.59, 0.59]}),
         ({"mode": "aux", "weight": 3.0}, {"tau": [0.40, 0.39]}),
         ({"mode": "shared"}, {"tau": [0.50, 0.49]}),
         ({"mode": "shared", "weight": 3.0}, {"tau": [0.44, 0.43]}),
         # Without a counterpart.
         ({"mode": "shared", "weight": 9.0}, {"tau": [0.59, 0.59]})],
        {("c", ""): [("mean over 2 settings, on validation", HOLDS, (0.1 + 0.04) / 2),
                     ("mean over 1 setting, on validation", FAILS, -(0.09 + 0.10) / 2)]},
    ),
    "c: within a hundredth of tau": (
        [({"mode": "none"}, {"tau": [0.3, 0.3, 0.3]}),
         ({"mode": "aux"}, {"tau": [0.400, 0.410, 0.400]}),
         ({"mode": "shared"}, {"tau": [0.401, 0.4105, 0.4015]})],
        # There are no heads of the teacher.
        {("c", ""): [("mean over 1 setting, on validation", "equivalent", 0.001),
                     ("", UNKNOWN, None)]},
    ),
    "d: the saving counts the student's own cost": (
        [({"mode": "none"}, {"flops": [10.0] * 3, "passed": [400, 420, 440]}),
         ({"mode": "shared"}, {"flops": [10.0] * 3, "passed": [300, 322, 338]}),
         # 20,000 FLOPs of candidates that pass no longer pay for 200,000 of the student.
         ({"mode": "aux"}, {"flops": [110.0] * 3, "passed": [300, 322, 338]})],
        # 20,000 FLOPs, and 200 of each that passes: of 100, 104 and 108 thousand.
        {("d", "shared"): [(SHARED, HOLDS, (20 / 100 + 19.6 / 104 + 20.4 / 108) / 3)],
         ("d", "aux"): [(AUX, FAILS, None)]},
    ),
    "f: users have no less, with as many passed and with as many as needed": (
        [({"mode": "none", "true_value": 0.9, "true_value_for": 0.9}, {"passed": SAME}),
         ({"mode": "aux", "true_value": 0.9, "true_value_for": 0.8}, {"passed": [300] * 3})],
        {("f", "aux"): [(AUX, HOLDS, 0.0), (AUX, FAILS, -0.1)]},
    ),
    "g: each method at its best": (
        [({"mode": "none"}, {"passed": [400, 410, 420]}),
         ({"mode": "shared"}, {"passed": [300, 312, 321]}),
         ({"mode": "shared", "weight": 2.0}, {"passed": [500, 500, 500]}),
         ({"mode": "shared", "distill_loss": "topk"}, {"passed": [450, 462, 471]}),
         ({"mode": "aux"}, {"passed": [390, 420, 420]})],
        # As shares of what mode none needs in the same repeat.
        {("g", ""): [("shared, weight 1, loss bce", HOLDS, (100/400 + 98/410 + 99/420) / 3),
                     ("shared, weight 1, loss topk", FAILS, -(50/400 + 52/410 + 51/420) / 3),
                     ("aux, weight 1, loss bce", OPEN, (10/400 - 10/410) / 3)]},
    ),
    "without a baseline": (
        [({"mode": "aux"}, {"tau": [0.3, 0.31]}), ({"mode": "shared"}, {"tau": [0.4, 0.41]})],
        {("c", "user"): [("mean over 1 setting, on validation", HOLDS, 0.1)],
         ("e", "fewer"): [("", UNKNOWN, None)] * 2, ("b", ""): [("", UNKNOWN, None)] * 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_numbers_and_verdicts_of_claims(tmp_path, name):
    settings, expected_by_claim = TABLE[name]

    frame = claims_on(tmp_path, *settings)

    for (claim, contains), expected_lines in expected_by_claim.items():
        lines = lines_of(frame, claim, contains)
        for line, (setting, verdict, mean) in zip(lines, expected_lines, strict=True):
            assert line["setting"] == setting
            assert line["verdict"] == verdict
            if mean is not None:
                assert line["mean"] == pytest.approx(mean)
            if verdict == UNKNOWN:
                assert line["remark"]


def test_c_leaves_out_settings_that_halving_stopped(tmp_path):
    study = study_on(
        tmp_path,
        ({"mode": "none"}, {"tau": [0.3, 0.3]}),
        ({"mode": "aux"}, {"tau": [0.40, 0.41]}),
        ({"mode": "aux", "weight": 3.0}, {"tau": [0.40, 0.41]}),
        ({"mode": "shared"}, {"tau": [0.50, 0.51]}),
        # Stopped, so it is behind one that trained on.
        ({"mode": "shared", "weight": 3.0}, {"tau": [0.20, 0.21]}),
    )
    is_stopped = study.rows["setting"] == "shared, weight 3"
    study = study._replace(rows=study.rows.assign(is_stopped=is_stopped))
    line, _ = lines_of(claims(study, Estimates(study)), "c")
    assert line["setting"] == "mean over 1 setting, on validation"
    assert line["mean"] == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["show_rate", "top_rate"])
def test_b_to_g_are_against_a_list_where_that_is_better(tmp_path, name):
    """Also against one that needs scores, though it is no ranker without scores."""
    settings = (
        ({"mode": "none"}, {"tau": [0.2, 0.2], "passed": [400, 401]}),
        ({"mode": "shared"}, {"tau": [0.3, 0.3], "passed": [300, 301]}),
    )
    better_list = reference_row(name, 250, tau=0.35)
    worse_list = reference_row(name, 600, tau=0.35)

    better = claims_on(tmp_path / "better", *settings, references=[better_list])
    worse = claims_on(tmp_path / "worse", *settings, references=[worse_list])

    lines = better[better["setting"] == SHARED].set_index("measure")
    # 2000 · 10 + 300.5 · 200 FLOPs against 250 · 200.
    saving = 1 - (20_000 + 300.5 * 200) / 50_000
    fewer = 1 - 300.5 / 250
    expected = {"teacher_tau": -0.05, "fewer_for_99": fewer, "funnel_cost_saving": saving}
    for measure, mean in expected.items():
        assert set(lines.loc[[measure], "verdict"]) == {FAILS}
        assert lines.loc[[measure], "mean"].to_numpy() == pytest.approx(mean)
    assert lines_of(worse, "b", "shared")[0]["mean"] == pytest.approx(0.1)


@pytest.mark.parametrize(("cost", "expected"), [(0.05, HOLDS), (0.06, FAILS)])
def test_own_costs_decide_the_share_of_a_candidates_cost(tmp_path, cost, expected):
    none = ({"mode": "none"}, {"tau": [0.2, 0.21]})
    aux = ({"mode": "aux"}, {"tau": [0.3, 0.31]})
    study = study_on(tmp_path, none, aux)
    study = study._replace(costs=study.costs._replace(teacher=1.0, student=cost))

    frame = claims(study, Estimates(study))

    assert lines_of(frame, "b", "aux")[0]["verdict"] == expected


USERS = [0.9, 0.91, 0.9]
CANNOT, NO_SAVING = "the log cannot show it", "no saving is shown"


@pytest.mark.parametrize(
    ("measure", "aux", "options", "expected", "remark"),
    [
        # A margin of 0.002 of the truth, and none of labels: they have a sign and no size.
        ("true_value", [0.8995, 0.9095, 0.8996], {}, HOLDS, ""),
        ("covered", [0.8995, 0.9095, 0.8996], {}, FAILS, ""),
        ("true_value", [0.89, 0.90, 0.89], {}, FAILS, ""),
        # Labels have to cover what would be shown, and cannot compare with today's ranker.
        ("covered", [0.92, 0.93, 0.92], {"coverage": 0.36}, HOLDS, ""),
        ("covered", [0.92, 0.93, 0.92], {"coverage": 0.34}, UNKNOWN, CANNOT),
        ("covered", [0.92, 0.93, 0.92], {"incumbent": 350}, UNKNOWN, CANNOT),
        # Labels of items that the final ranker chose show a loss, and no gain.
        ("covered", [0.92, 0.93, 0.92], {"shown_recall": 0.5}, UNKNOWN, CANNOT),
        ("covered", [0.8995, 0.9095, 0.8996], {"shown_recall": 0.5}, FAILS, ""),
        # It holds for no way without a saving; an unknown saving does not make it false.
        ("true_value", USERS, {"passed": [410, 410, 411]}, FAILS, NO_SAVING),
        ("true_value", USERS, {"passed": SAME}, OPEN, NO_SAVING),
        ("true_value", USERS, {"passed": [math.nan] * 3}, UNKNOWN, NO_SAVING),
    ],
)
def test_f_users_keep_what_they_have(tmp_path, measure, aux, options, expected, remark):
    options = {
        "coverage": 0.9,
        "shown_recall": None,
        "passed": [300] * 3,
        "incumbent": None,
    } | options
    covered = {"coverage": options["coverage"], "shown_recall@30": options["shown_recall"]}
    references = [] if options["incumbent"] is None else [
        reference_row("incumbent", options["incumbent"], covered=0.1, coverage=0.9)
    ]  # fmt: skip
    frame = claims_on(
        tmp_path,
        ({"mode": "none"} | covered, {measure: USERS, "passed": SAME}),
        # Validation chooses it.
        ({"mode": "aux"} | covered,
         {measure: aux, "test": [{"passed": passed} for passed in options["passed"]]}),
        references=references,
    )  # fmt: skip
    line = lines_of(frame, "f", "aux")[0]
    assert line["verdict"] == expected
    assert bool(line["remark"]) == bool(remark)
    assert remark in line["remark"]
    if measure == "true_value":
        column, threshold = "true_value_captured@30", -0.002
    else:
        column, threshold = "covered_user_value@30", 0
    assert line["measure"] == column
    if not remark:
        assert line["threshold"] == threshold


# Three repeats of what a ranker without scores, and an honest student with them, would have.
WITHOUT = {
    "tau": [0.40, 0.39, 0.41], "passed": [400, 410, 405], "survival": [0.70, 0.69, 0.71],
    "true_value": [0.950, 0.951, 0.949], "true_value_for": [0.950, 0.951, 0.949],
}  # fmt: skip
HONEST = {
    "tau": [0.50, 0.492, 0.511], "passed": [300, 312, 304], "survival": [0.80, 0.792, 0.811],
    "true_value": [0.951, 0.952, 0.950], "true_value_for": [0.950, 0.951, 0.949],
    "flops": [1.0] * 3,
}  # fmt: skip
# The list `show_rate`, the best without scores, in a student's place: it costs next to nothing.
LIST = {"tau": 0.45, "passed": 380.0, "survival": 0.75, "true_value": 0.95, "true_value_for": 0.95}
IMPOSTORS = {
    "a static list": {name: [value] * 3 for name, value in LIST.items()} | {"flops": [0.01] * 3},
    # All that the teacher has, at its cost.
    "a copy of the teacher": {
        "tau": [1.0] * 3, "passed": [10] * 3, "survival": [1.0] * 3, "true_value": [1.0] * 3,
        "true_value_for": [1.0] * 3, "flops": [sweeps.TEACHER_FLOPS] * 3,
    },
    "a constant": {
        "tau": [math.nan] * 3, "passed": [1990] * 3, "survival": [0.015] * 3,
        "true_value": [0.4] * 3, "true_value_for": [0.99] * 3,
    },
}  # fmt: skip


def held_by(tmp_path, **students):
    """The claims that hold, by mode, in a sweep with these students; claim (a) is of none.

    The ratio of mode none is that of a teacher whose probabilities are true: its excess loss on
    users is its distance from the teacher.
    """
    settings = [({"mode": "none"}, WITHOUT | {"alignment": [1.0, 0.99, 1.01]})]
    for mode, head in (("aux", "user"), ("aux", "teacher"), ("shared", "user")):
        settings.append(({"mode": mode, "serve": head, "run": mode + head}, students[mode]))
    frame = claims_on(tmp_path, *settings, references=[reference_row("show_rate", **LIST)])
    held = frame[frame["verdict"] == HOLDS]
    # Claim (c) names no setting, and is about shared.
    is_of_shared = held["setting"].str.startswith("shared") | (held["claim"] == "c")
    is_of_aux = held["setting"].str.startswith("aux")
    return {
        "shared": set(held.loc[is_of_shared, "claim"]),
        "aux": set(held.loc[is_of_aux, "claim"]),
    }


@pytest.mark.parametrize("name", IMPOSTORS)
@pytest.mark.parametrize("mode", ["aux", "shared"])
def test_no_claim_holds_for_an_impostor(tmp_path, name, mode):
    students = {"aux": HONEST, "shared": HONEST} | {mode: IMPOSTORS[name]}
    assert not held_by(tmp_path, **students)[mode]


def test_an_honest_student_passes_them(tmp_path):
    held = held_by(tmp_path, aux=HONEST, shared=HONEST)
    assert held == {"aux": set("bdefg"), "shared": set("bdefg")}
