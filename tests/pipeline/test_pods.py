"""The parts of hosts that are not there, by hand and against arrays on devices that are."""

import jax
import numpy as np
import pytest

from kd_ranker.configs import cascade
from kd_ranker.errors import UserError
from kd_ranker.pipeline import ahead, pods
from kd_ranker.training import recipes
from kd_ranker.training.mapping import shard_map, share_of
from kd_ranker.training.placing import first_devices
from kd_ranker.training.state import Frozen
from tests import small
from tests.random_batches import random_items


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    config = cascade("small")
    config.data.dir = str(tmp_path_factory.mktemp("none"))
    return ahead.sizes_of(config, tmp_path_factory.mktemp("sample"))


def config_of(**changes):
    config = cascade("small")
    config.update_from_flattened_dict(
        {"teacher.source": "logged", "distill.mode": "shared"}
        | {key.replace("__", "."): value for key, value in changes.items()}
    )
    return config


def test_sixteen_chips_on_four_hosts(sizes):
    config = config_of(
        batch__requests=256, teacher__batch__requests=256, parallel__tables="sharded"
    )
    planned = pods.plan("train", config, sizes, "v5e:4x4", hosts=4)
    assert planned.mesh.tolist() == [[0] * 4 + [1] * 4 + [2] * 4 + [3] * 4]
    assert [host.devices for host in planned.hosts] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15],
    ]  # fmt: skip
    assert [host.share for host in planned.hosts] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [host.dealt for host in planned.hosts] == [host.devices for host in planned.hosts]
    told = pods.lines(planned, ["--config=my config.py"])
    assert told[0] == (
        "train: 16 devices of v5e:4x4 on 4 hosts, as a mesh of 1 × 16, members × requests"
    )
    rows = [[cell.strip() for cell in line.split("  ") if cell] for line in told[1].splitlines()]
    assert rows[0] == [
        "host",
        "devices",
        "requests of a batch",
        "rows of tables",
        "members",
        "writes",
    ]
    assert rows[2] == [
        "0", "0-3", "0-63 of 256, 16 a device", "r with r mod 16 in 0-3, one a device", "the one",
        "all files, and speaks",
    ]  # fmt: skip
    assert rows[5] == [
        "3", "12-15", "192-255 of 256, 16 a device", "r with r mod 16 in 12-15, one a device",
        "the one", "nothing",
    ]  # fmt: skip
    assert told[-2:] == [
        "each starts:",
        "  .venv/bin/python -m experiments.train '--config=my config.py' "
        "--config.parallel.processes=True --workdir=WORKDIR",
    ]


def test_without_a_number_a_host_has_four_tpus_and_a_topology_of_cards_is_one_host(sizes):
    config = config_of(batch__requests=64, teacher__batch__requests=64)
    for topology, hosts in (("v5e:4x4", 4), ("v5e:2x2", 1), ("v5e:1x1", 1), ("h100:8", 1)):
        assert len(pods.plan("train", config, sizes, topology).hosts) == hosts
    two = pods.plan("train", config, sizes, "h100:8", hosts=2)
    assert two.mesh.size == 16
    assert [host.dealt for host in two.hosts] == [None, None]
    first, second = pods.lines(two, [])[-2:]
    assert first.strip().startswith(
        "JAX_COORDINATOR_ADDRESS=HOST_0:PORT JAX_NUM_PROCESSES=2 JAX_PR"
    )
    assert second == first.replace("JAX_PROCESS_ID=0", "JAX_PROCESS_ID=1")


def test_members_of_a_sweep_are_spread_over_hosts(sizes):
    """Four members of one group on eight devices: each host trains two, on two devices each."""
    config = config_of(sweep__modes=("none",), sweep__seeds=(0, 1, 2, 3), batch__requests=8)
    config.teacher.batch.requests = 8
    planned = pods.plan("sweep", config, sizes, "v5e:2x4")
    assert planned.mesh.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert [host.members for host in planned.hosts] == [
        ["none-seed0", "none-seed1"], ["none-seed2", "none-seed3"],
    ]  # fmt: skip
    assert [host.share for host in planned.hosts] == [(0, 1), (0, 1)]


