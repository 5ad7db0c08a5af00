"""Estimates against the same numbers taken draw by draw."""

import numpy as np
import pytest

from kd_ranker.evaluation.evaluate import PerRequest
from kd_ranker.evaluation.request_files import PerRequestByRanker, request_files
from kd_ranker.reporting import estimates
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.intervals import Interval, OverDraws, crossed_interval, request_counts
from kd_ranker.reporting.study import read_studies
from tests.reporting import sweeps

REQUESTS, RETRIEVED = 12, 40
KS = np.array([1, 2, 4, 8, 16, 28, 40])
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
    steps = {name: np.sort(draw(len(KS)))[:, ::-1] for name in sweeps.CURVES}
    curves = {name: np.cumsum(of, axis=1) for name, of in steps.items()}
    return PerRequest(single, curves | {"scored": np.multiply.outer(single["requests"], KS)})


# The oracles take the requests one by one, each `times` times, and search for k.
def bce(each: PerRequest, times: np.ndarray) -> float:
    drawn = np.repeat(np.arange(REQUESTS), times)
    losses, weights = (each.sums[name][drawn, 0] for name in ("user_bce", "label_weight"))
    return losses.sum(dtype=float) / weights.sum(dtype=float)


def curve(each: PerRequest, times: np.ndarray, name: str) -> np.ndarray:
    return times @ each.curves[name].astype(float)


def passed(each: PerRequest, times: np.ndarray, target: float = TARGET) -> float:
    value = curve(each, times, "value_captured")
    shares = (np.interp(k, KS, value) / value[-1] for k in range(1, RETRIEVED + 1))
    return 1.0 + next(place for place, share in enumerate(shares) if share >= target)


def users(each: PerRequest, times: np.ndarray) -> float:
    """The true value captured where the target is kept."""
    value = curve(each, times, "true_value_captured")
    return np.interp(passed(each, times), KS, value) / value[-1]


def saved(after: float, before: float) -> float:
    cost = {mode: RETRIEVED * of for mode, of in FLOPS.items()}
    return 1 - (cost["shared"] + after * TEACHER_FLOPS) / (cost["none"] + before * TEACHER_FLOPS)


ONCE = np.ones(REQUESTS, int)
EACH = {
    (mode, seed): each_of(10 * seed + len(mode)) for mode in ("none", "shared") for seed in SEEDS
}


def rows_of(seeds):
    runs = {
        (mode, seed): {
            "mode": mode, "seed": seed, "run": f"{mode}{seed}", "flops": FLOPS[mode],
            "passed": 5.0,
            "test": {
                "user_bce/watch": bce(each, ONCE), "passed_for_90": passed(each, ONCE),
                "scored_for_90": passed(each, ONCE), "true_value_for_90": users(each, ONCE),
                "passed": 7.0 + seed, "true_value_for": 1.0,
            },
        }
        for (mode, seed), each in EACH.items()
        if seed in seeds
    }  # fmt: skip
    return [sweeps.teacher_row() | {"flops": TEACHER_FLOPS}, *runs.values()]


def of_reference(each):
    needed = {"passed_for_90": passed(each, ONCE), "scored_for_90": passed(each, ONCE)}
    return sweeps.reference_row("show_rate", 4.0, test=needed | {"passed": 6.0})


def runs(*seeds):
    """The students of a cohort, of these seeds."""
    return {(f"{mode}{seed}", "user"): of for (mode, seed), of in EACH.items() if seed in seeds}


def write(folder, rows, *cohorts, ks=KS):
    """A sweep of rows; its cohorts have the requests of these rankers, each with a teacher.

    Their curves are kept at `ks`, which contain `KS`.
    """

    def at(of):
        return np.array([np.interp(ks, KS, curve) for curve in of], np.float32)

    sweeps.write_rows(folder, rows, retrieved=RETRIEVED)
    for number, each in enumerate(cohorts):
        test = folder / "cohorts" / str(number) / "test"
        test.mkdir(parents=True)
        each = {("teacher", "user"): each_of(90 + number), **each}
        for who, of in each.items():
            each[who] = PerRequest(of.sums, {name: at(curve) for name, curve in of.curves.items()})
        for name, content in request_files(PerRequestByRanker(ks, each), ("watch",)).items():
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
    """The interval of a number of (seed, times that each request counts), draw by draw."""
    assert len(COUNTS) == 1 + estimates.DRAWS
    numbers = np.array([[number(seed, times) for seed in seeds] for times in COUNTS])
    return crossed_interval(OverDraws(seeds, numbers, REQUESTS))


def assert_interval(found, expected):
    assert found[:4] == pytest.approx(expected[:4], rel=1e-5)
    assert found.covers == expected.covers == "both"
    assert found.low < found.mean < found.high


SHARED = "shared, weight 1"
PAIR = (SHARED, "none")


def of_shared(number):
    return lambda shared, none, times: number(shared, times)


def saving(shared, none, times):
    return saved(passed(shared, times), passed(none, times))


def survived(shared, none, times):
    return curve(shared, times, "survival")[2] / (times @ shared.sums["funnel_requests"])


