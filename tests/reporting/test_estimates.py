"""Estimates against the same numbers taken draw by draw."""

import numpy as np
import pytest

from kd_ranker.evaluation.evaluate import PerRequest
from kd_ranker.evaluation.metrics.metric import ReportAt
from kd_ranker.evaluation.metrics.registry import METRICS
from kd_ranker.evaluation.request_files import PerRequestByRanker, request_files
from kd_ranker.reporting import estimates
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.intervals import Interval, OverDraws, crossed_interval, request_counts
from kd_ranker.reporting.study import KeptRequests, read_studies
from tests.reporting import sweeps

REQUESTS, RETRIEVED = 12, 40
KS = np.array([1, 2, 4, 8, 16, 28, 40])
REPORTED = 16  # a k of columns in results.csv, where the curves are kept, as in a sweep
SEEDS = (0, 1, 2)
TARGET, TEACHER_FLOPS = 0.9, 200.0
FLOPS = {"none": 10.0, "shared": 14.0}


def each_of(seed: int) -> PerRequest:
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return generator.uniform(0.5, 1.5, (REQUESTS, *shape)).astype(np.float32)

    per_task = ("user_bce", "label_weight", "user_auc", "user_auc_requests")
    per_task += ("teacher_bce", "teacher_weight", "teacher_entropy")
    single = {name: draw(1) for name in per_task}
    single |= {name: draw() for name in ("teacher_tau", "teacher_tau_requests")}
    single["funnel_requests"] = single["requests"] = draw()
    single["candidates"] = RETRIEVED * single["requests"]
    curves = {}
    for name in sweeps.CURVES:
        falling_steps = np.sort(draw(len(KS)))[:, ::-1]
        curves[name] = np.cumsum(falling_steps, axis=1)
    return PerRequest(single, curves | {"scored": np.multiply.outer(single["requests"], KS)})


# The oracles take the requests one by one, each `times` times, and search for k.
def bce(each: PerRequest, times: np.ndarray) -> float:
    drawn = np.repeat(np.arange(REQUESTS), times)
    losses = each.sums["user_bce"][drawn, 0]
    weights = each.sums["label_weight"][drawn, 0]
    return losses.sum(dtype=float) / weights.sum(dtype=float)


def curve(each: PerRequest, times: np.ndarray, name: str) -> np.ndarray:
    return times @ each.curves[name].astype(float)


def passed(each: PerRequest, times: np.ndarray, target: float = TARGET) -> float:
    value = curve(each, times, "value_captured")
    for k in range(1, RETRIEVED + 1):
        if np.interp(k, KS, value) / value[-1] >= target:
            return float(k)
    raise AssertionError("the last k keeps all")


def true_value_at_target(each: PerRequest, times: np.ndarray) -> float:
    """The true value captured where the target is kept."""
    value = curve(each, times, "true_value_captured")
    return np.interp(passed(each, times), KS, value) / value[-1]


ONCE = np.ones(REQUESTS, int)
EACH = {
    (mode, seed): each_of(10 * seed + len(mode)) for mode in ("none", "shared") for seed in SEEDS
}


def rows_of(seeds):
    """The rows of a teacher, and of the students of these seeds."""
    rows = [sweeps.teacher_row() | {"flops": TEACHER_FLOPS}]
    for (mode, seed), each in EACH.items():
        if seed not in seeds:
            continue
        on_test = {
            "user_bce/watch": bce(each, ONCE), "passed_for_90": passed(each, ONCE),
            "scored_for_90": passed(each, ONCE),
            "true_value_for_90": true_value_at_target(each, ONCE),
            "passed": 7.0 + seed, "true_value_for": 1.0, f"survival@{REPORTED}": 0.5,
        }  # fmt: skip
        rows.append({
            "mode": mode, "seed": seed, "run": f"{mode}{seed}", "flops": FLOPS[mode],
            "passed": 5.0, "test": on_test,
        })  # fmt: skip
    return rows


def row_of_list(each):
    on_test = {
        "passed_for_90": passed(each, ONCE),
        "scored_for_90": passed(each, ONCE),
        "passed": 6.0,
    }
    return sweeps.reference_row("show_rate", 4.0, test=on_test)


def runs(*seeds):
    """The students of a cohort, of these seeds."""
    return {(f"{mode}{seed}", "user"): each for (mode, seed), each in EACH.items() if seed in seeds}


