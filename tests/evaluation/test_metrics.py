"""The metrics: the row of results against its restatement, and entries of one's own."""

import dataclasses
import itertools
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from kd_ranker.batch import Stage
from kd_ranker.evaluation import evaluate, results, setting_names
from kd_ranker.evaluation.metrics import calibration, metric, registry
from kd_ranker.evaluation.metrics.metric import Captured, Metric, ReportAt, Sums
from kd_ranker.evaluation.metrics.registry import METRICS
from kd_ranker.evaluation.ranked import Ranked
from kd_ranker.evaluation.saving import SAVINGS
from tests.evaluation.cases import SHOWN, TARGETS, TASKS, random_case, restated

# The ids that training included are not given in a `Case`.
UNSEEN = {"unseen_users", "unseen_items"}
ALIGNMENT = {"alignment_ratio", "alignment_ratio_bce"}
KS = range(1, 10)


def empty_of(row: dict[str, float]) -> set[str]:
    empty = {name for name, number in row.items() if np.isnan(number)}
    # These are empty as the cases are scored whole, and only shown items have labels.
    others = ("passed_auc", "passed_for_alike", "passed_for_users", "served_ndcg")
    return {name for name in empty - UNSEEN if not name.startswith(others)}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    levels=st.sampled_from([2, 4, 10**6]),
    holes=st.sampled_from([0.0, 0.3, 1.0]),
    padding=st.sampled_from([0.0, 0.4]),
    weights=st.sampled_from([(1.0, 2.0), (1.0, 0.0)]),
    truth=st.booleans(),
    copies=st.booleans(),
    whole=st.sampled_from([None, (True, False, True, True), (False, True, False, False)]),
    are_partly_scored=st.booleans(),
    labels_beyond_shown=st.booleans(),
)
def test_rows_and_curves_are_those_of_the_definitions(
    seed,
    levels,
    holes,
    padding,
    weights,
    truth,
    copies,
    whole,
    are_partly_scored,
    labels_beyond_shown,
):
    """Values with ties and holes, in ragged requests, some of which only fill the batch."""
    case = random_case(seed, 4, 9, levels, holes, padding, weights)
    case.request_mask[3] = seed % 2
    case.whole = None if whole is None else np.array(whole)
    case.are_partly_scored = are_partly_scored
    case.labels_beyond_shown = labels_beyond_shown
    case.stage[2] = np.where(case.stage[2] > 0, Stage.SHOWN, Stage.PADDING)
    case.propensity[:, ::4] = np.nan  # a slot that was not filled at random
    if not truth:
        case.true[:] = np.nan
    if copies:
        # A copy of the teacher where that is known.
        case.student = np.where(np.isnan(case.teacher), case.student, case.teacher)
    curves = registry.curves(case.sums(), TASKS)
    for name in ("value_captured", "survival"):
        # Letting more pass never loses value of the teacher. (It may lose true value.)
        assert not (np.diff(curves[name]) < 0).any()
    for of_teacher in (False, True):
        row, expected = case.row(KS, of_teacher), restated(case, of_teacher)
        if of_teacher:
            expected |= dict.fromkeys(ALIGNMENT, np.nan)
        assert row.keys() == expected.keys() | UNSEEN
        for name, number in expected.items():
            if name.startswith("ips") and np.isnan(number):
                # The last term of a running sum in float32 need not be exactly 0.
                continue
            # A ratio to a small distance has fewer digits in float32.
            rtol = 2e-3 if name in ALIGNMENT else 2e-4
            np.testing.assert_allclose(row[name], number, rtol=rtol, atol=1e-5, err_msg=name)
            column, _, at = name.partition("@")
            if at and not of_teacher:
                k, *task = at.split("/")
                curve = curves["/".join([column, *task])]
                np.testing.assert_equal(row[name], curve[int(k) - 1], err_msg=name)


def test_without_scores_of_the_rest_coverage_is_a_lower_bound():
    """Two requests of six candidates, in the order of the student; three are shown.

    The log scored the three that it passed. With two passed of which one has no score, that one
    may be shown without a label; and so on, by hand.
    """
    case = random_case(requests=2, candidates=6, weights=(1.0, 0.0))
    case.student = np.tile(np.linspace(0.9, 0.1, 6, dtype=np.float32)[:, None], (2, 1, len(TASKS)))
    passed = np.array([[1, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]], bool)
    case.stage = np.where(passed, Stage.PASSED, Stage.RETRIEVED).astype(np.int8)
    case.teacher_weight = np.repeat(passed[..., None], len(TASKS), axis=2).astype(np.float32)
    row = case.row([1, 2, 3, 4, 5, 6])
    found = [row[f"coverage@{k}"] for k in (1, 2, 3, 4, 5, 6)]
    slots = np.array([1, 2, 3, 3, 3, 3])
    without_label = np.array([[0, 1, 1, 1, 2, 3], [0, 0, 0, 1, 2, 3]])
    np.testing.assert_allclose(found, 1 - without_label.sum(axis=0) / (2 * slots))
    assert row["scored_share"] == 0.5
    case.teacher_weight[:] = 1  # all are scored: coverage is exact
    case.teacher[:] = np.linspace(0.1, 0.9, 6, dtype=np.float32)[:, None]  # the last ones are best
    row = case.row([1, 2, 3, 6])
    assert row["scored_share"] == 1
    shown_and_passed = [(1 + 1) / 2, (1 + 2) / 4, (2 + 3) / 6, (1 + 0) / 6]
    found = [row[f"coverage@{k}"] for k in (1, 2, 3, 6)]
    np.testing.assert_allclose(found, shown_and_passed, rtol=1e-6)


