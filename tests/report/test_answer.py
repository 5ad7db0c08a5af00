import numpy as np
import pytest

from kd_ranker.report.answer import answer
from kd_ranker.report.choices import best_distilled
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.study import read_studies
from tests.report import sweeps


def answered(tmp_path, passed_by_setting, flops=10.0, teacher=True, users=None):
    """The answer to `passed_for_99` by setting and repeat, on both splits.

    Args:
      tmp_path: a folder.
      passed_by_setting: (mode, weight) -> a number a repeat, or a pair for validation and test.
      flops: of students that distil; those of the others are 10, of the teacher 200.
      teacher: whether its row is there.
      users: by mode, the true value captured, a number a repeat; None where it is not known.
    """
    rows = [sweeps.teacher_row()] if teacher else []
    for (mode, weight), by_seed in passed_by_setting.items():
        for seed, passed in enumerate(by_seed):
            validation, test = passed if isinstance(passed, tuple) else (passed, passed)
            row = {
                "mode": mode, "weight": weight, "seed": seed, "passed": validation,
                "flops": 10.0 if mode == "none" else flops, "test": {"passed": test},
            }  # fmt: skip
            rows.append(row | ({"true_value": users[mode][seed]} if users else {}))
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    return answer(study, Estimates(study))


def test_a_saving_that_is_shown(tmp_path):
    given = answered(
        tmp_path,
        {
            ("none", 0.0): [(300, 400), (300, 420), (300, 440)],
            ("shared", 1.0): [(200, 300), (200, 322), (200, 338)],
            ("shared", 3.0): [(201, 100), (202, 100), (203, 100)],
            ("aux", 1.0): [350, 372, 388],
        },
        users={"none": [0.8, 0.9, 0.7], "shared": [0.81, 0.912, 0.708], "aux": [0.5] * 3},
    )
    # Differences 100, 98, 102: 100 ± 4.303 · 2 / √3. Savings of 100, 104 and 108 thousand.
    # Users' differences 0.010, 0.012, 0.008: 0.01 ± 4.303 · 0.002 / √3.
    assert given.sentence == (
        "d: with “shared, weight 1” the final ranker needs 320 candidates a request for 99% of the "
        "final value instead of the 420 with “none” (100 fewer, 95% interval 95 to 105), which "
        "saves 19% (95% interval 18 to 21) of the funnel's compute. By what users would have: the "
        "true value@30 rises, from 0.800 to 0.810 (difference +0.005 to +0.015)."
    )
    assert given.caveats == [
        "4 settings of 3 ways were compared on validation; the best of each way was then read on "
        "the test.",
        "Intervals cover 3 repeats, and not the test requests; the repeats have one teacher and "
        "one order of the data.",
    ]


def test_where_requests_were_kept_the_answer_says_that_intervals_cover_them(tmp_path):
    covered = {
        (0, 1): "the test requests and 2 repeats;",
        (0,): "the test requests, and not the seeds, of which there is one;",
    }
    for seeds, told in covered.items():
        (study,) = read_studies([sweeps.write_sweep(tmp_path / str(len(seeds)), seeds=seeds)])
        assert f"Intervals cover {told}" in answer(study, Estimates(study)).caveats[1]


def test_what_users_have_when_the_saving_is_made_is_said_too(tmp_path):
    """Not only at one k for both: who passes fewer may show users less."""
    (study,) = read_studies([sweeps.write_sweep(tmp_path)])
    estimates = Estimates(study)
    chosen, undistilled = best_distilled(study), study.baseline
    before, after = (
        estimates.at_target(name, 0.99, "true_value_captured").mean
        for name in (undistilled, chosen)
    )
    gap = estimates.gap_at_target(chosen, undistilled, 0.99, "true_value_captured")
    np.testing.assert_allclose(gap.mean, after - before, atol=1e-12)
    told = answer(study, estimates).sentence.partition(" Where each passes as many as it needs ")[2]
    assert f"from {before:.3f} to {after:.3f}" in told
    assert ("falls" in told, "rises" in told) == (gap.high < 0, gap.low > 0)


def test_an_interval_that_includes_0_shows_no_saving(tmp_path):
    given = answered(tmp_path, {("none", 0.0): [400, 420], ("shared", 1.0): [300, 410]})
    assert given.sentence.startswith("d: a saving is not shown: with “shared, weight 1”")
    assert "and the interval includes 0." in given.sentence
    assert "saves" not in given.sentence


def test_a_saving_on_validation_that_the_test_does_not_find_is_none(tmp_path):
    given = answered(
        tmp_path,
        {
            ("none", 0.0): [(400, 300), (410, 310)],
            ("shared", 1.0): [(100, 300), (100, 320)],
            # The best on the test, which must not matter.
            ("shared", 2.0): [(300, 50), (300, 50)],
        },
    )
    assert given.sentence.startswith(
        "d: distillation saves nothing here: with “shared, weight 1” the final ranker needs 310 "
        "candidates a request for 99% of the final value, and with “none” 305 (5 more, 95% "
        "interval "
    )


