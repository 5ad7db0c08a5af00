"""The metrics: sums of batches, the row of results from them, and entries of one's own."""

import dataclasses
import itertools
import math
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy.special import kl_div
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, ndcg_score

from kd_ranker.batch import Stage
from kd_ranker.evaluation import evaluate, metrics, results
from kd_ranker.evaluation.metrics import METRICS, Metric, ReportAt, Sums, ratio
from kd_ranker.evaluation.ranked import Ranked
from kd_ranker.evaluation.saving import SAVINGS
from tests.evaluation.cases import SHOWN, TARGETS, TASKS, VALUE_WEIGHTS, Case, random_case

# The ids that training included are not given in a `Case`.
UNSEEN = {"unseen_users", "unseen_items"}


def assert_same_sums(left: Sums, right: Sums) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=1e-5, atol=1e-5, err_msg=name)


def empty_of(row: dict[str, float]) -> set[str]:
    return {name for name, number in row.items() if np.isnan(number)} - UNSEEN


def test_row_of_one_small_request_by_hand() -> None:
    # Four candidates, of which b and c were shown. Values are those of watch.
    #      student  teacher  true
    # a      0.9      0.1      1
    # b      0.8      0.5      0
    # c      0.4      0.2      1
    # d      0.3      0.8      1
    # The teacher's own top 3 is d, b, c, worth 1.5 (2 in truth). The student passes a, b, c, d:
    # k = 1 shows a (0.1; 1), k = 2 b a (0.6; 1), k = 3 b c a (0.8; 2), k = 4 d b c (1.5; 2).
    def entries(*watch: float) -> np.ndarray:
        return np.stack([[watch], np.zeros((1, 4))], axis=-1).astype(np.float32)

    case = Case(
        student=entries(0.9, 0.8, 0.4, 0.3),
        teacher=entries(0.1, 0.5, 0.2, 0.8),
        teacher_weight=np.ones((1, 4, 2), np.float32),
        stage=np.array([[1, 3, 3, 2]], np.int8),
        label=entries(1, 1, 0, 1),  # those of weight 0 count for nothing
        label_weight=np.array([[0.0, 1.0, 3.0, 0.0]], np.float32),
        true=entries(1, 0, 1, 1),
        request_mask=np.ones(1, bool),
        propensity=np.full((1, 4), np.nan, np.float32),
    )
    curves = {  # at k = 1, 3 and all
        "survival@{}": (0.0, 2 / 3, 1.0),
        "value_captured@{}": (0.1 / 1.5, 0.8 / 1.5, 1.0),
        "true_value_captured@{}": (0.5, 1.0, 1.0),
        "shown_recall@{}": (0.0, 1.0, 1.0),
        # b was watched: passed from k = 2, and chosen.
        "hit_rate@{}/watch": (0.0, 1.0, 1.0),
        "end_to_end_hit_rate@{}/watch": (0.0, 1.0, 1.0),
        "end_to_end_hit_rate@{}/like": (np.nan,) * 3,  # no positive label
    }
    expected = {
        name.format(k): number
        for name, of in curves.items()
        for k, number in zip((1, 3, 99), of, strict=True)
    } | {
        "user_bce/watch": (-np.log(0.8) - 3 * np.log(0.6)) / 4,
        "user_auc/watch": 1.0,
        "user_auc/like": np.nan,
        "user_calibration/watch": (0.8 + 3 * 0.4) / 1,
        # The student's order is a, b, c; the teacher's best are d, b, c.
        "teacher_ndcg": (0.1 + 0.5 / np.log2(3) + 0.2 / 2) / (0.8 + 0.5 / np.log2(3) + 0.2 / 2),
        # Of six pairs only (b, c) is in the teacher's order.
        "teacher_tau": (1 - 5) / 6,
        "passed_for_50": 3,
        "scored_for_99": 4,
        # Of the three shown from the first three, and of those from all.
        "true_value_for_50": 1.0,
        "candidates": 4,
        # Of a, b, c, with a value of 2.1, two are good; so are three of all.
        "regret": 1 / 3,
        "top_calibration": 2.1 / 2,
    }
    row = case.row([1, 3, 99])
    for name, number in expected.items():
        np.testing.assert_allclose(row[name], number, rtol=1e-5, atol=1e-6, err_msg=name)
    of_teacher = case.teacher_row([1])
    assert of_teacher["regret"] == pytest.approx(1 / 3)
    assert of_teacher["top_calibration"] == pytest.approx(1.5 / 2)


