"""Estimates against the same numbers taken draw by draw."""

import math

import numpy as np
import pytest

from kd_ranker.evaluation.evaluate import Each
from kd_ranker.evaluation.results import Kept, request_files
from kd_ranker.report import estimates
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import (
    EQUIVALENCE_CONFIDENCE,
    Measured,
    crossed_interval,
    interval,
    request_counts,
)
from kd_ranker.report.study import read_studies
from tests.report import sweeps

REQUESTS, RETRIEVED = 12, 40
KS = np.array([1, 2, 4, 8, 16, 28, 40])
SEEDS = (0, 1, 2)
TARGET, TEACHER_FLOPS = 0.9, 200.0
FLOPS = {"none": 10.0, "shared": 14.0}


def each_of(seed: int) -> Each:
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return generator.uniform(0.5, 1.5, (REQUESTS, *shape)).astype(np.float32)

    per_task = ("user_bce", "label_weight", "user_auc", "user_auc_requests")
    per_task += ("teacher_bce", "teacher_weight", "teacher_entropy")
    alone = {name: draw(1) for name in per_task}
    alone |= {name: draw() for name in ("teacher_tau", "teacher_tau_requests")}
    alone["funnel_requests"] = alone["requests"] = draw()
    alone["candidates"] = RETRIEVED * alone["requests"]
    steps = {name: np.sort(draw(len(KS)))[:, ::-1] for name in sweeps.CURVES}
    curves = {name: np.cumsum(of, axis=1) for name, of in steps.items()}
    return Each(alone, curves | {"scored": np.multiply.outer(alone["requests"], KS)})


def bce(each: Each, times: np.ndarray) -> float:
    """User BCE on the requests, each so many times."""
    drawn = np.repeat(np.arange(REQUESTS), times)
    losses, weights = (each.alone[name][drawn, 0].astype(float) for name in
                       ("user_bce", "label_weight"))  # fmt: skip
    return losses.sum() / weights.sum()


def passed(each: Each, times: np.ndarray) -> float:
    drawn = np.repeat(np.arange(REQUESTS), times)
    curve = each.curves["value_captured"][drawn].astype(float).sum(axis=0)
    for k in range(1, RETRIEVED + 1):
        if np.interp(k, KS, curve) / curve[-1] >= TARGET:
            return float(k)
    raise AssertionError


def users(each: Each, times: np.ndarray) -> float:
    """The true value captured where the target is kept."""
    curve = times @ each.curves["true_value_captured"].astype(float)
    return np.interp(passed(each, times), KS, curve) / curve[-1]


def saved(after: float, before: float, shares: dict[str, float] = FLOPS) -> float:
    cost = {mode: RETRIEVED * of for mode, of in shares.items()}
    return 1 - (cost["shared"] + after * TEACHER_FLOPS) / (cost["none"] + before * TEACHER_FLOPS)


ONCE = np.ones(REQUESTS, int)
EACH = {
    (mode, seed): each_of(10 * seed + len(mode)) for mode in ("none", "shared") for seed in SEEDS
}


