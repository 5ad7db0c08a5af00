"""The sentences of the answer, each from a sweep written by hand."""

import re

import pytest

from kd_ranker.configs import sweeps as shipped
from kd_ranker.reporting.answer import _seeds_for_saving, answer
from kd_ranker.reporting.estimates import ALIKE, Estimates
from kd_ranker.reporting.study import read_studies
from tests.reporting import sweeps
from tests.reporting.sweeps import reference_row


def answer_to(tmp_path, rows):
    """The answer to these rows, with a teacher if they have none."""
    if not any(row.get("role") == "teacher" for row in rows):
        rows = [sweeps.teacher_row(), *rows]
    study = sweeps.study_of(tmp_path, rows)
    return answer(study, Estimates(study))


def students(passed_by_setting, **columns):
    """Rows of students, by seed.

    `passed_by_setting` has `passed_for_99` by mode, or by (mode, weight): a number per seed, or a
    pair of validation and test. `columns` have other numbers: by mode, one per seed or one for all.
    """
    rows = []
    for setting, passed_by_seed in passed_by_setting.items():
        if isinstance(setting, tuple):
            mode, weight = setting
        else:
            mode = setting
            weight = 0.0 if mode == "none" else 1.0
        for seed, passed in enumerate(passed_by_seed):
            validation, test = passed if isinstance(passed, tuple) else (passed, passed)
            row = {"mode": mode, "weight": weight, "seed": seed, "passed": validation,
                   "test": {"passed": test}}  # fmt: skip
            for column, by_mode in columns.items():
                if mode in by_mode:
                    number = by_mode[mode]
                    row[column] = number[seed] if isinstance(number, list) else number
            rows.append(row)
    return rows


def users(**by_mode):
    """The true value at 30 and at 99%, as columns for `students`."""
    return {"true_value": by_mode, "true_value_for": by_mode}


def labels(shared, coverage, *references, chosen=False):
    """Rows of a log whose labels, not a truth, measure users; the final ranker may choose them."""
    recall = 0.5 if chosen else None
    return students(
        {"none": [400, 400], "shared": [300, 300]},
        covered={"none": [0.50, 0.525], "shared": shared},
        coverage={"none": 0.9, "shared": coverage / 100},
        **{"shown_recall@30": {"none": recall, "shared": recall}},
    ) + [reference_row("incumbent", passed, covered=0.4, coverage=0.9) for passed in references]


def under_teachers(*areas, none):
    """Rows of teachers, one per repeat, with these AUCs of users, and students of each."""
    teachers = [
        sweeps.teacher_row() | {"seed": seed, "user_auc/watch": area}
        for seed, area in enumerate(areas)
    ]
    return teachers + students(STUDENTS, **{"user_auc/watch": {"none": none}})


def partly_scored(passed_auc, passed_by_mode=None, *references):
    """Rows of a log without scores of many candidates: students with them have this AUC."""
    rows = students(
        passed_by_mode or STUDENTS,
        scored_share={"none": 0.333, "shared": 0.333},
        passed_auc={"none": 0.5, "shared": passed_auc},
        **{ALIKE: {"none": 220, "shared": 120}},
    )
    incumbent = reference_row("incumbent", 600, **{ALIKE: 590, "passed_auc": 1.0})
    return [*rows, incumbent, *references]


STUDENTS = {"none": [400, 420, 440], "shared": [300, 322, 338]}
INCUMBENT = reference_row("incumbent", 600)