def test_row_has_the_measured_columns_of_the_results_in_their_order() -> None:
    row = random_case().row([10, 20])
    others = {*results.KEYS, *results.OTHER_KEYS, *SAVINGS, "flops_per_candidate", "cost_ratio"}
    others |= {"non_finite_step", "member"}
    columns = results.columns(TASKS, ReportAt([10, 20], TARGETS))
    assert list(row) == [name for name in columns if name not in others]
    assert all(type(number) is float for number in row.values())
    assert empty_of(row) == set()


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


def test_alignment_of_a_copy_of_the_teacher_is_unknown_and_of_a_better_student_negative() -> None:
    case = random_case()
    row = dataclasses.replace(case, student=case.teacher).row([])
    assert row["teacher_kl_shown/watch"] == pytest.approx(0, abs=1e-7)
    assert np.isnan(row["alignment_ratio"])
    assert row["alignment_ratio_bce"] == pytest.approx(0, abs=1e-6)
    assert dataclasses.replace(case, student=0.9 * case.label + 0.05).row([])["alignment_ratio"] < 0


def test_captured_value_is_the_ratio_of_sums_and_survival_the_mean() -> None:
    # Request 0 is worth ten times request 1. Only in request 1 does the student's best win.
    case = random_case(requests=2, candidates=2)
    case.stage[:] = Stage.RETRIEVED
    case.student[:] = np.array([0.9, 0.1])[None, :, None]
    case.teacher[:] = np.array([[0.1, 0.9], [0.09, 0.01]])[..., None]
    row = metrics.summarise(case.sums(shown=1), case.teacher_sums(), TASKS, ReportAt([1]))
    np.testing.assert_allclose(row["survival@1"], 0.5)
    np.testing.assert_allclose(row["value_captured@1"], (0.1 + 0.09) / (0.9 + 0.09), rtol=1e-6)


def test_ndcg_is_that_of_scikit_learn() -> None:
    case = random_case()
    case.label[0] = 0  # a request that does not count
    case.label_weight[1, 5:] = 0
    case.teacher_weight[:, ::3] = 0  # the teacher is judged only where it is known
    known = case.teacher_weight.all(axis=-1)
    row, of_teacher = case.row([]), case.teacher_row([])
    student, teacher, gain = (of @ VALUE_WEIGHTS for of in (case.student, case.teacher, case.label))
    labelled = case.label_weight > 0

    def mean(value: np.ndarray, gain: np.ndarray, there: np.ndarray) -> float:
        requests = [np.where(of)[0] for of in there]
        return np.mean([
            ndcg_score([gain[of, which]], [value[of, which]], k=SHOWN)
            for of, which in enumerate(requests) if gain[of, which].any()
        ])  # fmt: skip

    expected = mean(student, gain, labelled), mean(teacher, gain, labelled & known)
    assert (row["user_ndcg"], of_teacher["user_ndcg"]) == pytest.approx(expected, rel=1e-5)
    expected = mean(student, np.where(known, teacher, 0), case.stage > 0)
    assert row["teacher_ndcg"] == pytest.approx(expected, rel=1e-5)


def test_regret_is_that_of_the_top_that_the_ranker_itself_would_show() -> None:
    case = random_case()
    case.stage[:, ::4] = Stage.PADDING
    case.student[1:, 1] = np.nan  # not known, so never chosen
    case.teacher_weight[:, ::3, 0] = 0
    there = case.stage > 0
    for row, probability, may in (
        (case.row([]), case.student, there & ~np.isnan(case.student).any(axis=-1)),
        (case.teacher_row([]), case.teacher, there & (case.teacher_weight > 0).all(axis=-1)),
    ):
        sums = np.zeros(3)
        value, truth = probability @ VALUE_WEIGHTS, case.true @ VALUE_WEIGHTS
        for of in range(6):
            top = sorted(np.flatnonzero(may[of]), key=lambda place: -value[of, place])[:SHOWN]
            best = np.sort(truth[of, there[of]])[-SHOWN:]
            sums += [value[of, top].sum(), truth[of, top].sum(), best.sum()]
        promised, found, best = sums
        assert row["regret"] == pytest.approx(1 - found / best, rel=1e-4)
        assert row["top_calibration"] == pytest.approx(promised / found, rel=1e-4)


