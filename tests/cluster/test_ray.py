"""Commands on a cluster of two nodes, against the same ones here."""

import json
import shutil
import threading
import time

import pytest

from kd_ranker import api
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.pipeline import datasets, scoring
from kd_ranker.sources.logs import ordered
from kd_ranker.sweep.sweep import FOLDER
from tests import small
from tests.pipeline import test_score

ray = pytest.importorskip("ray", reason="ray is not installed; scripts/test_cluster.sh does it")
from ray.cluster_utils import Cluster  # noqa: E402

CHANGES = {
    "sweep__modes": ("none", "aux"),
    "sweep__seeds": (0, 1),
    "sweep__group_size": 1,
    "train__steps": 60,
    "train__checkpoint_every": 10,
    "train__eval_every": 0,
    "ray__cpus": 1,
}
TABLES = ("results.csv", "curves.csv", "calibration.csv")


@pytest.fixture
def cluster():
    """Two nodes beside a head that takes no tasks."""
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [started.add_node(num_cpus=1) for _ in range(2)]
    try:
        yield started, nodes
    finally:
        ray.shutdown()
        started.shutdown()


def config_of(world, cluster, **changes):
    return world.config(**CHANGES, launcher="ray", ray__address=cluster.address, **changes)


def test_a_sweep_whose_node_is_lost_ends_as_one_that_ran_here(world, cluster, tmp_path):
    expected = world.made("of_ray", lambda to: api.sweep(world.config(**CHANGES), to))
    started, nodes = cluster
    workdir = tmp_path / "sweep"
    lost = threading.Event()

    def lose_a_node():
        """Once cohorts train on both nodes."""
        while len(list(workdir.glob(f"{FOLDER}/*/metrics.jsonl"))) < 2:
            time.sleep(0.05)
        if not (workdir / results.FILE).exists():
            started.remove_node(nodes[0], allow_graceful=False)
            lost.set()

    killer = threading.Thread(target=lose_a_node, daemon=True)
    killer.start()
    assert small.sweep(config_of(world, started), workdir)
    killer.join(timeout=900)
    assert lost.is_set()
    for table in TABLES:
        assert (workdir / table).read_bytes() == (expected / table).read_bytes(), table
    assert not list(workdir.glob(f"{FOLDER}/*/damaged_checkpoints"))


def contents(folder, pattern):
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


def test_a_teacher_logs_the_bytes_that_it_logs_here_though_a_node_is_lost(
    world, cluster, tmp_path, monkeypatch
):
    dataset = datasets.dataset_of(world.config())
    copied = tmp_path / "requests" / dataset.directory.parent.name
    shutil.copytree(dataset.directory.parent, copied)
    monkeypatch.setattr(scoring, "_BATCHES", 1)  # six parts
    config = world.config(data__dir=str(tmp_path))
    directory = api.log_teacher(config).directory
    expected = contents(directory, "*")
    shutil.rmtree(directory)
    started, nodes = cluster
    lost = threading.Event()

    def lose_a_node():
        """Once a part is written; the others are not, since each machine has first to load JAX."""
        while not list(directory.glob(".scoring-*/parts/0*.parquet")):
            time.sleep(0.01)
        started.remove_node(nodes[0], allow_graceful=False)
        lost.set()

    threading.Thread(target=lose_a_node, daemon=True).start()
    on_ray = config_of(world, started, data__dir=str(tmp_path))
    assert api.log_teacher(on_ray).directory == directory
    assert lost.wait(timeout=900)
    assert contents(directory, "*") == expected


def test_a_log_gets_the_scores_that_it_gets_here(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(ordered, "PIECE", 40)
    world = test_score.make_world(tmp_path / "score")
    log = test_score.write_raw(tmp_path / "log", world.tested, files=2)
    config = test_score.config_for(world, "student", log)
    workdir = world.folder / "student"
    expected, _ = scoring.score_unseen(config, workdir, output=tmp_path / "here")
    config.launcher, config.ray.address = "ray", cluster[0].address
    found, _ = scoring.score_unseen(config, workdir, output=tmp_path / "there")
    assert len(contents(expected.directory, "*.parquet")) == 2
    for pattern in ("*.parquet", "scores.json"):
        assert contents(found.directory, pattern) == contents(expected.directory, pattern)


MY_LOSS = """
import jax.numpy as jnp

from kd_ranker import configs
from kd_ranker.distillation.losses import DEFAULT_NUMBERS, LOSSES, Loss, bce

def bce_of_the_sure(logits, probability, weight, numbers=DEFAULT_NUMBERS):
    is_sure = jnp.abs(probability - 0.5) > 0.4
    return bce(logits, probability, weight * is_sure, numbers)

LOSSES["bce_of_the_sure"] = Loss(bce_of_the_sure)

def get_config(variant=""):
    config = configs.cascade("small")
    config.distill.loss = "bce_of_the_sure"
    config.update_from_flattened_dict(CHANGES)
    return config
"""


def test_a_loss_of_a_config_file_is_known_on_the_machines(world, cluster, tmp_path):
    changes = world.changes(**CHANGES | {"train__steps": 10})
    file = tmp_path / "my_loss.py"
    file.write_text(MY_LOSS.replace("CHANGES", repr(changes)))
    on_ray = ["--config.launcher=ray", f"--config.ray.address={cluster[0].address}"]
    for workdir, flags in ((tmp_path / "here", []), (tmp_path / "there", on_ray)):
        ended = small.run(
            "-m", "experiments.sweep", f"--config={file}", f"--workdir={workdir}", *flags
        )
        assert ended.returncode == 0, ended.stderr
        assert "bce_of_the_sure" in (workdir / "results.csv").read_text()
    assert json.loads((workdir / "config.json").read_text())["registered_by"] == str(file)
    for table in TABLES:
        assert (tmp_path / "here" / table).read_bytes() == (workdir / table).read_bytes()


def test_resources_that_no_machine_has_are_a_line(world, cluster, tmp_path):
    config = config_of(world, cluster[0], ray__gpus=2)
    with pytest.raises(
        UserError, match=r"no machine of the cluster has ray\.cpus=1 and ray\.gpus=2"
    ):
        api.sweep(config, tmp_path / "sweep")


def test_a_cluster_that_is_not_there_is_a_line(world, tmp_path):
    config = world.config(**CHANGES, launcher="ray", ray__address="localhost:1")
    with pytest.raises(UserError, match=r"no cluster of Ray at ray\.address='localhost:1'"):
        api.sweep(config, tmp_path / "sweep")
