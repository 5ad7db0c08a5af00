"""MLflow and Weights & Biases themselves, see scripts/test_trackers.sh: what their stores hold."""

import json
import struct
from pathlib import Path

import pytest

from kd_ranker import api
from kd_ranker.errors import UserError
from kd_ranker.tracking.registry import TRACKERS
from kd_ranker.training import workdir as workdirs
from tests import small
from tests.tracking.recorded import TRACKED

SWEEP = {
    "sweep__modes": ("none", "shared"),
    "sweep__seeds": (0,),
    "train__steps": 6,
    "train__log_every": 2,
    "train__eval_every": 0,
}
NAMES = {"none-seed0", "shared-weight1.0-seed0"}


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """The package, with a store of this test."""
    package = pytest.importorskip("mlflow", reason="scripts/test_trackers.sh has MLflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # where it keeps artifacts
    return package


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The package, offline and with a folder of this test."""
    package = pytest.importorskip("wandb", reason="scripts/test_trackers.sh has W&B")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    yield package
    package.teardown()


def lines_of(folder: Path, name: str, run: str) -> list[tuple[int, float]]:
    """The steps and values of a run's scalar in `metrics.jsonl`."""
    lines = workdirs.read_metrics(folder / workdirs.METRICS_FILE)
    return [(line["step"], line[f"{name}/{run}"]) for line in lines]


def runs_in(mlflow) -> dict:
    """MLflow's runs by their names."""
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("kd_ranker")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def history_in(mlflow, run, name: str) -> list[tuple[int, float]]:
    """Steps and values of a metric, in the order of the steps."""
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, name)
    return sorted((metric.step, metric.value) for metric in history)


def test_mlflow_has_a_sweep_with_its_runs_below_it(world, tmp_path, mlflow):
    config = world.config(**SWEEP)
    config.tracker = "mlflow"
    workdir = tmp_path / "run"
    small.sweep(config, workdir)
    runs = runs_in(mlflow)
    assert {*runs} == {str(workdir), *NAMES}
    parent = runs.pop(str(workdir))
    assert parent.data.params["sweep.seeds"] == "[0]"
    client = mlflow.MlflowClient()
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"config.json", "results.csv"}
    copied = Path(client.download_artifacts(parent.info.run_id, "results.csv"))
    assert copied.read_bytes() == (workdir / "results.csv").read_bytes()
    for name, run in runs.items():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
        assert run.data.params["distill.mode"] == name.split("-")[0]
        assert "sweep.seeds" not in run.data.params
        assert history_in(mlflow, run, "loss") == lines_of(workdir / "cohorts/0", "loss", name)
        assert "speed/steps" in run.data.metrics
        assert "validation/user/value_captured_30" in run.data.metrics


