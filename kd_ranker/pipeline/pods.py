"""A run of several hosts before any is paid for: for each of them, what it would hold and do."""

import math
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding
from jaxtyping import Int
from ml_collections import ConfigDict
from tabulate import tabulate

from kd_ranker.batch import WHOLE, Deal, abstract_items
from kd_ranker.batches.training import Share
from kd_ranker.config import checks
from kd_ranker.errors import UserError, check_choice
from kd_ranker.pipeline import ahead, runs, topologies
from kd_ranker.training.mapping import having_members, share_of, shared_evenly
from kd_ranker.training.placing import AXIS, MEMBERS, dealt_shapes, specs_of
from kd_ranker.training.run import abstract_states
from kd_ranker.training.state import Frozen

_TPUS_OF_A_HOST = 4
_NAMES = 2  # of members, that a line tells


class Host(NamedTuple):
    """The part of one host, and of the process on it.

    Attributes:
      number: of its process.
      devices: the numbers of its devices, of all in the order of hosts.
      share: the part of each batch that it makes.
      members: the names of the members that its devices train.
      dealt: the remainders of the rows that its devices hold; None where each device holds all.
    """

    number: int
    devices: Sequence[int]
    share: Share
    members: Sequence[str]
    dealt: Sequence[int] | None


class Plan(NamedTuple):
    """A run of several hosts.

    Attributes:
      program: one of `ahead.TRAINING`.
      topology: one of `topologies.names`.
      mesh: the host of each device.
      requests: of a batch.
      hosts: the part of each.
      held: bytes that a device holds of states, items and the live teacher's parameters, without
        what the layout adds.
      saved: bytes of the states of all members, which a checkpoint holds.
    """

    program: str
    topology: str
    mesh: Int[np.ndarray, "members sharing"]
    requests: int
    hosts: Sequence[Host]
    held: int
    saved: int


