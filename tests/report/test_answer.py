import pytest

from kd_ranker.report.answer import answer
from kd_ranker.report.study import read_studies
from tests.report import sweeps


def answered(tmp_path, passed_by_setting, flops=10.0, teacher=True):
    rows = [sweeps.teacher_row()] if teacher else []
    for (mode, weight), by_seed in passed_by_setting.items():
        rows += [
            {"mode": mode, "weight": weight, "seed": seed, "passed": passed,
             "flops": 10.0 if mode == "none" else flops}
            for seed, passed in enumerate(by_seed)
        ]  # fmt: skip
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    return answer(study)


def test_a_saving_that_is_shown(tmp_path):
    given = answered(
        tmp_path,
        {
            ("none", 0.0): [400, 420, 440],
            ("shared", 1.0): [300, 322, 338],
            ("aux", 1.0): [350, 372, 388],
        },
    )
    # Differences 100, 98, 102: 100 ± 4.303 · 2 / √3. Savings of 100, 104 and 108 thousand.
    assert given.sentence == (
        "d: with “shared, weight 1” the final ranker needs 320 candidates a request for 99% of the "
        "final value instead of the 420 of mode none (100 fewer, 95% interval 95 to 105), which "
        "saves 19% (95% interval 18 to 21) of the funnel's compute."
    )
    assert given.caveats[0].startswith("2 distilled settings were compared")
    assert "over 3 repeats" in given.caveats[0]
    assert "320 candidates, 100 fewer than without distillation" in given.caveats[1]


def test_an_interval_that_includes_0_shows_no_saving(tmp_path):
    given = answered(tmp_path, {("none", 0.0): [400, 420], ("shared", 1.0): [300, 410]})
    assert given.sentence.startswith("d: a saving is not shown: with “shared, weight 1”")
    assert "includes 0" in given.sentence
    assert "saves" not in given.sentence
    assert given.caveats[0] == "One distilled setting was measured, over 2 repeats."


def test_a_saving_that_other_repeats_do_not_find_is_not_shown(tmp_path):
    given = answered(
        tmp_path,
        {
            ("none", 0.0): [400, 400],
            # The best on both, but never the best of one.
            ("shared", 1.0): [390, 390],
            ("shared", 2.0): [200, 600],
            ("shared", 3.0): [600, 200],
        },
    )
    assert given.sentence.startswith("d: a saving is not shown")
    assert given.sentence.endswith("a setting that was chosen on other repeats needs no fewer.")
    assert "200 more than without distillation" in given.caveats[1]


def test_no_distilled_student_that_is_better(tmp_path):
    given = answered(tmp_path, {("none", 0.0): [300, 310], ("shared", 1.0): [300, 320]})
    assert given.sentence == (
        "d: no distilled student lets the final ranker do with fewer candidates for 99% of the "
        "final value: the best of them, “shared, weight 1”, needs 310, mode none 305."
    )


def test_one_repeat_says_nothing_of_chance(tmp_path):
    given = answered(tmp_path, {("none", 0.0): [400], ("shared", 1.0): [300]})
    assert "needs 300 candidates" in given.sentence
    assert given.sentence.endswith("that is one repeat, which says nothing of chance.")
    assert "interval" not in given.sentence
    assert "at least two repeats" in given.caveats[1]


def test_fewer_passed_can_cost_more_compute(tmp_path):
    # 400 fewer candidates of 20,000 FLOPs each are less than 2000 candidates at 60 more.
    given = answered(tmp_path, {("none", 0.0): [400, 410], ("aux", 1.0): [300, 311]}, flops=70.0)
    assert "fewer" in given.sentence
    assert "which costs another 99% (95% interval" in given.sentence


def test_without_a_teacher_nothing_is_said_of_compute(tmp_path):
    given = answered(
        tmp_path, {("none", 0.0): [400, 401], ("shared", 1.0): [300, 302]}, teacher=False
    )
    assert "compute" not in given.sentence


@pytest.mark.parametrize(
    ("passed_by_setting", "why"),
    [
        ({("shared", 1.0): [300, 310]}, "no measured student of mode none"),
        ({("none", 0.0): [300, 310]}, "no measured student that distils"),
    ],
)
def test_what_a_sweep_has_to_hold_is_said(tmp_path, passed_by_setting, why):
    given = answered(tmp_path, passed_by_setting)
    assert why in given.sentence
    assert "sweep.modes" in given.sentence
    assert given.caveats == []
