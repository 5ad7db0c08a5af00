"""What commands tell a tracker."""

import json
import threading

import pytest

from kd_ranker import api
from kd_ranker.tracking import background, registry
from kd_ranker.tracking.tracker import Tracker
from kd_ranker.training import workdir as workdirs
from tests import small
from tests.faults import fault_of
from tests.tracking.recorded import Recorded


@pytest.fixture
def recorded(monkeypatch):
    """Trackers that record, in the order in which commands started them."""
    made = []

    class Kept(Recorded):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setitem(registry.TRACKERS, "recorded", Kept)
    return made


def lines_of(workdir):
    """The lines of the metrics of a run."""
    metrics = [
        workdirs.read_metrics(workdir / file)
        for file in (workdirs.METRICS_FILE, workdirs.SPEED_FILE)
    ]
    return sorted(((line.pop("step"), line) for lines in metrics for line in lines), key=str)


def test_a_tracker_gets_the_scalars_the_results_and_the_files_of_a_run(world, tmp_path, recorded):
    config = world.config(distill__mode="aux", train__steps=4, train__log_every=2)
    config.tracker = "recorded"
    api.train(config, tmp_path / "run")
    (tracker,) = recorded
    (started,) = tracker.of("start")[0]
    assert (started.command, started.name) == ("train", str(tmp_path / "run"))
    assert started.runs == {}
    assert started.config["train.steps"] == 4
    assert json.loads((tmp_path / "run/tracked.json").read_text()) == {"id": started.id}
    assert sorted(tracker.of("write"), key=str) == lines_of(tmp_path / "run")
    ((results, files),) = tracker.of("finish")
    assert {*results} == {""}
    assert {"test/user/user_auc/watch", "validation/teacher/value_captured@30"} <= {*results[""]}
    assert files == [("config.json", True), ("results.csv", True)]
    assert [call[0] for call in tracker.calls[-2:]] == ["finish", "close"]
    assert tracker.of("close") == [(True,)]
    assert not [*(tmp_path / "run").glob("events*")]


def test_a_sweep_tells_of_its_runs_and_resumes_under_another_tracker(world, tmp_path, recorded):
    config = world.config(
        sweep__modes=("none", "aux"), sweep__seeds=(0,), train__steps=4, train__eval_every=0
    )
    small.sweep(config, tmp_path / "run")
    (tmp_path / "run/manifest.json").unlink()
    config.tracker = "recorded"
    assert small.sweep(config, tmp_path / "run")
    (tracker,) = recorded
    (started,) = tracker.of("start")[0]
    names = {"none-seed0", "aux-weight1.0-seed0"}
    assert {*started.runs} == names
    assert {values["distill.mode"] for values in started.runs.values()} == {"none", "aux"}
    ((results, _),) = tracker.of("finish")
    assert {*results} == names
    # A further start changes nothing, and tells nothing.
    assert not small.sweep(config, tmp_path / "run")
    assert len(recorded) == 1


def test_the_id_stays_when_a_run_resumes(world, tmp_path, recorded):
    config = world.config(distill__mode="none", train__steps=4)
    config.tracker = "recorded"
    for _ in range(2):
        api.train(config, tmp_path / "run")
    api.train(config, tmp_path / "other")
    ids = [tracker.of("start")[0][0].id for tracker in recorded]
    assert ids[0] == ids[1] != ids[2]


def test_a_run_that_fails_is_not_finished(world, tmp_path, recorded, monkeypatch):
    monkeypatch.setattr("kd_ranker.pipeline.training.measure", lambda *_, **__: 1 / 0)
    config = world.config(distill__mode="none", train__steps=4)
    config.tracker = "recorded"
    with pytest.raises(ZeroDivisionError):
        api.train(config, tmp_path / "run")
    assert recorded[0].of("close") == [(False,)]


def test_a_run_ends_though_its_tracker_hangs(world, tmp_path, monkeypatch):
    released = threading.Event()

    class Hanging(Tracker):
        def start(self, tracked):
            released.wait()

    monkeypatch.setitem(registry.TRACKERS, "hanging", Hanging)
    monkeypatch.setattr(background, "_SECONDS_TO_END", 0.0)
    config = world.config(distill__mode="none", train__steps=4)
    config.tracker = "hanging"
    assert len(api.train(config, tmp_path / "run").results)
    released.set()


def test_a_tracker_that_is_not_installed_is_named_before_anything_else(
    world, tmp_path, monkeypatch
):
    class Absent(Tracker):
        package = "no_such_package"

    monkeypatch.setitem(registry.TRACKERS, "absent", Absent)
    config = world.config()
    config.tracker = "absent"
    for command in (api.train_teacher, api.train, api.sweep, api.run):
        message = fault_of(command, config, tmp_path / "run")
        assert "needs the package no_such_package: install the extra" in message
    assert not (tmp_path / "run").exists()