def test_the_whole_answer(tmp_path):
    passed = {
        "none": [(300, 400), (300, 420), (300, 440)],
        ("shared", 1.0): [(200, 300), (200, 322), (200, 338)],
        ("shared", 3.0): [(201, 100), (202, 100), (203, 100)],
        "aux": [350, 372, 388],
    }
    true_values = users(none=[0.8, 0.9, 0.7], shared=[0.81, 0.912, 0.708], aux=0.5)

    given = answer_to(tmp_path, [*students(passed, **true_values), INCUMBENT])

    # 20,000 FLOPs of the student, and 200 of each that passes: savings of 20 of 100, 19.6 of 104
    # and 20.4 of 108 thousand. Users' differences 0.010, 0.012, 0.008: 0.01 ± 4.303 · 0.002 / √3.
    assert given.sentences == (
        "The final ranker's scores save 19% of the funnel's compute (95% interval 18 to 21%).",
        "For 99% of the final value, 320 candidates must pass with them, 420 without, 600 with "
        "today's ranker.",
        "For users: more (+0.50% to +1.50%) if both pass 30, and if each passes its number.",
    )
    assert given.settings == {"with the scores": "shared, weight 1", "without": "none"}
    assert given.notes == ()
    assert given.caveats == (
        "4 settings of 3 methods were compared on validation; the best of each method was then "
        "read on the test.",
        "Intervals cover 3 repeats, and not the test requests; the repeats have one teacher and "
        "one order of the data.",
    )


def test_settings_and_notes_stand_on_their_own_lines(tmp_path):
    given = answer_to(tmp_path, [*students(STUDENTS), INCUMBENT, reference_row("random", 310)])
    lines = given.text.splitlines()
    assert " ".join(lines).startswith(f"d: {given.sentences[0]} {given.sentences[1]}")
    assert max(map(len, lines)) <= 100
    assert "  with the scores  shared, weight 1" in lines
    assert "  without          none" in lines
    assert lines[-1].startswith("  note: A random order does as well as the best student:")


