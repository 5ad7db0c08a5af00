import json

import numpy as np
import pytest

from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.evaluation.saving import SAVINGS
from kd_ranker.report.study import read_studies
from tests.faults import fault_of
from tests.report import sweeps

SHARED, AUX = "shared, weight 1", "aux, weight 1"


def test_members_settings_and_repeats(tmp_path):
    (study,) = read_studies([sweeps.write_sweep(tmp_path)])
    assert (study.dataset, study.tasks, study.passed) == ("cascade", list(sweeps.TASKS), 200)
    assert list(study.rows["setting"].unique()) == [
        "none", "aux (user), weight 0.3", "aux (user), weight 1", "aux (teacher), weight 0.3",
        "aux (teacher), weight 1", "aux (blend), weight 0.3", "aux (blend), weight 1",
        "shared, weight 0.3", "shared, weight 1",
    ]  # fmt: skip
    assert list(study.rows["repeat"].unique()) == ["0/0", "1/0", "2/0"]
    # The weight and the serving choice are tuned, so that each mode is a way.
    assert list(study.chosen) == list(study.rows["way"].unique()) == ["none", "aux", "shared"]
    assert study.baseline == study.chosen["none"] == "none"
    # A teacher and references have no repeats themselves: they are repeated in each.
    assert study.num_teachers == 1
    assert list(study.teachers["repeat"]) == ["0/0", "1/0", "2/0"]
    references = study.references.groupby(["split", "repeat"])["member"]
    assert len(references) == 2 * 3
    assert all(sorted(of) == sorted(sweeps.REFERENCES) for _, of in references)
    assert (study.references["setting"] == study.references["member"]).all()
    assert study.varying == []
    # Only chosen settings are read on test: their requests, and those of teacher and references.
    written = results.read_csv(tmp_path / results.FILE)
    on_test = written[(written["role"] == "student") & (written["split"] == "test")]
    assert set(study.tested["setting"]) == set(study.chosen.values())
    assert len(study.tested) == len(on_test) == 3 * 3
    assert set(study.tested["split"]) == set(study.teachers["split"]) == {"test"}
    ((_, of_requests),) = study.kept
    chosen = set(zip(on_test["member"], on_test["serve"], strict=True))
    others = {(name, "user") for name in ("teacher", *sweeps.REFERENCES)}
    assert set(of_requests.each) == chosen | others


def test_of_sweeps_that_chose_differently_the_validation_of_both_decides(tmp_path):
    def rows(seed, one, other, tested):
        """`passed_for_99` of two weights on validation, of which one was read on test."""
        at = {"mode": "shared", "seed": seed}
        return [
            sweeps.teacher_row(),
            {"mode": "none", "seed": seed, "passed": 500},
            at | {"weight": 1.0, "passed": one, "split": "validation"},
            at | {"weight": 2.0, "passed": other, "split": "validation"},
            at | {"weight": 3.0, "passed": 290, "split": "validation"},
            at | {"weight": tested, "passed": 999, "split": "test"},
        ]

    a = sweeps.write_rows(tmp_path / "a", rows(0, 200, 300, tested=1.0))
    b = sweeps.write_rows(tmp_path / "b", rows(1, 390, 250, tested=2.0))
    (study,) = read_studies([a, b])
    # 295 against 275; 290 of a third one, which nobody has read, would lie between them.
    assert study.chosen == {"none": "none", "shared": "shared, weight 2"}
    assert list(study.tested.loc[study.tested["mode"] == "shared", "repeat"]) == ["1/0"]


