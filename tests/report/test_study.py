import json

import jax
import numpy as np
import pytest

from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.evaluation.saving import SAVINGS
from kd_ranker.report.study import read_studies
from tests.report import sweeps


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
    assert study.missing == {"calibration": [], "losses": [], "requests": []}
    # The line that was cut short is not read.
    assert study.losses["step"].max() == 1500


def test_what_was_chosen_is_read_on_the_test_split_alone(tmp_path):
    (study,) = read_studies([sweeps.write_sweep(tmp_path)])
    written = results.read_csv(tmp_path / results.FILE)
    on_test = written[(written["role"] == "student") & (written["split"] == "test")]
    assert set(study.tested["setting"]) == set(study.chosen.values())
    assert len(study.tested) == len(on_test) == 3 * 3
    assert set(study.tested["split"]) == {"test"}
    assert set(study.teachers["split"]) == {"test"}
    # Each request, of the teacher and of those.
    ((_, of_requests),) = study.kept
    whose = set(zip(on_test["member"], on_test["serve"], strict=True))
    others = {(name, "user") for name in ("teacher", *sweeps.REFERENCES)}
    assert set(of_requests.each) == whose | others


def test_what_requests_add_is_read_of_every_cohort_with_its_teacher(tmp_path):
    whole = sweeps.write_sweep(tmp_path / "whole")
    parts = sweeps.write_sweep(tmp_path / "parts", without=sweeps.OF_REQUESTS)
    of = results.read_requests(whole / "cohorts" / "0" / "test")
    names = [who for who in of.each if who[0] != "teacher"]
    shares = [(("teacher", "user"), *share) for share in (names[::2], names[1::2])]
    for cohort, share in enumerate(shares):
        each = {who: of.each[who] for who in share}
        folder = parts / "cohorts" / str(2 * cohort) / "test"
        folder.mkdir(parents=True)
        for name, content in results.request_files(of._replace(each=each), sweeps.TASKS).items():
            (folder / name).write_bytes(content)
    (study,) = read_studies([sweeps.finish(parts)])
    assert [source for source, _ in study.kept] == [0, 0]
    for share, (_, found) in zip(shares, study.kept, strict=True):
        np.testing.assert_array_equal(found.ks, of.ks)
        assert tuple(found.each) == share
        for who in share:
            jax.tree.map(np.testing.assert_array_equal, found.each[who], of.each[who])


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


def test_a_setting_that_was_not_read_on_test_is_not_chosen(tmp_path):
    rows = [
        {"mode": "none"},
        {"mode": "shared", "weight": 1.0, "passed": 90},
        {"mode": "shared", "weight": 2.0, "passed": 80, "split": "validation"},
        {"mode": "aux", "passed": 80, "split": "validation"},
    ]
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    assert study.chosen == {"none": "none", "shared": "shared, weight 1"}


def test_a_switch_that_is_on_is_a_way_tuned_over_its_own_values(tmp_path):
    rows = [
        {"mode": "none", "passed": passed, "unshown_weight": weight, "member": f"at{weight}"}
        for weight, passed in ((0.0, 30), (0.1, 25), (0.3, 20))
    ]
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    assert study.chosen == {
        "none": "none", "none, unshown weight": "none, unshown weight 0.3",
    }  # fmt: skip
    assert (study.baseline, study.plain) == ("none, unshown weight 0.3", "none")


def test_results_of_an_older_version_are_refused(tmp_path):
    """Reading needs no column that it does not ask for."""
    whole = results.read_csv(sweeps.write_sweep(tmp_path, seeds=(0,)) / results.FILE)
    for column in results.ALWAYS:
        sweeps.change(tmp_path, lambda _, left=column: whole.drop(columns=left))
        message = one_line([tmp_path])
        assert f"{tmp_path / results.FILE} has no column {column}, so an older version" in message
        assert "wrote it; run the sweep again in another --workdir" in message
    sweeps.change(tmp_path, lambda _: whole[[*results.ALWAYS]])
    assert read_studies([tmp_path])[0].chosen


def test_the_savings_are_those_of_the_results(tmp_path):
    (study,) = read_studies([sweeps.write_sweep(tmp_path)])
    written = results.read_csv(tmp_path / results.FILE)
    joined = study.rows.merge(written, on=["member", "serve", "split"], suffixes=("", "_written"))
    assert len(joined) == len(study.rows) == 9 * 3 + 9
    assert joined["funnel_cost_saving"].to_numpy() == pytest.approx(
        joined["funnel_cost_saving_written"].to_numpy(), abs=1e-6
    )


def test_what_varies_is_part_of_a_setting(tmp_path):
    rows = [
        {"mode": "none", "learning_rate": 0.001},
        {"mode": "none", "learning_rate": 0.01},
        {"mode": "shared", "temperature": 2.0, "learning_rate": 0.001},
        {"mode": "shared", "temperature": 4.0, "learning_rate": 0.001},
    ]
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    assert study.varying == ["temperature", "learning_rate"]
    assert set(study.rows["setting"]) == {
        "none, learning rate 0.001",
        "none, learning rate 0.01",
        "shared, weight 1, temperature 2, learning rate 0.001",
        "shared, weight 1, temperature 4, learning rate 0.001",
    }


