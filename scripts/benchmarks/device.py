"""What to measure first on a real device: the other benchmarks, and what compilers cannot say.

They know the memory and the cycles of a program. This asks for the bits first: whether steps taken
twice from the same state end alike, with and without `parallel.deterministic`. Then each of the
other benchmarks runs in a process of its own, which has the devices for itself; one that fails is
reported, and the next one is run.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from scripts.benchmarks.programs import Program
from scripts.benchmarks.sizes import Sizes

SCRIPT = Path(__file__).resolve().parent.parent / "bench.py"
OTHERS = (
    "layout", "train_step", "table_size", "scoring", "pipeline", "from_disk", "sweep"
)  # fmt: skip
STEPS = 20


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Asks for all of it; `passed` is true if every benchmark met its bar."""
    # Spawned, and so gone before the others start, which must find the devices free.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        checked: dict[str, Any] = {
            "same bits": {
                name: pool.apply(same_bits, (deterministic,))
                for name, deterministic in (("as it is", False), ("deterministic", True))
            },
            "memory": pool.apply(memory),
        }
    others = arguments.benchmarks or OTHERS
    results = {name: in_a_process(name, arguments) for name in others}
    passed = all(result.get("passed", False) for result in results.values())
    return {"passed": passed, **checked, "benchmarks": results}


def same_bits(deterministic: bool) -> bool:
    """Tests if some steps from the same state end in the same bits when they are taken again."""
    sizes = Sizes()
    ends = []
    for _ in range(2):
        program = Program(
            {"": sizes.config()},
            *(sizes.spec(), sizes.random_items(), sizes.batch()),
            deterministic=deterministic,
        )
        for _ in range(STEPS):
            program.step()
        ends.append(jax.device_get(jax.tree.leaves(program.states)))
    return all(one.tobytes() == other.tobytes() for one, other in zip(*ends, strict=True))


def memory() -> dict[str, dict[str, int] | None]:
    """The memory of each device, as far as it says."""
    return {str(device): device.memory_stats() for device in jax.local_devices()}


def in_a_process(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs a benchmark by its name; what it found, or the end of what it printed if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        flags = [f"--json={path}", f"--runs={arguments.runs}"]
        if arguments.steps:
            flags.append(f"--steps={arguments.steps}")
        finished = subprocess.run(
            [sys.executable, SCRIPT, name, *flags], capture_output=True, text=True, check=False
        )
        if finished.returncode or not path.exists():
            return {"failed": finished.stderr[-2000:]}
        return json.loads(path.read_text())
