import math
import re

import numpy as np
import pytest

from kd_ranker.report.answer import answer
from kd_ranker.report.choices import best_with_scores
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.study import read_studies
from tests.report import sweeps


def answered(
    tmp_path, passed_by_setting, flops=10.0, teacher=True, users=None, references=(), areas=None
):
    """The answer to `passed_for_99` by setting and repeat, on both splits.

    Args:
      tmp_path: a folder.
      passed_by_setting: (mode, weight) -> a number a repeat, or a pair for validation and test.
      flops: of students that distil; those of the others are 10, of the teacher 200.
      teacher: whether its row is there.
      users: by mode, the true value captured at 30 and at 99%, a number a repeat; None where it is
        not known.
      references: rows of references.
      areas: AUC by mode or "teacher", a number a repeat; the default is better than chance.
    """
    areas = areas or {}
    of_teacher = sweeps.teacher_row() | {"user_auc/watch": areas.get("teacher", 0.8)}
    rows = [of_teacher, *references] if teacher else [*references]
    for (mode, weight), by_seed in passed_by_setting.items():
        for seed, passed in enumerate(by_seed):
            validation, test = passed if isinstance(passed, tuple) else (passed, passed)
            row = {
                "mode": mode, "weight": weight, "seed": seed, "passed": validation,
                "flops": 10.0 if mode == "none" else flops, "test": {"passed": test},
            }  # fmt: skip
            if users:
                row |= dict.fromkeys(("true_value", "true_value_for"), users[mode][seed])
            rows.append(row | ({"user_auc/watch": areas[mode][seed]} if mode in areas else {}))
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
    rises = "rises, from 0.8000 to 0.8100 (difference +0.0050 to +0.0150)"
    assert given.sentence == (
        "d: For 99% of the final value the final ranker needs 420 candidates per request with mode "
        "none. On validation, no other ranker without the final ranker's scores needs fewer. With "
        "the scores it needs 320 with “shared, weight 1” (100 fewer, 95% interval 95 to 105), "
        "which saves 19% (95% interval 18 to 21) of the funnel's compute. For users: the true "
        f"value@30 {rises}; the true value for 99% {rises}."
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
        (0,): "the test requests, and not the seeds, since there is only one;",
    }
    for seeds, text in covered.items():
        (study,) = read_studies([sweeps.write_sweep(tmp_path / str(len(seeds)), seeds=seeds)])
        assert f"Intervals cover {text}" in answer(study, Estimates(study)).caveats[1]


INCUMBENT = sweeps.reference_row("incumbent", 600)
RANDOM = sweeps.reference_row("random", 1900)
STUDENTS = {("none", 0.0): [400, 420, 440], ("shared", 1.0): [300, 322, 338]}


def test_the_answer_decomposes(tmp_path):
    """Today, without scores, with them: the interval and the saving are of the last step."""
    rows = {**STUDENTS, ("aux", 1.0): [350, 372, 388]}
    given = answered(tmp_path, rows, references=[INCUMBENT, RANDOM])
    assert given.sentence.startswith(
        "d: For 99% of the final value the final ranker needs 600 candidates per request with "
        "today's early ranker and 420 with mode none. On validation, no other ranker without the "
        "final ranker's scores needs fewer. With the scores it needs 320 with “shared, weight 1” "
        "(100 fewer, 95% interval 95 to 105), which saves 19% (95% interval 18 to 21) of the "
        # 20,000 + 320 · 200 FLOPs instead of 600 · 200: 30%.
        "funnel's compute (against today's early ranker, taken as free it saves 30% (95% interval "
    )
    assert "against mode none" not in given.sentence