def test_the_sums_of_each_request_are_those_of_a_batch_of_it() -> None:
    case = random_case()
    case.label_weight[1] = 0  # nothing was shown
    case.teacher_weight[2] = 0  # nothing is known
    case.request_mask[5] = False
    ks, candidates = (1, 7, 99), case.stage.shape[1]
    single, curves = case.sums_of_each(ks)
    assert not single.keys() & curves.keys()
    each = single | curves
    at = np.minimum(ks, candidates) - 1
    for request in range(6):
        # All other requests only fill the batch, and may hold anything.
        only = case.request_mask & (np.arange(6) == request)
        noise = {
            name: np.where(only[:, None, None], getattr(case, name), np.nan)
            for name in ("student", "teacher", "true", "label")
        }
        sums = dataclasses.replace(case, request_mask=only, **noise).sums()
        expected = {
            name: of[at] if of.shape[:1] == (candidates,) else of
            for name, of in sums.items()
            if not name.startswith("bin_")
        }
        assert_same_sums({name: of[request] for name, of in each.items()}, expected)
    assert single["user_bce"].shape == (6, len(TASKS))
    assert curves["survival"].shape == (6, len(ks))
    assert curves["positives_kept"].shape == (6, len(ks), len(TASKS))
    assert single["funnel_requests"].tolist() == [1, 1, 0, 1, 1, 0]


def shown_by_funnel(case: Case, request: int, among: list[int], passed: int) -> list[int]:
    """The places that the teacher shows if the student passes its first ones of some."""
    student, teacher = (of[request] @ case.value_weights for of in (case.student, case.teacher))
    best = sorted(among, key=lambda place: -student[place])[:passed]
    known = [place for place in best if (case.teacher_weight[request, place] > 0).all()]
    return sorted(known, key=lambda place: -teacher[place])[:SHOWN]


def test_sums_of_many_batches_keep_all_digits() -> None:
    # In float32, 2^24 + 1 is 2^24.
    total = evaluate.add(None, {"a": np.full(3, np.float32(2.0**24))})
    one = {"a": np.ones(3, np.float32)}
    total = evaluate.add(evaluate.add(total, one), one)
    np.testing.assert_array_equal(total["a"], 2.0**24 + 2)


def test_padding_changes_nothing() -> None:
    case = random_case()
    # Weights of 1 and values of NaN: only the stage marks padding.
    fills = {"teacher_weight": 1, "label_weight": 1, "stage": Stage.PADDING}
    padded = {
        name: np.pad(
            of, [(0, 0), (0, 5)] + [(0, 0)] * (of.ndim - 2), constant_values=fills.get(name, np.nan)
        )
        for name, of in vars(case).items()
        if of.ndim > 1
    }
    longer = dataclasses.replace(case, **padded)
    # At the same k, a user metric passes the same share: padding is no candidate.
    assert longer.row([1, 7, 40]) == pytest.approx(case.row([1, 7, 40]), rel=1e-5, nan_ok=True)
    of_longer, of_case = metrics.curves(longer.sums(), TASKS), metrics.curves(case.sums(), TASKS)
    for name, curve in of_longer.items():
        # All that are passed beyond the candidates change nothing.
        if name != "covered_user_value":
            assert (curve[40:] == curve[39]).all(), name
        np.testing.assert_allclose(curve[:40], of_case[name], rtol=1e-5, err_msg=name)


def test_teacher_judged_as_a_student() -> None:
    case = random_case()
    assert_same_sums(case.teacher_sums(), dataclasses.replace(case, student=case.teacher).sums())
    row = case.teacher_row([1, SHOWN])
    # It is not measured against itself.
    assert np.isnan([row["alignment_ratio"], row["alignment_ratio_bce"]]).all()
    assert row["survival@1"] == pytest.approx(1 / SHOWN)
    assert row[f"value_captured@{SHOWN}"] == 1
    assert row["passed_for_99"] == SHOWN
    assert row["teacher_ndcg"] == pytest.approx(1)
    assert row["teacher_tau"] == pytest.approx(1)
    assert row["teacher_kl/watch"] == pytest.approx(0, abs=1e-6)