def test_a_resumed_run_continues_in_mlflow_and_repeats_no_step(tmp_path, mlflow):
    for step in (0, 2):
        tracker = TRACKERS["mlflow"]()
        # `train.log_every` may change, and MLflow keeps parameters as they were.
        tracker.start(TRACKED._replace(config={"train.log_every": step}))
        tracker.begin(tmp_path, step)
        for later in (1, 2, 3, 4):
            # Killed after step 3, resumed from a checkpoint after step 2.
            if step < later <= step + 3:
                tracker.write(later, {"loss/aux": float(later), "loss/none/1": 0.0})
        if step == 2:
            tracker.close(True)
    runs = runs_in(mlflow)
    assert {*runs} == {"runs/small", "aux", "none/1"}
    assert runs["runs/small"].data.params == {"train.log_every": "0"}
    assert history_in(mlflow, runs["aux"], "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_mlflow_is_told_when_a_run_did_not_finish(tmp_path, mlflow):
    tracker = TRACKERS["mlflow"]()
    tracker.start(TRACKED)
    tracker.close(False)
    assert runs_in(mlflow)["runs/small"].info.status == "KILLED"


def test_another_part_of_a_sweep_finds_its_page_in_mlflow(tmp_path, mlflow):
    whole = TRACKERS["mlflow"]()
    whole.start(TRACKED)
    part = TRACKERS["mlflow"]()
    part.start(TRACKED._replace(is_part=True))
    part.begin(tmp_path, 0)
    part.write(1, {"loss/aux": 1.0})
    part.close(True)
    runs = runs_in(mlflow)
    assert runs["aux"].data.tags["mlflow.parentRunId"] == runs["runs/small"].info.run_id
    assert runs["runs/small"].info.status == "RUNNING"


def records_in(path: Path, record_type) -> list:
    """The records of a file of W&B: LevelDB's log format after a header."""
    content, position, parts, records = path.read_bytes(), 7, b"", []
    while position < len(content):
        left = 2**15 - position % 2**15
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", content[position : position + 7])
        part = content[position + 7 : position + 7 + size]
        position += 7 + size
        parts = part if kind in (1, 2) else parts + part
        if kind in (1, 4):
            record = record_type()
            record.ParseFromString(parts)
            records.append(record)
    return records


def runs_of_wandb(folder: Path) -> dict[str, list]:
    """The records of each offline run by its name."""
    from wandb.proto import wandb_internal_pb2

    runs = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        records = records_in(path, wandb_internal_pb2.Record)
        (name,) = [record.run.display_name for record in records if record.HasField("run")]
        runs[name] = records
    return runs


def history_of(records) -> dict[int, dict]:
    """The scalars of a run by their steps."""
    rows = [record.history for record in records if record.HasField("history")]
    return {
        row.step.num: {
            ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item
        }
        for row in rows
    }


def summary_of(records) -> dict:
    """The last values of a run's summary."""
    updates = [record.summary.update for record in records if record.HasField("summary")]
    return {
        ".".join(item.nested_key) or item.key: json.loads(item.value_json)
        for update in updates
        for item in update
    }


def test_wandb_has_a_sweep_as_a_group_of_runs(world, tmp_path, wandb):
    config = world.config(**SWEEP)
    config.tracker = "wandb"
    workdir = tmp_path / "run"
    small.sweep(config, workdir)
    runs = runs_of_wandb(tmp_path)
    assert {*runs} == {str(workdir), *NAMES}
    started = {
        name: next(record.run for record in records if record.HasField("run"))
        for name, records in runs.items()
    }
    workdir_id = json.loads((workdir / "tracked.json").read_text())["id"]
    assert {run.run_group for run in started.values()} == {f"{workdir} {workdir_id}"}
    assert all(run.run_id.startswith(workdir_id) for run in started.values())
    assert {run.job_type for run in started.values()} == {"sweep", "run"}
    (artifact,) = [record.artifact for record in runs[str(workdir)] if record.HasField("artifact")]
    assert {file.path for file in artifact.manifest.contents} == {"config.json", "results.csv"}
    for name in NAMES:
        configured = {
            ".".join(item.nested_key) or item.key: item.value_json
            for item in started[name].config.update
        }
        assert json.loads(configured["distill"])["mode"] == name.split("-")[0]
        history = history_of(runs[name])
        losses = [(step, row["loss"]) for step, row in sorted(history.items())]
        assert losses == lines_of(workdir / "cohorts/0", "loss", name)
        assert "speed/steps" in history[6]
        assert "validation/user/value_captured@30" in summary_of(runs[name])
        (end,) = [record.exit for record in runs[name] if record.HasField("exit")]
        assert end.exit_code == 0


def test_a_resumed_run_keeps_its_id_in_wandb(tmp_path, wandb):
    for step in (1, 2):
        tracker = TRACKERS["wandb"]()
        tracker.start(TRACKED._replace(command="train", runs={}, config={"train": step}))
        tracker.begin(tmp_path, step)
        tracker.write(step, {"loss": float(step)})
        tracker.close(step == 2)
    paths = [*tmp_path.glob("wandb/offline-run-*/*.wandb")]
    assert {path.name for path in paths} == {f"run-{TRACKED.id}.wandb"}
    assert len(paths) == 2  # which `wandb sync` joins


def test_wandb_without_a_key_says_so_and_asks_nothing(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))  # where the key would be
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="run `wandb login`, or set WANDB_MODE=offline"):
        TRACKERS["wandb"]().start(TRACKED)


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_server_that_is_down_ends_no_run(world, tmp_path, name, monkeypatch, request):
    request.getfixturevalue(name)
    port = small.free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://localhost:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://localhost:{port}")
    monkeypatch.setattr("kd_ranker.tracking.background._SECONDS_TO_END", 0.0)
    monkeypatch.setattr("kd_ranker.tracking.wandb._SECONDS_TO_ANSWER", 1.0)
    config = world.config(distill__mode="none", train__steps=4)
    config.tracker = name
    assert len(api.train(config, tmp_path / "run").results)
