import math

import numpy as np
import pytest

from kd_ranker.report.claims import RULES, claims, verdict
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import Interval, interval
from kd_ranker.report.study import read_studies
from tests.report import sweeps


def claims_on(tmp_path, *settings, references=()):
    """The claims on settings given as (what they are, what varies by seed: name -> values).

    Mode none predicts users better than chance, unless a setting gives its AUC.
    """
    rows = [sweeps.teacher_row(), *references]
    for setting, by_seed in settings:
        repeats = len(next(iter(by_seed.values())))
        rows += [
            {"user_auc/watch": 0.7}
            | setting
            | {"seed": seed}
            | {name: values[seed] for name, values in by_seed.items()}
            for seed in range(repeats)
        ]
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    return claims(study, Estimates(study))


def of(frame, claim, contains=""):
    lines = frame[(frame["claim"] == claim) & frame["statement"].str.contains(contains)]
    return lines.to_dict("records")


@pytest.mark.parametrize(
    ("low", "high", "n", "side", "expected"),
    [
        (0.1, 0.2, 3, "below", "holds"),
        (0.1, 0.2, 3, "above", "does not hold"),
        (0.3, 0.4, 3, "below", "does not hold"),
        (0.3, 0.4, 3, "above", "holds"),
        (0.2, 0.3, 3, "below", "undecided"),
        (0.2, 0.3, 3, "above", "undecided"),
        (math.nan, math.nan, 1, "below", "undecided"),
        (math.nan, math.nan, 0, "below", "not measured"),
    ],
)
def test_a_verdict_follows_from_the_interval(low, high, n, side, expected):
    assert verdict(Interval((low + high) / 2, low, high, n), side, 0.25) == expected


@pytest.mark.parametrize(
    ("ratios", "expected", "remark"),
    [
        ([0.20, 0.21, 0.19], "holds", ""),
        ([0.30, 0.31, 0.32], "does not hold", ""),
        ([0.20, 0.30, 0.24], "undecided", ""),
        ([0.20], "undecided", "one repeat gives no interval"),
        # A student that is better than its teacher is not misaligned.
        ([-0.3, -0.32, -0.31], "does not hold", "better than this teacher"),
        # The ratio of an exact copy of the teacher is 0 over 0.
        ([math.nan, math.nan], "not measured", "agrees with the teacher"),
    ],
)
def test_a_misalignment_without_distillation(tmp_path, ratios, expected, remark):
    frame = claims_on(tmp_path, ({"mode": "none"}, {"alignment": ratios}))
    line, of_bce = of(frame, "a")
    assert (of_bce["measure"], of_bce["verdict"]) == ("alignment_ratio_bce", "not measured")
    assert (line["verdict"], line["threshold"]) == (expected, 0.25)
    assert remark in line["remark"]
    assert bool(remark) == bool(line["remark"])
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    assert (line["mean"], line["low"], line["high"], line["n"]) == pytest.approx(
        interval(np.array(known))[:4], nan_ok=True
    )


def test_a_also_has_the_ratio_of_the_post(tmp_path):
    ratios = {"alignment": [0.9, 0.91, 0.92], "alignment_ratio_bce": [0.1, 0.11, 0.12]}
    frame = claims_on(tmp_path, ({"mode": "none"}, ratios))
    assert [(line["measure"], line["verdict"]) for line in of(frame, "a")] == [
        ("alignment_ratio", "does not hold"), ("alignment_ratio_bce", "holds"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("of_none", "of_teacher", "expected"),
    [
        ([0.70, 0.71, 0.69], 0.8, "holds"),
        # A constant, and one whose interval includes 0.5.
        ([0.5, 0.5, 0.5], 0.8, "does not hold"),
        ([0.50, 0.56, 0.52], 0.8, "does not hold"),
        ([0.70, 0.71, 0.69], 0.49, "does not hold"),
    ],
)
def test_a_does_not_hold_for_a_ranker_that_predicts_users_by_chance(
    tmp_path, of_none, of_teacher, expected
):
    rows = [
        sweeps.teacher_row() | {"user_auc/watch": of_teacher},
        *({"mode": "none", "seed": seed, "alignment": 0.1, "user_auc/watch": area}
          for seed, area in enumerate(of_none)),
    ]  # fmt: skip
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    line, _ = of(claims(study, Estimates(study)), "a")
    assert line["verdict"] == expected
    assert ("by chance" in line["remark"]) == (expected != "holds")


def test_b_each_mode_against_the_best_without_scores_as_validation_chose(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"tau": [0.40, 0.30, 0.20], "passed": [400] * 3}),
        # Closer in every repeat, though the repeats differ more than the modes.
        ({"mode": "aux"}, {"tau": [0.42, 0.32, 0.21], "passed": [300] * 3}),
        # Further away at the best weight, closer at another one.
        ({"mode": "shared", "weight": 1.0}, {"tau": [0.38, 0.27, 0.18], "passed": [200] * 3}),
        (
            {"mode": "shared", "weight": 9.0, "test": {"passed": 1}},
            {"tau": [0.50, 0.40, 0.30], "passed": [300] * 3},
        ),
    )
    (aux,), (shared,) = of(frame, "b", "aux"), of(frame, "b", "shared")
    assert aux["verdict"] == "holds"
    assert aux["mean"] == pytest.approx(0.05 / 3)
    assert shared["setting"] == "shared, weight 1"
    assert shared["verdict"] == "does not hold"


