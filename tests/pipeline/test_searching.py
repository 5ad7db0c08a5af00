"""A sweep of settings that Optuna asks for, round by round."""

import json
import shutil

import pytest

from kd_ranker import api
from kd_ranker.config import asking
from kd_ranker.config.asking import Trial, ask
from kd_ranker.config.runs import methods_of, sweep_runs
from kd_ranker.config.schema import sweepable_by_name
from kd_ranker.evaluation import results
from tests.faults import fault_of

pytest.importorskip("optuna", reason="the extra optuna")

RATE = "optimizer.learning_rate"
SEARCH = {
    "sweep__modes": ("none", "aux"),
    "sweep__weights": (0.5, 4.0),
    "sweep__seeds": (0, 1),
    "sweep__search": "optuna",
    "sweep__draws": 3,
    "sweep__round": 2,
    "train__eval_every": 0,
    "train__steps": 6,
}


def config_of(world, **changes):
    config = world.config(**SEARCH | changes)
    config.sweep.ranges.optimizer.learning_rate = (1e-3, 1e-1)
    return config


def search(config, workdir):
    """Searches; returns the lines that are shown."""
    lines = []
    api.sweep(config, workdir, show=lines.append)
    return lines


@pytest.fixture(scope="module")
def searched(world, tmp_path_factory):
    """The workdir of a search; tests change copies."""
    workdir = tmp_path_factory.mktemp("searched") / "sweep"
    search(config_of(world), workdir)
    return workdir


def students(workdir, split):
    rows = results.read_csv(workdir / results.FILE)
    return rows[(rows["role"] == "student") & (rows["split"] == split)]


def test_each_method_trains_as_many_draws_in_rounds(searched):
    rounds = json.loads((searched / "draws.json").read_text())["rounds"]
    assert [[len(draws) for draws in round_.values()] for round_ in rounds] == [[2, 2], [1, 1]]
    rows = students(searched, "validation")
    # Two methods, three draws, two seeds; each draw has a rate of its own.
    assert rows["run"].nunique() == 12
    assert rows.groupby("mode")["learning_rate"].nunique().to_dict() == {"none": 3, "aux": 3}
    cohorts = json.loads((searched / "cohorts.json").read_text())["cohorts"]
    assert [len(names) for names in cohorts] == [8, 4]


def test_the_second_round_is_asked_for_by_what_the_first_reached_on_validation(world, searched):
    first, second = json.loads((searched / "draws.json").read_text())["rounds"]
    rows = students(searched, "validation")
    for method in methods_of(config_of(world)):
        trials = []
        for drawn in first[method.name]:
            of_draw = rows[rows["learning_rate"] == drawn[RATE]]
            if method.fixed["distill.mode"] == "aux":
                of_draw = of_draw[of_draw["distill_weight"] == drawn["distill.weight"]]
            by_head = [group["passed_for_99"].mean() for _, group in of_draw.groupby("serve")]
            trials.append(Trial(drawn, min(by_head)))
        asked = ask(method, sweepable_by_name(), trials, draws=1, sampler="tpe", seed=0)
        assert asked == second[method.name]


def test_only_what_validation_chose_is_read_on_test(searched):
    assert students(searched, "test")["run"].nunique() == 4


def test_a_search_resumes_within_a_round_and_grows(world, searched, tmp_path):
    workdir = shutil.copytree(searched, tmp_path / "sweep")
    shutil.rmtree(workdir / "cohorts/1")
    (workdir / results.FILE).unlink()

    search(config_of(world), workdir)

    assert (workdir / results.FILE).read_bytes() == (searched / results.FILE).read_bytes()
    assert any("there is nothing to do" in line for line in search(config_of(world), workdir))

    search(config_of(world, sweep__draws=4), workdir)
    before = {*students(searched, "validation")["run"]}
    assert before < {*students(workdir, "validation")["run"]}
    assert students(workdir, "validation")["run"].nunique() == 16


def test_another_search_is_refused_in_its_workdir(world, searched):
    line = fault_of(search, config_of(world, sweep__draw_seed=1), searched)
    assert "holds a search with other methods, ranges, sweep.sampler or sweep.draw_seed" in line


def test_optuna_that_is_not_installed_is_one_line_before_any_work(world, tmp_path, monkeypatch):
    monkeypatch.setattr(asking.importlib.util, "find_spec", lambda _: None)
    line = fault_of(search, config_of(world), tmp_path / "sweep")
    assert line == "sweep.search='optuna' needs the package optuna: install the extra `optuna`"
    assert not (tmp_path / "sweep").exists()


def test_runs_of_the_config_stand_for_those_that_will_be_asked_for(world):
    assert len(sweep_runs(config_of(world))) == 12