def write(folder, rows, *cohorts, ks=KS):
    """A sweep of rows; its cohorts have the requests of these rankers, each with a teacher.

    Their curves are kept at `ks`, which contain `KS`.
    """

    def at_ks(each):
        curves = {}
        for name, of_requests in each.curves.items():
            values = [np.interp(ks, KS, of_request) for of_request in of_requests]
            curves[name] = np.array(values, np.float32)
        return PerRequest(each.sums, curves)

    sweeps.write_rows(folder, rows, retrieved=RETRIEVED)
    for number, students in enumerate(cohorts):
        test = folder / "cohorts" / str(number) / "test"
        test.mkdir(parents=True)
        rankers = {("teacher", "user"): each_of(90 + number), **students}
        by_ranker = PerRequestByRanker(ks, {name: at_ks(each) for name, each in rankers.items()})
        for name, content in request_files(by_ranker, ("watch",)).items():
            (test / name).write_bytes(content)
    return sweeps.finish(folder)


def estimates_of(*folders):
    (study,) = read_studies([*folders])
    return Estimates(study)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return estimates_of(write(folder, rows_of(SEEDS), runs(*SEEDS)))


COUNTS = request_counts(REQUESTS, 60)


def by_hand(number, seeds=SEEDS):
    """The interval of `number(seed, times that each request counts)`, draw by draw."""
    assert len(COUNTS) == 1 + estimates.DRAWS
    numbers = np.array([[number(seed, times) for seed in seeds] for times in COUNTS])
    return crossed_interval(OverDraws(seeds, numbers, REQUESTS))


def assert_interval(found, expected):
    assert found[:4] == pytest.approx(expected[:4], rel=1e-5)
    assert found.covers == expected.covers == "both"
    assert found.low < found.mean < found.high


SHARED = "shared, weight 1"
PAIR = (SHARED, "none")


# The columns whose numbers have a restatement for one student above.
RESTATED = {
    "user_bce/watch": bce,
    "passed_for_90": passed,
    "true_value_for_90": true_value_at_target,
}


@pytest.mark.parametrize("column", RESTATED)
def test_the_estimate_of_a_column_is_that_of_the_draws(made, column):
    def number(seed, times):
        return RESTATED[column](EACH["shared", seed], times)

    assert_interval(made.of(SHARED, column), by_hand(number))


def test_the_gap_of_two_settings_is_that_of_the_draws(made):
    def gap(seed, times):
        return bce(EACH["shared", seed], times) - bce(EACH["none", seed], times)

    assert_interval(made.gap(*PAIR, "user_bce/watch"), by_hand(gap))


def test_a_saving_is_that_of_the_draws(made):
    def cost(mode, seed, times):
        return RETRIEVED * FLOPS[mode] + passed(EACH[mode, seed], times) * TEACHER_FLOPS

    def saving(seed, times):
        return 1 - cost("shared", seed, times) / cost("none", seed, times)

    assert_interval(made.cost_saved(SHARED, TARGET), by_hand(saving))


def interval_on_curve(made, name, index):
    """The interval of a curve at `KS[index]`."""
    found = made.curve(SHARED, name)
    assert list(found["k"]) == list(KS)
    return Interval(*found.loc[index, ["mean", "low", "high"]], len(SEEDS), "both")


def test_a_curve_of_value_is_that_of_the_draws(made):
    def share_of_value(seed, times):
        value = curve(EACH["shared", seed], times, "value_captured")
        return value[3] / value[-1]

    assert_interval(interval_on_curve(made, "value_captured", 3), by_hand(share_of_value))


def test_a_curve_of_survival_is_that_of_the_draws(made):
    def survival(seed, times):
        each = EACH["shared", seed]
        return curve(each, times, "survival")[2] / (times @ each.sums["funnel_requests"])

    assert_interval(interval_on_curve(made, "survival", 2), by_hand(survival))


def test_a_column_at_a_k_is_that_of_the_draws(made):
    found = made._measured(SHARED, f"survival@{REPORTED}")

    for index, seed in enumerate(SEEDS):
        each = EACH["shared", seed]
        for times, number in zip(COUNTS[1:], found.numbers[1:, index], strict=True):
            survivors = curve(each, times, "survival")[KS.tolist().index(REPORTED)]
            expected = survivors / (times @ each.sums["funnel_requests"])
            assert number == pytest.approx(expected, rel=1e-5)