@pytest.mark.parametrize("name", ["show_rate", "top_rate", "static_list"])
def test_b_to_g_are_against_a_list_where_that_is_better(tmp_path, name):
    """Also against one that needs scores, though it is no ranker without scores."""
    settings = (
        ({"mode": "none"}, {"tau": [0.2, 0.2], "passed": [400, 401], "survival": [0.6, 0.6]}),
        ({"mode": "shared"}, {"tau": [0.3, 0.3], "passed": [300, 301], "survival": [0.7, 0.7]}),
    )
    better, worse = (
        claims_on(
            tmp_path / str(passed), *settings,
            references=[sweeps.reference_row(name, passed, tau=0.35, survival=0.75)],
        )
        for passed in (250, 401)
    )  # fmt: skip
    lines = better[better["setting"] == "shared, weight 1"].set_index("measure")
    for measure, mean in (
        ("teacher_tau", -0.05), ("survival@30", -0.05), ("passed_for_99", 50.5),
        # 2000 · 10 + 300.5 · 200 FLOPs against 250 · 200.
        ("funnel_cost_saving", 1 - (20_000 + 300.5 * 200) / 50_000),
    ):  # fmt: skip
        assert set(lines.loc[[measure], "verdict"]) == {"does not hold"}
        assert lines.loc[[measure], "mean"].to_numpy() == pytest.approx(mean)
    assert of(worse, "b", "shared")[0]["mean"] == pytest.approx(0.1)
    assert of(worse, "e", "fewer")[1]["mean"] == pytest.approx(-100)


def test_the_share_of_a_candidates_cost_is_that_of_the_costs_where_they_are_given(tmp_path):
    settings = (
        ({"mode": "none"}, {"tau": [0.2, 0.21]}), ({"mode": "aux"}, {"tau": [0.3, 0.31]}),
    )  # fmt: skip
    rows = [sweeps.teacher_row()] + [
        setting | {"seed": seed} | {name: values[seed] for name, values in by_seed.items()}
        for setting, by_seed in settings
        for seed in (0, 1)
    ]
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    for of_student, expected in ((0.0, "holds"), (0.05, "holds"), (0.06, "does not hold")):
        costs = study.costs._replace(teacher=1.0, student=of_student)
        priced = study._replace(costs=costs)
        (line,) = of(claims(priced, Estimates(priced)), "b", "aux")
        assert line["verdict"] == expected
    assert "it costs 6% of the final ranker per candidate" in line["remark"]


def test_numbers_are_those_of_the_test(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none", "test": {"tau": 0.2, "alignment": 0.3}}, {"tau": [0.1, 0.1]}),
        ({"mode": "aux", "test": {"tau": 0.5}}, {"tau": [0.1, 0.1]}),
    )
    assert of(frame, "a")[0]["mean"] == pytest.approx(0.3)
    assert of(frame, "b", "aux")[0]["mean"] == pytest.approx(0.3)


def test_c_shared_against_aux_all_else_equal_over_all_weights_on_validation(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"tau": [0.3, 0.3]}),
        ({"mode": "aux", "weight": 1.0, "test": {"tau": 0.9}}, {"tau": [0.40, 0.39]}),
        ({"mode": "aux", "weight": 1.0, "serve": "teacher"}, {"tau": [0.59, 0.59]}),
        ({"mode": "aux", "weight": 3.0}, {"tau": [0.40, 0.39]}),
        ({"mode": "shared", "weight": 1.0}, {"tau": [0.50, 0.49]}),
        ({"mode": "shared", "weight": 3.0}, {"tau": [0.44, 0.43]}),
        # Without a counterpart.
        ({"mode": "shared", "weight": 9.0}, {"tau": [0.59, 0.59]}),
    )
    user, teacher = of(frame, "c")
    assert user["mean"] == pytest.approx((0.1 + 0.04) / 2)
    assert (user["verdict"], user["setting"]) == ("holds", "mean over 2 settings, on validation")
    assert teacher["mean"] == pytest.approx(-(0.09 + 0.10) / 2)
    assert teacher["verdict"] == "does not hold"


