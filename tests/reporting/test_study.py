import pytest

from kd_ranker.reporting.study import read_studies
from tests.faults import fault_of
from tests.reporting import sweeps
from tests.reporting.sweeps import reference_row, teacher_row

SHARED, AUX = "shared, weight 1", "aux, weight 1"


def study_of(tmp_path, *rows):
    return sweeps.study_of(tmp_path, [teacher_row(), *rows])


def test_runs_settings_and_repeats(tmp_path):
    (study,) = read_studies([sweeps.write_sweep(tmp_path)])
    assert (study.dataset, study.passed) == ("cascade", 200)
    heads = [f"aux ({of}), weight {weight}" for of in sweeps.SERVES["aux"] for weight in (0.3, 1)]
    shared = ["shared, weight 0.3", SHARED]
    assert list(study.rows["setting"].unique()) == ["none", *heads, *shared]
    assert list(study.rows["repeat"].unique()) == ["0/0", "1/0", "2/0"]
    assert study.varying == []
    # The weight and the head are tuned, so that each mode is a method.
    assert list(study.chosen) == list(study.rows["method"].unique()) == ["none", "aux", "shared"]
    assert study.baseline == study.chosen["none"] == "none"
    # A teacher and references have no repeats themselves: they are repeated in each.
    assert study.num_teachers == 1
    assert list(study.teachers["repeat"]) == ["0/0", "1/0", "2/0"]
    references = study.references.groupby(["split", "repeat"])["setting"]
    assert [sorted(of) for _, of in references] == [sorted(sweeps.BASELINES)] * 6
    # Only chosen settings are read on test: their requests, and those of teacher and references.
    assert sorted(study.tested["setting"]) == sorted([*study.chosen.values()] * 3)
    assert set(study.tested["split"]) == set(study.teachers["split"]) == {"test"}
    ((_, of_requests),) = study.kept
    names = [*study.tested["run"], "teacher", *sweeps.BASELINES]
    assert sorted(name for name, _ in of_requests.each) == sorted(names)


def test_the_validation_of_all_joined_sweeps_decides(tmp_path):
    def rows(seed, passed, tested):
        """`passed_for_99` of three weights on validation, of which one was read on test."""
        at = {"mode": "shared", "seed": seed}
        return [
            teacher_row(), {"mode": "none", "seed": seed, "passed": 500},
            *(at | {"weight": weight, "passed": of, "split": "validation"}
              for weight, of in zip((1.0, 2.0, 3.0), passed, strict=True)),
            at | {"weight": tested, "passed": 999, "split": "test"},
        ]  # fmt: skip

    # 295 against 275; 290 of a third one, which nobody has read, would lie between them.
    a = sweeps.write_rows(tmp_path / "a", rows(0, (200, 300, 290), tested=1.0))
    b = sweeps.write_rows(tmp_path / "b", rows(1, (390, 250, 290), tested=2.0))
    (study,) = read_studies([a, b])
    assert study.chosen == {"none": "none", "shared": "shared, weight 2"}
    assert list(study.tested.loc[study.tested["mode"] == "shared", "repeat"]) == ["1/0"]


