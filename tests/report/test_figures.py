"""The tables of the figures against the numbers of the study."""

import numpy as np
import pandas as pd
import pytest

from kd_ranker.report import charts, figures
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.study import read_studies
from tests.report import sweeps

CURVES = ["frontier", "value_captured", "true_value_captured", "survival"]


def drawn(name, estimates):
    return figures.figure(name, estimates.study, estimates)


def test_the_pareto_front_has_a_line_a_way_and_a_point_a_weight_of_it(estimates):
    data = drawn("pareto", estimates).data
    assert list(data["line"].unique()) == ["none", "aux", "shared"]
    assert list(data.loc[data["line"] == "shared", "weight"]) == [0.3, 1.0]
    # All else as it was chosen.
    assert set(data.loc[data["line"] == "aux", "serve"]) == {"teacher"}
    (none,) = data[data["mode"] == "none"].to_dict("records")
    assert np.isnan(none["weight"])
    rows = estimates.study.rows.query("setting == 'none' and split == 'validation'")
    assert none["user_bce"] == pytest.approx(rows.filter(like="user_bce/").to_numpy().mean())
    assert none["user_bce_low"] < none["user_bce"] < none["user_bce_high"]


@pytest.mark.parametrize("measure", CURVES[1:])
def test_the_curves_are_means_of_what_was_chosen_of_each_way_on_test(estimates, measure):
    data = drawn(measure, estimates).data
    # Today's early ranker is muted.
    assert list(data["line"].unique()) == ["none", "aux", "shared", "incumbent"]
    assert set(data.loc[data["mode"] == charts.REFERENCE, "line"]) == {"incumbent"}
    of_shared = data[data["line"] == "shared"].reset_index(drop=True)
    curve = estimates.curve("shared, weight 1", measure)
    pd.testing.assert_frame_equal(of_shared[list(curve)], curve)
    passed = estimates.of("shared, weight 1", "passed_for_99").mean
    assert set(of_shared["passed_for_99"]) == {passed}


def test_a_list_is_drawn_over_k_if_no_student_without_scores_needs_fewer(tmp_path):
    def needs_fewer(frame):
        list_rows = frame["member"] == "show_rate"
        return frame.assign(passed_for_99=frame["passed_for_99"].where(~list_rows, 100.0))

    folder = sweeps.change(sweeps.write_sweep(tmp_path, seeds=(0, 1)), needs_fewer)
    (study,) = read_studies([folder])
    assert study.baseline == "show_rate"
    data = drawn("value_captured", Estimates(study)).data
    assert set(data.loc[data["mode"] == charts.REFERENCE, "line"]) == {"incumbent", "show_rate"}


def test_the_waterfall_goes_from_today_to_the_best_with_scores(estimates):
    data = drawn("waterfall", estimates).data
    steps = {
        "today's early ranker": "incumbent", "mode none": "none", "best without scores": "none",
        "best with scores": estimates.study.best_with_scores,
    }  # fmt: skip
    assert dict(zip(data["line"], data["setting"], strict=True)) == steps
    for line in data.to_dict("records"):
        mean = estimates.of(line["setting"], "passed_for_99")
        assert (line["mean"], line["low"], line["high"]) == pytest.approx(mean[:3], nan_ok=True)
    assert data["mean"].iloc[0] == 1500
    assert data["mean"].is_monotonic_decreasing


def test_the_plane_has_a_mark_a_way_against_the_best_without_scores(estimates):
    study = estimates.study
    data = drawn("plane", estimates).data
    assert study.baseline == "none"
    assert list(data["line"]) == ["aux", "shared"]
    for mark in data.to_dict("records"):
        users = estimates.gap(mark["setting"], "none", "true_value_for_99")
        for name, mean in (("users", users), ("saving", estimates.saving(mark["setting"]))):
            found = [mark[f"{name}{end}"] for end in ("", "_low", "_high")]
            assert found == pytest.approx(mean[:3])
        assert mark["margin"] == -study.margin


def test_without_the_truth_there_is_no_plane(tmp_path):
    estimates = sweeps.estimates_of(tmp_path, true_values=False, seeds=(0,))
    assert drawn("plane", estimates).data.empty


def test_the_frontier_has_the_best_with_and_without_distillation_at_their_cost(estimates):
    data = drawn("frontier", estimates).data
    # Of the ways that distil the better one on validation.
    assert list(data["line"].unique()) == ["none", "aux", "incumbent"]
    at = data[data["k"] == 200].set_index("line")
    # 2000 candidates at 800 and 900 FLOPs, 200 at 150,000, over 2000 at 150,000.
    assert at.loc["none", "cost"] == pytest.approx(0.1 + 800 / 150_000)
    assert at.loc["aux", "cost"] == pytest.approx(0.1 + 900 / 150_000)
    assert at.loc["incumbent", "cost"] == pytest.approx(0.1)
    rows = estimates.study.tested
    passed = rows.loc[rows["mode"] == "none", "passed_for_99"].mean()
    assert at.loc["none", "cost_for_99"] == pytest.approx(passed / 2000 + 800 / 150_000)


def test_the_frontier_has_a_pair_a_size_of_the_student(tmp_path):
    rows = [
        {"mode": mode, "distill_loss": loss, "seed": 0, "student.width": width, "passed": passed,
         "weight": 0.0 if mode == "none" else 1.0,
         "member": f"{mode}{loss}{width}", "flops": float(width)}
        for width, of_losses in ((8, (400, 120, 130)), (32, (300, 110, 90)))
        for mode, loss, passed in zip(
            ("none", "shared", "shared"), (None, "bce", "topk"), of_losses, strict=True
        )
    ]  # fmt: skip
    study = sweeps.study_of(tmp_path, [sweeps.teacher_row(), *rows])
    chosen = study.best_of_sizes
    assert dict(zip(chosen["way"], chosen["size"], strict=True)) == {
        "none, width 8": "width 8", "none, width 32": "width 32",
        "shared, loss bce, width 8": "width 8", "shared, loss topk, width 32": "width 32",
    }  # fmt: skip
    # 2000 · 8 + 120 · 200 FLOPs are less than 2000 · 32 + 90 · 200.
    assert study.cheapest(list(chosen["setting"])) == "shared, weight 1, loss bce, width 8"


def test_the_saving_is_that_of_each_target(estimates):
    data = drawn("saving", estimates).data
    assert list(data["line"].unique()) == ["aux", "shared"]
    shared = data[data["line"] == "shared"].set_index("target")
    for target in (95, 99):
        of_table = estimates.saving("shared, weight 1", target / 100)
        assert tuple(shared.loc[target, ["mean", "low", "high"]]) == pytest.approx(of_table[:3])
    assert (data["target"].min(), data["target"].max()) == pytest.approx((95, 99.9))
    assert (data["low"] < data["high"]).all()


def test_where_the_truth_is_not_known_users_labels_are_drawn(tmp_path):
    estimates = sweeps.estimates_of(tmp_path, true_values=False, seeds=(0,))
    names = [name for name, of in figures.ENTRIES.items() if of.shown(estimates.study)]
    assert set(figures.ENTRIES) - set(names) == {"true_value_captured"}
    data = drawn("covered_user_value", estimates).data
    # The covered value of the incumbent would be far too low.
    assert list(data["line"].unique()) == ["none", "aux", "shared"]
    at = data[data["k"] == 200].set_index("line")["mean"]
    expected = estimates.of("shared, weight 1", "covered_user_value@200").mean
    assert at["shared"] == pytest.approx(expected, abs=1e-3)