def test_the_tables_rate_is_named_unless_it_follows_the_learning_rate(tmp_path):
    for number, (rates, named) in enumerate([((0.006, 0.024), False), ((0.006, 0.006), False),
                                             ((0.006, 0.012), True)]):  # fmt: skip
        rows = [
            {"mode": "none", "learning_rate": rate, "optimizer.table_learning_rate": of_table}
            for rate, of_table in zip((0.01, 0.04), rates, strict=True)
        ]
        (study,) = read_studies([sweeps.write_rows(tmp_path / str(number), rows)])
        assert ("optimizer.table_learning_rate" in study.varying) == named
        assert study.rows["setting"].nunique() == 2


def test_plain_mode_none_comes_first_and_is_named_by_its_mode(tmp_path):
    """Also where it has a larger learning rate than a variant."""
    rows = [
        {"mode": "none", "learning_rate": rate, "unshown_weight": weight, "member": f"{weight}"}
        for rate, weight in ((0.001, 0.3), (0.01, 0.0))
    ]
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    assert list(study.rows["setting"].unique()) == [
        "none, learning rate 0.01", "none, learning rate 0.001, unshown weight 0.3",
    ]  # fmt: skip
    assert list(study.rows["way"].unique()) == ["none", "none, unshown weight"]
    assert study.rows.groupby("way")["plain"].unique().map(list).to_dict() == {
        "none": [True], "none, unshown weight": [False],
    }  # fmt: skip


def test_of_several_students_without_scores_the_best_is_the_baseline_of_savings(tmp_path):
    rows = [
        sweeps.teacher_row(),
        {"mode": "none", "learning_rate": 0.001, "passed": 400.0},
        # 2000 · 10 + 200 · 200 = 60,000
        {"mode": "none", "learning_rate": 0.01, "passed": 200.0},
        # 2000 · 10 + 125 · 200 = 45,000: a quarter less
        {"mode": "shared", "learning_rate": 0.001, "passed": 125.0},
    ]
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    assert study.baseline == "none, learning rate 0.01"
    savings = dict(zip(study.rows["setting"], study.rows["funnel_cost_saving"], strict=True))
    assert savings["shared, weight 1, learning rate 0.001"] == pytest.approx(0.25)
    assert savings["none, learning rate 0.01"] == 0.0
    assert savings["none, learning rate 0.001"] == pytest.approx(1 - 100 / 60)


def test_frozen_members_are_set_apart(tmp_path):
    frozen = ["aux-weight1.0-seed1", "shared-weight0.3-seed0"]
    (study,) = read_studies([sweeps.write_sweep(tmp_path, frozen=frozen)])
    assert sorted(study.frozen["member"]) == sorted(frozen)
    assert set(study.frozen["non_finite_step"]) == {700}
    assert not set(frozen) & set(study.rows["member"])


def titled(workdir, title, **options):
    """A sweep of an own log, which may have a title."""
    sweeps.write_sweep(workdir, dataset="parquet", **options)
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["title"] = title
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def test_own_logs_go_by_their_titles(tmp_path):
    names = {"a": "May: feed", "b": "", "c": "June / feed", "d": "May: feed"}
    workdirs = [
        titled(tmp_path / folder, title, seeds=(number,))
        for number, (folder, title) in enumerate(names.items())
    ]
    studies = read_studies(workdirs)
    assert [study.dataset for study in studies] == ["May: feed", "parquet", "June / feed"]
    assert [study.rows["repeat"].nunique() for study in studies] == [2, 1, 1]
    for other in ("June   feed", "claims"):
        clash = titled(tmp_path / other.strip(), other)
        with pytest.raises(UserError, match="two tables would both be called"):
            read_studies([*workdirs, clash])


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


def test_data_seeds_make_repeats_too(tmp_path):
    other = sweeps.change(
        sweeps.write_sweep(tmp_path / "b"),
        lambda frame: frame.assign(data_seed=(frame["role"] == "student").map({True: 1})),
    )
    (study,) = read_studies([sweeps.write_sweep(tmp_path / "a"), other])
    assert study.rows["repeat"].nunique() == 6
    assert study.teachers["repeat"].nunique() == len(study.teachers) == 6


def test_of_several_teachers_each_counts_for_the_repeats_of_its_own_seed(tmp_path):
    rows = [
        row | {"seed": seed}
        for seed in (0, 1)
        for row in (
            sweeps.teacher_row() | {"flops": 200.0 + seed},
            sweeps.reference_row("show_rate", 500 + seed),
            *({"mode": "none", "data_seed": data_seed, "member": f"{seed}{data_seed}",
               "passed": 400} for data_seed in (0, 1)),
        )
    ]  # fmt: skip
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    assert study.num_teachers == 2
    of_repeats = study.teachers.set_index("repeat")["flops_per_candidate"].to_dict()
    assert of_repeats == {"0/0": 200, "0/1": 200, "1/0": 201, "1/1": 201}
    on_test = study.references[study.references["split"] == "test"]
    passed = on_test.set_index("repeat")["passed_for_99"].to_dict()
    assert passed == {"0/0": 500, "0/1": 500, "1/0": 501, "1/1": 501}


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