RATE, TABLES = "learning_rate", "optimizer.table_learning_rate"
NONE = {"mode": "none"}
# Students by what differs, the names of their settings in the order of tables, and of methods.
NAMES = {
    "keys that vary": (
        [NONE | {RATE: 0.001}, {"mode": "shared", "temperature": 2.0, RATE: 0.001},
         {"mode": "shared", "temperature": 4.0, RATE: 0.01}],
        ["none, learning rate 0.001", "shared, weight 1, temperature 2, learning rate 0.001",
         "shared, weight 1, temperature 4, learning rate 0.01"], ["none", "shared"],
    ),
    "a rate of tables that follows the other one has no name": (
        [NONE | {RATE: 0.01, TABLES: 0.006}, NONE | {RATE: 0.04, TABLES: 0.024}],
        ["none, learning rate 0.01", "none, learning rate 0.04"], ["none"],
    ),
    "a switch is a method, tuned over its values": (
        [NONE | {"unshown_weight": weight, "passed": passed}
         for weight, passed in ((0.0, 30), (0.1, 25), (0.3, 20))],
        ["none", "none, unshown weight 0.1", "none, unshown weight 0.3"],
        ["none", "none, unshown weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_settings_and_ways_are_named_by_what_varies(tmp_path, name):
    rows, settings, methods = NAMES[name]
    runs = [row | {"run": str(number)} for number, row in enumerate(rows)]
    study = sweeps.study_of(tmp_path, runs)
    assert list(study.rows["setting"].unique()) == settings
    assert list(study.rows["method"].unique()) == list(study.chosen) == methods
    if "switch" in name:
        assert (study.baseline, study.plain) == ("none, unshown weight 0.3", "none")


def test_the_best_setting_and_its_saving_are_from_validation(tmp_path):
    study = study_of(
        tmp_path,
        NONE | {RATE: 0.001, "passed": 400.0},
        NONE | {RATE: 0.01, "passed": 200.0},
        {"mode": "shared", RATE: 0.001, "passed": 125.0},
    )
    chosen = "shared, weight 1, learning rate 0.001"
    assert study.chosen == {"none": "none, learning rate 0.01", "shared": chosen}
    # 2000 · 10 + 125 · 200 = 45,000 in place of 60,000.
    saved = study.rows.loc[study.rows["setting"] == chosen, "funnel_cost_saving"]
    assert saved.to_numpy() == pytest.approx(0.25)


def test_own_logs_go_by_their_titles(tmp_path):
    def titled(seed, title):
        rows = [teacher_row(), NONE | {"seed": seed, "run": str(seed)}]
        return sweeps.write_rows(tmp_path / str(seed), rows, title=title)

    titles = ("May: feed", "", "June / feed", "May: feed")
    workdirs = [titled(seed, title) for seed, title in enumerate(titles)]
    studies = read_studies(workdirs)
    assert [study.dataset for study in studies] == ["May: feed", "d", "June / feed"]
    assert [study.rows["repeat"].nunique() for study in studies] == [2, 1, 1]
    for other in ("June   feed", "claims"):
        assert "two tables would both" in fault_of(read_studies, [*workdirs, titled(9, other)])


def test_references_pair_within_the_sweep_of_their_teacher(tmp_path):
    """Also where both name their teacher's seed 0 and the students' seeds differ from it."""

    def of_sweep(folder, seeds, flops, passed):
        students = [NONE | {"seed": seed, "passed": 700} for seed in seeds]
        rows = [teacher_row() | {"flops": flops}, reference_row("show_rate", passed), *students]
        return sweeps.write_rows(tmp_path / folder, rows)

    folders = of_sweep("a", (1, 2), 200.0, 500), of_sweep("b", (3,), 300.0, 600)
    (study,) = read_studies(folders)
    assert list(study.configs) == [str(folder) for folder in folders]
    for table, column, expected in (
        (study.teachers, "flops_per_candidate", {"1/0": 200, "2/0": 200, "3/0": 300}),
        (study.references, "passed_for_99", {"1/0": 500, "2/0": 500, "3/0": 600}),
    ):
        on_test = table[table["split"] == "test"].set_index("repeat")
        assert on_test[column].to_dict() == expected
        assert on_test["source"].to_dict() == {"1/0": 0, "2/0": 0, "3/0": 1}


def test_sweeps_that_differ_in_sweepable_keys_are_joined(tmp_path):
    options = {"modes": ("none", "shared"), "weights": (1.0,)}
    a = sweeps.write_sweep(tmp_path / "a", seeds=(0, 1), **options)
    changes = {"value_weights": (1.0, 0.0, 0.0), "report.margin": 0.01}
    other = sweeps.write_sweep(tmp_path / "other", seeds=(2,), changes=changes, **options)
    message = fault_of(read_studies, [a, other])
    assert "report them separately: " in message
    assert "value_weights (" in message
    assert "report.margin (0.002 there, 0.01 now)" in message
    steps = sweeps.write_sweep(tmp_path / "b", seeds=(0,), changes={"train.steps": 7}, **options)
    (study,) = read_studies([a, steps])
    assert study.varying == ["train.steps"]
    labels = study.rows.groupby("source")["setting"].unique()
    assert list(labels[0]) == ["none, steps 1000", f"{SHARED}, steps 1000"]
    assert list(labels[1]) == ["none, steps 7", f"{SHARED}, steps 7"]
    # A run of two sweeps is named.
    again = sweeps.write_sweep(tmp_path / "c", modes=("none",), seeds=(1, 2))
    message = fault_of(read_studies, [a, again])
    assert f"{tmp_path}/c: these runs occur more than once: none-weight0.0-seed1;" in message


def test_what_is_missing_names_the_command_that_makes_it(tmp_path):
    absent = tmp_path / "absent"
    steps = {
        f"{absent} holds no results.csv": lambda: (
            absent.mkdir() or (absent / "results.csv").write_text("dataset\n")
        ),
        # A teacher's workdir is no sweep.
        f"{absent} holds no config.json": lambda: sweeps.write_rows(absent, [teacher_row()]),
        f"{absent}: results.csv has no student": lambda: None,
    }
    for start, go_on in steps.items():
        message = fault_of(read_studies, [absent])
        assert message.startswith(start)
        assert f"kd-ranker sweep --config=FILE.py --workdir={absent}" in message
        go_on()


# The cheapest funnel is not the one that passes fewest:
# 2000 · 4 + 120 · 200 = 32,000 FLOPs against 2000 · 10 + 90 · 200 = 38,000.
WIDTHS = [
    NONE | {"passed": 400, "student.width": 8},
    *({"mode": "shared", "student.width": width, "flops": flops, "passed": passed,
       "run": str(width)} for width, flops, passed in ((8, 4.0, 120), (32, 10.0, 90))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("students", "expected"),
    [
        # Of all methods the best on validation, and the test must not matter.
        ([NONE | {"passed": 10},
          {"mode": "shared", "weight": 1.0, "passed": 310, "test": {"passed": 100}},
          {"mode": "shared", "weight": 3.0, "passed": 290, "test": {"passed": 900}},
          {"mode": "aux", "passed": 300, "test": {"passed": 100}}], "shared, weight 3"),
        # A student of the stage needs no scores; one with another term does.
        ([NONE | {"passed": 400},
          *({"mode": "aux", "distill_loss": loss, "passed": passed, "run": loss}
            for loss, passed in (("topk:stage", 20), ("topk:stage+bce", 200), ("softmax", 300)))],
         "aux, weight 1, loss topk:stage+bce"),
        ([NONE], None),
        # Without a baseline.
        ([{"mode": "aux", "true_value": 0.9, "true_value_for": 0.9}], AUX),
        # Without a teacher the cost is unknown, and the fewest passed are best.
        (WIDTHS, "shared, weight 1, width 32"),
        ([*WIDTHS], "shared, weight 1, width 8"),
    ],
)  # fmt: skip
def test_the_best_with_scores(tmp_path, students, expected):
    rows = students if students is WIDTHS else [teacher_row(), *students]
    assert sweeps.study_of(tmp_path, rows).best_with_scores == expected


def of_users(passed, lost, noise=0.0):
    """Rows of three repeats: what users lose at 99% on validation, against 0.9 of the baseline."""
    return [
        {"seed": seed, "passed": passed, "true_value": 0.9,
         "true_value_for": 0.9 - lost + noise * (seed - 1),
         # The test must not decide.
         "test": {"true_value_for": 0.9 + lost}}
        for seed in range(3)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "noise", "kept", "chosen"),
    [
        # A loss within the margin of 0.002 is none, and so is a gain.
        ((0.0019, -0.1), 0.0, [AUX, SHARED], SHARED),
        ((0.0021, 0.001), 0.0, [AUX], AUX),
        # No loss on average, and not sure: 2.48 standard errors of 0.002 / √3 are 0.005.
        ((0.0, 0.001), 0.002, [AUX], AUX),
        # If none is left, all take part.
        ((0.03, 0.03), 0.0, [], SHARED),
    ],
)
def test_a_cheaper_setting_that_loses_users_is_passed_over(tmp_path, losses, noise, kept, chosen):
    methods = {"none": (400, 0.0), "shared": (100, losses[0], noise), "aux": (120, losses[1])}
    study = study_of(
        tmp_path, *({"mode": mode} | row for mode, of in methods.items() for row in of_users(*of))
    )
    assert [name for name in (AUX, SHARED) if study.keeps_users(name)] == kept
    assert study.best_with_scores == chosen
    # Paired over the repeats of validation: 4.303 · noise / √3.
    half = 4.302653 * noise / 3**0.5
    expected = (-losses[0], -losses[0] - half, -losses[0] + half, 3)
    assert study.users_change(SHARED)[:4] == pytest.approx(expected, abs=1e-9)
    # At a larger margin, that of the config, both keep users.
    study.config.report.margin = 0.04
    assert study.best_with_scores == SHARED


def test_labels_measure_users_where_the_truth_is_unknown(tmp_path):
    study = study_of(tmp_path, *({"mode": mode, "covered": 0.5} for mode in ("none", "shared")))
    # Labels of a log cannot compare funnels that pass different numbers.
    assert study.users_measures == ["covered_user_value@30"]
    assert study.users_change(SHARED) is None
    assert study.keeps_users(SHARED)