CANNOT = "The log cannot show the effect on users: "
SEEDS = 'add `--config.sweep.seeds="({})" --config.sweep.extend=True`.'
# Rows, and a part of the answer.
STEPS = {
    "a saving": (
        students(STUDENTS), "The final ranker's scores save 19% of the funnel's compute (95% int",
    ),
    "costs that grow": (
        # 82,000 FLOPs after 78,000 of the list.
        [*students({"none": [500, 501], "shared": [310, 310]}), reference_row("incumbent", 400),
         reference_row("show_rate", 390)],
        "save nothing: with them, the funnel takes 5% more compute (95% interval 5 to 5%).",
    ),
    "a list": (
        # 400 + 320 · 200 FLOPs instead of 390 · 200.
        [*students(STUDENTS, flops={"shared": 0.2}), INCUMBENT, reference_row("show_rate", 390)],
        "320 candidates must pass with them, 390 without, 600 with today's ranker.",
    ),
    "today's ranker as the best without scores": (
        [*students(STUDENTS), reference_row("incumbent", 380)],
        "320 candidates must pass with them, 380 with today's ranker, the best without.",
    ),
    "a log that does not name today's ranker": (
        students(STUDENTS), "320 candidates must pass with them, 420 without. ",
    ),
    "a log with a score for some candidates": (
        partly_scored(passed_auc=0.6),
        "If unscored candidates are worthless, the final ranker's scores save 19% of the funnel's "
        "compute (95% interval ",
    ),
    "scores that save nothing if candidates without a score are worthless": (
        partly_scored(0.6, {"none": [500, 501], "shared": [310, 310]},
                      reference_row("show_rate", 390, **{ALIKE: 200, "passed_auc": 0.5})),
        "If unscored candidates are worthless, the scores save nothing: the funnel takes 5% more "
        "compute (95% interval 5 to 5%).",
    ),
    "an undecided saving if candidates without a score are worthless": (
        partly_scored(0.6, {"none": [400, 420], "shared": [300, 410]}),
        "If unscored candidates are worthless, it is undecided whether the scores save compute "
        "(95% interval −104 to 126%).",
    ),
    "bounds of the candidates to pass": (
        partly_scored(passed_auc=0.6),
        "To pass for 99%: 120 to 320 candidates with them, 220 to 420 without, at least 590 with "
        "today's ranker.",
    ),
    "a student that repeats the choice of what was scored": (
        partly_scored(passed_auc=0.8),
        "This log cannot show how much the final ranker's scores save. To pass for 99%: at least "
        "120 candidates with them, 220 to 420 without,",
    ),
    "what a score for some candidates means": (
        partly_scored(passed_auc=0.6),
        "The final ranker scored 33% of the measured test candidates. The others count as worth",
    ),
    "what users need by labels of more than the shown items": (
        [*students(STUDENTS, passed_for_users_99={"none": 40, "shared": 30}),
         reference_row("incumbent", 600, passed_for_users_99=50)],
        "Candidates to pass for users, for 99% of the NDCG by labels of the list that the final "
        "ranker makes: 30 with the scores, 40 "
        "without, 50 with today's ranker.",
    ),
    "a gain by labels of more than the shown items, with little coverage": (
        students({"none": [400, 400], "shared": [300, 300]}, coverage={"none": 0.1, "shared": 0.1},
                 **{"served_ndcg@30": {"none": [0.50, 0.525], "shared": [0.60, 0.62]},
                    "shown_recall@30": {"none": 0.5, "shared": 0.5}}),
        # Gaps of 0.1 and 0.095: 0.0975 ± 12.706 · 0.0025, over an NDCG of 0.5125.
        "For users, by their labels: more (+12.83% to +25.22%) if both pass 30.",
    ),
    "no relevant difference by labels of more than the shown items": (
        students({"none": [400, 400], "shared": [300, 300]},
                 **{"served_ndcg@30": {"none": [0.50, 0.525], "shared": [0.5001, 0.525]}}),
        "For users, by their labels: no relevant difference (within 0.2%) if both pass 30.",
    ),
    "a few lost scores": (
        [*students(STUDENTS, scored_share={"none": 0.95, "shared": 0.95}), INCUMBENT],
        "320 candidates must pass with them, 420 without, 600 with today's ranker.",
    ),
    "an interval that includes 0": (
        # Savings of 20/100 and 2/104 thousand: 0.11 ± 12.71 · 0.09.
        students({"none": [400, 420], "shared": [300, 410]}),
        "Whether the final ranker's scores save any of the funnel's compute is undecided (95% "
        "interval −104 to 126%).",
    ),
    "the seeds that would decide it": (
        # Savings of 0.25 and 0.024: 2.179 · 0.160 / √13 + 0.842 · 0.160 / √13 < 0.137.
        students({"none": [400, 420], "shared": [300, 410]}),
        "To see a difference of this size, use 13 seeds: "
        + SEEDS.format("0,1,2,3,4,5,6,7,8,9,10,11,12"),
    ),
    "a difference that takes too many seeds": (
        students({"none": [400, 400], "shared": [300, 405]}),
        "To see so small a difference takes more than 20 seeds.",
    ),
    "a gain on validation only": (
        # The second weight is the best on the test, which must not matter.
        students({"none": [(400, 300), (410, 310)], ("shared", 1.0): [(100, 300), (100, 320)],
                  ("shared", 2.0): [(300, 50), (300, 50)]}),
        "310 candidates must pass with them, 305 without.",
    ),
    "one repeat": (
        students({"none": [400], "shared": [300]}, **users(none=0.8, shared=0.7)),
        "The saving is 20% of the funnel's compute, without an interval. For 99% of the final "
        "value, 300 candidates must pass with them, 400 without. For users: −10.00%, without an "
        "interval if both pass 30, and if each passes its number.",
    ),
    "a loss of users": (
        students(STUDENTS, **users(none=[0.8, 0.9, 0.7], shared=[0.71, 0.8, 0.61])),
        "For users: less (−10.77% to −7.90%) if both",
    ),
    "no relevant difference for users": (
        students(STUDENTS, **users(none=[0.8, 0.9, 0.7], shared=[0.8001, 0.9, 0.7001])),
        "For users: no relevant difference (within 0.2%) if both",
    ),
    "a difference for users that may be a loss": (
        students(STUDENTS, **users(none=[0.8, 0.9, 0.7], shared=[0.81, 0.9, 0.7])),
        "For users: undecided (−1.10% to +1.77%) if both",
    ),
    "more seeds where users are undecided": (
        students(STUDENTS, **users(none=[0.8, 0.9, 0.7], shared=[0.81, 0.9, 0.7])),
        SEEDS.format("0,1,2,3,4,5"),
    ),
    "users at two numbers passed": (
        students(STUDENTS, true_value={"none": [0.8, 0.9, 0.7], "shared": [0.81, 0.912, 0.708]},
                 true_value_for={"none": 0.8, "shared": 0.8}),
        "For users: no relevant difference (within 0.2%) if each passes its number, more (+0.50% "
        "to +1.50%) if both pass 30.",
    ),
    "users who pay": (
        students(STUDENTS, **users(none=[0.8, 0.9, 0.7], shared=[0.75, 0.85, 0.65])),
        "No method with scores is shown to keep users within 0.2% of their value without: on "
        "validation, the change of this one is −5.0% to −5.0%. Users may pay for the saving.",
    ),
    "a random order that does as well": (
        [*students(STUDENTS), reference_row("random", 310)],
        "A random order does as well as the best student: it needs 310 candidates, the student "
        "320.",
    ),
    # 320 ± 48 over the repeats.
    "a random order that may": (
        [*students(STUDENTS), reference_row("random", 360)], "A random order may do as well as",
    ),
    "a list that does as well": (
        [*students(STUDENTS), reference_row("top_rate", 300)],
        "A list without a user, top_rate, does as well as",
    ),
    "a final ranker by chance": (
        # The interval over three teachers includes chance.
        under_teachers(0.49, 0.56, 0.54, none=0.4),
        "The final ranker is not shown to predict users better than chance (AUC watch 0.530): this "
        "is about copying it",
    ),
    "a final ranker below mode none": (
        under_teachers(0.6, 0.6, 0.6, none=[0.70, 0.71, 0.69]),
        "predicts users worse than a student of mode none (AUC watch 0.600, mode none 0.700): this",
    ),
    "repeats of teachers": (under_teachers(0.8, 0.8, 0.8, none=0.7), "the repeats have 3 teachers"),
    "labels of a gain": (
        labels([0.60, 0.62], 36), "By the log's labels, users have more.",
    ),
    "labels of a loss": (labels([0.40, 0.42], 80), "By the log's labels, users have less."),
    "labels of no clear change": (
        labels([0.50, 0.53], 80, 500), "By the log's labels, the change for users is undecided.",
    ),
    "labels of no change at all": (
        labels([0.50, 0.525], 80), "By the log's labels, the change for users is undecided.",
    ),
    "a gain by labels of chosen items": (
        labels([0.60, 0.62], 36, chosen=True),
        f"{CANNOT}labels that the final ranker chose show losses only, and here none.",
    ),
    "a loss by labels of chosen items": (
        labels([0.40, 0.42], 80, chosen=True), "users have less: a sign only",
    ),
    "too few labels": (
        labels([0.60, 0.62], 34),
        f"{CANNOT}only 34% of the items that these funnels show could have labels.",
    ),
    "an early ranker that decides what has labels": (
        labels([0.60, 0.62], 80, 350),
        f"{CANNOT}candidates that today's early ranker left out have no labels.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_the_steps_of_the_answer(tmp_path, name):
    rows, part = STEPS[name]
    given = answer_to(tmp_path, rows)
    assert part in " ".join([*given.sentences, *given.notes, *given.caveats])


def test_a_final_ranker_below_none_by_chance_is_not_doubted(tmp_path):
    given = answer_to(tmp_path, under_teachers(0.695, 0.695, 0.695, none=[0.70, 0.71, 0.69]))
    assert given.notes == ()


def test_no_seeds_are_asked_for_where_nothing_is_open(tmp_path):
    decided = users(none=[0.8, 0.9, 0.7], shared=[0.81, 0.912, 0.708])
    given = answer_to(tmp_path, students(STUDENTS, **decided))
    assert len(given.sentences) == 3


def test_scores_of_all_candidates_need_no_note(tmp_path):
    rows = [*students(STUDENTS, scored_share={"none": 1.0, "shared": 1.0}), INCUMBENT]
    given = answer_to(tmp_path, rows)
    assert given.notes == ()
    assert "at least" not in given.sentence


@pytest.mark.parametrize(
    ("requests_a_day", "spent"),
    [
        (30_000.0, ", 2 days at the rate of this log"),
        (1e9, ", 1 day at the rate of this log"),
        (20.0, ", 3,000 days at the rate of this log"),
        (float("nan"), ""),
    ],
)
def test_requests_to_score_whole_are_counted_in_days_too(
    tmp_path, monkeypatch, requests_a_day, spent
):
    study = sweeps.study_of(tmp_path, [sweeps.teacher_row(), *partly_scored(passed_auc=0.6)])
    study = study._replace(requests_a_day=requests_a_day)
    monkeypatch.setattr(Estimates, "requests_for", lambda *_: 300.0)

    notes = answer(study, Estimates(study)).notes

    # 1 in 200 is whole.
    note = f"About 300 such requests give the count to ±10%: those of 60,000 requests{spent}."
    assert note in " ".join(notes)


def test_a_list_is_named_as_one(tmp_path):
    rows = [*students(STUDENTS, flops={"shared": 0.2}), reference_row("show_rate", 390)]
    given = answer_to(tmp_path, rows)
    assert given.settings["without"] == "show_rate, a list of items without a user"


SHIPPED = [
    *(("cascade", variant) for variant in ("", "small", "paper", "items", "live", "sizes")),
    *((name, variant) for name in ("movielens", "filmsearch") for variant in ("", "paper")),
    ("kuairand", ""),
]


@pytest.mark.parametrize(("name", "variant"), SHIPPED)
def test_the_answer_of_each_shipped_sweep_is_short(tmp_path, name, variant):
    (study,) = read_studies([sweeps.write_runs(tmp_path, getattr(shipped, name)(variant))])
    given = answer(study, Estimates(study))
    lengths = [len(sentence.split()) for sentence in given.sentences]
    assert 3 <= len(lengths) <= 4
    assert max(lengths) <= 20
    assert sum(lengths) <= 80


@pytest.mark.parametrize("name", STEPS)
def test_every_sentence_is_short(tmp_path, name):
    given = answer_to(tmp_path, STEPS[name][0])
    lengths = [len(sentence.split()) for sentence in given.sentences]
    assert len(lengths) <= 4
    assert max(lengths) <= 20


@pytest.mark.parametrize(
    ("seeds", "covers"),
    [
        ((0, 1), "the test requests and 2 repeats;"),
        # Though the test requests show that fewer need passing.
        ((0,), "the test requests, and not the seeds, since there is only one;"),
    ],
)
def test_intervals_cover_the_requests_that_were_kept(tmp_path, seeds, covers):
    costs = {"costs.teacher.candidate": 2.0}
    estimates = sweeps.estimates_of(tmp_path, seeds=seeds, changes=costs)
    given = answer(estimates.study, estimates)
    assert any(f"Intervals cover {covers}" in caveat for caveat in given.caveats)
    # In the units of the config.
    assert "of the funnel's cost" in given.sentences[0]


def test_a_log_without_a_truth_has_the_plan_of_a_live_test(tmp_path):
    estimates = sweeps.estimates_of(tmp_path, true_values=False)
    study = estimates.study
    needed = estimates.live_test(study.best_with_scores, study.baseline, 0.002)
    plan = re.search(
        r"A/B test needs about ([\d,]+) requests, an interleaved test at most ([\d,]+)\.$",
        answer(study, estimates).sentences[-1],
    )
    # Two digits: the plan is rough.
    for text, number in zip(plan.groups(), needed, strict=True):
        assert float(text.replace(",", "")) == pytest.approx(number, rel=0.05)


def test_one_seed_cannot_say_how_many_would_do(tmp_path):
    estimates = sweeps.estimates_of(tmp_path, seeds=(0,))
    advice = _seeds_for_saving(estimates.study, estimates, estimates.study.best_with_scores)
    assert advice == "How much seeds differ, one seed cannot show: " + SEEDS.format("0,1,2")


@pytest.mark.parametrize(
    ("dataset", "is_simulated"), [("cascade", True), ("movielens_100k", False)]
)
def test_simulated_data_are_said_to_be(tmp_path, dataset, is_simulated):
    estimates = sweeps.estimates_of(tmp_path, dataset=dataset)
    caveats = answer(estimates.study, estimates).caveats
    assert any("simulated" in caveat for caveat in caveats) == is_simulated