def test_each_saving_in_brackets_has_its_own_verb(tmp_path):
    given = answered(tmp_path, STUDENTS, references=[sweeps.reference_row("incumbent", 400)])
    # 84,000 FLOPs after 80,000 of the ranker that is free.
    assert (
        "which adds 5% (95% interval −7 to 17) of the funnel's compute (against mode none it saves "
        "19% (95% interval 18 to 21))."
    ) in given.sentence
    references = [sweeps.reference_row("incumbent", 400), sweeps.reference_row("show_rate", 390)]
    rows = {("none", 0.0): [500, 501], ("shared", 1.0): [310, 310]}
    given = answered(tmp_path / "two", rows, references=references)
    # 82,000 after 78,000 of the list, 80,000 of the incumbent, and 120,100 of mode none.
    assert (
        "which adds 5% (95% interval 5 to 5) of the funnel's compute (against mode none it saves "
        "32% (95% interval 31 to 32); against today's early ranker, taken as free it adds 2% (95% "
        "interval 2 to 2))."
    ) in given.sentence


def test_a_student_of_the_stage_is_the_best_without_scores(tmp_path):
    rows = [
        {"mode": mode, "distill_loss": loss, "seed": seed, "passed": passed + seed,
         "member": f"{loss}{seed}", "user_auc/watch": 0.7}
        for mode, loss, passed in (
            ("none", None, 400), ("aux", "topk:stage", 320), ("aux", "topk", 300),
        )
        for seed in (0, 1)
    ]  # fmt: skip
    (study,) = read_studies([sweeps.write_rows(tmp_path, [sweeps.teacher_row(), *rows])])
    sentence = answer(study, Estimates(study)).sentence
    assert (
        "needs 400 candidates per request with mode none. With the best early ranker that learns "
        "from the log without the final ranker's scores, it needs 320 (“aux, weight 1, loss "
        "topk:stage”). With the scores it needs 300 with “aux, weight 1, loss topk” (20 fewer, 95% "
        "interval 20 to 20), which saves 5%"
    ) in sentence
    # 80,100 FLOPs after 84,100, and after 100,100 with mode none: 20%.
    assert "compute (against mode none it saves 20% (95% interval 20 to 20))." in sentence


def test_a_list_may_be_the_best_without_scores(tmp_path):
    of_list = sweeps.reference_row("show_rate", 390)
    given = answered(tmp_path, STUDENTS, flops=0.2, references=[INCUMBENT, RANDOM, of_list])
    # 400 + 320 · 200 FLOPs instead of 390 · 200.
    assert (
        "With the best early ranker that learns from the log without the final ranker's scores, it "
        "needs 390 (“show_rate”, a list of items without a user). With the scores it needs 320 "
        "with “shared, weight 1” (70 fewer, 95% interval 23 to 117), which saves 17%"
    ) in given.sentence
    assert "(against mode none it saves 38% (95% interval 35 to 41); " in given.sentence
    assert "against today's early ranker, taken as free it saves 46%" in given.sentence


@pytest.mark.parametrize(
    ("reference", "rest"),
    [
        (INCUMBENT, "today's early ranker. On validation, no other ranker without the final "
         "ranker's scores needs fewer. "),
        (sweeps.reference_row("pass_rate", 600), "the best early ranker that needs no scores of "
         "the final ranker, “pass_rate”, a list of items without a user. With the scores"),
    ],
)  # fmt: skip
def test_without_a_student_of_mode_none_a_reference_is_compared(tmp_path, reference, rest):
    given = answered(tmp_path, {("shared", 1.0): [300, 302]}, references=[reference])
    assert given.sentence.startswith(
        "d: For 99% of the final value the final ranker needs 600 candidates per request with "
        + rest
    )


@pytest.mark.parametrize(
    ("name", "passed", "begins"),
    [
        ("random", 310, "A random order does as well as"),
        # 320 ± 48 over the repeats.
        ("random", 360, "A random order may do as well as"),
        ("random", 375, ""),
        ("top_rate", 300, "A list of items without a user, “top_rate”, does as well as"),
        # It is the best without scores.
        ("show_rate", 300, "A list of items without a user, “show_rate”, does as well as"),
        ("show_rate", 375, ""),
        # These are no lists.
        ("oracle", 5, ""),
        ("incumbent", 310, ""),
    ],
)
def test_the_first_sentence_names_a_simple_order_that_does_as_well(tmp_path, name, passed, begins):
    given = answered(tmp_path, STUDENTS, references=[sweeps.reference_row(name, passed)])
    needs = "the best student: it needs {} candidates per request for 99% of the final value, the "
    first = f"{begins} {needs.format(passed)}student 320." if begins else "For 99%"
    assert given.sentence.startswith(f"d: {first}")