def test_c_a_difference_of_tau_within_a_hundredth_is_equivalent(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"tau": [0.3, 0.3, 0.3]}),
        ({"mode": "aux"}, {"tau": [0.400, 0.410, 0.400]}),
        ({"mode": "shared"}, {"tau": [0.401, 0.4105, 0.4015]}),
    )
    user, teacher = of(frame, "c")
    assert user["verdict"] == "equivalent"
    assert "±0.01" in user["remark"]
    # There are no teacher's heads.
    assert teacher["verdict"] == "not measured"


def test_d_the_saving_counts_the_students_own_cost(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"flops": [10.0] * 3, "passed": [400, 420, 440]}),
        ({"mode": "shared"}, {"flops": [10.0] * 3, "passed": [300, 322, 338]}),
        # 20,000 FLOPs of candidates that pass no longer pay for 200,000 of the student.
        ({"mode": "aux"}, {"flops": [110.0] * 3, "passed": [300, 322, 338]}),
    )
    (shared,), (aux,) = of(frame, "d", "shared"), of(frame, "d", "aux")
    # 20,000 FLOPs, and 200 of each that passes: of 100, 104 and 108 thousand.
    assert shared["mean"] == pytest.approx((20 / 100 + 19.6 / 104 + 20.4 / 108) / 3)
    assert (shared["verdict"], aux["verdict"]) == ("holds", "does not hold")


def test_e_survival_and_fewer_passed(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"survival": [0.70, 0.75, 0.80], "passed": [400, 380, 360]}),
        ({"mode": "aux"}, {"survival": [0.75, 0.79, 0.86], "passed": [300, 290, 250]}),
        ({"mode": "shared"}, {"survival": [0.60, 0.66, 0.69], "passed": [390, 400, 355]}),
    )
    survives = {line["setting"]: line["verdict"] for line in of(frame, "e", "survive")}
    passed = {line["setting"]: line["verdict"] for line in of(frame, "e", "fewer")}
    assert survives == {"aux, weight 1": "holds", "shared, weight 1": "does not hold"}
    assert passed == {"aux, weight 1": "holds", "shared, weight 1": "undecided"}


def with_users(tmp_path, measure, none, aux, passed=300, coverage=0.9):
    of_both = {"coverage": [coverage] * len(none)}
    return of(
        claims_on(
            tmp_path,
            ({"mode": "none"}, of_both | {measure: none, "passed": [400] * len(none)}),
            ({"mode": "aux"}, of_both | {measure: aux, "passed": [passed] * len(aux)}),
        ),
        "f",
        "aux",
    )[0]


# A margin of 0.002: differences that rise, that are sure to be small, that fall, and that vary.
@pytest.mark.parametrize(
    ("aux", "of_truth", "of_labels"),
    [
        ([0.92, 0.93, 0.92], "holds", "holds"),
        # Labels have a sign and no size, so that no loss of them is small.
        ([0.8995, 0.9095, 0.8996], "holds", "does not hold"),
        ([0.9, 0.91, 0.9], "holds", "undecided"),
        ([0.89, 0.90, 0.89], "does not hold", "does not hold"),
        ([0.88, 0.93, 0.90], "undecided", "undecided"),
    ],
)
@pytest.mark.parametrize("knows_truth", [True, False])
def test_f_users_keep_what_they_have_unless_it_falls(
    tmp_path, knows_truth, aux, of_truth, of_labels
):
    measure = "true_value" if knows_truth else "covered"
    line = with_users(tmp_path, measure, [0.9, 0.91, 0.9], aux)
    assert line["verdict"] == (of_truth if knows_truth else of_labels)
    assert line["threshold"] == (-0.002 if knows_truth else 0)
    assert line["measure"] == {"true_value": "true_value_captured@30"}.get(
        measure, "covered_user_value@30"
    )


@pytest.mark.parametrize(("coverage", "expected"), [(0.35, "holds"), (0.34, "not measured")])
def test_f_labels_that_cover_too_little_measure_nothing(tmp_path, coverage, expected):
    line = with_users(tmp_path, "covered", [0.5, 0.51], [0.6, 0.61], coverage=coverage)
    assert line["verdict"] == expected
    assert (line["remark"] == "the log cannot show it: too little coverage") == (
        expected != "holds"
    )


