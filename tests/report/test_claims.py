import math

import numpy as np
import pytest

from kd_ranker.report.claims import RULES, claims, verdict
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import Interval, interval
from kd_ranker.report.study import read_studies
from tests.report import sweeps


def claims_on(tmp_path, *settings):
    """The claims on settings given as (what they are, what varies by seed: name -> values)."""
    rows = [sweeps.teacher_row()]
    for setting, by_seed in settings:
        repeats = len(next(iter(by_seed.values())))
        rows += [
            setting | {"seed": seed} | {name: values[seed] for name, values in by_seed.items()}
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
    ("ratios", "expected"),
    [
        ([0.20, 0.21, 0.19], "holds"),
        ([0.30, 0.31, 0.32], "does not hold"),
        ([0.20, 0.30, 0.24], "undecided"),
        ([0.20], "undecided"),
        ([math.nan, math.nan], "not measured"),
    ],
)
def test_a_misalignment_without_distillation(tmp_path, ratios, expected):
    frame = claims_on(tmp_path, ({"mode": "none"}, {"alignment": ratios}))
    line, of_bce = of(frame, "a")
    assert (of_bce["measure"], of_bce["verdict"]) == ("alignment_ratio_bce", "not measured")
    assert line["verdict"] == expected
    assert line["threshold"] == 0.25
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    assert (line["mean"], line["low"], line["high"], line["n"]) == pytest.approx(
        interval(np.array(known))[:4], nan_ok=True
    )


def test_a_a_student_that_is_better_than_its_teacher_does_not_hold(tmp_path):
    frame = claims_on(tmp_path, ({"mode": "none"}, {"alignment": [-0.3, -0.32, -0.31]}))
    line, _ = of(frame, "a")
    assert line["verdict"] == "does not hold"
    assert "better than this teacher" in line["remark"]


def test_a_an_exact_copy_of_the_teacher_has_no_misalignment(tmp_path):
    """Its ratio is 0 over 0: nobody can say that it strays and costs little."""
    frame = claims_on(tmp_path, ({"mode": "none"}, {"alignment": [math.nan] * 3, "kl": [0.0] * 3}))
    line, _ = of(frame, "a")
    assert line["verdict"] == "not measured"
    assert "agrees with the teacher" in line["remark"]


def test_a_the_posts_number_stands_beside_it(tmp_path):
    frame = claims_on(
        tmp_path,
        (
            {"mode": "none"},
            {"alignment": [0.9, 0.91, 0.92], "alignment_ratio_bce": [0.1, 0.11, 0.12]},
        ),
    )
    assert [(line["measure"], line["verdict"]) for line in of(frame, "a")] == [
        ("alignment_ratio", "does not hold"), ("alignment_ratio_bce", "holds"),
    ]  # fmt: skip


def test_b_each_mode_against_none_at_the_setting_that_validation_chose(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"kl": [0.20, 0.30, 0.40], "passed": [400] * 3}),
        # Closer in every repeat, though the repeats differ more than the modes.
        ({"mode": "aux"}, {"kl": [0.18, 0.28, 0.39], "passed": [300] * 3}),
        # Further away at the best weight, closer at another one.
        ({"mode": "shared", "weight": 1.0}, {"kl": [0.22, 0.33, 0.42], "passed": [200] * 3}),
        (
            {"mode": "shared", "weight": 9.0, "test": {"passed": 1}},
            {"kl": [0.10, 0.20, 0.30], "passed": [300] * 3},
        ),
    )
    (aux,), (shared,) = of(frame, "b", "aux"), of(frame, "b", "shared")
    assert aux["verdict"] == "holds"
    assert aux["mean"] == pytest.approx(-0.05 / 3)
    assert shared["setting"] == "shared, weight 1"
    assert shared["verdict"] == "does not hold"


def test_numbers_are_those_of_the_test(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none", "test": {"kl": 0.2, "alignment": 0.3}}, {"kl": [0.1, 0.1]}),
        ({"mode": "aux", "test": {"kl": 0.5}}, {"kl": [0.1, 0.1]}),
    )
    assert of(frame, "a")[0]["mean"] == pytest.approx(0.3)
    assert of(frame, "b", "aux")[0]["mean"] == pytest.approx(0.3)


def test_c_shared_against_aux_all_else_equal_over_all_weights_on_validation(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"kl": [0.3, 0.3]}),
        ({"mode": "aux", "weight": 1.0, "test": {"kl": 0.9}}, {"kl": [0.20, 0.21]}),
        ({"mode": "aux", "weight": 1.0, "serve": "teacher"}, {"kl": [0.01, 0.01]}),
        ({"mode": "aux", "weight": 3.0}, {"kl": [0.20, 0.21]}),
        ({"mode": "shared", "weight": 1.0}, {"kl": [0.10, 0.11]}),
        ({"mode": "shared", "weight": 3.0}, {"kl": [0.16, 0.17]}),
        # Without a counterpart.
        ({"mode": "shared", "weight": 9.0}, {"kl": [0.01, 0.01]}),
    )
    user, teacher = of(frame, "c")
    assert user["mean"] == pytest.approx(-(0.1 + 0.04) / 2)
    assert (user["verdict"], user["setting"]) == ("holds", "mean over 2 settings, on validation")
    assert teacher["mean"] == pytest.approx((0.09 + 0.10) / 2)
    assert teacher["verdict"] == "does not hold"