def rows_of(seeds):
    members = {
        (mode, seed): {
            "mode": mode, "seed": seed, "member": f"{mode}{seed}", "flops": FLOPS[mode],
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
    return [sweeps.teacher_row() | {"flops": TEACHER_FLOPS}, *members.values()]


def write(folder, seeds=SEEDS, with_requests=True):
    sweeps.write_rows(folder, rows_of(seeds), retrieved=RETRIEVED)
    if with_requests:
        each = {("teacher", "user"): each_of(99)}
        each |= {
            (f"{mode}{seed}", "user"): of for (mode, seed), of in EACH.items() if seed in seeds
        }
        test = folder / "cohorts" / "0" / "test"
        test.mkdir(parents=True)
        for name, content in request_files(Kept(KS, each), ("watch",)).items():
            (test / name).write_bytes(content)
    return sweeps.finish(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    (study,) = read_studies([write(tmp_path_factory.mktemp("study"))])
    return Estimates(study)


COUNTS = request_counts(REQUESTS, 60)


def by_hand(number, confidence=0.95, seeds=SEEDS):
    """The interval of a number of (seed, times that each request counts), draw by draw."""
    assert len(COUNTS) == estimates.DRAWS
    each = np.array([number(seed, ONCE) for seed in seeds])
    drawn = np.array([[number(seed, times) for seed in seeds] for times in COUNTS])
    return crossed_interval(Measured(seeds, each, drawn, REQUESTS), confidence)


def assert_interval(found, expected):
    assert found[:4] == pytest.approx(expected[:4], rel=1e-6)
    assert found.covers == expected.covers == "both"
    assert found.low < found.mean < found.high


def test_a_mean_and_its_interval_are_those_of_the_draws_one_by_one(made):
    for measure, number in (
        ("user_bce/watch", bce), ("user_bce", bce), ("passed_for_90", passed),
        ("scored_for_90", passed), ("true_value_for_90", users),
    ):  # fmt: skip
        expected = by_hand(lambda seed, times, of=number: of(EACH["shared", seed], times))
        assert_interval(made.of("shared, weight 1", measure), expected)


def test_a_gap_is_paired_within_repeats_and_draws(made):
    def gap(seed, times):
        return bce(EACH["shared", seed], times) - bce(EACH["none", seed], times)

    pair = ("shared, weight 1", "none", "user_bce/watch")
    assert_interval(made.gap(*pair), by_hand(gap))
    narrower = by_hand(gap, EQUIVALENCE_CONFIDENCE)
    assert_interval(made.gap(*pair, EQUIVALENCE_CONFIDENCE), narrower)
    assert narrower.high < made.gap(*pair).high


def test_a_saving_is_of_the_funnels_costs_on_each_draw(made):
    assert made.targets == (0.99, TARGET) or made.targets == (TARGET, 0.99)

    def saving(seed, times, shares=FLOPS):
        of = (passed(EACH[mode, seed], times) for mode in ("shared", "none"))
        return saved(*of, shares)

    assert_interval(made.saving("shared, weight 1", TARGET), by_hand(saving))
    # Both students at a twentieth of the teacher's cost.
    alike = dict.fromkeys(FLOPS, 0.05 * TEACHER_FLOPS)
    expected = by_hand(lambda seed, times: saving(seed, times, alike))
    assert_interval(made.saving("shared, weight 1", TARGET, 0.05), expected)
    assert made.saving("none", TARGET)[:3] == (0, 0, 0)


def test_a_saving_over_any_ranker_is_of_the_costs_of_both(made):
    pair = ("shared, weight 1", "none")
    found = made.saving_over(*pair)
    # On the test each needs 7, 8 and 9 for 99%.
    each = [saved(7.0 + seed, 7.0 + seed) for seed in SEEDS]
    assert found.mean == pytest.approx(np.mean(each))
    assert found == pytest.approx(made.of(pair[0], "funnel_cost_saving"))
    # What the one saves of the other's cost, the other adds to its own.
    other = np.mean([1 - 1 / (1 - saving) for saving in each])
    assert made.saving_over(*reversed(pair)).mean == pytest.approx(other)
    assert made.saving_over("none", "none")[:3] == (0, 0, 0)


def live_study(tmp_path, survival, positives, member="none"):
    """A study of two shown items, whose requests have so many positive labels, three of each."""
    rows = [
        {"mode": mode, "survival": share, "passed": 9.0, "member": mode}
        for mode, share in zip(("none", "shared"), survival, strict=True)
    ]
    teacher = sweeps.teacher_row() | {"flops": TEACHER_FLOPS}
    sweeps.write_rows(tmp_path, [teacher, *rows], retrieved=RETRIEVED)
    (study,) = read_studies([tmp_path])

    def each(of):
        """Only the last k keeps all of them."""
        kept = np.zeros((REQUESTS, len(KS), 1))
        kept[:, -1, 0] = np.repeat(of, 3)
        found = each_of(7)
        return Each(found.alone, found.curves | {"positives_kept": kept})

    of_requests = {("teacher", "user"): each([9, 9, 0, 9]), (member, "user"): each(positives)}
    return study._replace(shown=2, value_weights=[2.0], kept=[(0, Kept(KS, of_requests))])


@pytest.mark.parametrize(
    ("survival", "interleaved"),
    [
        # They differ by at most 2 · 2 · (0.1 + 0.2) items: 1.2 · (24/11 / 2 + 1²) · 7.849 = 19.7.
        ((0.9, 0.8), 20),
        # By at most all of both: 4 · 23/11 · 7.849 = 65.6.
        ((0.3, 0.4), 66),
    ],
)
def test_a_live_test_planned_by_hand(tmp_path, survival, interleaved):
    # V = 0, 2, 2, 4, each three times: mean 2, variance 24/11. z = 1.960 + 0.842, so z² = 7.849.
    study = live_study(tmp_path, survival, [0, 1, 1, 2])
    # A change of 1: 4 · 24/11 · 7.849 = 68.5.
    needed = Estimates(study).live_test("shared, weight 1", "none", 0.5)
    assert needed == (69, interleaved)


def test_a_live_test_that_cannot_be_planned(tmp_path):
    pair = ("shared, weight 1", "none", 0.5)
    labels = [0, 1, 1, 2]
    study = live_study(tmp_path / "a", (0.9, 0.8), labels)
    assert Estimates(study._replace(kept=[])).live_test(*pair) is None
    # The teacher's row has labels only of what it has scored.
    only = live_study(tmp_path / "b", (0.9, 0.8), labels, member="teacher")
    assert Estimates(only).live_test(*pair) is None
    # No label is positive; no list differs.
    assert Estimates(live_study(tmp_path / "c", (0.9, 0.8), [0] * 4)).live_test(*pair) is None
    assert Estimates(live_study(tmp_path / "d", (1.0, 1.0), labels)).live_test(*pair) is None


def test_a_target_that_was_not_measured_is_read_between_the_kept_k(made):
    def needed(seed, times, mode="shared", target=0.83):
        curve = times @ EACH[mode, seed].curves["value_captured"].astype(float)
        return next(k for k in range(1, RETRIEVED + 1)
                    if np.interp(k, KS, curve) / curve[-1] >= target)  # fmt: skip

    def saving(seed, times):
        return saved(needed(seed, times), needed(seed, times, "none"))

    assert_interval(made.saving("shared, weight 1", 0.83), by_hand(saving))

    def share(seed, times):
        cost = RETRIEVED * FLOPS["shared"] + needed(seed, times) * TEACHER_FLOPS
        return cost / (RETRIEVED * TEACHER_FLOPS)

    assert_interval(made.cost_share("shared, weight 1", 0.83), by_hand(share))


def test_a_curve_is_that_of_the_kept_k_with_an_interval_at_each(made):
    curve = made.curve("none", "value_captured")
    assert list(curve["k"]) == list(KS)

    def share(seed, times, place=3):
        of = times @ EACH["none", seed].curves["value_captured"].astype(float)
        return of[place] / of[-1]

    expected = by_hand(share)
    assert tuple(curve.loc[3, ["mean", "low", "high"]]) == pytest.approx(expected[:3], rel=1e-6)
    assert (curve["mean"].iloc[-1], curve["low"].iloc[-1]) == (1, 1)

    def survived(seed, times, place=2):
        each = EACH["none", seed]
        return times @ each.curves["survival"][:, place] / (times @ each.alone["funnel_requests"])

    expected = by_hand(survived)
    found = made.curve("none", "survival").loc[2, ["mean", "low", "high"]]
    assert tuple(found) == pytest.approx(expected[:3], rel=1e-5)


def test_what_is_not_measured_on_requests_varies_over_repeats_alone(made):
    gap = made.relative_gap("shared, weight 1", "none", "flops_per_candidate")
    assert gap == pytest.approx((0.4, 0.4, 0.4, 3, "repeats"))


def test_without_the_requests_intervals_are_over_repeats(tmp_path):
    (study,) = read_studies([write(tmp_path, with_requests=False)])
    plain = Estimates(study)
    each = np.array([bce(EACH["shared", seed], ONCE) for seed in SEEDS])
    assert plain.of("shared, weight 1", "user_bce/watch") == pytest.approx(interval(each))
    k = {mode: [passed(EACH[mode, seed], ONCE) for seed in SEEDS] for mode in FLOPS}
    saving = np.array([saved(*pair) for pair in zip(k["shared"], k["none"], strict=True)])
    assert plain.saving("shared, weight 1", TARGET) == pytest.approx(interval(saving))
    assert plain.curve("none", "survival").empty


def test_sweeps_of_which_one_has_lost_its_requests_are_taken_over_repeats(tmp_path):
    folders = [write(tmp_path / "a", (0, 1)), write(tmp_path / "b", (2,), with_requests=False)]
    (study,) = read_studies(folders)
    joined = Estimates(study)
    each = np.array([bce(EACH["none", seed], ONCE) for seed in SEEDS])
    assert joined.of("none", "user_bce/watch") == pytest.approx(interval(each))
    assert joined.curve("none", "survival").empty


def test_repeats_of_several_sweeps_are_those_of_one(tmp_path, made):
    (study,) = read_studies([write(tmp_path / "a", (0, 1)), write(tmp_path / "b", (2,))])
    joined = Estimates(study)
    pair = ("shared, weight 1", "none", "user_bce/watch")
    assert joined.gap(*pair) == pytest.approx(made.gap(*pair))


def test_a_setting_with_requests_and_one_without_are_compared_over_repeats(tmp_path):
    rows = rows_of(SEEDS)
    write(tmp_path / "a")
    path = tmp_path / "a"
    others = [row | {"mode": "aux", "weight": 1.0, "member": f"aux{row['seed']}"}
              for row in rows if row.get("mode") == "none"]  # fmt: skip
    sweeps.write_rows(tmp_path / "b", [rows[0], *others], retrieved=RETRIEVED)
    (study,) = read_studies([path, tmp_path / "b"])
    gap = Estimates(study).gap("aux, weight 1", "none", "user_bce/watch")
    assert gap == pytest.approx((0, 0, 0, 3, "repeats"))


def test_what_is_not_known_has_no_estimate(made, tmp_path):
    assert made.of("none", "alignment_ratio").n == 0
    assert made.gap("shared, weight 1", "none", "absent").n == 0
    # Neither a baseline nor a teacher to save anything of.
    for rows in (rows_of(SEEDS)[1:], [row for row in rows_of(SEEDS) if row.get("mode") != "none"]):
        (study,) = read_studies([sweeps.write_rows(tmp_path, rows, retrieved=RETRIEVED)])
        saving = Estimates(study).of("shared, weight 1", "funnel_cost_saving")
        assert math.isnan(saving.mean)
        assert saving.n == 0


def test_of_one_teacher_references_measured_in_one_cohort_serve_every_repeat(tmp_path):
    """A sweep of one teacher measures them once, in the first of its cohorts."""
    show_rate = each_of(55)
    rows = [*rows_of((0, 1)), of_reference(show_rate)]
    cohorts = [{("show_rate", "user"): show_rate} | members(0), members(1)]
    made = with_cohorts(tmp_path, rows, cohorts)

    def gap(seed, times):
        return passed(EACH["none", seed], times) - passed(show_rate, times)

    assert made.study.num_teachers == 1
    assert_interval(made.gap("none", "show_rate", "passed_for_90"), by_hand(gap, seeds=(0, 1)))


def test_under_two_teachers_a_reference_has_the_requests_of_its_own_teacher(tmp_path):
    """The needs of a list depend on the teacher."""
    lists = {seed: each_of(120 + seed) for seed in (0, 1)}
    rows = [row for row in rows_of((0, 1)) if row.get("role") != "teacher"]
    rows += [
        row | {"seed": seed}
        for seed in (0, 1)
        for row in (
            sweeps.teacher_row() | {"flops": TEACHER_FLOPS},
            of_reference(lists[seed]),
        )
    ]
    cohorts = [{("show_rate", "user"): lists[seed]} | members(seed) for seed in (0, 1)]
    made = with_cohorts(tmp_path, rows, cohorts)
    assert made.study.num_teachers == 2
    expected = by_hand(lambda seed, times: passed(lists[seed], times), seeds=(0, 1))
    assert_interval(made.of("show_rate", "passed_for_90"), expected)

    def gap(seed, times):
        return passed(EACH["shared", seed], times) - passed(lists[seed], times)

    found = made.gap("shared, weight 1", "show_rate", "passed_for_90")
    assert_interval(found, by_hand(gap, seeds=(0, 1)))

    def saving(seed, times):
        own = RETRIEVED * FLOPS["shared"] + passed(EACH["shared", seed], times) * TEACHER_FLOPS
        return 1 - own / (passed(lists[seed], times) * TEACHER_FLOPS)

    # Of all without scores the list needs the fewest on validation; it costs nothing itself.
    assert made.study.baseline == "show_rate"
    found = made.saving("shared, weight 1", TARGET)
    assert_interval(found, by_hand(saving, seeds=(0, 1)))


def of_reference(each):
    needed = {"passed_for_90": passed(each, ONCE), "scored_for_90": passed(each, ONCE)}
    return sweeps.reference_row("show_rate", 4.0, test=needed | {"passed": 6.0})


def members(seed):
    """A cohort's students of a seed."""
    return {(f"{mode}{seed}", "user"): EACH[mode, seed] for mode in ("none", "shared")}


def with_cohorts(folder, rows, cohorts):
    """The estimates of rows whose requests are those of cohorts, each with a teacher."""
    sweeps.write_rows(folder, rows, retrieved=RETRIEVED)
    for number, each in enumerate(cohorts):
        test = folder / "cohorts" / str(number) / "test"
        test.mkdir(parents=True)
        of_cohort = Kept(KS, {("teacher", "user"): each_of(90 + number), **each})
        for name, content in request_files(of_cohort, ("watch",)).items():
            (test / name).write_bytes(content)
    (study,) = read_studies([sweeps.finish(folder)])
    return Estimates(study)
