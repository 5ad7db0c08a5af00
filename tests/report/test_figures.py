import numpy as np
import pytest

from kd_ranker.report import figures
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.study import read_studies
from tests.report import sweeps

CURVES = ["value_captured", "true_value_captured", "survival"]


@pytest.fixture(scope="module")
def estimates(tmp_path_factory):
    (study,) = read_studies([sweeps.write_sweep(tmp_path_factory.mktemp("sweep"))])
    return Estimates(study)


def drawn(make, estimates):
    return make(estimates.study, estimates)


def test_the_pareto_front_has_a_line_a_way_and_a_point_a_weight_of_it(estimates):
    data = drawn(figures.pareto, estimates).data
    assert list(data["line"].unique()) == ["none", "aux", "shared"]
    assert list(data.loc[data["line"] == "shared", "weight"]) == [0.3, 1.0]
    # All else as it was chosen.
    assert set(data.loc[data["line"] == "aux", "serve"]) == {"teacher"}
    (none,) = data[data["mode"] == "none"].to_dict("records")
    assert np.isnan(none["weight"])
    rows = estimates.study.rows
    rows = rows[(rows["setting"] == "none") & (rows["split"] == "validation")]
    assert none["user_bce"] == pytest.approx(
        rows[[f"user_bce/{task}" for task in sweeps.TASKS]].to_numpy().mean()
    )
    assert none["user_bce_low"] < none["user_bce"] < none["user_bce_high"]


@pytest.mark.parametrize(
    ("make", "measure"),
    [
        (figures.value_captured, "value_captured"),
        (figures.users_value, "true_value_captured"),
        (figures.survival, "survival"),
    ],
)
def test_the_curves_are_means_of_what_was_chosen_of_each_way_on_test(estimates, make, measure):
    data = drawn(make, estimates).data
    assert list(data["line"].unique()) == ["none", "aux", "shared"]
    at = data[(data["line"] == "shared") & (data["k"] == 200)].iloc[0]
    rows = estimates.study.tested
    rows = rows[rows["way"] == "shared"]
    # The sums that are kept are those of float32; captured shares end at 1.
    assert at["mean"] == pytest.approx(
        (rows[f"{measure}@200"] / (1.02 if measure.startswith("true") else 1)).mean(), abs=1e-5
    )
    assert at["low"] < at["mean"] < at["high"]
    assert at["passed_for_99"] == pytest.approx(rows["passed_for_99"].mean())
    # A k that one member alone holds is no mean.
    assert data.groupby("line")["k"].nunique().nunique() == 1
    assert data["k"].max() == 2000


def test_calibration_joins_repeats_by_weight(estimates):
    study = estimates.study
    data = drawn(figures.calibration, estimates).data
    assert list(data["task"].unique()) == list(sweeps.TASKS)
    line = data.iloc[0]
    members = study.tested[study.tested["way"] == line["line"]]
    bins = study.calibration.merge(members[["member", "serve"]], on=["member", "serve"])
    bins = bins[(bins["task"] == line["task"]) & (bins["bin"] == line["bin"])]
    assert len(bins) == 3
    assert line["weight"] == pytest.approx(bins["weight"].sum())
    assert line["observed"] == pytest.approx(np.average(bins["observed"], weights=bins["weight"]))


def test_training_has_each_repeat_and_their_mean(estimates):
    data = drawn(figures.training, estimates).data
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
        ("cohorts/0/test/requests.parquet", CURVES),
        ("calibration.csv", ["calibration"]),
        ("cohorts/0/metrics.jsonl", ["training"]),
    ],
)
def test_a_figure_without_its_file_is_left_out_and_says_why(tmp_path, file, absent):
    (study,) = read_studies([sweeps.write_sweep(tmp_path, without=[file], seeds=(0,))])
    for figure in figures.figures(study, Estimates(study)):
        assert (figure.name in absent) == figure.data.empty
        assert (figure.name in absent) == bool(figure.absent)
        if figure.name in absent:
            assert str(tmp_path) in figure.absent


def test_curves_of_sweeps_of_which_one_lacks_its_requests_are_left_out(tmp_path):
    whole = sweeps.write_sweep(tmp_path / "a", seeds=(0,))
    part = sweeps.write_sweep(tmp_path / "b", seeds=(1,), without=sweeps.OF_REQUESTS)
    (study,) = read_studies([whole, part])
    for figure in figures.figures(study, Estimates(study)):
        assert (figure.name in CURVES) == figure.data.empty
        assert (str(part) in figure.absent) == (figure.name in CURVES)


def test_where_the_truth_is_not_known_there_is_no_figure_of_it(tmp_path):
    (study,) = read_studies([sweeps.write_sweep(tmp_path, true_values=False, seeds=(0,))])
    of_truth = figures.users_value(study, Estimates(study))
    assert of_truth.data.empty
    assert of_truth.absent