RATE = "optimizer.table_learning_rate"
# Students by (what differs), and the names of their settings in the order of tables.
NAMES = {
    "keys that vary": (
        [{"mode": "none", "learning_rate": 0.001}, {"mode": "none", "learning_rate": 0.01},
         {"mode": "shared", "temperature": 2.0, "learning_rate": 0.001},
         {"mode": "shared", "temperature": 4.0, "learning_rate": 0.001}],
        ["none, learning rate 0.001", "none, learning rate 0.01",
         "shared, weight 1, temperature 2, learning rate 0.001",
         "shared, weight 1, temperature 4, learning rate 0.001"],
        ["none", "shared"],
    ),
    "plain mode none first, even if its rate is larger": (
        [{"mode": "none", "learning_rate": 0.001, "unshown_weight": 0.3},
         {"mode": "none", "learning_rate": 0.01}],
        ["none, learning rate 0.01", "none, learning rate 0.001, unshown weight 0.3"],
        ["none", "none, unshown weight"],
    ),
    # The rate of tables is named unless it follows the learning rate.
    "rates in proportion": (
        [{"mode": "none", "learning_rate": 0.01, RATE: 0.006},
         {"mode": "none", "learning_rate": 0.04, RATE: 0.024}],
        ["none, learning rate 0.01", "none, learning rate 0.04"], ["none"],
    ),
    "rates out of proportion": (
        [{"mode": "none", "learning_rate": 0.01, RATE: 0.006},
         {"mode": "none", "learning_rate": 0.04, RATE: 0.012}],
        ["none, learning rate 0.01, table learning rate 0.006",
         "none, learning rate 0.04, table learning rate 0.012"], ["none"],
    ),
    # A switch is a way, tuned over its values.
    "a switch": (
        [{"mode": "none", "unshown_weight": weight, "passed": passed}
         for weight, passed in ((0.0, 30), (0.1, 25), (0.3, 20))],
        ["none", "none, unshown weight 0.1", "none, unshown weight 0.3"],
        ["none", "none, unshown weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_settings_and_ways_are_named_by_what_varies(tmp_path, name):
    rows, settings, ways = NAMES[name]
    members = [row | {"member": str(number)} for number, row in enumerate(rows)]
    study = sweeps.study_of(tmp_path, members)
    assert list(study.rows["setting"].unique()) == settings
    assert list(study.rows["way"].unique()) == list(study.chosen) == ways
    # The plain ones are those of mode none without a switch, and all others.
    assert set(study.rows.loc[~study.rows["plain"], "way"]) == {
        way for way in ways if "unshown" in way
    }  # fmt: skip
    if name == "a switch":
        assert (study.baseline, study.plain) == ("none, unshown weight 0.3", "none")


def test_savings_are_against_the_best_of_each_kind_that_was_read_on_test(tmp_path):
    rows = [
        sweeps.teacher_row(),
        {"mode": "none", "learning_rate": 0.001, "passed": 400.0},
        # 2000 · 10 + 200 · 200 = 60,000
        {"mode": "none", "learning_rate": 0.01, "passed": 200.0},
        # 2000 · 10 + 125 · 200 = 45,000: a quarter less
        {"mode": "shared", "learning_rate": 0.001, "passed": 125.0},
        # Better, and only on validation.
        {"mode": "shared", "learning_rate": 0.001, "weight": 2.0, "passed": 80.0,
         "split": "validation"},
        {"mode": "aux", "learning_rate": 0.001, "passed": 80.0, "split": "validation"},
    ]  # fmt: skip
    study = sweeps.study_of(tmp_path, rows)
    assert study.chosen == {
        "none": "none, learning rate 0.01", "shared": "shared, weight 1, learning rate 0.001",
    }  # fmt: skip
    savings = dict(zip(study.rows["setting"], study.rows["funnel_cost_saving"], strict=True))
    assert savings["shared, weight 1, learning rate 0.001"] == pytest.approx(0.25)
    assert savings["none, learning rate 0.01"] == 0.0
    assert savings["none, learning rate 0.001"] == pytest.approx(1 - 100 / 60)
    # Those of results.csv, which has no names of settings.
    filled = results.fill_savings(results.read_csv(tmp_path / results.FILE))
    joined = study.rows.merge(filled, on=["member", "learning_rate", "split"])
    for column in SAVINGS:
        np.testing.assert_allclose(joined[f"{column}_x"], joined[f"{column}_y"])


def test_own_logs_go_by_their_titles(tmp_path):
    def titled(folder, title, seed=0):
        workdir = sweeps.write_sweep(tmp_path / folder, "parquet", seeds=(seed,))
        config = json.loads((workdir / "config.json").read_text())
        config["data"]["title"] = title
        (workdir / "config.json").write_text(json.dumps(config))
        return workdir

    titles = ("May: feed", "", "June / feed", "May: feed")
    workdirs = [titled(str(seed), title, seed) for seed, title in enumerate(titles)]
    studies = read_studies(workdirs)
    assert [study.dataset for study in studies] == ["May: feed", "parquet", "June / feed"]
    assert [study.rows["repeat"].nunique() for study in studies] == [2, 1, 1]
    for other in ("June   feed", "claims"):
        with pytest.raises(UserError, match="two tables would both be called"):
            read_studies([*workdirs, titled(other, other)])


def test_sweeps_of_a_dataset_are_joined_and_those_of_another_are_not(tmp_path):
    studies = read_studies(
        [
            sweeps.write_sweep(tmp_path / "a", seeds=(0, 1)),
            sweeps.write_sweep(tmp_path / "m", dataset="movielens_100k"),
            sweeps.write_sweep(tmp_path / "b", seeds=(2, 3)),
        ]
    )
    assert [study.dataset for study in studies] == ["cascade", "movielens_100k"]
    assert studies[0].rows["repeat"].nunique() == 4
    # The same teacher is in both.
    assert studies[0].num_teachers == 1
    assert len(studies[0].teachers) == 4
    assert list(studies[0].configs) == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_joined_sweeps_under_different_teachers_pair_references_by_their_own_sweep(tmp_path):
    """Also where both name their teacher's seed 0 and the students' seeds differ from it."""

    def of_sweep(seeds, flops, passed):
        return [
            sweeps.teacher_row() | {"flops": flops},
            sweeps.reference_row("show_rate", passed),
            *({"mode": "none", "seed": seed, "passed": 700} for seed in seeds),
        ]

    a = sweeps.write_rows(tmp_path / "a", of_sweep((1, 2), 200.0, 500))
    b = sweeps.write_rows(tmp_path / "b", of_sweep((3,), 300.0, 600))
    (study,) = read_studies([a, b])
    for table, column, expected in (
        (study.teachers, "flops_per_candidate", {"1/0": 200, "2/0": 200, "3/0": 300}),
        (study.references, "passed_for_99", {"1/0": 500, "2/0": 500, "3/0": 600}),
    ):
        on_test = table[table["split"] == "test"]
        assert on_test.set_index("repeat")[column].to_dict() == expected
        assert on_test.set_index("repeat")["source"].to_dict() == {"1/0": 0, "2/0": 0, "3/0": 1}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("value_weights", (1.0, 0.0, 0.0), "report them separately: value_weights ("),
        ("data.seed", 7, "data.seed (0 and 7)"),
        ("report.margin", 0.01, "report.margin (0.002 and 0.01)"),
    ],
)
def test_sweeps_under_different_configs_are_not_joined(tmp_path, key, value, message):
    a = sweeps.write_sweep(tmp_path / "a", seeds=(0,))
    b = sweeps.write_sweep(tmp_path / "b", seeds=(1,), changes={key: value})
    assert message in fault_of(read_studies, [a, b])


def test_what_is_missing_names_the_command_that_makes_it(tmp_path):
    absent = tmp_path / "absent"
    make = f"kd-ranker sweep --config=FILE.py --workdir={absent}"

    def message(start):
        text = fault_of(read_studies, [absent])
        assert text.startswith(start)
        assert make in text

    message(f"there is no folder {absent}")
    absent.mkdir()
    message(f"{absent} holds no results.csv")
    (absent / "results.csv").write_text("dataset\n")
    message(f"{absent} holds no config.json")
    # A teacher's workdir is no sweep.
    sweeps.write_rows(absent, [sweeps.teacher_row()])
    message(f"{absent}: results.csv has no student")


def test_overlapping_members_are_named(tmp_path):
    a = sweeps.write_sweep(tmp_path / "a", seeds=(0, 1))
    b = sweeps.write_sweep(tmp_path / "b", seeds=(1, 2), modes=("none", "shared"))
    message = fault_of(read_studies, [a, b])
    assert "none-weight0.0-seed1, shared-weight0.3-seed1, shared-weight1.0-seed1" in message
    assert "aux" not in message
    assert "seed0" not in message
    assert "more than once" in fault_of(read_studies, [a, a])


def test_sweeps_that_differ_in_what_a_sweep_may_vary_are_settings_of_their_own(tmp_path):
    a = sweeps.write_sweep(tmp_path / "a", seeds=(0, 1))
    b = sweeps.write_sweep(tmp_path / "b", seeds=(0, 1), changes={"train.steps": 7})
    (study,) = read_studies([a, b])
    assert study.varying == ["train.steps"]
    for source, steps in ((0, 1000), (1, 7)):
        labels = study.rows.loc[study.rows["source"] == source, "setting"].unique()
        assert all(f"steps {steps}" in label for label in labels)
    assert len(study.rows["repeat"].unique()) == 2


def study_of(tmp_path, *rows):
    return sweeps.study_of(tmp_path, [sweeps.teacher_row(), *rows])


@pytest.mark.parametrize(
    ("students", "expected"),
    [
        # Of all ways the best on validation, and the test must not matter.
        ([{"mode": "none", "passed": 10},
          {"mode": "shared", "weight": 1.0, "passed": 310, "test": {"passed": 100}},
          {"mode": "shared", "weight": 3.0, "passed": 290, "test": {"passed": 900}},
          {"mode": "aux", "passed": 300, "test": {"passed": 100}}], "shared, weight 3"),
        # A student of the stage needs no scores; one with another term does.
        ([{"mode": "none", "passed": 400},
          *({"mode": "aux", "distill_loss": loss, "passed": passed, "member": loss}
            for loss, passed in (("topk:stage", 20), ("topk:stage+bce", 200), ("softmax", 300)))],
         "aux, weight 1, loss topk:stage+bce"),
        ([{"mode": "none"}], None),
        # Without a baseline.
        ([{"mode": "aux", "true_value": 0.9, "true_value_for": 0.9}], AUX),
        # The cheapest funnel and not the one that passes fewest:
        # 2000 · 4 + 120 · 200 = 32,000 FLOPs against 2000 · 10 + 90 · 200 = 38,000.
        ([{"mode": "none", "passed": 400, "student.width": 8},
          *({"mode": "shared", "student.width": width, "flops": flops, "passed": passed,
             "member": str(width)} for width, flops, passed in ((8, 4.0, 120), (32, 10.0, 90)))],
         "shared, weight 1, width 8"),
    ],
)  # fmt: skip
def test_the_best_with_scores(tmp_path, students, expected):
    assert study_of(tmp_path, *students).best_with_scores == expected


def test_without_a_teacher_the_cost_is_unknown_and_the_fewest_passed_are_best(tmp_path):
    rows = [
        {"mode": "shared", "weight": weight, "flops": flops, "passed": passed}
        for weight, flops, passed in ((8.0, 4.0, 120), (32.0, 10.0, 90))
    ]
    study = sweeps.study_of(tmp_path, [{"mode": "none", "passed": 400}, *rows])
    assert study.best_with_scores == "shared, weight 32"


def of_users(passed, lost, noise=0.0):
    """Rows of three repeats: what users lose at 99% on validation, against 0.9 of the baseline."""
    return [
        {"seed": seed, "passed": passed, "true_value": 0.9,
         "true_value_for": 0.9 - lost + noise * (seed - 1),
         # The test must not decide.
         "test": {"true_value_for": 0.9 + lost}}
        for seed in range(3)
    ]  # fmt: skip


def ways_of(tmp_path, losses, noise=0.0):
    """A study of mode none, of shared at 100 passed and of aux at 120, with these losses."""
    ways = {"none": (400, 0.0, 0.0), "shared": (100, losses[0], noise), "aux": (120, losses[1], 0)}
    rows = [{"mode": mode} | row for mode, of in ways.items() for row in of_users(*of)]
    return study_of(tmp_path, *rows)


@pytest.mark.parametrize(
    ("losses", "noise", "kept", "chosen"),
    [
        ((0.0, 0.0), 0.0, [AUX, SHARED], SHARED),
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
    study = ways_of(tmp_path, losses, noise)
    assert [name for name in (AUX, SHARED) if study.keeps_users(name)] == kept
    assert study.best_with_scores == chosen
    change = study.users_change(SHARED)
    # Paired over the repeats of validation: 4.303 · noise / √3.
    half = 4.302653 * noise / 3**0.5
    expected = (-losses[0], -losses[0] - half, -losses[0] + half, 3)
    assert change[:4] == pytest.approx(expected, abs=1e-9)
    # At a larger margin, that of the config, both keep users.
    assert study._replace(margin=0.02).best_with_scores == SHARED


@pytest.mark.parametrize(("lost", "kept"), [(0.06, True), (0.0, False)])
def test_users_against_a_list_that_is_the_best_without_scores(tmp_path, lost, kept):
    rows = [{"mode": mode} | row for mode in ("none", "shared") for row in of_users(400, 0.05)]
    of_list = sweeps.reference_row("show_rate", 300, true_value=0.9, true_value_for=0.9 - lost)
    study = study_of(tmp_path, of_list, *rows)
    assert study.baseline == "show_rate"
    assert study.keeps_users(SHARED) == kept


@pytest.mark.parametrize("known", [{"true_value": 0.9}, {"true_value": None}, {}])
def test_labels_measure_users_where_the_truth_is_unknown(tmp_path, known):
    rows = ({"mode": mode, "covered": of} | known for mode, of in (("none", 0.5), ("shared", 0.1)))
    study = study_of(tmp_path, *rows)
    if known.get("true_value"):
        assert study.users_measure == "true_value_captured@30"
        assert study.users_at_target == ["true_value_for_99"]
        return
    assert study.users_measure == "covered_user_value@30"
    # Labels of a log cannot compare funnels that pass different numbers: every setting takes part.
    assert study.users_at_target == []
    assert study.users_change(SHARED) is None
    assert study.keeps_users(SHARED)