def test_of_several_simple_orders_the_best_is_named_and_one_repeat_compares_means(tmp_path):
    references = [
        sweeps.reference_row(name, at) for name, at in (("random", 290), ("top_rate", 280))
    ]
    one = {("none", 0.0): [400], ("shared", 1.0): [285]}
    assert answered(tmp_path, one, references=references).sentence.startswith(
        "d: A list of items without a user, “top_rate”, does as well as the best student: it needs "
        "280 candidates"
    )
    assert answered(tmp_path, one, references=references[:1]).sentence.startswith("d: For 99%")


@pytest.mark.parametrize(
    ("areas", "begins"),
    [
        ({"teacher": 0.5}, "than chance (AUC watch 0.500)"),
        ({"teacher": 0.4}, "than chance (AUC watch 0.400)"),
        (
            {"teacher": 0.6, "none": [0.70, 0.71, 0.69]},
            "than a student of mode none (AUC watch 0.600, mode none 0.700)",
        ),
        # It may be below by chance.
        ({"teacher": 0.695, "none": [0.70, 0.71, 0.69]}, ""),
        ({"teacher": 0.8, "none": [0.70, 0.71, 0.69]}, ""),
    ],
)
def test_the_first_sentence_warns_of_a_final_ranker_that_predicts_users_badly(
    tmp_path, areas, begins
):
    given = answered(tmp_path, STUDENTS, areas=areas)
    warned = (
        f"d: The final ranker is not shown to predict users better {begins}, so the following is "
        "about copying it"
    )
    assert given.sentence.startswith(warned if begins else "d: For 99%")


def test_a_final_ranker_whose_interval_includes_chance_is_warned_of(tmp_path):
    """Three teachers, one per repeat."""
    rows = [
        row
        for seed, area in enumerate((0.49, 0.56, 0.54))
        for row in (
            sweeps.teacher_row() | {"seed": seed, "user_auc/watch": area},
            {"mode": "none", "seed": seed, "passed": 400 + seed},
            {"mode": "shared", "seed": seed, "passed": 300 + seed},
        )
    ]
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    given = answer(study, Estimates(study))
    assert given.sentence.startswith(
        "d: The final ranker is not shown to predict users better than chance (AUC watch 0.530)"
    )
    assert "3 teachers" in given.caveats[1]


def test_a_passed_for_99_that_is_unknown_everywhere_is_named(tmp_path):
    rows = {("none", 0.0): [math.nan] * 2, ("shared", 1.0): [math.nan] * 2}
    given = answered(tmp_path, rows)
    assert given.sentence == (
        "d: the saving from the final ranker's scores is unknown: passed_for_99 is unknown for "
        "every student, since no test or validation request holds a value of the final ranker; "
        "check data.teacher and value_weights."
    )
    assert given.caveats == []


def test_the_change_for_users_where_the_saving_is_taken_is_given(tmp_path):
    """Not only at one k for both: a funnel that passes fewer may show users less."""
    (study,) = read_studies([sweeps.write_sweep(tmp_path)])
    estimates = Estimates(study)
    chosen, without = best_with_scores(study), study.baseline
    measure = "true_value_for_99"
    rows = study.tested.pivot(index="repeat", columns="setting", values=measure)
    before, after = rows[without].mean(), rows[chosen].mean()
    gap = estimates.gap(chosen, without, measure)
    np.testing.assert_allclose(gap.mean, after - before, atol=1e-12)
    found = answer(study, estimates).sentence.partition("; the true value for 99% ")[2]
    assert f"from {before:.4f} to {after:.4f}" in found
    assert ("falls" in found, "rises" in found) == (gap.high < 0, gap.low > 0)


