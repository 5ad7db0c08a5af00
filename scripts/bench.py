"""Benchmarks, each measuring what it compares in the same run on the same machine.

    python scripts/bench.py NAME [--json FILE] [--profile DIR]

    train_step   a train step against a plain PyTorch student (needs the extra `torch`)
    table_size   a train step at ten million table rows against one at a hundred thousand
    metrics      train steps that measure norms and shares against the same without
    pipeline     train steps with the loader against steps on a resident batch
    from_disk    train steps with batches from files against batches from memory
    checkpoint   the time that a training waits for a checkpoint against that until it is whole
    log_build    a dataset of a log of `make_log.py` against plain DuckDB on the same threads
    log_day      one of 30 files of such a log added to a dataset against a build of all files
    scoring      one request of 2,000 candidates, the student against the teacher
    serving      the same by exported programs (needs the extra `onnx`)
    sweep        16 runs as one sweep against as many runs of `experiments.train`
    layout       ways of updating the tables of a population within one program
    growth       time and memory against members, candidates, tasks, rows and test requests
    film_search  the rankers of film search, in microseconds per candidate
    compilers    the project's programs, compiled for TPUs and H100s that are not here
    device       those that measure, and more: the first command on a device never measured

`docs/benchmarks.md` holds what they measured and what bounds it. `--profile` keeps a trace of the
measurement for TensorBoard or Perfetto.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NAMES = (
    "train_step",
    "table_size",
    "metrics",
    "pipeline",
    "from_disk",
    "checkpoint",
    "log_build",
    "log_day",
    "scoring",
    "serving",
    "sweep",
    "layout",
    "growth",
    "compilers",
    "film_search",
    "device",
)
# As scripts/run.sh sets it: memory in pages of 2 MiB. With small ones, a step over a large table
# waits for where its rows lie as well as for the rows.
HUGE_PAGES = "glibc.malloc.hugetlb=1"
PACKAGES = ("kd_ranker", "jax", "jaxlib", "torch")


def main() -> None:
    """Runs one benchmark, prints what it found, and writes it where `--json` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--profile", help="a folder for a trace by jax.profiler")
    parser.add_argument("--runs", type=int, default=16, help="sweep and layout: how many")
    parser.add_argument("--steps", type=int, help="sweep: instead of the config's train.steps")
    parser.add_argument(
        "--rows", type=int, default=4_000_000, help="log_build, log_day: of the log"
    )
    parser.add_argument("--data", help="film_search: the folder of the raw files")
    parser.add_argument("--data-dir", help="film_search: with a dataset made of them")
    parser.add_argument("--benchmarks", nargs="+", choices=NAMES[:-1], help="device: these alone")
    arguments = parser.parse_args()
    if os.environ.setdefault("GLIBC_TUNABLES", HUGE_PAGES) == HUGE_PAGES and not started_with_it():
        os.execv(sys.executable, [sys.executable, *sys.argv])
    import jax  # once, and not before the process starts again

    benchmark = importlib.import_module(f"scripts.benchmarks.{arguments.name}")
    profile = jax.profiler.trace(arguments.profile) if arguments.profile else None
    with profile or contextlib.nullcontext():
        measured = benchmark.run(arguments)
    result = {"name": arguments.name, **measured, "device": device(), "versions": versions()}
    result["environment"] = {"GLIBC_TUNABLES": os.environ["GLIBC_TUNABLES"]}
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def started_with_it() -> bool:
    """Whether the C library has read this environment, which it does when a process starts."""
    started_with = Path("/proc/self/environ")
    return not started_with.exists() or HUGE_PAGES.encode() in started_with.read_bytes()


def device() -> str:
    """What the numbers were measured on."""
    import jax

    kind = jax.devices()[0].device_kind
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    return machine if kind == "cpu" else f"{kind}, {machine}"


def versions() -> dict[str, str]:
    """The releases that matter, of those that are installed."""
    releases = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            releases[name] = metadata.version(name)
    return releases


if __name__ == "__main__":
    main()