def test_each_saving_has_its_baseline(tmp_path):
    rows = [
        sweeps.teacher_row(),
        sweeps.reference_row("incumbent", 500),
        sweeps.reference_row("show_rate", 250),
        # The order of the final ranker's scores, and those that no funnel could use.
        *(sweeps.reference_row(name, 20) for name in ("top_rate", "oracle", "random")),
        {"mode": "none", "passed": 300},
        {"mode": "shared", "passed": 125},
    ]
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    assert (study.baseline, study.plain, study.incumbent) == ("show_rate", "none", "incumbent")
    (shared,) = study.tested[study.tested["mode"] == "shared"].to_dict("records")
    # 2000 · 10 + 125 · 200 = 45,000 FLOPs, against 50,000, 80,000 and 100,000.
    savings = [shared[column] for column in SAVINGS]
    assert savings == pytest.approx([0.1, 1 - 45 / 80, 0.55])


def one_line(workdirs):
    with pytest.raises(UserError) as caught:
        read_studies(workdirs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_overlapping_members_are_named(tmp_path):
    a = sweeps.write_sweep(tmp_path / "a", seeds=(0, 1))
    b = sweeps.write_sweep(tmp_path / "b", seeds=(1, 2), modes=("none", "shared"))
    message = one_line([a, b])
    assert "none-weight0.0-seed1, shared-weight0.3-seed1, shared-weight1.0-seed1" in message
    assert "aux" not in message
    assert "seed0" not in message
    assert "more than once" in one_line([a, a])


def test_sweeps_under_different_configs_are_not_joined(tmp_path):
    a = sweeps.write_sweep(tmp_path / "a", seeds=(0, 1))
    b = sweeps.write_sweep(tmp_path / "b", seeds=(2,), changes={"value_weights": (1.0, 0.0, 0.0)})
    assert "report them separately: value_weights (" in one_line([a, b])
    c = sweeps.write_sweep(tmp_path / "c", seeds=(2,), changes={"data.seed": 7})
    assert "data.seed (0 and 7)" in one_line([a, c])
    d = sweeps.write_sweep(tmp_path / "d", seeds=(2,), changes={"report.margin": 0.01})
    assert "report.margin (0.002 and 0.01)" in one_line([a, d])


def test_sweeps_that_differ_in_what_a_sweep_may_vary_are_settings_of_their_own(tmp_path):
    a = sweeps.write_sweep(tmp_path / "a", seeds=(0, 1))
    b = sweeps.write_sweep(tmp_path / "b", seeds=(0, 1), changes={"train.steps": 7})
    (study,) = read_studies([a, b])
    assert study.varying == ["train.steps"]
    for source, steps in ((0, 1000), (1, 7)):
        labels = study.rows.loc[study.rows["source"] == source, "setting"].unique()
        assert all(f"steps {steps}" in label for label in labels)
    assert len(study.rows["repeat"].unique()) == 2


def test_what_is_missing_names_the_command_that_makes_it(tmp_path):
    absent = tmp_path / "absent"
    make = f"python -m experiments.sweep --config=configs/FILE.py --workdir={absent}"
    assert make in one_line([absent])
    assert f"there is no folder {absent}" in one_line([absent])
    absent.mkdir()
    assert f"{absent} holds no results.csv" in one_line([absent])
    assert make in one_line([absent])
    (absent / "results.csv").write_text("dataset\n")
    assert f"{absent} holds no config.json" in one_line([absent])


def test_a_teachers_workdir_is_no_sweep(tmp_path):
    assert "has no student" in one_line([sweeps.write_rows(tmp_path, [sweeps.teacher_row()])])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("calibration.csv", "calibration"),
        ("cohorts/0/metrics.jsonl", "losses"),
        ("cohorts/0/test/requests.parquet", "requests"),
    ],
)
def test_missing_files_are_named(tmp_path, name, kind):
    whole = sweeps.write_sweep(tmp_path / "a", seeds=(0, 1))
    part = sweeps.write_sweep(tmp_path / "b", seeds=(2,), without=[name])
    (study,) = read_studies([whole, part])
    (line,) = study.missing[kind]
    assert line.startswith(f"{part} holds no ")
    assert len(study.kept if kind == "requests" else getattr(study, kind))


def test_environments_are_told_where_they_are_recorded(tmp_path):
    sweeps.write_sweep(tmp_path / "a", seeds=(0,))
    sweeps.write_sweep(tmp_path / "b", seeds=(1,), without=["environment.json"])
    (study,) = read_studies([tmp_path / "a", tmp_path / "b"])
    assert list(study.environments) == [str(tmp_path / "a")]
    assert study.environments[str(tmp_path / "a")]["packages"]["jax"] == "0.10.2"
    assert json.loads(study.configs[str(tmp_path / "b")])["funnel"]["passed"] == 200