@pytest.mark.parametrize("tables", ["replicated", "sharded"])
def test_a_device_holds_the_bytes_that_are_told(sizes, tables):
    config = config_of(
        batch__requests=8, teacher__batch__requests=8, parallel__tables=tables,
        parallel__mapping="shard_map",
    )  # fmt: skip
    told = pods.plan("train", config, sizes, "v5e:2x4")
    (group,) = recipes.student_groups({"": config}, sizes.spec)
    states = (group.init(),)
    assert told.saved == sum(leaf.nbytes for leaf in jax.tree.leaves(states))
    devices = shard_map(jax.devices()[:8], sharded=tables == "sharded")
    frozen = Frozen(random_items(spec=sizes.spec), None)
    held = jax.tree.leaves((devices.place(states), devices.hold(frozen)))
    third = [leaf.addressable_shards[3].data for leaf in held]
    assert told.held == sum(leaf.nbytes for leaf in third)


@pytest.mark.parametrize(
    ("topology", "hosts", "changes", "fault"),
    [
        ("v5e:4x4", 3, {}, "v5e:4x4 has 16 devices, which 3 hosts cannot share alike"),
        ("v5e:3x3", 0, {}, "topology='v5e:3x3'"),
        ("v5e:4x4", 4, {"batch__requests": 24}, "batch.requests=24 cannot be shared by 16 devices"),
        ("v5e:4x4", 4, {"parallel__devices": 8}, "parallel.devices=8 with parallel.processes"),
        ("v5e:4x4", 4, {"parallel__mapping": "pmap"}, "cannot do parallel.processes"),
    ],
)
def test_a_run_that_would_not_start_is_refused_as_it_would_be(
    sizes, topology, hosts, changes, fault
):
    config = config_of(**{"batch__requests": 64, "teacher__batch__requests": 64} | changes)
    with pytest.raises(UserError) as caught:
        pods.plan("train", config, sizes, topology, hosts)
    assert fault in str(caught.value)


def test_a_process_makes_the_requests_of_its_own_devices():
    of_hosts = np.array([[0, 0, 1, 1], [2, 2, 3, 3]])
    assert [share_of(of_hosts, host) for host in range(4)] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert share_of(np.array([[0, 0], [0, 0], [1, 1]]), 1) == (0, 1)
    for mesh in (
        [[0, 0, 1, 1, 0, 0, 1, 1]],  # as a pod of TPUs numbers its chips
        [[0, 0, 0, 0, 1, 1], [1, 1, 2, 2, 2, 2]],
        [[0, 1, 1, 1]],
    ):
        for process in (0, 1):  # all are told
            with pytest.raises(UserError, match="which are no run of its own"):
                share_of(np.array(mesh), process)


def test_devices_of_a_process_lie_beside_each_other(monkeypatch):
    class Chip:
        def __init__(self, number, process):
            self.number, self.process_index = number, process

    chips = [Chip(number, process) for number, process in enumerate((0, 0, 1, 1, 0, 0, 1, 1))]
    monkeypatch.setattr(jax, "devices", lambda: chips)
    assert [chip.number for chip in first_devices(0)] == [0, 1, 4, 5, 2, 3, 6, 7]
    assert [chip.number for chip in first_devices(3)] == [0, 1, 4]


def test_the_script_tells_without_compilers(tmp_path):
    ended = small.run(
        "scripts/compile_for.py", "--dry_run", "--topology=v5e:4x4", "--hosts=2", small.CONFIG,
        "--config.batch.requests=256", "--config.teacher.batch.requests=32",
        f"--config.data.dir={tmp_path}", "--config.teacher.source=logged",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "train: 16 devices of v5e:4x4 on 2 hosts" in ended.stdout
    assert "--config.batch.requests=256 " in ended.stdout.splitlines()[-1]
    assert "--topology" not in ended.stdout