def test_one_repeat_says_nothing_of_chance(tmp_path):
    given = answered(tmp_path, {("none", 0.0): [400], ("shared", 1.0): [300]})
    assert "needs 300 candidates" in given.sentence
    assert "that is too little data to say anything of chance." in given.sentence
    assert "interval" not in given.sentence
    assert "Intervals cover nothing" in given.caveats[1]


def test_fewer_passed_can_cost_more_compute(tmp_path):
    # 400 fewer candidates of 20,000 FLOPs each are less than 2000 candidates at 60 more.
    given = answered(tmp_path, {("none", 0.0): [400, 410], ("aux", 1.0): [300, 311]}, flops=70.0)
    assert "fewer" in given.sentence
    assert "which costs another 99% (95% interval" in given.sentence


def test_without_a_teacher_nothing_is_said_of_compute(tmp_path):
    given = answered(
        tmp_path, {("none", 0.0): [400, 401], ("shared", 1.0): [300, 302]}, teacher=False
    )
    assert "100 fewer" in given.sentence
    assert "compute" not in given.sentence


@pytest.mark.parametrize(
    ("shared", "told"),
    [
        ([0.71, 0.80, 0.61], "falls, from 0.800 to 0.707 (difference −0.1"),
        ([0.80, 0.91, 0.69], "shows no difference, from 0.800 to 0.800 (difference −0.0"),
    ],
)
def test_users_who_have_less_are_told_in_the_same_sentence(tmp_path, shared, told):
    given = answered(
        tmp_path,
        {("none", 0.0): [400, 420, 440], ("shared", 1.0): [300, 322, 338]},
        users={"none": [0.8, 0.9, 0.7], "shared": shared},
    )
    assert "saves 19%" in given.sentence
    assert f"By what users would have: the true value@30 {told}" in given.sentence


def test_of_several_sizes_the_cheapest_funnel_is_named(tmp_path):
    rows = [
        {"mode": mode, "seed": seed, "student.width": width, "passed": passed + seed,
         "flops": float(flops), "member": f"{mode}{width}{seed}"}
        for mode, width, flops, passed in (
            ("none", 8, 4, 400), ("none", 32, 10, 300),
            # The large one passes fewer, and costs more: 2000 · 10 + 90 · 200 against 8 + 24.
            ("shared", 8, 4, 120), ("shared", 32, 10, 90),
        )
        for seed in (0, 1)
    ]  # fmt: skip
    (study,) = read_studies([sweeps.write_rows(tmp_path, [sweeps.teacher_row(), *rows])])
    sentence = answer(study, Estimates(study)).sentence
    assert "with “shared, weight 1, width 32” the final ranker needs 90" in sentence
    # 2000 · 4 + 120.5 · 200 over 2000 · 200.
    assert (
        "Of 2 sizes, the cheapest funnel for 99% is that of “shared, weight 1, width 8”, which "
        "passes 120 candidates at 8.0% (95% interval 7.7 to 8.3) of what the final ranker alone "
        "costs; of students that do not distil it is that of “none, width 32”, which passes 300 "
        "candidates at 20.0%"
    ) in sentence


def test_costs_of_ones_own_are_no_compute(tmp_path):
    (study,) = read_studies(
        [sweeps.write_sweep(tmp_path, changes={"costs.teacher.candidate": 2.0})]
    )
    assert "of the funnel's cost. By what" in answer(study, Estimates(study)).sentence


def test_where_the_truth_is_not_known_users_labels_speak_for_them(tmp_path):
    rows = [
        {"mode": mode, "seed": seed, "passed": passed, "end_to_end_hit_rate@30/watch": rate}
        for mode, passed, rate in (("none", 400, 0.5), ("shared", 300, 0.6))
        for seed in (0, 1)
    ]
    rows[0]["end_to_end_hit_rate@30/watch"] = 0.49
    (study,) = read_studies([sweeps.write_rows(tmp_path, [sweeps.teacher_row(), *rows])])
    sentence = answer(study, Estimates(study)).sentence
    assert "the end-to-end hit rate@30 watch rises, from 0.495 to 0.600" in sentence


def test_without_any_word_of_users_that_is_said(tmp_path):
    given = answered(tmp_path, {("none", 0.0): [400, 401], ("shared", 1.0): [300, 302]})
    assert given.sentence.endswith("How much users have of it was not measured.")


@pytest.mark.parametrize(
    ("passed_by_setting", "why"),
    [
        ({("shared", 1.0): [300, 310]}, "no measured student of mode none to compare with"),
        ({("none", 0.0): [300, 310]}, "no measured student of a mode that distils"),
    ],
)
def test_what_a_sweep_has_to_hold_is_said(tmp_path, passed_by_setting, why):
    given = answered(tmp_path, passed_by_setting)
    assert why in given.sentence
    assert "sweep.modes" in given.sentence
    assert given.caveats == []