def test_sweeps_that_report_other_k_have_one_curve(made, tmp_path):
    more_ks = np.array([*KS[:5], 20, *KS[5:]])
    one = write(tmp_path / "one", rows_of((0,)), runs(0))
    other = write(tmp_path / "other", rows_of((1, 2)), runs(1, 2), ks=more_ks)

    found = estimates_of(one, other).curve(SHARED, "value_captured")

    expected = made.curve(SHARED, "value_captured")
    np.testing.assert_allclose(found, expected, rtol=1e-5)


LABELS = [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("survival", "positives", "run", "needed"),
    [
        # V = 0, 2, 2, 4, each three times: mean 2, variance 24/11. z = 1.960 + 0.842, z² = 7.849.
        # A change of 1: 4 · 24/11 · 7.849 = 68.5.
        # They differ by at most 2 · 2 · (0.1 + 0.2) items: 1.2 · (24/11 / 2 + 1²) · 7.849 = 19.7.
        ((0.9, 0.8), LABELS, "none", (69, 20)),
        # By at most all of both: 4 · 23/11 · 7.849 = 65.6.
        ((0.3, 0.4), LABELS, "none", (69, 66)),
        ((1.0, 1.0), LABELS, "none", None),
        ((0.9, 0.8), [0] * 4, "none", None),
        # The teacher's row has labels only of items that it has scored.
        ((0.9, 0.8), LABELS, "teacher", None),
    ],
)
def test_a_live_test_planned_by_hand(tmp_path, survival, positives, run, needed):
    """Of two shown items; only the last k keeps all positive labels of a request."""
    of_none, of_shared = survival
    rows = [
        {"mode": "none", "survival": of_none, "passed": 9.0, "run": "none"},
        {"mode": "shared", "survival": of_shared, "passed": 9.0, "run": "shared"},
    ]
    study = sweeps.study_of(tmp_path, [sweeps.teacher_row(), *rows])
    study.config.funnel.shown = 2
    study.config.value_weights = (2.0,)

    def each_with_positives(positives):
        """Three requests with each number of positive labels."""
        kept = np.zeros((REQUESTS, len(KS), 1))
        kept[:, -1, 0] = np.repeat(positives, 3)
        each = each_of(7)
        return PerRequest(each.sums, each.curves | {"positives_kept": kept})

    of_requests = {
        ("teacher", "user"): each_with_positives([9, 9, 0, 9]),
        (run, "user"): each_with_positives(positives),
    }
    study = study._replace(kept_requests=[KeptRequests(0, PerRequestByRanker(KS, of_requests))])

    assert Estimates(study).live_test(SHARED, "none", 0.5) == needed


@pytest.mark.parametrize("teachers", [1, 2])
def test_references_are_those_of_the_teacher_of_a_repeat(tmp_path, teachers):
    """A sweep of one teacher measures them once, in the first of its cohorts."""
    lists = {seed: each_of(120 + seed * (teachers - 1)) for seed in (0, 1)}
    rows = [row for row in rows_of((0, 1)) if row.get("role") != "teacher"]
    cohorts = [runs(0), runs(1)]
    for seed in range(teachers):
        teacher = sweeps.teacher_row() | {"flops": TEACHER_FLOPS, "seed": seed}
        rows += [teacher, row_of_list(lists[seed]) | {"seed": seed}]
        cohorts[seed] = {("show_rate", "user"): lists[seed]} | cohorts[seed]

    found = estimates_of(write(tmp_path, rows, *cohorts))

    def gap(seed, times):
        return passed(EACH["shared", seed], times) - passed(lists[seed], times)

    assert found.study.num_teachers == teachers
    expected = by_hand(gap, seeds=(0, 1))
    assert_interval(found.gap(SHARED, "show_rate", "passed_for_90"), expected)


def test_what_is_not_known_has_no_estimate(made):
    assert made.of("none", "alignment_ratio").n == 0
    assert made.gap(*PAIR, "absent").n == 0


def test_a_number_without_requests_varies_over_repeats_only(made):
    flops = made.gap(*PAIR, "flops_per_candidate")

    assert flops == pytest.approx((4, 4, 4, 3, "repeats"))