def test_a_row_has_the_measured_columns_in_their_order():
    row = random_case().row([10, 99])
    others = {
        *results.KEYS,
        *setting_names.OTHER_KEYS,
        *SAVINGS,
        "flops_per_candidate",
        "cost_ratio",
    }
    others |= {"non_finite_step", "run", "needs_scores"}
    columns = results.columns(TASKS, ReportAt([10, 99], TARGETS))
    assert list(row) == [name for name in columns if name not in others]
    assert all(type(number) is float for number in row.values())
    assert empty_of(row) == set()
    # More than there are means all.
    assert row["survival@99"] == row["value_captured@99"] == 1


def test_sums_of_many_batches_keep_all_digits():
    # In float32, 2^24 + 1 is 2^24.
    total = evaluate.add(None, {"a": np.full(3, np.float32(2.0**24))})
    total = evaluate.add(total, {"a": np.ones(3, np.float32)})
    np.testing.assert_array_equal(total["a"], 2.0**24 + 1)


def test_of_a_teachers_positions_only_the_order_is_measured():
    case = random_case()
    names = ("teacher_bce", "teacher_kl", "teacher_kl_shown")
    against_teacher = {f"{name}/{task}" for name in names for task in TASKS} | ALIGNMENT
    names = ("user_bce", "user_calibration")
    of_probabilities = {f"{name}/{task}" for name in names for task in TASKS} | {"top_calibration"}
    row, of_order = case.row([SHOWN]), case.row([SHOWN], signal="rank")
    assert of_order == pytest.approx(row | dict.fromkeys(against_teacher, np.nan), nan_ok=True)
    # A reference that only orders lacks the same, under a teacher of probabilities.
    for of_list in (
        case.row([SHOWN], of_teacher=True, signal="rank"),
        case.row([SHOWN], only_order=True, signal="rank"),
    ):
        assert empty_of(of_list) == against_teacher | of_probabilities


def test_nothing_is_known_of_a_diverged_student():
    case = random_case()
    case.student[:] = np.nan
    row = case.row([10])
    assert row.pop("candidates") == 40
    assert row.pop("scored_share") == 1
    assert row.pop("measured_requests") > 0
    assert np.isnan(list(row.values())).all()


def test_calibration_table_is_that_of_scikit_learn():
    case = random_case()
    case.label_weight = (case.label_weight > 0).astype(np.float32)
    case.label_weight[0, :2] = 1
    case.student[0, :2] = [[0.0], [1.0]]  # the ends fall into the first and last bin
    table = pd.DataFrame(calibration.calibration(case.sums(), TASKS))
    shown = case.label_weight > 0
    for task, name in enumerate(TASKS):
        of_task = table[table["task"] == name]
        observed, predicted = calibration_curve(
            case.label[shown][:, task], case.student[shown][:, task], n_bins=20
        )
        np.testing.assert_allclose(of_task["observed"], observed, rtol=1e-5)
        np.testing.assert_allclose(of_task["predicted"], predicted, rtol=1e-5)
        assert of_task["weight"].sum() == shown.sum()
        assert {0, 19} <= {*of_task["bin"]}


def liked_kept(ranked: Ranked) -> Sums:
    by_student = jnp.argsort(-ranked.value, axis=1)[..., None]
    positive = ranked.batch.user_label * (ranked.label_weight > 0)[..., None]
    return {"kept": jnp.take_along_axis(positive, by_student, axis=1).cumsum(axis=1)}


KEPT_RATE = Metric(
    name="kept_rate",
    formula="the share of the positive labels that the student's top k keeps",
    per=("k", "task"),
    sums=liked_kept,
    final=Captured("kept"),
)


def test_a_registered_metric_is_measured_and_has_columns():
    case = random_case()
    with mock.patch.dict(
        METRICS, kept_rate=KEPT_RATE, other=dataclasses.replace(KEPT_RATE, name="other")
    ):
        row, curves = case.row([1, 10]), registry.curves(case.sums(), TASKS)
        # A function that two metrics share is called once.
        assert registry.sum_functions().count(liked_kept) == 1
        assert "kept_rate@10/like" in results.columns(TASKS, ReportAt(ks=(10,)))
        assert "kept_rate/like" in results.curves_columns(TASKS)
        assert registry.title_of("kept_rate@10/like") == "kept rate@10 like"
    for k, task in itertools.product((1, 10), TASKS):
        rate = pytest.approx(row[f"hit_rate@{k}/{task}"])
        assert row[f"kept_rate@{k}/{task}"] == row[f"other@{k}/{task}"] == rate
        assert curves[f"kept_rate/{task}"][k - 1] == rate
    clash = dataclasses.replace(
        KEPT_RATE, sums=lambda ranked: {"user_bce": ranked.mask.sum(axis=1)}
    )
    with (
        mock.patch.dict(METRICS, {clash.name: clash}),
        pytest.raises(ValueError, match="two sums of the metrics are named user_bce"),
    ):
        case.sums()


def test_passed_for_is_the_smallest_k_that_reaches_the_target() -> None:
    # Not every step rises, as with true value; the first curve never reaches it.
    curves = np.random.default_rng(8).uniform(0, 1.2, (30, 50))
    curves[:, 0], curves[:, 1] = 0.5, np.nan
    for curve, k in zip(curves.T, metric.passed_for(curves, 0.9), strict=True):
        reached = [place for place in range(1, 31) if curve[place - 1] >= 0.9]
        assert k == reached[0] if reached else np.isnan(k)