@pytest.mark.parametrize(("lost", "pays"), [(0.0, False), (0.05, True)])
def test_a_saving_for_which_users_may_pay_is_named(tmp_path, lost, pays):
    of_none = [0.8, 0.9, 0.7]
    users = {"none": of_none, "shared": [value - lost for value in of_none]}
    sentence = answered(tmp_path, STUDENTS, users=users).sentence
    assert (
        sentence.endswith(
            " No way with scores surely keeps the value for users within 0.2% of the value without "
            "them: on validation, the change of this one is −5.0% to −5.0%. So users may pay for "
            "the saving."
        )
        == pays
    )


def test_one_repeat_cannot_tell_whether_users_pay(tmp_path):
    """Though the test requests show that fewer need passing."""
    (study,) = read_studies([sweeps.write_sweep(tmp_path, seeds=(0,))])
    sentence = answer(study, Estimates(study)).sentence
    assert sentence.endswith(" One repeat cannot show whether users pay for the saving.")


def test_an_interval_that_includes_0_shows_no_saving(tmp_path):
    given = answered(tmp_path, {("none", 0.0): [400, 420], ("shared", 1.0): [300, 410]})
    assert "No gain from the scores is shown: it needs 355 with “shared" in given.sentence
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
    assert (
        "needs 305 candidates per request with mode none. On validation, no other ranker without "
        "the final ranker's scores needs fewer. The scores save nothing here: with “shared, weight "
        "1” it needs 310 (5 more, 95% interval "
    ) in given.sentence


def test_one_repeat_says_nothing_of_chance(tmp_path):
    rows = {("none", 0.0): [400], ("shared", 1.0): [300]}
    given = answered(tmp_path, rows, users={"none": [0.8], "shared": [0.7]})
    assert (
        "With the scores it needs 300 with “shared, weight 1” (100 fewer); no interval is known. "
        "For users: the true value@30 goes from 0.8000 to 0.7000, without an interval; the true "
        "value for 99% goes from 0.8000 to 0.7000, without an interval."
    ) in given.sentence
    assert "95%" not in given.sentence
    assert "Intervals cover nothing" in given.caveats[1]


def test_fewer_passed_can_cost_more_compute(tmp_path):
    # 400 fewer candidates of 20,000 FLOPs each are less than 2000 candidates at 60 more.
    given = answered(tmp_path, {("none", 0.0): [400, 410], ("aux", 1.0): [300, 311]}, flops=70.0)
    assert "fewer" in given.sentence
    assert "which adds 99% (95% interval 88 to 110) of the funnel's compute." in given.sentence


def test_without_a_teacher_nothing_is_said_of_compute(tmp_path):
    given = answered(
        tmp_path, {("none", 0.0): [400, 401], ("shared", 1.0): [300, 302]}, teacher=False
    )
    assert "100 fewer" in given.sentence
    assert "compute" not in given.sentence


@pytest.mark.parametrize(
    ("shared", "change"),
    [
        ([0.71, 0.80, 0.61], "falls, from 0.8000 to 0.7067 (difference −0.1"),
        ([0.80, 0.91, 0.69], "shows no difference, from 0.8000 to 0.8000 (difference −0.0"),
    ],
)
def test_the_same_sentence_has_the_loss_of_users(tmp_path, shared, change):
    given = answered(tmp_path, STUDENTS, users={"none": [0.8, 0.9, 0.7], "shared": shared})
    assert "saves 19%" in given.sentence
    assert f"For users: the true value@30 {change}" in given.sentence


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
    assert "With the scores it needs 120 with “shared, weight 1, width 8”" in sentence
    # 2000 · 4 + 120.5 · 200 over 2000 · 200.
    assert (
        "Of 2 sizes, the cheapest funnel for 99% is that of “shared, weight 1, width 8”, which "
        "passes 120 candidates at 8.0% (95% interval 7.7 to 8.3) of the cost of the final ranker "
        "on all candidates; of students that need no scores it is that of “none, width 32”, which "
        "passes 300 candidates at 20.0%"
    ) in sentence


def test_costs_of_ones_own_are_no_compute(tmp_path):
    (study,) = read_studies(
        [sweeps.write_sweep(tmp_path, changes={"costs.teacher.candidate": 2.0})]
    )
    assert "of the funnel's cost (" in answer(study, Estimates(study)).sentence


