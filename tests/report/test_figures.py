import numpy as np
import pytest

from kd_ranker.report import figures
from kd_ranker.report.study import read_studies
from tests.report import sweeps


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    (study,) = read_studies([sweeps.write_sweep(folder)])
    return study


def test_the_pareto_front_has_a_point_a_setting_and_a_line_a_mode_and_serving_choice(study):
    data = figures.pareto(study).data
    assert list(data["line"].unique()) == [
        "none", "aux (user)", "aux (teacher)", "aux (blend)", "shared",
    ]  # fmt: skip
    assert list(data.loc[data["line"] == "shared", "weight"]) == [0.3, 1.0]
    (none,) = data[data["mode"] == "none"].to_dict("records")
    assert np.isnan(none["weight"])
    rows = study.rows[study.rows["setting"] == "none"]
    assert none["user_bce"] == pytest.approx(
        rows[[f"user_bce/{task}" for task in sweeps.TASKS]].to_numpy().mean()
    )
    assert none["user_bce_low"] < none["user_bce"] < none["user_bce_high"]


def test_the_curves_are_means_of_the_best_setting_of_each_mode(study):
    data = figures.value_captured(study).data
    assert list(data["mode"].unique()) == ["none", "aux", "shared"]
    (line,) = data.loc[data["mode"] == "shared", "line"].unique()
    at = data[(data["line"] == line) & (data["k"] == 200)].iloc[0]
    rows = study.rows[study.rows["setting"] == line]
    assert at["mean"] == pytest.approx(rows["value_captured@200"].mean(), abs=1e-6)
    assert at["passed_for_99"] == pytest.approx(rows["passed_for_99"].mean())
    # A k that one member alone holds is no mean.
    assert data.groupby("line")["k"].nunique().nunique() == 1
    assert data["k"].max() == 2000


def test_calibration_joins_repeats_by_weight(study):
    data = figures.calibration(study).data
    assert list(data["task"].unique()) == list(sweeps.TASKS)
    line = data.iloc[0]
    members = study.rows[study.rows["setting"] == line["line"]]
    bins = study.calibration.merge(members[["member", "serve"]], on=["member", "serve"])
    bins = bins[(bins["task"] == line["task"]) & (bins["bin"] == line["bin"])]
    assert len(bins) == 3
    assert line["weight"] == pytest.approx(bins["weight"].sum())
    assert line["observed"] == pytest.approx(np.average(bins["observed"], weights=bins["weight"]))


def test_training_has_each_repeat_and_their_mean(study):
    data = figures.training(study).data
    assert set(data["repeat"]) == {"0/0", "1/0", "2/0", "mean"}
    at = data[(data["mode"] == "none") & (data["step"] == 50)]
    assert set(at["kind"]) == {"user_loss"}
    assert at.loc[at["repeat"] == "mean", "loss"].item() == pytest.approx(
        at.loc[at["repeat"] != "mean", "loss"].mean()
    )
    assert set(data.loc[data["mode"] == "aux", "kind"]) == {"user_loss", "distill_loss"}


@pytest.mark.parametrize(
    ("file", "absent"),
    [
        ("curves.csv", ["value_captured", "survival"]),
        ("calibration.csv", ["calibration"]),
        ("cohorts/0/metrics.jsonl", ["training"]),
    ],
)
def test_a_figure_without_its_file_is_left_out_and_says_why(tmp_path, file, absent):
    (study,) = read_studies([sweeps.write_sweep(tmp_path, without=[file], seeds=(0,))])
    for figure in figures.figures(study):
        assert (figure.name in absent) == figure.data.empty
        assert (figure.name in absent) == bool(figure.absent)
        if figure.name in absent:
            assert str(tmp_path) in figure.absent
