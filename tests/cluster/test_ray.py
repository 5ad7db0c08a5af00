"""Commands on a cluster of two nodes, against the same ones here."""

import json
import threading
import time

import pytest

from kd_ranker import api
from kd_ranker.cohorts.plan import FOLDER
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from tests import small

ray = pytest.importorskip("ray", reason="ray is not installed; scripts/test_cluster.sh does it")
from ray.cluster_utils import Cluster  # noqa: E402

CHANGES = {
    "sweep__modes": ("none", "aux"),
    "sweep__seeds": (0, 1),
    "sweep__cohort_size": 1,
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
