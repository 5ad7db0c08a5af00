import numpy as np
import pandas as pd

from kd_ranker.evaluation import results
from kd_ranker.evaluation.metrics import ReportAt
from kd_ranker.report import tables

TASKS = ("watch",)
REPORT_AT = ReportAt((30,), (0.99,))


def frame_of(tmp_path, rows):
    path = tmp_path / results.FILE
    path.write_text(results.to_csv(rows, results.columns(TASKS, REPORT_AT)))
    return results.read_csv(path)


def row(mode, seed, auc, **more):
    return {
        "dataset": "d", "role": "student", "mode": mode, "serve": "user", "seed": seed,
        "distill_loss": None if mode == "none" else "bce",
        "distill_weight": 0.0 if mode == "none" else 1.0,
        "user_auc/watch": auc, "user_bce/watch": 0.1, "passed_for_99": 100.0 + seed, **more,
    }  # fmt: skip


def cells(text):
    return [line.split() for line in text.splitlines()]


def test_seeds_become_a_mean_and_its_standard_error(tmp_path):
    aucs = (0.61, 0.67, 0.75)
    rows = [
        {"dataset": "d", "role": "teacher", "serve": "user", "user_auc/watch": 0.9},
        *(row("none", seed, auc) for seed, auc in enumerate(aucs)),
        row("shared", 0, 0.8),
    ]
    header, teacher, none, shared = cells(tables.summary_table(frame_of(tmp_path, rows), 30))
    assert header[:4] == ["model", "serve", "weight", "seeds"]
    assert teacher[:4] == ["teacher", "user", "1", "0.900"]
    error = np.std(aucs, ddof=1) / np.sqrt(3)
    assert none[:4] == ["none", "user", "3", f"{np.mean(aucs):.3f}±{error:.3f}"]
    # Whole requests need no digits.
    assert f"101±{1 / np.sqrt(3):.0f}" in none
    assert shared[:5] == ["shared", "user", "1", "1", "0.800"]


def test_only_rows_that_differ_in_nothing_but_the_seed_are_joined(tmp_path):
    rows = [
        row("aux", 0, 0.1),
        row("aux", 0, 0.2, serve="blend"),
        row("aux", 0, 0.3, distill_weight=2.0),
        row("aux", 0, 0.4, distill_loss="other"),
        row("aux", 0, 0.5, dataset="other"),
        row("aux", 1, 0.3),
    ]
    lines = cells(tables.summary_table(frame_of(tmp_path, rows), 30))[1:]
    assert len(lines) == 5
    assert "0.200±0.100" in lines[0]


def test_the_text_ends_with_where_the_results_lie(tmp_path):
    frame_of(tmp_path, [row("none", 0, 0.5)])
    text = tables.results_text(tmp_path, 30)
    assert text.endswith(f"results: {tmp_path / results.FILE}")


def test_what_a_sweep_varies_keeps_rows_apart_and_seeds_and_data_seeds_count(tmp_path):
    rows = [
        row("shared", seed, 0.5, temperature=temperature, data_seed=data_seed, learning_rate=0.1)
        for temperature in (1.0, 2.0)
        for seed in (0, 1)
        for data_seed in (0, 1)
    ]
    rows[0]["non_finite_step"] = 7
    frame = pd.DataFrame(rows).reindex(
        columns=[*rows[0], *set(results.columns(TASKS, REPORT_AT)).difference(rows[0])]
    )
    header, one, two = cells(tables.summary_table(frame, 30))
    # A learning rate that all have is not worth a column.
    assert header[:5] == ["model", "serve", "weight", "temperature", "seeds"]
    assert one[:5] == ["shared", "user", "1", "1", "3"]
    assert two[:5] == ["shared", "user", "1", "2", "4"]


def test_losses_that_a_sweep_varies_are_told_apart(tmp_path):
    rows = [row("none", 0, 0.5, distill_loss=None), row("shared", 0, 0.5, distill_loss="bce")]
    header, *_ = cells(tables.summary_table(frame_of(tmp_path, rows), 30))
    assert header[:3] == ["model", "serve", "weight"]
    rows.append(row("shared", 0, 0.5, distill_loss="softmax"))
    header, _, one, two = cells(tables.summary_table(frame_of(tmp_path, rows), 30))
    assert header[:4] == ["model", "serve", "weight", "loss"]
    assert one[:4] == ["shared", "user", "1", "bce"]
    assert two[:4] == ["shared", "user", "1", "softmax"]


def test_whatever_a_sweep_varies_is_told_apart_and_only_seeds_are_averaged(tmp_path):
    rows = [
        row("shared", seed, 0.5 + 0.1 * (width == 8)) | {"student.width": width}
        for width in (8, 16)
        for seed in (0, 1)
    ]
    frame = frame_of(tmp_path, rows).assign(**{"student.width": [8, 8, 16, 16]})
    header, one, two = cells(tables.summary_table(frame, 30))
    assert header[:5] == ["model", "serve", "weight", "width", "seeds"]
    assert (one[3:5], two[3:5]) == (["8", "2"], ["16", "2"])