def test_c_a_difference_within_a_tenth_of_what_none_has_is_equivalent(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"kl": [0.3, 0.3, 0.3]}),
        ({"mode": "aux"}, {"kl": [0.200, 0.210, 0.200]}),
        ({"mode": "shared"}, {"kl": [0.199, 0.2095, 0.1985]}),
    )
    user, teacher = of(frame, "c")
    assert user["verdict"] == "equivalent"
    assert "±0.03" in user["remark"]
    # There are no teacher's heads.
    assert teacher["verdict"] == "not measured"


def test_d_costs_are_counted_and_need_no_repeats(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"flops": [10.0]}),
        ({"mode": "shared"}, {"flops": [10.0]}),
        ({"mode": "aux"}, {"flops": [12.0]}),
    )
    (shared,), (aux,) = of(frame, "d", "shared"), of(frame, "d", "aux")
    assert (shared["verdict"], shared["mean"]) == ("holds", 0.0)
    assert (aux["verdict"], aux["mean"]) == ("does not hold", pytest.approx(0.2))
    assert math.isnan(aux["low"])


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


def with_users(tmp_path, measure, none, aux):
    return of(
        claims_on(tmp_path, ({"mode": "none"}, {measure: none}), ({"mode": "aux"}, {measure: aux})),
        "f",
        "aux",
    )[0]


# A margin of 0.002: differences that rise, that are sure to be small, that fall, and that vary.
@pytest.mark.parametrize(
    ("aux", "expected", "remark"),
    [
        ([0.92, 0.93, 0.92], "holds", "higher"),
        ([0.8995, 0.9095, 0.8996], "holds", "equivalent"),
        ([0.9, 0.91, 0.9], "holds", "equivalent"),
        ([0.89, 0.90, 0.89], "does not hold", "lower"),
        ([0.88, 0.93, 0.90], "undecided", "undecided"),
        ([0.9], "undecided", "undecided"),
    ],
)
@pytest.mark.parametrize("measure", ["true_value", "end_to_end_hit_rate@30/watch"])
def test_f_users_keep_what_they_have_unless_it_falls(tmp_path, measure, aux, expected, remark):
    line = with_users(tmp_path, measure, [0.9, 0.91, 0.9][: len(aux)], aux)
    assert line["verdict"] == expected
    assert line["remark"].startswith(remark)


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
    found = of(frame, "g", "the teacher speaks of")
    assert {line["setting"]: round(line["mean"]) for line in found} == {
        "shared, weight 1, loss topk, stage passed": -80,
        "shared, weight 1, loss bce, stage retrieved": -100,
    }
    assert "speaks of the passed in training" in found[0]["statement"]


def test_without_the_other_modes_their_claims_are_not_measured(tmp_path):
    frame = claims_on(tmp_path, ({"mode": "none"}, {"alignment": [0.2, 0.21]}))
    others = frame[frame["claim"] != "a"]
    assert set(others["verdict"]) == {"not measured"}
    assert of(frame, "b", "aux")[0]["remark"] == "there is no measured student of mode aux"


def test_without_a_baseline_only_c_can_be_tested(tmp_path):
    frame = claims_on(
        tmp_path, ({"mode": "aux"}, {"kl": [0.3, 0.31]}), ({"mode": "shared"}, {"kl": [0.2, 0.21]})
    )
    measured = frame[frame["verdict"] != "not measured"]
    assert list(measured["claim"]) == ["c"]
    assert of(frame, "e")[0]["remark"] == "there is no measured student of mode none"


def test_one_repeat_decides_nothing_but_costs(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"kl": [0.3], "alignment": [0.2]}),
        ({"mode": "aux"}, {"kl": [0.2], "survival": [0.9]}),
        ({"mode": "shared"}, {"kl": [0.1], "survival": [0.9]}),
    )
    decided = frame[~frame["verdict"].isin(["undecided", "not measured"])]
    assert set(decided["claim"]) == {"d"}
    assert "one repeat gives no interval" in of(frame, "b")[0]["remark"]


def test_every_claim_has_a_rule_for_the_page(tmp_path):
    frame = claims_on(
        tmp_path, ({"mode": "none"}, {"kl": [0.3]}), ({"mode": "shared"}, {"kl": [0.3]})
    )
    assert list(frame["claim"].unique()) == list(RULES)