def test_of_a_teachers_positions_only_the_order_is_measured() -> None:
    case = random_case()
    names = ("teacher_bce", "teacher_kl", "teacher_kl_shown")
    against_teacher = {f"{name}/{task}" for name in names for task in TASKS}
    against_teacher |= {"alignment_ratio", "alignment_ratio_bce"}
    names = ("user_bce", "user_calibration")
    of_probabilities = {f"{name}/{task}" for name in names for task in TASKS} | {"top_calibration"}
    row, of_order = case.row([SHOWN]), case.row([SHOWN], "rank")
    assert empty_of(of_order) == against_teacher
    assert of_order == pytest.approx(row | dict.fromkeys(against_teacher, np.nan), nan_ok=True)
    assert empty_of(case.teacher_row([SHOWN], "rank")) == against_teacher | of_probabilities
    # A reference that only orders lacks the same, under a teacher of probabilities.
    sums = case.sums(), case.teacher_sums()
    of_list = metrics.summarise(*sums, TASKS, ReportAt([SHOWN], TARGETS), only_order=True)
    assert empty_of(of_list) == against_teacher | of_probabilities


def test_unknown_inputs_give_nan() -> None:
    truth, without, ignorant, diverged = (random_case() for _ in range(4))
    truth.true[:] = np.nan
    of_truth = {"true_value_captured@10", "regret", "top_calibration"}
    assert empty_of(truth.row([10])) == of_truth | {"true_value_for_50", "true_value_for_99"}
    assert np.isnan(metrics.curves(truth.sums(), TASKS)["true_value_captured"]).all()
    without.propensity[:] = np.nan
    assert empty_of(without.row([10])) == {"ips_user_value@10"}
    ignorant.teacher_weight[:] = 0
    row = ignorant.row([10])
    assert np.isfinite(row["hit_rate@10/watch"])
    assert {"end_to_end_hit_rate@10/watch", "survival@10", "value_captured@10"} <= empty_of(row)
    diverged.student[:] = np.nan
    row = diverged.row([10])
    assert row.pop("candidates") == 40
    assert np.isnan(list(row.values())).all()


def test_calibration_table_is_that_of_scikit_learn() -> None:
    case = random_case()
    case.label_weight = (case.stage == Stage.SHOWN).astype(np.float32)
    case.student[0, :2] = [[0.0], [1.0]]  # the ends fall into the first and last bin
    table = pd.DataFrame(metrics.calibration(case.sums(), TASKS))
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
    for name in (name for name in expected if not name.startswith("alignment")):
        lacks = name.startswith("teacher_") and name.endswith("/like")
        np.testing.assert_equal(row[name], np.nan if lacks else expected[name], err_msg=name)
        if not name.endswith("/like"):
            np.testing.assert_equal(teacher[name], of_teacher[name], err_msg=name)
    assert np.isfinite(row["alignment_ratio"])  # a mean over tasks
    assert np.isnan(teacher["user_auc/like"])


def test_the_teacher_scores_no_more_than_a_request_has() -> None:
    case = random_case(requests=3, candidates=12)
    for request, size in enumerate((2, 5, 12)):
        case.stage[request, size:] = Stage.PADDING
    for sizes in ((2, 5, 12), (2, 12)):
        row = case.row([4])
        assert row["candidates"] == pytest.approx(np.mean(sizes))
        for target in ("50", "99"):
            expected = np.minimum(sizes, row[f"passed_for_{target}"]).mean()
            assert row[f"scored_for_{target}"] == pytest.approx(expected)
        case.request_mask[1] = False