def test_f_labels_cannot_compare_with_todays_ranker(tmp_path):
    of_labels = {"covered": [0.5, 0.51], "coverage": [0.9, 0.9]}
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, of_labels | {"passed": [400, 400]}),
        ({"mode": "aux"}, of_labels | {"passed": [300, 300]}),
        references=[sweeps.reference_row("incumbent", 350, covered=0.1, coverage=0.9)],
    )
    (line,) = of(frame, "f", "aux")
    assert line["verdict"] == "not measured"
    left_out = "candidates that today's early ranker left out have no labels"
    assert line["remark"] == f"the log cannot show it: {left_out}"


@pytest.mark.parametrize(
    ("passed", "expected"),
    [
        ([410, 410, 411], "does not hold"),
        ([400, 400, 400], "undecided"),
        ([300, 500, 350], "undecided"),
        # It never reaches 99%, so that what it saves is unknown.
        ([math.nan] * 3, "not measured"),
    ],
)
def test_f_holds_for_no_way_without_a_saving(tmp_path, passed, expected):
    """A saving that is merely unknown does not make the claim false."""
    same = [0.9, 0.91, 0.9]
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"true_value": same, "passed": [400] * 3}),
        # Validation chooses it.
        ({"mode": "aux"}, {"true_value": same, "test": [{"passed": of} for of in passed]}),
    )
    (line,) = (line for line in of(frame, "f", "aux") if line["measure"].endswith("@30"))
    assert (line["verdict"], line["remark"]) == (expected, "no saving is shown")


def test_f_what_is_not_measured_or_undecided_stays_so_where_the_saving_is_unknown(tmp_path):
    for name, aux, expected in (
        ("unknown", [math.nan] * 3, "not measured"), ("varies", [0.88, 0.93, 0.90], "undecided"),
        ("falls", [0.80, 0.81, 0.80], "does not hold"),
    ):  # fmt: skip
        line = with_users(tmp_path / name, "true_value", [0.9, 0.91, 0.9], aux, passed=410)
        assert line["verdict"] == expected
        assert line["remark"] != "no saving is shown"


def test_f_has_a_line_where_each_passes_what_it_needs(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none", "true_value": 0.9, "true_value_for": 0.9}, {"passed": [400] * 3}),
        ({"mode": "aux", "true_value": 0.9, "true_value_for": 0.8}, {"passed": [300] * 3}),
    )
    assert {line["measure"]: line["verdict"] for line in of(frame, "f", "aux")} == {
        "true_value_captured@30": "holds", "true_value_for_99": "does not hold",
    }  # fmt: skip


def test_f_without_either_measure_it_is_not_measured(tmp_path):
    line = with_users(tmp_path, "survival", [0.9, 0.9], [0.9, 0.9])
    assert line["verdict"] == "not measured"


def test_g_each_way_at_its_best_against_none(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"passed": [400, 410, 420]}),
        ({"mode": "shared", "weight": 1.0}, {"passed": [300, 312, 321]}),
        ({"mode": "shared", "weight": 2.0}, {"passed": [500, 500, 500]}),
        ({"mode": "shared", "distill_loss": "topk"}, {"passed": [450, 462, 471]}),
        ({"mode": "aux"}, {"passed": [390, 420, 420]}),
    )
    assert {line["setting"]: line["verdict"] for line in of(frame, "g")} == {
        "shared, weight 1, loss bce": "holds",
        "shared, weight 1, loss topk": "does not hold",
        "aux, weight 1, loss bce": "undecided",
    }
    assert of(frame, "g", "topk")[0]["mean"] == pytest.approx(51)


def test_g_each_regime_at_its_best_where_there_are_several(tmp_path):
    settings = [
        (stage, mode, loss, passed)
        for stage, of_stage in (
            ("passed", (400, 500, 320)), ("retrieved", (400, 300, 310)),
        )
        for (mode, loss), passed in zip(
            (("none", None), ("shared", "bce"), ("shared", "topk")), of_stage, strict=True
        )
    ]  # fmt: skip
    frame = claims_on(
        tmp_path,
        *(
            (
                {"mode": mode, "distill_loss": loss, "teacher.stage": stage,
                 "member": f"{stage}{mode}{loss}"},
                {"passed": [passed, passed + 1]},
            )
            for stage, mode, loss, passed in settings
        ),
    )  # fmt: skip
    found = of(frame, "g", "in training")
    assert {line["setting"]: round(line["mean"]) for line in found} == {
        "shared, weight 1, loss topk, stage passed": -80,
        "shared, weight 1, loss bce, stage retrieved": -100,
    }
    assert "scores the passed in training" in found[0]["statement"]


