"""The one pass: sums of batches, and the row of results that they make."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import kl_div
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, roc_auc_score

from kd_ranker.batch import Stage
from kd_ranker.evaluation import totals
from kd_ranker.evaluation.metrics import ReportAt, Sums
from tests.evaluation.cases import SHOWN, TASKS, VALUE_WEIGHTS, Case, random_case

VALUES = np.asarray(VALUE_WEIGHTS)


def assert_same_sums(left: Sums, right: Sums) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_row_of_one_small_request_by_hand() -> None:
    # Four candidates, of which b and c were shown. Values are watch + 2 · like.
    #            student        teacher        true
    # a    0.9 + 2·0.0 = 0.9  0.1 + 0 = 0.1      1
    # b    0.8 + 2·0.0 = 0.8  0.5 + 0 = 0.5      0
    # c    0.4 + 2·0.0 = 0.4  0.2 + 0 = 0.2      1
    # d    0.3 + 2·0.0 = 0.3  0.8 + 0 = 0.8      1
    # The teacher's own top 3 is d, b, c, worth 1.5 (2 in truth). The student passes a, b, c, d:
    # k = 1 shows a (0.1; 1), k = 2 b a (0.6; 1), k = 3 b c a (0.8; 2), k = 4 d b c (1.5; 2).
    def entries(watch: list[float]) -> np.ndarray:
        return np.stack([[watch], np.zeros((1, 4))], axis=-1).astype(np.float32)

    case = Case(
        student=entries([0.9, 0.8, 0.4, 0.3]),
        teacher=entries([0.1, 0.5, 0.2, 0.8]),
        teacher_weight=np.ones((1, 4, 2), np.float32),
        stage=np.array([[1, 3, 3, 2]], np.int8),
        label=entries([0, 1, 0, 0]),
        label_weight=np.array([[0.0, 1.0, 3.0, 0.0]], np.float32),
        true=entries([1, 0, 1, 1]),
        request_mask=np.ones(1, bool),
        propensity=np.full((1, 4), np.nan, np.float32),
    )
    row = case.row([1, 3, 99])
    expected = {
        "user_bce/watch": (-np.log(0.8) - 3 * np.log(0.6)) / 4,
        "user_bce/like": 0.0,
        "user_auc/watch": 1.0,
        "user_auc/like": np.nan,  # nobody liked anything
        "user_calibration/watch": (0.8 + 3 * 0.4) / 1,
        "user_calibration/like": np.nan,
        "survival@1": 0.0,
        "survival@3": 2 / 3,
        "survival@99": 1.0,
        "value_captured@1": 0.1 / 1.5,
        "value_captured@3": 0.8 / 1.5,
        "value_captured@99": 1.0,
        "true_value_captured@1": 0.5,
        "true_value_captured@3": 1.0,
        "true_value_captured@99": 1.0,
        "shown_recall@1": 0.0,
        "shown_recall@3": 1.0,
        "shown_recall@99": 1.0,
        # b was watched: passed from k = 2 on, and chosen.
        "hit_rate@1/watch": 0.0,
        "hit_rate@3/watch": 1.0,
        "hit_rate@99/watch": 1.0,
        "hit_rate@3/like": np.nan,
        "end_to_end_hit_rate@1/watch": 0.0,
        "end_to_end_hit_rate@3/watch": 1.0,
        "end_to_end_hit_rate@99/watch": 1.0,
        "end_to_end_hit_rate@3/like": np.nan,
        # The student's order is a, b, c; the teacher's best are d, b, c.
        "teacher_ndcg": (0.1 + 0.5 / np.log2(3) + 0.2 / 2) / (0.8 + 0.5 / np.log2(3) + 0.2 / 2),
        # Of six pairs only (b, c) is in the teacher's order.
        "teacher_tau": (1 - 5) / 6,
        "passed_for_50": 3,
        "passed_for_99": 4,
        "scored_for_50": 3,
        "scored_for_99": 4,
        # Of the three shown from the first three, and of those from all.
        "true_value_for_50": 1.0,
        "candidates": 4,
        # Of a, b, c, which it values at 2.1, two are good; so are three of all.
        "regret": 1 / 3,
        "top_calibration": 2.1 / 2,
    }
    for name, number in expected.items():
        np.testing.assert_allclose(row[name], number, rtol=1e-5, atol=1e-6, err_msg=name)
    of_teacher = case.teacher_row([1])
    assert of_teacher["regret"] == pytest.approx(1 / 3)
    assert of_teacher["top_calibration"] == pytest.approx(1.5 / 2)


def test_row_has_the_columns_of_the_results_in_their_order() -> None:
    case = random_case()
    row = case.row([10, 20])
    assert list(row) == [
        "user_bce/watch",
        "user_bce/like",
        "user_auc/watch",
        "user_auc/like",
        "user_calibration/watch",
        "user_calibration/like",
        "teacher_bce/watch",
        "teacher_bce/like",
        "teacher_kl/watch",
        "teacher_kl/like",
        "teacher_kl_shown/watch",
        "teacher_kl_shown/like",
        "alignment_ratio",
        "alignment_ratio_bce",
        "survival@10",
        "survival@20",
        "value_captured@10",
        "value_captured@20",
        "true_value_captured@10",
        "true_value_captured@20",
        "shown_recall@10",
        "shown_recall@20",
        "hit_rate@10/watch",
        "hit_rate@10/like",
        "hit_rate@20/watch",
        "hit_rate@20/like",
        "end_to_end_hit_rate@10/watch",
        "end_to_end_hit_rate@10/like",
        "end_to_end_hit_rate@20/watch",
        "end_to_end_hit_rate@20/like",
        *(f"{name}@{k}" for name in ("covered_user_value", "coverage") for k in (10, 20)),
        *(f"ips_user_value@{k}" for k in (10, 20)),
        "teacher_ndcg",
        "teacher_tau",
        "passed_for_50",
        "passed_for_99",
        "scored_for_50",
        "scored_for_99",
        "true_value_for_50",
        "true_value_for_99",
        "candidates",
        "regret",
        "top_calibration",
        "unseen_users",
        "unseen_items",
    ]
    assert all(type(number) is float for number in row.values())
    assert empty_of(row) == set()


def test_user_metrics_are_those_of_scikit_learn() -> None:
    case = random_case()
    row = case.row([])
    for index, task in enumerate(TASKS):
        label, student = case.label[..., index], case.student[..., index]
        expected = log_loss(label.ravel(), student.ravel(), sample_weight=case.label_weight.ravel())
        np.testing.assert_allclose(row[f"user_bce/{task}"], expected, rtol=1e-5)
        areas = [
            roc_auc_score(labels[weights > 0], students[weights > 0])
            for labels, students, weights in zip(label, student, case.label_weight, strict=True)
        ]
        np.testing.assert_allclose(row[f"user_auc/{task}"], np.mean(areas), rtol=1e-5)


def test_alignment_is_measured_on_the_shown_that_the_teacher_knows() -> None:
    case = random_case()
    case.teacher_weight[:, ::3, 1] = 0  # of one task, which is enough
    case.teacher[:, ::3, 1] = np.nan
    row = case.row([])
    same = (case.label_weight > 0) & (case.teacher_weight > 0).all(axis=-1)
    weight = case.label_weight[same]
    ratios, of_bce = [], []
    for index, task in enumerate(TASKS):
        label, p, q = (
            array[same][:, index].astype(np.float64)
            for array in (case.label, case.student, case.teacher)
        )
        gap = log_loss(label, p, sample_weight=weight) - log_loss(label, q, sample_weight=weight)
        kl = np.average(kl_div(q, p) + kl_div(1 - q, 1 - p), weights=weight)
        bce = np.average(-q * np.log(p) - (1 - q) * np.log(1 - p), weights=weight)
        assert row[f"teacher_kl_shown/{task}"] == pytest.approx(kl, rel=1e-4)
        ratios.append(gap / kl)
        of_bce.append(gap / bce)
    assert row["alignment_ratio"] == pytest.approx(np.mean(ratios), rel=1e-3)
    assert row["alignment_ratio_bce"] == pytest.approx(np.mean(of_bce), rel=1e-3)


def test_an_exact_copy_of_the_teacher_has_no_alignment_ratio() -> None:
    case = random_case()
    row = dataclasses.replace(case, student=case.teacher).row([])
    assert row["teacher_kl_shown/watch"] == pytest.approx(0, abs=1e-7)
    assert np.isnan(row["alignment_ratio"])
    assert row["alignment_ratio_bce"] == pytest.approx(0, abs=1e-6)


def test_a_student_that_foretells_users_better_than_the_teacher_is_below_0() -> None:
    case = random_case()
    case.student = 0.9 * case.label + 0.05
    row = case.row([])
    assert row["alignment_ratio"] < 0
    assert row["alignment_ratio_bce"] < 0


def test_captured_value_is_the_ratio_of_sums_and_survival_the_mean() -> None:
    # Request 0 is worth ten times request 1. Only in request 1 does the student's best win.
    case = random_case(requests=2, candidates=2)
    case.stage[:] = Stage.RETRIEVED
    case.student[:] = np.array([0.9, 0.1])[None, :, None]
    case.teacher[:] = np.array([[0.1, 0.9], [0.09, 0.01]])[..., None]
    row = totals.summarise(case.sums(shown=1), case.teacher_sums(), TASKS, ReportAt([1]))
    np.testing.assert_allclose(row["survival@1"], 0.5)
    np.testing.assert_allclose(row["value_captured@1"], (0.1 + 0.09) / (0.9 + 0.09), rtol=1e-6)


def test_regret_is_that_of_the_top_which_the_ranker_alone_would_show() -> None:
    case = random_case()
    case.stage[:, ::4] = Stage.PADDING
    case.student[:, 1] = 0.99
    case.student[1:, 1] = np.nan  # not known, so never chosen
    case.true[:, 2] = np.array([0.98, 0.98])
    case.teacher_weight[:, ::3, 0] = 0
    of_student = [np.zeros(3), case.student, case.stage > 0]
    known = (case.stage > 0) & (case.teacher_weight > 0).all(axis=-1)
    of_teacher = [np.zeros(3), case.teacher, known]
    for sums, probability, chosen in (of_student, of_teacher):
        for value, truth, there, may in zip(
            probability @ VALUES, case.true @ VALUES, case.stage > 0, chosen, strict=True
        ):
            places = [place for place in np.flatnonzero(may) if value[place] == value[place]]
            top = sorted(places, key=lambda place: -value[place])[:SHOWN]
            sums += [value[top].sum(), truth[top].sum(), np.sort(truth[there])[-SHOWN:].sum()]
    for row, (sums, *_) in ((case.row([]), of_student), (case.teacher_row([]), of_teacher)):
        promised, found, best = sums
        assert row["regret"] == pytest.approx(1 - found / best, rel=1e-4)
        assert row["top_calibration"] == pytest.approx(promised / found, rel=1e-4)


def test_recall_of_the_shown_pools_requests_and_leaves_out_those_shown_whole_or_not_at_all() -> (
    None
):
    case = random_case(requests=5, candidates=6)
    # By their places in the student's order: best first.
    case.student[:] = np.linspace(0.9, 0.1, 6)[None, :, None]
    case.stage[:] = Stage.RETRIEVED
    case.stage[0, [0, 3]] = Stage.SHOWN
    case.stage[1, [1, 2, 4, 5]] = Stage.SHOWN
    case.stage[1, 3] = Stage.PASSED
    case.stage[2] = Stage.SHOWN  # whole
    case.stage[3, 0] = Stage.PASSED  # none
    case.stage[4, 0] = Stage.SHOWN
    case.request_mask[4] = False  # only fills up the batch
    case.teacher_weight[:] = 0  # whatever the teacher knows
    case.teacher[:] = np.nan
    row = case.row([1, 3, 6])
    # Six were shown: of request 0 the best and the fourth, of request 1 all but two.
    np.testing.assert_allclose(
        [row[f"shown_recall@{k}"] for k in (1, 3, 6)], [1 / 6, (1 + 2) / 6, 1.0], rtol=1e-6
    )
    row = case.of_requests(slice(2, 5)).row([1, 3, 6])
    assert np.isnan(row["shown_recall@3"])


def test_the_sums_of_each_request_are_those_of_a_batch_of_it_alone() -> None:
    case = random_case()
    case.label_weight[1] = 0  # nothing was shown
    case.teacher_weight[2] = 0  # nothing is known
    case.request_mask[5] = False
    ks = (1, 7, 99)
    alone, curves = case.sums_of_each(ks)
    kept = np.minimum(ks, case.stage.shape[1]) - 1
    of_each = {**alone, **curves}
    assert len(of_each) == len(alone) + len(curves)
    expected = alone_of_each(case, kept)
    assert of_each.keys() == {name for name in expected[0] if not name.startswith("bin_")}
    assert_same_sums(
        of_each, {name: np.stack([of_one[name] for of_one in expected]) for name in of_each}
    )
    assert alone["user_bce"].shape == (6, len(TASKS))
    assert curves["survival"].shape == (6, len(ks))
    assert curves["positives_kept"].shape == (6, len(ks), len(TASKS))
    assert alone["funnel_requests"].tolist() == [1, 1, 0, 1, 1, 0]


def alone_of_each(case: Case, kept: np.ndarray) -> list[Sums]:
    """For each request, the sums of a batch of which all other requests only fill it up."""
    sums = []
    for request in range(len(case.request_mask)):
        only = np.arange(len(case.request_mask)) == request
        of_one = dataclasses.replace(case, request_mask=case.request_mask & only).sums()
        candidates = case.stage.shape[1]
        sums.append(
            {
                name: of_sum[kept] if of_sum.shape[:1] == (candidates,) else of_sum
                for name, of_sum in of_one.items()
            }
        )
    return sums


def test_what_has_a_task_for_each_candidate_is_not_taken_for_a_curve() -> None:
    case = random_case(candidates=len(TASKS))
    of_each = case.sums_of_each((1,))
    assert of_each.alone["user_bce"].shape == (6, len(TASKS))
    assert of_each.curves["value_captured"].shape == (6, 1)


def test_hit_rates_are_ratios_of_sums_over_the_positive_labels_that_count() -> None:
    case = random_case()
    case.label[case.label_weight == 0] = 1  # which nobody has seen
    case.label[0] = 0  # nobody did anything in this request
    case.teacher_weight[:, ::3, 1] = 0  # these the teacher never shows
    case.request_mask[4] = False
    row = case.row([1, 8, 40])
    value, teacher_value = case.student @ VALUES, case.teacher @ VALUES
    known = (case.teacher_weight > 0).all(axis=-1)
    for k in (1, 8, 40):
        kept, shown, positives = np.zeros((3, len(TASKS)))
        for request in np.flatnonzero(case.request_mask):
            positive = case.label[request] * (case.label_weight[request] > 0)[:, None]
            passed = sorted(range(40), key=lambda i: -value[request, i])[:k]
            judged = [i for i in passed if known[request, i]]
            chosen = sorted(judged, key=lambda i: -teacher_value[request, i])[:SHOWN]
            kept += positive[passed].sum(axis=0)
            shown += positive[chosen].sum(axis=0)
            positives += positive.sum(axis=0)
        for index, task in enumerate(TASKS):
            share = kept[index] / positives[index]
            end_to_end = shown[index] / positives[index]
            assert row[f"hit_rate@{k}/{task}"] == pytest.approx(share, rel=1e-6)
            assert row[f"end_to_end_hit_rate@{k}/{task}"] == pytest.approx(end_to_end, rel=1e-6)
    assert row["hit_rate@40/watch"] == 1 > row["end_to_end_hit_rate@40/watch"] > 0


def test_a_batch_split_in_two_has_the_same_sums() -> None:
    case = random_case()
    parts = None
    for part in (slice(0, 3), slice(3, 6)):
        parts = totals.add(parts, case.of_requests(part).sums())
    assert parts is not None
    assert parts["user_bce"].dtype == np.float64
    assert_same_sums(parts, case.sums())


def test_sums_lose_no_digits_in_a_long_evaluation() -> None:
    # In float32, 2^24 + 1 is 2^24.
    total = jax.tree.map(lambda leaf: np.full(leaf.shape, 2.0**24), random_case().sums())
    one = jax.tree.map(jnp.ones_like, total)
    total = totals.add(totals.add(totals.add(None, total), one), one)
    np.testing.assert_array_equal(total["label_weight"], 2.0**24 + 2)


def test_padding_changes_nothing() -> None:
    case = random_case()
    sums = case.sums()

    def padded(array: np.ndarray, fill: float) -> np.ndarray:
        width = [(0, 0), (0, 5)] + [(0, 0)] * (array.ndim - 2)
        return np.pad(array, width, constant_values=fill)

    # Weights of 1 and values of NaN: only the stage says that there is nothing.
    longer = Case(
        student=padded(case.student, np.nan),
        teacher=padded(case.teacher, np.nan),
        teacher_weight=padded(case.teacher_weight, 1),
        stage=padded(case.stage, Stage.PADDING),
        label=padded(case.label, np.nan),
        label_weight=padded(case.label_weight, 1),
        true=padded(case.true, np.nan),
        request_mask=case.request_mask,
        propensity=padded(case.propensity, np.nan),
    ).sums()
    # At the same k, the same share of the passed: padding is no candidate.
    longer["covered_user_value"] = longer["covered_user_value"][:40]
    for name in (
        *("survival", "value_captured", "true_value_captured", "shown_kept"),
        *("positives_kept", "positives_shown", "scored", "passed_shown", "all_shown"),
        "ips_user_value",
    ):
        curve = longer[name]
        np.testing.assert_array_equal(curve[40:], np.broadcast_to(curve[39], curve[40:].shape))
        longer[name] = curve[:40]
    assert_same_sums(longer, sums)


def test_requests_that_only_fill_up_the_batch_do_not_count() -> None:
    case = random_case()
    case.request_mask[3:] = False
    expected = case.of_requests(slice(0, 3)).sums()
    for array in (case.student, case.teacher, case.true, case.label):
        array[3:] = np.nan
    assert_same_sums(case.sums(), expected)


def test_a_candidate_without_teacher_probability_is_never_chosen() -> None:
    case = random_case()
    case.teacher_weight[:, ::2, 1] = 0  # of one task, which is enough
    case.teacher[:, ::2, 1] = 7  # improper, and more than any other
    holes = case.sums()
    case.teacher[:, ::2] = 0  # the same choice from a teacher that values them least
    case.true[:, ::2] = 0  # and whose choice of them, where it has no other, brings nothing
    case.teacher_weight[:] = 1
    worst = case.sums()
    for name in ("survival", "value_captured", "true_value_captured", "funnel_requests"):
        np.testing.assert_allclose(holes[name], worst[name], rtol=1e-6)


def test_teacher_judged_as_a_student() -> None:
    case = random_case()
    assert_same_sums(case.teacher_sums(), dataclasses.replace(case, student=case.teacher).sums())
    row = case.teacher_row([1, SHOWN])
    # It is not measured against itself.
    assert np.isnan(row["alignment_ratio"])
    assert np.isnan(row["alignment_ratio_bce"])
    assert row["survival@1"] == pytest.approx(1 / SHOWN)
    assert row[f"value_captured@{SHOWN}"] == 1
    assert row["passed_for_99"] == SHOWN
    assert row["teacher_ndcg"] == pytest.approx(1)
    assert row["teacher_tau"] == pytest.approx(1)
    assert row["teacher_kl/watch"] == pytest.approx(0, abs=1e-6)


def test_of_a_teachers_positions_only_the_order_is_measured() -> None:
    case = random_case()
    against_teacher = {
        *(
            f"{name}/{task}"
            for name in ("teacher_bce", "teacher_kl", "teacher_kl_shown")
            for task in TASKS
        ),
        *("alignment_ratio", "alignment_ratio_bce"),
    }
    foretold = {f"{name}/{task}" for name in ("user_bce", "user_calibration") for task in TASKS}
    foretold.add("top_calibration")
    assert empty_of(case.row([SHOWN], "rank")) == against_teacher
    assert empty_of(case.teacher_row([SHOWN], "rank")) == against_teacher | foretold
    row, of_order = case.row([SHOWN]), case.row([SHOWN], "rank")
    assert {name: row[name] for name in row.keys() - against_teacher} == pytest.approx(
        {name: of_order[name] for name in row.keys() - against_teacher}, nan_ok=True
    )


def empty_of(row: dict[str, float]) -> set[str]:
    # What training met was not given.
    return {name for name, number in row.items() if np.isnan(number)} - {
        "unseen_users",
        "unseen_items",
    }


def test_teacher_with_holes_is_judged_only_where_it_is_known() -> None:
    case = random_case()
    case.teacher_weight[:, ::3, 0] = 0  # of one task, so that the other still counts for the BCE
    case.teacher[:, ::3, 0] = np.nan
    row = case.teacher_row([SHOWN])
    assert empty_of(row) == {"alignment_ratio", "alignment_ratio_bce"}
    assert row[f"survival@{SHOWN}"] == 1


def test_true_value_is_nan_where_the_dataset_does_not_know_it() -> None:
    case = random_case()
    case.true[:] = np.nan
    row = case.row([10])
    assert np.isnan([row["true_value_captured@10"], row["regret"], row["top_calibration"]]).all()
    assert np.isfinite(row["value_captured@10"])
    assert np.isnan(totals.curves(case.sums(), TASKS)["true_value_captured"]).all()


def test_a_diverged_student_gives_nan_and_no_numbers() -> None:
    case = random_case()
    case.student[:] = np.nan
    row = case.row([10])
    assert row.pop("candidates") == 40
    assert np.isnan(list(row.values())).all()


def test_calibration_table_is_that_of_scikit_learn() -> None:
    case = random_case()
    case.label_weight = (case.stage == Stage.SHOWN).astype(np.float32)
    case.student[0, :2] = [[0.0], [1.0]]  # the ends fall into the first and last bin
    table = totals.calibration_table(case.sums())
    shown = case.label_weight > 0
    for task in range(len(TASKS)):
        observed, predicted = calibration_curve(
            case.label[shown][:, task], case.student[shown][:, task], n_bins=20
        )
        filled = table["weight"][task] > 0
        np.testing.assert_allclose(table["observed"][task][filled], observed, rtol=1e-5)
        np.testing.assert_allclose(table["predicted"][task][filled], predicted, rtol=1e-5)
        assert table["weight"][task].sum() == shown.sum()


def test_sums_are_the_same_to_the_last_bit_when_repeated() -> None:
    case = random_case()
    for left, right in zip(*map(jax.tree.leaves, (case.sums(), case.sums())), strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_task_of_weight_0_that_the_teacher_lacks_changes_no_other_number() -> None:
    whole = random_case(seed=3)
    whole.value_weights = np.array([1.0, 0.0])
    lacking = dataclasses.replace(
        whole,
        teacher=np.where([True, False], whole.teacher, np.nan).astype(np.float32),
        teacher_weight=np.where([True, False], whole.teacher_weight, 0.0).astype(np.float32),
    )
    row, expected = lacking.row([10, 20]), whole.row([10, 20])
    teacher, of_teacher = lacking.teacher_row([10, 20]), whole.teacher_row([10, 20])
    for name in expected:
        if name.startswith("alignment"):
            continue  # a mean over tasks
        if name.startswith("teacher_") and name.endswith("/like"):
            assert np.isnan(row[name]), name
        else:
            np.testing.assert_equal(row[name], expected[name], err_msg=name)
        if not name.endswith("/like"):
            np.testing.assert_equal(teacher[name], of_teacher[name], err_msg=name)
    assert np.isfinite(row["alignment_ratio"])
    assert np.isnan(teacher["user_auc/like"])


def test_a_teacher_that_knows_nothing_shows_nothing_known() -> None:
    case = random_case()
    case.teacher_weight = np.zeros_like(case.teacher_weight)
    row = case.row([10])
    assert np.isfinite(row["hit_rate@10/watch"])
    for name in ("end_to_end_hit_rate@10/watch", "survival@10", "value_captured@10"):
        assert np.isnan(row[name]), name


def test_the_teacher_scores_no_more_than_a_request_has() -> None:
    case = random_case(requests=3, candidates=12)
    for request, size in enumerate((2, 5, 12)):
        case.stage[request, size:] = Stage.PADDING
    row = case.row([4])
    assert row["candidates"] == pytest.approx((2 + 5 + 12) / 3)
    for target in ("50", "99"):
        k = row[f"passed_for_{target}"]
        expected = (min(k, 2) + min(k, 5) + min(k, 12)) / 3
        assert row[f"scored_for_{target}"] == pytest.approx(expected)
    # A request that fills up a batch counts for nothing.
    case.request_mask[1] = False
    row = case.row([4])
    k = row["passed_for_99"]
    assert row["scored_for_99"] == pytest.approx((min(k, 2) + min(k, 12)) / 2)


def shown_by_funnel(case: Case, request: int, among: list[int], passed: int) -> list[int]:
    """The places that the teacher shows if the student passes so many of some candidates."""
    student, teacher = (of[request] @ case.value_weights for of in (case.student, case.teacher))
    best = sorted(among, key=lambda place: -student[place])[:passed]
    return sorted(best, key=lambda place: -teacher[place])[:SHOWN]


def test_users_measures_are_those_of_one_funnel_after_the_other() -> None:
    case = random_case(seed=5, candidates=30)
    case.stage[0, 20:] = Stage.PADDING
    case.stage[1] = np.where(case.stage[1] == Stage.PASSED, Stage.RETRIEVED, case.stage[1])
    case.label_weight *= case.stage == Stage.SHOWN
    case.request_mask[5] = False
    ks = [1, 4, 12, 30]
    row = case.row(ks)
    value = (case.label * case.value_weights).sum(axis=2) * (case.label_weight > 0)
    found = {}
    for k in ks:
        every = passed_shown = of_labels = by_propensity = 0.0
        for request in range(5):
            there = [place for place in range(30) if case.stage[request, place] > 0]
            passed = [place for place in there if case.stage[request, place] >= Stage.PASSED]
            shown = shown_by_funnel(case, request, there, k)
            every += len(shown)
            passed_shown += len(set(shown) & set(passed))
            by_propensity += sum(
                value[request, place] / case.propensity[request, place]
                for place in shown
                if case.label_weight[request, place] > 0
            )
            some = math.ceil(min(k, len(there)) * len(passed) / len(there))
            of_passed = shown_by_funnel(case, request, passed, some)
            of_labels += sum(value[request, place] for place in of_passed)
        found[k] = {"covered": of_labels, "ips": by_propensity}
        assert row[f"coverage@{k}"] == pytest.approx(passed_shown / every)
    for name, of in (("covered_user_value", "covered"), ("ips_user_value", "ips")):
        for k in ks:
            expected = found[k][of] / found[30][of]
            assert row[f"{name}@{k}"] == pytest.approx(expected, rel=1e-5), (name, k)


def test_a_label_without_a_propensity_has_no_weight() -> None:
    """As if it were negative: a slot that was not filled at random."""
    ks = [1, 4, 12, 40]
    case = random_case(seed=3)
    some = np.random.default_rng(0).random(case.stage.shape) < 0.5
    positive = (case.label_weight > 0) & (case.label @ case.value_weights > 0)
    assert (positive & some).any()
    assert (positive & ~some).any()
    without, negative = (
        dataclasses.replace(case, **{name: getattr(case, name).copy()})
        for name in ("propensity", "label")
    )
    without.propensity[some] = np.nan
    negative.label[some] = 0
    for k in ks:
        name = f"ips_user_value@{k}"
        assert without.row(ks)[name] == pytest.approx(negative.row(ks)[name], rel=1e-6)
    assert without.row(ks)["ips_user_value@4"] != pytest.approx(case.row(ks)["ips_user_value@4"])


def test_without_propensities_nothing_is_weighted_by_them() -> None:
    case = random_case()
    case.propensity[:] = np.nan
    assert np.isnan(case.row([SHOWN])[f"ips_user_value@{SHOWN}"])