def from_labels(tmp_path, none, shared, coverage=0.8, incumbent=None):
    """The last sentences, of labels of the log alone; `incumbent`: its `passed_for_99`."""
    rows = [
        {"mode": mode, "seed": seed, "passed": passed, "covered": value, "coverage": of_mode}
        for mode, passed, values, of_mode in (
            ("none", 400, none, 0.9), ("shared", 300, shared, coverage),
        )
        for seed, value in enumerate(values)
    ]  # fmt: skip
    if incumbent is not None:
        rows.append(sweeps.reference_row("incumbent", incumbent, covered=0.4, coverage=0.9))
    (study,) = read_studies([sweeps.write_rows(tmp_path, [sweeps.teacher_row(), *rows])])
    return answer(study, Estimates(study)).sentence


@pytest.mark.parametrize(
    ("shared", "found"),
    [
        ([0.60, 0.62], "users have more"),
        ([0.40, 0.42], "users have less"),
        ([0.50, 0.53], "no change for users is shown"),
        ([0.60], "no change for users is shown"),
    ],
)
def test_labels_of_the_log_tell_a_direction_and_no_size(tmp_path, shared, found):
    sentence = from_labels(tmp_path, [0.50, 0.525][: len(shared)], shared)
    assert sentence.endswith(
        ". By the labels of the log, which can cover 80% of the items that these funnels would "
        f"show, {found} (a sign, not a size)."
    )
    assert "0.6" not in sentence


@pytest.mark.parametrize(("coverage", "tells"), [(0.36, True), (0.34, False)])
def test_a_log_that_covers_too_little_cannot_say(tmp_path, coverage, tells):
    sentence = from_labels(tmp_path, [0.5, 0.5], [0.6, 0.6], coverage)
    share = f"{100 * coverage:.0f}% of the items that these funnels would show"
    if tells:
        assert f"which can cover {share}, users have more" in sentence
    else:
        assert sentence.endswith(
            "This log cannot show the effect of the scores on users: it could have labels of only "
            f"{share}."
        )


def test_against_todays_ranker_the_log_cannot_say(tmp_path):
    """Of what it left out there are no labels, whatever the coverage."""
    sentence = from_labels(tmp_path, [0.5, 0.5], [0.6, 0.6], incumbent=350)
    assert sentence.endswith(
        "This log cannot show the effect of the scores on users: candidates that today's early "
        "ranker left out have no labels."
    )
    # It is not compared here.
    assert "users have more" in from_labels(tmp_path / "b", [0.5] * 2, [0.6] * 2, incumbent=500)


def test_a_log_that_knows_no_truth_has_the_plan_of_a_live_test(tmp_path):
    (study,) = read_studies([sweeps.write_sweep(tmp_path, true_values=False)])
    estimates = Estimates(study)
    needed = estimates.live_test(best_with_scores(study), study.baseline, 0.002)
    plan = answer(study, estimates).sentence.partition("By the labels of the log")[2]
    ab, interleaved = re.search(
        r"To see a change of 0.2%, an A/B test needs about ([\d,]+) requests, an interleaved test "
        r"at most ([\d,]+)\.$",
        plan,
    ).groups()
    # Two digits: the plan is rough.
    for text, number in ((ab, needed.ab), (interleaved, needed.interleaved)):
        assert float(text.replace(",", "")) == pytest.approx(number, rel=0.05)
        assert len(text.replace(",", "").rstrip("0")) <= 2


def test_users_that_were_not_measured_are_named(tmp_path):
    given = answered(tmp_path, {("none", 0.0): [400, 401], ("shared", 1.0): [300, 302]})
    assert given.sentence.endswith("The change for users was not measured.")


@pytest.mark.parametrize(
    ("passed_by_setting", "why"),
    [
        ({("shared", 1.0): [300, 310]}, "there is no measured student that needs none of them"),
        ({("none", 0.0): [300, 310]}, "there is no measured student that learns from them"),
    ],
)
def test_what_a_sweep_has_to_hold_is_said(tmp_path, passed_by_setting, why):
    given = answered(tmp_path, passed_by_setting)
    assert why in given.sentence
    assert "sweep.modes" in given.sentence
    assert given.caveats == []