def test_without_the_other_modes_their_claims_are_not_measured(tmp_path):
    frame = claims_on(tmp_path, ({"mode": "none"}, {"alignment": [0.2, 0.21]}))
    others = frame[frame["claim"] != "a"]
    assert set(others["verdict"]) == {"not measured"}
    lacking = "there is no measured student of mode aux that learns from scores"
    assert of(frame, "b", "aux")[0]["remark"] == lacking


def test_without_a_baseline_only_c_can_be_tested(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "aux"}, {"tau": [0.3, 0.31]}),
        ({"mode": "shared"}, {"tau": [0.4, 0.41]}),
    )
    measured = frame[frame["verdict"] != "not measured"]
    assert list(measured["claim"]) == ["c"]
    assert of(frame, "e")[0]["remark"] == "there is no measured ranker without scores"


def test_one_repeat_decides_nothing(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"tau": [0.3], "alignment": [0.2], "true_value": [0.9]}),
        ({"mode": "aux"}, {"tau": [0.4], "survival": [0.9], "true_value": [0.9]}),
        ({"mode": "shared"}, {"tau": [0.5], "survival": [0.9], "true_value": [0.9]}),
    )
    assert set(frame["verdict"]) == {"undecided", "not measured"}
    assert "one repeat gives no interval" in of(frame, "b")[0]["remark"]


def test_every_claim_has_a_rule_for_the_page(tmp_path):
    frame = claims_on(
        tmp_path, ({"mode": "none"}, {"tau": [0.3]}), ({"mode": "shared"}, {"tau": [0.3]})
    )
    assert list(frame["claim"].unique()) == list(RULES)


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
    "a random order": {
        "tau": [0.001, -0.002, 0.002], "passed": [1980, 1978, 1983],
        "survival": [0.014, 0.016, 0.015], "true_value": [0.41, 0.40, 0.42],
        "true_value_for": [0.99, 0.989, 0.991],
    },
}  # fmt: skip


def held_by(tmp_path, aux, shared):
    """The claims that hold, of each mode, in a sweep with these students; claim (a) is of none.

    The ratio of mode none is that of a teacher whose probabilities are true: its excess loss on
    users is its distance from the teacher.
    """
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, WITHOUT | {"alignment": [1.0, 0.99, 1.01]}),
        *(
            ({"mode": mode} | of_mode, student)
            for mode, serves, student in (
                ("aux", ("user", "teacher"), aux), ("shared", ("user",), shared),
            )
            for serve in serves
            for of_mode in [{"serve": serve, "member": f"{mode}{serve}"}]
        ),
        references=[sweeps.reference_row("show_rate", **LIST)],
    )  # fmt: skip
    held = frame[frame["verdict"] == "holds"]
    return {
        mode: set(held.loc[held["setting"].str.startswith(mode), "claim"])
        | set(held.loc[(held["claim"] == "c") & (mode == "shared"), "claim"])
        for mode in ("aux", "shared")
    }


def test_a_list_that_needs_scores_in_a_students_place_passes_no_claim(tmp_path):
    """Also where no list without scores was measured."""
    as_student = {name: [value] * 3 for name, value in LIST.items()} | {"flops": [0.01] * 3}
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, WITHOUT),
        ({"mode": "shared"}, as_student),
        references=[sweeps.reference_row("top_rate", **LIST)],
    )
    of_shared = frame[frame["setting"] == "shared, weight 1"]
    assert set(of_shared["claim"]) == set("bdefg")
    assert "holds" not in set(of_shared["verdict"])
    # Without the list it would pass for a student.
    frame = claims_on(tmp_path / "b", ({"mode": "none"}, WITHOUT), ({"mode": "shared"}, as_student))
    assert "holds" in set(frame["verdict"])


@pytest.mark.parametrize("name", IMPOSTORS)
def test_no_claim_holds_for_an_impostor(tmp_path, name):
    student = IMPOSTORS[name]
    for place, (aux, shared) in enumerate(
        [(student, student), (student, HONEST), (HONEST, student)]
    ):
        held = held_by(tmp_path / str(place), aux, shared)
        for mode, of_mode in (("aux", aux), ("shared", shared)):
            assert of_mode is HONEST or not held[mode], (name, mode)


def test_an_honest_student_passes_them(tmp_path):
    held = held_by(tmp_path, HONEST, HONEST)
    assert held == {"aux": set("bdefg"), "shared": set("bdefg")}
