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
    aux = [f"aux ({head}), weight {weight}" for head in sweeps.SERVES["aux"] for weight in (0.3, 1)]
    shared = ["shared, weight 0.3", SHARED]
    assert list(study.rows["setting"].unique()) == ["none", *aux, *shared]
    assert list(study.rows["repeat"].unique()) == ["0/0", "1/0", "2/0"]
    assert study.varying == []
    # The weight and the head are tuned, so that each mode is a method.
    assert list(study.chosen) == list(study.rows["method"].unique()) == ["none", "aux", "shared"]
    assert study.baseline == study.chosen["none"] == "none"
    # A teacher and references have no repeats themselves: they are repeated in each.
    assert study.num_teachers == 1
    assert list(study.teachers["repeat"]) == ["0/0", "1/0", "2/0"]
    references = study.references.groupby(["split", "repeat"])["setting"]
    names_by_repeat = [sorted(names) for _, names in references]
    assert names_by_repeat == [sorted(sweeps.BASELINES)] * 6
    # Only chosen settings are read on test: their requests, and those of teacher and references.
    assert sorted(study.tested["setting"]) == sorted([*study.chosen.values()] * 3)
    assert set(study.tested["split"]) == set(study.teachers["split"]) == {"test"}
    ((_, of_requests),) = study.kept_requests
    names = [*study.tested["run"], "teacher", *sweeps.BASELINES]
    assert sorted(name for name, _ in of_requests.each) == sorted(names)


def test_the_validation_of_all_joined_sweeps_decides(tmp_path):
    def rows(seed, passed_by_weight, tested_weight):
        """`passed_for_99` of three weights on validation, of which one was read on test."""
        shared = {"mode": "shared", "seed": seed}
        on_validation = [
            shared | {"weight": weight, "passed": passed, "split": "validation"}
            for weight, passed in passed_by_weight.items()
        ]
        on_test = shared | {"weight": tested_weight, "passed": 999, "split": "test"}
        return [
            teacher_row(), {"mode": "none", "seed": seed, "passed": 500}, *on_validation, on_test,
        ]  # fmt: skip

    # 295 against 275; 290 of a third one, which nobody has read, would lie between them.
    first = sweeps.write_rows(tmp_path / "a", rows(0, {1.0: 200, 2.0: 300, 3.0: 290}, 1.0))
    second = sweeps.write_rows(tmp_path / "b", rows(1, {1.0: 390, 2.0: 250, 3.0: 290}, 2.0))

    (study,) = read_studies([first, second])

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


def assert_names_the_command(workdir, fault):
    message = fault_of(read_studies, [workdir])
    assert message.startswith(f"{workdir}{fault}")
    assert f"kd-ranker sweep --config=FILE.py --workdir={workdir}" in message


def test_an_absent_workdir_names_the_command_that_makes_it(tmp_path):
    assert_names_the_command(tmp_path / "absent", " holds no results.csv")


def test_a_workdir_without_a_config_names_the_command(tmp_path):
    (tmp_path / "results.csv").write_text("dataset\n")

    assert_names_the_command(tmp_path, " holds no config.json")


def test_a_teachers_workdir_is_no_sweep(tmp_path):
    sweeps.write_rows(tmp_path, [teacher_row()])

    assert_names_the_command(tmp_path, ": results.csv has no student")


# The cheapest funnel is not the one that passes fewest:
# 2000 · 4 + 120 · 200 = 32,000 FLOPs against 2000 · 10 + 90 · 200 = 38,000.
WIDTHS = [
    NONE | {"passed": 400, "student.width": 8},
    {"mode": "shared", "student.width": 8, "flops": 4.0, "passed": 120, "run": "8"},
    {"mode": "shared", "student.width": 32, "flops": 10.0, "passed": 90, "run": "32"},
]


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
          {"mode": "aux", "distill_loss": "topk:stage", "passed": 20, "run": "stage"},
          {"mode": "aux", "distill_loss": "topk:stage+bce", "passed": 200, "run": "both"},
          {"mode": "aux", "distill_loss": "softmax", "passed": 300, "run": "scores"}],
         "aux, weight 1, loss topk:stage+bce"),
        ([NONE], None),
        # Without a baseline.
        ([{"mode": "aux", "true_value": 0.9, "true_value_for": 0.9}], AUX),
        (WIDTHS, "shared, weight 1, width 8"),
    ],
)  # fmt: skip
def test_the_best_with_scores(tmp_path, students, expected):
    assert study_of(tmp_path, *students).best_with_scores == expected


def test_without_a_teachers_cost_the_fewest_passed_are_best(tmp_path):
    study = sweeps.study_of(tmp_path, WIDTHS)

    assert study.best_with_scores == "shared, weight 1, width 32"


def rows_of_mode(mode, passed, lost, noise=0.0):
    """Rows of three repeats: what users lose at 99% on validation, against 0.9 of the baseline."""
    return [
        {"mode": mode, "seed": seed, "passed": passed, "true_value": 0.9,
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
    lost_by_shared, lost_by_aux = losses
    study = study_of(
        tmp_path,
        *rows_of_mode("none", 400, 0.0),
        *rows_of_mode("shared", 100, lost_by_shared, noise),
        *rows_of_mode("aux", 120, lost_by_aux),
    )

    assert [name for name in (AUX, SHARED) if study.keeps_users(name)] == kept
    assert study.best_with_scores == chosen
    # Paired over the repeats of validation: 4.303 · noise / √3.
    half = 4.302653 * noise / 3**0.5
    expected = (-lost_by_shared, -lost_by_shared - half, -lost_by_shared + half, 3)
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