def plan(
    program: str, config: ConfigDict, sizes: ahead.Sizes, topology: str, hosts: int = 0
) -> Plan:
    """The run of a program by one process a host.

    Neither the devices nor their compilers need be there.

    Args:
      program: one of `ahead.TRAINING`.
      config: that of the experiment.
      sizes: of its dataset.
      topology: one of `topologies.names`: a pod of TPUs, or the cards of each host.
      hosts: their number; 0 takes four TPUs a host, and one host of cards.

    Raises:
      UserError: there is no such topology, its devices cannot be shared by so many hosts, or the
        config does not fit them.
    """
    check_choice("program", program, ahead.TRAINING)
    check_choice("topology", topology, topologies.names())
    devices = topologies.chips_of(topology)
    is_pod = topologies.platform_of(topology) == "tpu"
    hosts = hosts or (-(-devices // _TPUS_OF_A_HOST) if is_pod else 1)
    devices *= 1 if is_pod else hosts
    if devices % hosts:
        raise UserError(f"{topology} has {devices} devices, which {hosts} hosts cannot share alike")
    config = config.copy_and_resolve_references()
    config.parallel.processes = True
    checks.validate(config, devices)
    if program == "train":
        checks.check_alone(config, devices)
    trained = ahead.trained_by(program, config, sizes.spec)
    requests = trained.section.batch.requests
    groups = [len(group.names) for group in trained.groups]
    members = runs.devices_of_members(config, groups, requests, devices)
    mesh = np.repeat(np.arange(hosts), devices // hosts).reshape(members, -1)
    sharing = mesh.shape[1]
    deal = WHOLE
    if config.parallel.tables == "sharded" and sharing > 1:
        deal = Deal(sharing, AXIS)
    return Plan(
        program=program,
        topology=topology,
        mesh=mesh,
        requests=requests,
        hosts=[_host(number, mesh, trained.groups, deal) for number in range(hosts)],
        held=_bytes_held(trained, sizes, topologies.platform_of(topology), members, deal),
        saved=_bytes(abstract_states(trained.groups)),
    )


def _host(number: int, mesh: np.ndarray, groups: Sequence[Any], deal: Deal) -> Host:
    rows, columns = np.nonzero(mesh == number)
    members = len(mesh)
    names = [
        group.names[place]
        for group in groups
        for row in np.unique(rows)
        for place in np.split(shared_evenly(len(group.names), members), members)[row]
    ]
    return Host(
        number=number,
        devices=np.flatnonzero(mesh == number).tolist(),
        share=share_of(mesh, number),
        members=list(dict.fromkeys(names)),
        dealt=None if deal == WHOLE else np.unique(columns).tolist(),
    )


def _bytes_held(
    trained: ahead.Trained, sizes: ahead.Sizes, platform: str, members: int, deal: Deal
) -> int:
    """Bytes that a device holds from step to step."""
    mesh = AbstractMesh((members, deal.devices), (MEMBERS, AXIS))
    learned = trained.teacher(platform)[1] if trained.teacher else None
    frozen = Frozen(items=abstract_items(sizes.spec), teacher=learned)
    filled = [group.at(shared_evenly(len(group.names), members)) for group in trained.groups]
    states = abstract_states(filled)

    def of_device(tree: Any, has_members: Any = False) -> int:
        shapes = dealt_shapes(tree, deal)
        specs = specs_of(members, deal, shapes, has_members)
        shares = jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                NamedSharding(mesh, spec).shard_shape(leaf.shape), leaf.dtype
            ),
            shapes,
            specs,
        )
        return _bytes(shares)

    return of_device(states, having_members(states)) + of_device(frozen)


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def lines(planned: Plan, flags: Sequence[str]) -> list[str]:
    """The lines that tell of a plan.

    Args:
      planned: the plan.
      flags: those of the run, `--config` and its overrides.
    """
    members, sharing = planned.mesh.shape
    command = " ".join(
        [f".venv/bin/python -m experiments.{planned.program}", *map(shlex.quote, flags)]
    )
    command = f"{command} --config.parallel.processes=True --workdir=WORKDIR"
    hosts, spread = len(planned.hosts), f"{members} × {sharing}, members × requests"
    table = [_line(planned, host) for host in planned.hosts]
    told = [
        f"{planned.program}: {planned.mesh.size} devices of {planned.topology} on {hosts} hosts, "
        f"as a mesh of {spread}",
        tabulate(table, headers="keys", disable_numparse=True),
        f"a device holds {_mib(planned.held)} MiB of state, items and live teacher from step to "
        "step; its compiler tells what a step takes beside it",
        f"a checkpoint holds {_mib(planned.saved)} MiB, which the memory of each host has to hold "
        "while it is made",
        "all see the same dataset and WORKDIR, and none reads the requests of the others",
    ]
    if topologies.platform_of(planned.topology) == "tpu":
        return [*told, "each starts:", f"  {command}"]
    variables = f"JAX_COORDINATOR_ADDRESS=HOST_0:PORT JAX_NUM_PROCESSES={hosts} JAX_PROCESS_ID="
    starts = [f"  {variables}{host.number} {command}" for host in planned.hosts]
    return [*told, "they start, where neither Slurm nor another launcher sets these:", *starts]


def _line(planned: Plan, host: Host) -> dict[str, str]:
    number, sharing = planned.requests // host.share.parts, planned.mesh.shape[1]
    start = host.share.part * number
    held = "all, on each"
    if host.dealt is not None:
        held = f"r with r mod {sharing} in {_run(host.dealt)}, one a device"
    return {
        "host": str(host.number),
        "devices": _run(host.devices),
        "requests of a batch": (
            f"{_run(range(start, start + number))} of {planned.requests}, "
            f"{planned.requests // sharing} a device"
        ),
        "rows of tables": held,
        "members": _few(host.members) or "the one",
        "writes": "all files, and speaks" if host.number == 0 else "nothing",
    }


def _few(names: Sequence[str]) -> str:
    more = len(names) - _NAMES
    return ", ".join([*names[:_NAMES], *([f"{more} more"] if more > 0 else [])])


def _run(numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return str(first) if first == last else f"{first}-{last}"


def _mib(number: int) -> str:
    return f"{number / 2**20:,.0f}"
