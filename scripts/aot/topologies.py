"""Topologies of TPUs and H100s for which programs can be compiled without the chips.

`scripts/test_compilers.sh` installs the compilers.
"""

import importlib.util
import os
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from kd_ranker.errors import UserError, check_choice

_GIB = 2**30
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")

CHIPS: dict[str, tuple[int, tuple[str, ...]]] = {
    "v5e": (int(15.75 * _GIB), _FLAT),
    "v6e": (int(31.25 * _GIB), _FLAT),
    "v5p": (int(95.74 * _GIB), _CUBES),
    "h100": (84_942_979_072, ("1", "2", "4", "8")),
}
"""For each chip, the bytes that its compiler gives to a program, and the arrangements of chips.

An H100 is the SXM card, and its arrangements are the cards of one host.
"""

# The description of a card that XLA requires. Its names for the numbers are those of CUDA's device
# properties, for compute capability 9.0; see NVIDIA's Hopper tuning guide.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Libtpu reads these when it is loaded: there is no metadata server, and no TPU to lock.
_NO_TPU_HOST = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Topology(NamedTuple):
    """Devices for the compiler only, such as "v5e:4x4".

    A program may use `memory` bytes on one device. `options` are for `jax.stages.Lowered.compile`.
    """

    name: str
    memory: int
    devices: tuple[jax.Device, ...]
    options: Mapping[str, Any]


def topology_names() -> list[str]:
    """Return the names of all topologies."""
    return [f"{name}:{shape}" for name, (_, shapes) in CHIPS.items() for shape in shapes]


def missing_packages(topology: str) -> str:
    """Return the packages that a topology's compiler needs and that are not installed."""
    of_cuda = ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")
    needed = of_cuda if topology.startswith("h100") else ("libtpu",)
    return ", ".join(name for name in needed if not [*metadata.distributions(name=name)])


def open_topology(name: str) -> Topology:
    """Return the devices of a topology, one of `topology_names`.

    Raises:
      UserError: there is no such topology, or its compiler is not installed.
    """
    check_choice("topology", name, topology_names())
    if missing := missing_packages(name):
        setup = "./scripts/test_compilers.sh --setup"
        raise UserError(f"topology={name} needs the packages {missing}; install them with: {setup}")
    kind, _, shape = name.partition(":")
    options: dict[str, Any] = {}
    if kind == "h100":
        described = topologies.get_topology_desc(
            platform="cuda", topology_name=kind, target_config=_H100, topology=f"1x1x{shape}"
        )
        found = importlib.util.find_spec("nvidia.cuda_nvcc")
        (toolkit, *_) = (found and found.submodule_search_locations) or [""]
        # No card is there to time kernels on.
        options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
        options["xla_gpu_cuda_data_dir"] = toolkit
    else:
        for variable, value in _NO_TPU_HOST.items():
            os.environ.setdefault(variable, value)
        rows, columns, depth = map(int, f"{shape}x1".split("x")[:3])
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{kind}:{rows}x{columns}x{depth}",
            chips_per_host_bounds=(min(rows, 2), min(columns, 2), 1),
        )
    # A v5p has one device per chip, as JAX sees it.
    return Topology(name, CHIPS[kind][0], tuple(described.devices), options)
