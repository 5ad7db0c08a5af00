import math

import pandas as pd
import pytest

from kd_ranker.evaluation import results

TASKS = ("watch", "like")


def test_the_columns_are_the_contracts_in_its_order():
    assert results.columns(TASKS, (10, 50)) == [
        "dataset", "role", "mode", "distill_loss", "distill_weight", "serve", "seed", "step",
        "user_bce/watch", "user_bce/like", "user_auc/watch", "user_auc/like",
        "user_calibration/watch", "user_calibration/like", "teacher_bce/watch", "teacher_bce/like",
        "teacher_kl/watch", "teacher_kl/like", "alignment_ratio", "survival@10", "survival@50",
        "value_captured@10", "value_captured@50", "true_value_captured@10",
        "true_value_captured@50", "passed_for_99", "flops_per_candidate", "cost_ratio",
        "funnel_cost_saving",
    ]  # fmt: skip


def test_unknown_numbers_are_empty_and_the_others_keep_their_form(tmp_path):
    rows = [
        {"mode": "", "seed": None, "step": None, "alignment_ratio": math.nan},
        {"mode": "none", "seed": 0, "step": 20, "alignment_ratio": 1 / 3},
    ]
    text = results.to_csv(rows, ["mode", "seed", "step", "alignment_ratio", "absent"])
    assert text == "mode,seed,step,alignment_ratio,absent\n,,,,\nnone,0,20,0.3333333,\n"
    path = tmp_path / results.FILE
    path.write_text(text)
    frame = results.read_csv(path)
    assert frame["mode"].tolist()[1] == "none"
    assert math.isnan(frame["alignment_ratio"][0])
    assert frame["alignment_ratio"][1] == pytest.approx(1 / 3)
    assert pd.isna(frame["absent"]).all()


def row(role, mode, seed, passed, flops, **more):
    return {
        "dataset": "d", "role": role, "mode": mode, "seed": seed, "passed_for_99": passed,
        "flops_per_candidate": flops, **more,
    }  # fmt: skip


def test_savings_of_a_case_worked_by_hand():
    rows = [
        row("teacher", None, 0, 10.0, 200.0),
        # 2000 · 10 + 200 · 200 = 60,000
        row("student", "none", 0, 200.0, 10.0),
        # 2000 · 10 + 125 · 200 = 45,000: a quarter less
        row("student", "shared", 0, 125.0, 10.0),
        # 2000 · 12 + 240 · 200 = 72,000: a fifth more
        row("student", "aux", 0, 240.0, 12.0),
        # The baseline of its own seed: 2000 · 10 + 400 · 200 = 100,000
        row("student", "none", 1, 400.0, 10.0),
        row("student", "shared", 1, 200.0, 10.0),
        # No baseline of this seed, and no teacher of this dataset.
        row("student", "shared", 2, 200.0, 10.0),
        row("student", "none", 0, 200.0, 10.0) | {"dataset": "other"},
    ]
    savings = [row.get("funnel_cost_saving") for row in results.with_savings(rows, 2000)]
    assert savings == [
        None, 0.0, pytest.approx(0.25), pytest.approx(-0.2), 0.0, pytest.approx(0.4), None, None,
    ]  # fmt: skip


def test_a_student_that_never_captures_99_percent_has_no_saving():
    rows = [
        row("teacher", None, 0, 10.0, 200.0),
        row("student", "none", 0, 200.0, 10.0),
        row("student", "aux", 0, math.nan, 10.0),
    ]
    assert math.isnan(results.with_savings(rows, 2000)[2]["funnel_cost_saving"])


def test_cost_is_told_beside_the_teachers():
    told = results.with_cost({"mode": "none"}, 10.0, 200.0)
    assert told == {"mode": "none", "flops_per_candidate": 10.0, "cost_ratio": 0.05}