def at_k(estimates, name, place):
    found = estimates.curve(SHARED, name)
    assert list(found["k"]) == list(KS)
    return Interval(*found.loc[place, ["mean", "low", "high"]], len(SEEDS), "both")


# By name: an estimate, and the same number of both students on requests that count so many times.
NUMBERS = {
    "bce": (lambda e: e.of(SHARED, "user_bce/watch"), of_shared(bce)),
    "passed": (lambda e: e.of(SHARED, "passed_for_90"), of_shared(passed)),
    "users": (lambda e: e.of(SHARED, "true_value_for_90"), of_shared(users)),
    "gap": (
        lambda e: e.gap(*PAIR, "user_bce/watch"),
        lambda shared, none, times: bce(shared, times) - bce(none, times),
    ),
    "saving": (lambda e: e.saving(SHARED, TARGET), saving),
    "curve of value": (
        lambda e: at_k(e, "value_captured", 3),
        of_shared(lambda each, times: np.divide(*curve(each, times, "value_captured")[[3, -1]])),
    ),
    "curve of survival": (lambda e: at_k(e, "survival", 2), survived),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_estimates_are_those_of_the_draws_one_by_one(made, name):
    estimate, number = NUMBERS[name]

    def of_seed(seed, times):
        return number(EACH["shared", seed], EACH["none", seed], times)

    assert_interval(estimate(made), by_hand(of_seed))


def test_sweeps_that_report_other_k_have_one_curve(made, tmp_path):
    more = np.array([*KS[:5], 20, *KS[5:]])
    one = write(tmp_path / "one", rows_of((0,)), runs(0))
    other = write(tmp_path / "other", rows_of((1, 2)), runs(1, 2), ks=more)
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
    rows = [
        {"mode": mode, "survival": share, "passed": 9.0, "run": mode}
        for mode, share in zip(("none", "shared"), survival, strict=True)
    ]
    study = sweeps.study_of(tmp_path, [sweeps.teacher_row(), *rows])
    study.config.funnel.shown, study.config.value_weights = 2, (2.0,)

    def each(of):
        kept = np.zeros((REQUESTS, len(KS), 1))
        kept[:, -1, 0] = np.repeat(of, 3)
        found = each_of(7)
        return PerRequest(found.sums, found.curves | {"positives_kept": kept})

    of_requests = {("teacher", "user"): each([9, 9, 0, 9]), (run, "user"): each(positives)}
    kept = PerRequestByRanker(KS, of_requests)
    found = Estimates(study._replace(kept=[(0, kept)])).live_test(SHARED, "none", 0.5)
    assert found == needed


@pytest.mark.parametrize("teachers", [1, 2])
def test_references_are_those_of_the_teacher_of_a_repeat(tmp_path, teachers):
    """A sweep of one teacher measures them once, in the first of its cohorts."""
    lists = {seed: each_of(120 + seed * (teachers - 1)) for seed in (0, 1)}
    rows = [row for row in rows_of((0, 1)) if row.get("role") != "teacher"]
    cohorts = [runs(0), runs(1)]
    for seed in range(teachers):
        teacher = sweeps.teacher_row() | {"flops": TEACHER_FLOPS, "seed": seed}
        rows += [teacher, of_reference(lists[seed]) | {"seed": seed}]
        cohorts[seed] = {("show_rate", "user"): lists[seed]} | cohorts[seed]
    found = estimates_of(write(tmp_path, rows, *cohorts))
    assert found.study.num_teachers == teachers

    def gap(seed, times):
        return passed(EACH["shared", seed], times) - passed(lists[seed], times)

    expected = by_hand(gap, seeds=(0, 1))
    assert_interval(found.gap(SHARED, "show_rate", "passed_for_90"), expected)


def test_what_is_not_known_has_no_estimate(made, tmp_path):
    assert made.of("none", "alignment_ratio").n == 0
    assert made.gap(*PAIR, "absent").n == 0
    # What is not measured on requests varies over repeats only.
    flops = made.gap(*PAIR, "flops_per_candidate")
    assert flops == pytest.approx((4, 4, 4, 3, "repeats"))
    # Neither a baseline nor a teacher to save anything of.
    for rows in (rows_of(SEEDS)[1:], [row for row in rows_of(SEEDS) if row.get("mode") != "none"]):
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
    rows = [
        {"mode": mode, "seed": seed, "coverage": coverage, "shown_recall@30": shown_recall,
         "covered": before + (change[seed] if mode == "shared" else 0)}
        for mode in ("none", "shared")
        for seed, before in enumerate(COVERED_BEFORE)
    ]  # fmt: skip
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
    means = [np.mean([passed(EACH["none", seed], times) for seed in SEEDS]) for times in counts[1:]]
    whole = np.mean([passed(EACH["none", seed], ONCE) for seed in SEEDS])

    needed = made.requests_for("none", "passed_for_90", 0.1)

    half = 1.96 * np.std(means, ddof=1) / whole
    assert needed == pytest.approx(REQUESTS * (half / 0.1) ** 2, rel=1e-6)
    assert made.requests_for("none", "passed_for_90", 0.05) == pytest.approx(4 * needed)


def test_without_request_sums_requests_for_a_width_are_unknown(made):
    assert np.isnan(made.requests_for("none", "flops_per_candidate", 0.1))
