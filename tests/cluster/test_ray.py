"""A sweep whose cohorts train on a cluster of two nodes, against the same sweep here."""

import threading
import time

import pytest

from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.pipeline import commands
from kd_ranker.sweep.sweep import FOLDER
from tests import small

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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small.open_world(tmp_path_factory)


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
    expected = world.made("of_ray", lambda to: commands.sweep(world.config(**CHANGES), to))
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
    assert commands.sweep(config_of(world, started), workdir)
    killer.join(timeout=60)
    assert lost.is_set()
    for table in TABLES:
        assert (workdir / table).read_bytes() == (expected / table).read_bytes(), table
    assert not list(workdir.glob(f"{FOLDER}/*/damaged_checkpoints"))


def test_resources_that_no_machine_has_are_a_line(world, cluster, tmp_path):
    config = config_of(world, cluster[0], ray__gpus=2)
    with pytest.raises(
        UserError, match=r"no machine of the cluster has ray\.cpus=1 and ray\.gpus=2"
    ):
        commands.sweep(config, tmp_path / "sweep")


def test_a_cluster_that_is_not_there_is_a_line(world, tmp_path):
    config = world.config(**CHANGES, launcher="ray", ray__address="localhost:1")
    with pytest.raises(UserError, match=r"no cluster of Ray at ray\.address='localhost:1'"):
        commands.sweep(config, tmp_path / "sweep")