def test_users_measures_are_those_of_one_funnel_after_the_other() -> None:
    case = random_case(seed=5, candidates=30)
    case.stage[0, 20:] = Stage.PADDING
    case.stage[1] = np.where(case.stage[1] == Stage.PASSED, Stage.RETRIEVED, case.stage[1])
    case.label_weight *= case.stage == Stage.SHOWN
    case.request_mask[5] = False
    ks = [1, 4, 12, 30]
    row = case.row(ks)
    value = (case.label * case.value_weights).sum(axis=2) * (case.label_weight > 0)
    weighted = np.where(case.label_weight > 0, value / case.propensity, 0)
    found = {}
    for k in ks:
        sums = np.zeros(4)
        for request in range(5):
            there = np.flatnonzero(case.stage[request] > 0).tolist()
            passed = np.flatnonzero(case.stage[request] >= Stage.PASSED).tolist()
            shown = shown_by_funnel(case, request, there, k)
            some = math.ceil(min(k, len(there)) * len(passed) / len(there))
            covered = value[request, shown_by_funnel(case, request, passed, some)].sum()
            coverage = len(shown), len({*shown} & {*passed})
            sums += [covered, weighted[request, shown].sum(), *coverage]
        *found[k], every, passed_shown = sums
        assert row[f"coverage@{k}"] == pytest.approx(passed_shown / every)
    for k in ks:
        shares = [row[f"{name}@{k}"] for name in ("covered_user_value", "ips_user_value")]
        np.testing.assert_allclose(shares, np.divide(found[k], found[30]), rtol=1e-5)


def test_a_label_without_a_propensity_has_no_weight() -> None:
    """As if it were negative: a slot that was not filled at random."""
    case, without, negative = (random_case(seed=3) for _ in range(3))
    some = np.random.default_rng(0).random(case.stage.shape) < 0.5
    without.propensity[some] = np.nan
    negative.label[some] = 0
    found, same, other = (of.row([4])["ips_user_value@4"] for of in (without, negative, case))
    assert found == pytest.approx(same, rel=1e-6) != other


def liked_kept(ranked: Ranked) -> Sums:
    by_student = jnp.argsort(-ranked.value, axis=1)[..., None]
    positive = ranked.batch.user_label * (ranked.label_weight > 0)[..., None]
    return {"kept": jnp.take_along_axis(positive, by_student, axis=1).cumsum(axis=1)}


KEPT_RATE = Metric(
    name="kept_rate",
    formula="the share of the positive labels that the student's top k keeps",
    per=("k", "task"),
    sums=(liked_kept,),
    ends=lambda sums, _: ratio(sums["kept"], sums["kept"][-1]),
)


def test_a_metric_that_is_put_into_the_table_is_measured_and_has_its_columns():
    case = random_case()
    with mock.patch.dict(METRICS, kept_rate=KEPT_RATE, other=KEPT_RATE._replace(name="other")):
        row, curves = case.row([1, 10]), metrics.curves(case.sums(), TASKS)
        # A function that two metrics share is called once.
        assert metrics.sum_functions() == (*metrics.SUMS, liked_kept)
        assert "kept_rate@10/like" in results.columns(TASKS, ReportAt(ks=(10,)))
        assert "kept_rate/like" in results.curves_columns(TASKS)
        assert metrics.title_of("kept_rate@10/like") == "kept rate@10 like"
    positive = case.label * (case.label_weight > 0)[..., None]
    order = (-case.student @ VALUE_WEIGHTS).argsort(axis=1)[..., None]
    kept = np.take_along_axis(positive, order, axis=1).cumsum(axis=1).sum(axis=0)
    for k, (index, task) in itertools.product((1, 10), enumerate(TASKS)):
        share = pytest.approx(kept[k - 1, index] / kept[-1, index], rel=1e-5)
        assert row[f"kept_rate@{k}/{task}"] == row[f"other@{k}/{task}"] == share
        assert curves[f"kept_rate/{task}"][k - 1] == share


def test_two_sums_of_one_name_are_refused():
    clash = KEPT_RATE._replace(sums=(lambda ranked: {"user_bce": ranked.mask.sum(axis=1)},))
    with (
        mock.patch.dict(METRICS, {clash.name: clash}),
        pytest.raises(ValueError, match="two sums of the metrics are named user_bce"),
    ):
        random_case().sums()


def test_the_columns_and_titles_of_the_main_table():
    assert [metrics.title_of(column) for column in metrics.main_columns(("a", "b"), 200)] == [
        "passed for 99%", "saving", "cost ratio", "survival@200", "value@200", "true value@200",
        "hit rate@200 a", "end-to-end hit rate@200 a", "teacher KL", "alignment ratio",
        "users' NDCG", "AUC a", "AUC b", "user BCE a", "user BCE b",
    ]  # fmt: skip
