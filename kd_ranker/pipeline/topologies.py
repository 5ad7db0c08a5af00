"""Accelerators that exist for the compiler alone, and the figures of their chips.

A program that is lowered for such devices goes through the real compiler and can be read, but not
run. TPUs need the package `libtpu`, H100s `jax-cuda12-plugin`, `jax-cuda12-pjrt` and
`nvidia-cuda-nvcc-cu12`; `scripts/test_compilers.sh` installs both beside each other.
"""

import importlib.util
import itertools
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from kd_ranker.errors import UserError, check_choice


class Chip(NamedTuple):
    """The figures of a chip.

    Attributes:
      memory: bytes that its compiler lets a program have, a little less than its maker's page says.
      arithmetic: FLOPs a second of matrix products in bfloat16, from that page.
      shapes: the arrangements of chips that can be had.
      page: its maker's page.
    """

    memory: int
    arithmetic: float
    shapes: tuple[str, ...]
    page: str


_GIB = 2**30
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")

CHIPS: dict[str, Chip] = {
    "v5e": Chip(int(15.75 * _GIB), 197e12, _FLAT, "https://cloud.google.com/tpu/docs/v5e"),
    "v6e": Chip(int(31.25 * _GIB), 918e12, _FLAT, "https://cloud.google.com/tpu/docs/v6e"),
    "v5p": Chip(int(95.74 * _GIB), 459e12, _CUBES, "https://cloud.google.com/tpu/docs/v5p"),
    # The page's 1,979 TFLOPS are those of sparse matrices, twice those of dense ones.
    "h100": Chip(
        84_942_979_072,
        989e12,
        ("1", "2", "4", "8"),
        "https://www.nvidia.com/en-us/data-center/h100",
    ),
}
"""Chips by name. Of an H100, the SXM card, and the cards of one host."""

# What XLA asks of a card that is not there. Its names for the numbers are those of CUDA's device
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

# Read when libtpu is loaded: there is no machine to ask what it is, and no TPU to be alone with.
_NO_TPU_HOST = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

INSTALL = "./scripts/test_compilers.sh --setup"


class Topology(NamedTuple):
    """Devices for the compiler alone.

    Attributes:
      name: "v5e:4x4".
      chip: the figures of one.
      devices: to lower programs for; a v5p has one a chip, as JAX sees it.
      options: for `jax.stages.Lowered.compile`.
    """

    name: str
    chip: Chip
    devices: tuple[jax.Device, ...]
    options: Mapping[str, Any]


def names() -> list[str]:
    """The topologies that there are."""
    return [f"{name}:{shape}" for name, chip in CHIPS.items() for shape in chip.shapes]


def platform_of(name: str) -> str:
    """The platform of a topology's devices, as JAX calls it."""
    return "gpu" if name.startswith("h100") else "tpu"


def chips_of(name: str) -> int:
    """The number of devices of a topology.

    >>> chips_of("v5e:4x4")
    16
    """
    return math.prod(map(int, name.partition(":")[2].split("x")))


def missing_packages(topology: str) -> str:
    """The packages that a topology's compiler needs and that are not installed; "" if none are."""
    needed = (
        {"jax_plugins.xla_cuda12": "jax-cuda12-plugin", "nvidia.cuda_nvcc": "nvidia-cuda-nvcc-cu12"}
        if topology.startswith("h100")
        else {"libtpu": "libtpu"}
    )
    return ", ".join(package for module, package in needed.items() if not _is_installed(module))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would lie in
        return False


def open_topology(name: str) -> Topology:
    """The devices of a topology, one of `names`.

    Raises:
      UserError: there is no such topology, or its compiler is not installed.
    """
    check_choice("topology", name, names())
    if missing := missing_packages(name):
        raise UserError(f"topology={name} needs the packages {missing}; get them by: {INSTALL}")
    kind, _, shape = name.partition(":")
    open_devices = _h100s if kind == "h100" else _tpus
    devices, options = open_devices(kind, shape)
    return Topology(name, CHIPS[kind], tuple(devices), options)


def _tpus(kind: str, shape: str) -> tuple[list[jax.Device], dict[str, Any]]:
    for variable, value in _NO_TPU_HOST.items():
        os.environ.setdefault(variable, value)
    sizes = [int(size) for size in shape.split("x")]
    bounds = [size for size, _ in itertools.zip_longest(sizes, range(3), fillvalue=1)]
    described = topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{kind}:{'x'.join(map(str, bounds))}",
        chips_per_host_bounds=(*(min(size, 2) for size in bounds[:2]), 1),
    )
    assert len(described.devices) == math.prod(sizes)
    return described.devices, {}


def _h100s(kind: str, shape: str) -> tuple[list[jax.Device], dict[str, Any]]:
    described = topologies.get_topology_desc(
        platform="cuda", topology_name=kind, target_config=_H100, topology=f"1x1x{shape}"
    )
    found = importlib.util.find_spec("nvidia.cuda_nvcc")
    assert found is not None
    (toolkit, *_) = found.submodule_search_locations or [""]
    options = {
        # Nothing can be timed to choose among kernels.
        "xla_gpu_autotune_level": 0,
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_cuda_data_dir": toolkit,
    }
    return described.devices, options