@pytest.mark.parametrize("lacking", ["teacher", "none"])
def test_without_a_teacher_or_a_baseline_there_is_no_saving(tmp_path, lacking):
    rows = [row for row in rows_of(SEEDS) if lacking not in (row.get("role"), row.get("mode"))]
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows, retrieved=RETRIEVED)])

    saving = Estimates(study).of(SHARED, "funnel_cost_saving")

    assert saving.n == 0


# The covered value of three repeats of mode `none`, and by what that of `shared` differs.
COVERED_BEFORE = [0.900, 0.910, 0.905]
GAIN, LOSS, UNSURE = [0.02, 0.021, 0.019], [-0.02, -0.021, -0.019], [0.03, -0.06, 0.01]
ONLY_A_LOSS = "labels that the final ranker chose show losses only, and here none"


@pytest.mark.parametrize(
    ("change", "shown_recall", "coverage", "reason"),
    [
        (LOSS, 0.5, 0.9, ""),
        # The final ranker chose what has a label: whoever agrees with its mistakes would gain.
        (GAIN, 0.5, 0.9, ONLY_A_LOSS),
        (UNSURE, 0.5, 0.9, ONLY_A_LOSS),
        # All candidates were shown, so nobody chose.
        (GAIN, None, 0.9, ""),
        (UNSURE, None, 0.9, ""),
        (LOSS, 0.5, 0.34, "only 34%"),
        (GAIN, None, 0.34, "only 34%"),
    ],
)
def test_labels_of_chosen_items_show_a_loss_and_no_gain(
    tmp_path, change, shown_recall, coverage, reason
):
    rows = []
    for seed, before in enumerate(COVERED_BEFORE):
        numbers = {"seed": seed, "coverage": coverage, "shown_recall@30": shown_recall}
        rows.append({"mode": "none", "covered": before, **numbers})
        rows.append({"mode": "shared", "covered": before + change[seed], **numbers})

    found = estimates_of(sweeps.write_rows(tmp_path / "study", rows)).why_unlabeled(PAIR)

    assert bool(found) == bool(reason)
    assert reason in found


def test_labels_beyond_the_shown_items_show_gains(tmp_path):
    rows = [
        {"mode": mode, "seed": seed, "coverage": 0.1, "shown_recall@30": 0.5,
         "served_ndcg@30": ndcg}
        for mode, ndcg in (("none", 0.80), ("shared", 0.85))
        for seed in range(3)
    ]  # fmt: skip

    estimates = estimates_of(sweeps.write_rows(tmp_path / "study", rows))

    assert estimates.why_unlabeled(PAIR) == ""


def test_requests_for_a_width_follow_from_the_spread_of_draws(made):
    counts = request_counts(REQUESTS, estimates.DRAWS)
    means = [np.mean([bce(EACH["none", seed], times) for seed in SEEDS]) for times in counts[1:]]
    whole = np.mean([bce(EACH["none", seed], ONCE) for seed in SEEDS])

    needed = made.requests_for("none", "user_bce/watch", 0.1)

    half = 1.96 * np.std(means, ddof=1) / whole
    assert needed == pytest.approx(REQUESTS * (half / 0.1) ** 2, rel=1e-6)
    assert made.requests_for("none", "user_bce/watch", 0.05) == pytest.approx(4 * needed)


def test_a_study_counts_the_requests_that_were_kept(made, tmp_path):
    assert made.num_requests == REQUESTS
    assert estimates_of(write(tmp_path / "study", rows_of(SEEDS))).num_requests == 0


def test_without_request_sums_requests_for_a_width_are_unknown(made):
    assert np.isnan(made.requests_for("none", "flops_per_candidate", 0.1))


def test_the_mean_over_tasks_leaves_out_an_unknown_task(tmp_path):
    estimates_of_three_tasks = sweeps.estimates_of(tmp_path)
    # No like has a weight, so their mean is unknown. One draw, the last axis.
    losses = np.array([[2.0], [0.0], [9.0]])
    weights = np.array([[4.0], [0.0], [12.0]])
    sums = {"user_bce": losses, "label_weight": weights}

    metric = METRICS["user_bce"]
    drawn = estimates_of_three_tasks._numbers(metric, metric.final(sums, sums), ReportAt())

    assert drawn["user_bce/watch"] == 0.5
    assert np.isnan(drawn["user_bce/like"])
    assert drawn["user_bce"] == (0.5 + 0.75) / 2
