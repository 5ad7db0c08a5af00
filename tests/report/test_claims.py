import math

import numpy as np
import pytest

from kd_ranker.report.claims import RULES, claims, verdict
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
    return claims(study)


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
    (line,) = of(frame, "a")
    assert line["verdict"] == expected
    assert line["threshold"] == 0.25
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    assert (line["mean"], line["low"], line["high"], line["n"]) == pytest.approx(
        interval(np.array(known))[:4], nan_ok=True
    )


def test_a_a_student_that_is_better_than_its_teacher_is_told(tmp_path):
    frame = claims_on(tmp_path, ({"mode": "none"}, {"alignment": [-0.3, -0.32, -0.31]}))
    (line,) = of(frame, "a")
    assert line["verdict"] == "holds"
    assert "better than this teacher" in line["remark"]


def test_b_each_mode_against_none_at_the_weight_that_needs_the_fewest_passed(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"kl": [0.20, 0.30, 0.40], "passed": [400] * 3}),
        # Closer in every repeat, though the repeats differ more than the modes.
        ({"mode": "aux"}, {"kl": [0.18, 0.28, 0.39], "passed": [300] * 3}),
        # Further away at the best weight, closer at another one.
        ({"mode": "shared", "weight": 1.0}, {"kl": [0.22, 0.33, 0.42], "passed": [200] * 3}),
        ({"mode": "shared", "weight": 9.0}, {"kl": [0.10, 0.20, 0.30], "passed": [300] * 3}),
    )
    (aux,), (shared,) = of(frame, "b", "aux"), of(frame, "b", "shared")
    assert aux["verdict"] == "holds"
    assert aux["mean"] == pytest.approx(-0.05 / 3)
    assert shared["setting"] == "shared, weight 1"
    assert shared["verdict"] == "does not hold"
    assert shared["remark"] == "better on average at 1 of 2 settings; the interval excludes 0 at 1"


def test_c_shared_against_aux_at_the_same_weight_and_the_user_heads(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"kl": [0.3, 0.3]}),
        ({"mode": "aux", "weight": 1.0}, {"kl": [0.20, 0.21]}),
        ({"mode": "aux", "weight": 1.0, "serve": "teacher"}, {"kl": [0.01, 0.01]}),
        ({"mode": "aux", "weight": 3.0}, {"kl": [0.10, 0.11]}),
        ({"mode": "shared", "weight": 1.0}, {"kl": [0.15, 0.16]}),
        ({"mode": "shared", "weight": 3.0}, {"kl": [0.12, 0.13]}),
        # Without a counterpart.
        ({"mode": "shared", "weight": 9.0}, {"kl": [0.01, 0.01]}),
    )
    over_all, one, three = of(frame, "c")
    assert over_all["mean"] == pytest.approx((-0.05 + 0.02) / 2)
    assert over_all["verdict"] == "holds"
    assert (one["setting"], one["verdict"]) == ("weight 1", "holds")
    assert (three["setting"], three["verdict"]) == ("weight 3", "does not hold")


def test_d_costs_are_counted_and_need_no_repeats(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"flops": [10.0]}),
        ({"mode": "shared"}, {"flops": [10.0]}),
        ({"mode": "aux"}, {"flops": [12.0]}),
    )
    (shared,), (aux,) = of(frame, "d", "shared"), of(frame, "d", "aux")
    assert (shared["verdict"], shared["mean"]) == ("holds", 0.0)
    assert (aux["verdict"], aux["mean"]) == ("holds", pytest.approx(0.2))
    assert math.isnan(aux["low"])


def test_d_a_shared_that_costs_and_an_aux_that_does_not_contradict(tmp_path):
    frame = claims_on(
        tmp_path,
        ({"mode": "none"}, {"flops": [10.0, 10.0]}),
        ({"mode": "shared"}, {"flops": [10.5, 10.5]}),
        ({"mode": "aux"}, {"flops": [10.0, 10.0]}),
    )
    assert [line["verdict"] for line in of(frame, "d")] == ["does not hold", "does not hold"]


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
    frame = claims_on(tmp_path, ({"mode": "none"}, {"kl": [0.3]}))
    assert list(frame["claim"].unique()) == list(RULES)
