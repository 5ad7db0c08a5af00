import math

import pandas as pd
import pytest

from configs import cascade
from kd_ranker.evaluation import results
from kd_ranker.evaluation.metrics import ReportAt

TASKS = ("watch", "like")


def test_the_columns_are_the_contracts_in_its_order():
    assert results.columns(TASKS, ReportAt((10, 50), (0.99, 0.995))) == [
        "dataset", "split", "role", "mode", "distill_loss", "distill_weight", "temperature",
        "learning_rate", "serve", "seed", "data_seed", "step",
        "user_bce/watch", "user_bce/like", "user_auc/watch", "user_auc/like",
        "user_calibration/watch", "user_calibration/like", "teacher_bce/watch", "teacher_bce/like",
        "teacher_kl/watch", "teacher_kl/like", "teacher_kl_shown/watch", "teacher_kl_shown/like",
        "alignment_ratio", "alignment_ratio_bce", "survival@10", "survival@50",
        "value_captured@10", "value_captured@50", "true_value_captured@10",
        "true_value_captured@50", "shown_recall@10", "shown_recall@50",
        "hit_rate@10/watch", "hit_rate@10/like", "hit_rate@50/watch", "hit_rate@50/like",
        "end_to_end_hit_rate@10/watch", "end_to_end_hit_rate@10/like",
        "end_to_end_hit_rate@50/watch", "end_to_end_hit_rate@50/like",
        "teacher_ndcg", "teacher_tau", "passed_for_99", "passed_for_99.5",
        "flops_per_candidate", "cost_ratio", "funnel_cost_saving", "unseen_users", "unseen_items",
        "non_finite_step", "member",
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


def test_a_row_tells_the_loss_with_what_it_learns_from():
    config = cascade.get_config("small")
    config.distill.mode, config.distill.loss = "aux", "softmax"
    assert results.made_of(config)["distill_loss"] == "softmax"
    config.teacher.signal = "stage"
    assert results.made_of(config)["distill_loss"] == "softmax:stage"
    config.distill.terms = ("topk", "bce:logged")
    assert results.made_of(config)["distill_loss"] == "topk:stage+bce"
    config.distill.mode = "none"
    assert results.made_of(config)["distill_loss"] is None
    config.sweep.axes.teacher.signal = ("logged", "stage")
    assert results.swept_columns(config) == []


def row(role, mode, seed, passed, flops, **more):
    distilled = mode not in (None, "", "none")
    return {
        "dataset": "d", "role": role, "mode": mode, "seed": seed, "passed_for_99": passed,
        "flops_per_candidate": flops, "learning_rate": 0.01, "data_seed": 0, "serve": "user",
        "distill_loss": "bce" if distilled else None, "distill_weight": float(distilled),
        "temperature": 1.0 if distilled else None, **more,
    }  # fmt: skip


def savings_of(*rows):
    frame = pd.DataFrame([row("teacher", None, 0, 10.0, 200.0), *rows])
    return results.fill_savings(frame, 2000)["funnel_cost_saving"].tolist()[1:]


def test_savings_of_a_case_worked_by_hand():
    savings = savings_of(
        # 2000 · 10 + 200 · 200 = 60,000
        row("student", "none", 0, 200.0, 10.0),
        # 2000 · 10 + 125 · 200 = 45,000: a quarter less
        row("student", "shared", 0, 125.0, 10.0),
        # 2000 · 12 + 240 · 200 = 72,000: a fifth more
        row("student", "aux", 0, 240.0, 12.0),
        # The baseline of its own seed: 2000 · 10 + 400 · 200 = 100,000
        row("student", "none", 1, 400.0, 10.0),
        row("student", "shared", 1, 200.0, 10.0),
        # Whatever its learning rate.
        row("student", "shared", 0, 125.0, 10.0, learning_rate=0.02),
        # No baseline of this seed, of this order of the data.
        row("student", "shared", 2, 200.0, 10.0),
        row("student", "shared", 0, 200.0, 10.0, data_seed=1),
    )
    expected = [0.0, 0.25, -0.2, 0.0, 0.4, 0.25]
    assert savings[:6] == pytest.approx(expected)
    assert all(map(math.isnan, savings[6:]))


def test_of_several_undistilled_students_the_best_on_average_is_the_baseline():
    savings = savings_of(
        # 40,000 and 60,000 FLOPs at one rate, 50,000 and 100,000 at the other.
        row("student", "none", 0, 100.0, 10.0, learning_rate=0.02),
        row("student", "none", 1, 200.0, 10.0, learning_rate=0.02),
        row("student", "none", 0, 150.0, 10.0),
        row("student", "none", 1, 400.0, 10.0),
        row("student", "shared", 0, 50.0, 10.0),
        row("student", "shared", 1, 50.0, 10.0),
    )
    assert savings == pytest.approx([0, 0, 1 - 50 / 40, 1 - 100 / 60, 1 - 30 / 40, 1 - 30 / 60])


def test_a_student_that_never_captures_99_percent_has_no_saving():
    none, aux = savings_of(
        row("student", "none", 0, 200.0, 10.0), row("student", "aux", 0, math.nan, 10.0)
    )
    assert none == 0
    assert math.isnan(aux)


def test_runs_are_joined_as_they_were_written(tmp_path):
    columns = results.columns(TASKS, ReportAt((10,), (0.99,)))
    teacher = row("teacher", "", 0, 10.0, 200.0, member="teacher")
    runs = [
        [teacher, row("student", "none", 0, 200.0, 10.0, member="none-seed0")],
        [teacher, row("student", "shared", 0, 125.0, 10.0, member="shared", step=7)],
    ]
    for index, rows in enumerate(runs):
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / results.FILE).write_text(results.to_csv(rows, columns))
        curves = [{"member": row["member"], "k": 1, "survival": 1 / 3} for row in rows]
        (folder / results.CURVES_FILE).write_text(
            results.to_csv(curves, results.curves_columns(TASKS))
        )
        (folder / results.CALIBRATION_FILE).write_text("member\n")
    joined = results.join([tmp_path / "0", tmp_path / "1"], 2000, {})
    expected = [teacher, *(rows[1] for rows in runs)]
    savings = [math.nan, 0.0, 0.25]
    assert joined[results.FILE] == results.to_csv(
        [row | {"funnel_cost_saving": s} for row, s in zip(expected, savings, strict=True)],
        columns,
    )
    assert [line.split(",")[0] for line in joined[results.CURVES_FILE].splitlines()] == [
        "member", "teacher", "none-seed0", "shared",
    ]  # fmt: skip


def test_cost_is_told_beside_the_teachers():
    told = results.with_cost({"mode": "none"}, 10.0, 200.0)
    assert told == {"mode": "none", "flops_per_candidate": 10.0, "cost_ratio": 0.05}
