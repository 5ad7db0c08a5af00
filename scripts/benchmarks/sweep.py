"""16 runs under a live teacher: one sweep against as many runs of `experiments.train`.

Each run is a process of its own, start-up and compilation included.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_ranker.configs import cascade
from kd_ranker.pipeline.job import open_job
from scripts.benchmarks import measuring
from scripts.benchmarks.programs import Program, first_batch

ROOT = Path(__file__).resolve().parent.parent.parent
BAR = 0.25


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Wall time of one sweep over that of its runs trained one by one."""
    config = cascade()
    weights = np.geomspace(0.1, 10, arguments.runs).round(3).tolist()
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--config.data.dir={folder}/datasets"]
        if arguments.steps:
            flags.append(f"--config.train.steps={arguments.steps}")
            config.train.steps = arguments.steps
        entry_point("prepare_data", flags)
        entry_point("train_teacher", [*flags, f"--workdir={folder}/teacher"])
        flags.append(f"--config.teacher.workdir={folder}/teacher")
        config.data.dir, config.teacher.workdir = f"{folder}/datasets", f"{folder}/teacher"

        def train(weight: float) -> float:
            workdir = f"--workdir={folder}/train-{weight}"
            return entry_point("train", [*flags, workdir, f"--config.distill.weight={weight}"])

        half = len(weights) // 2
        first = [train(weight) for weight in weights[:half]]
        sweep = entry_point("sweep", [
            *flags, f"--workdir={folder}/sweep", "--config.sweep.modes=('shared',)",
            f"--config.sweep.weights={tuple(weights)}",
        ])  # fmt: skip
        # Around the sweep, so that a machine that slows down slows both.
        runs = [*first, *(train(weight) for weight in weights[half:])]
        floor = steps_and_floor(config, arguments.runs)
    ratio = sweep / sum(runs)
    return {
        "ratio": ratio,
        "bar": BAR,
        "passed": ratio <= BAR,
        "seconds": {
            "sweep": sweep,
            "runs": sum(runs),
            "one run": {"median": statistics.median(runs), "min": min(runs), "max": max(runs)},
        },
        "steps": config.train.steps,
        "runs": arguments.runs,
        "floor": floor,
    }


def steps_and_floor(config: Any, runs: int) -> dict[str, Any]:
    """Steps on a resident batch, and what they would take at the machine's best rates.

    `ratio` is that of the operations: one teacher pass and the runs' updates over as many
    teacher passes and updates. Bytes are those of the rows that the runs' item tables must have
    read and written, once each way. XLA counts the body of the loop that updates tables once, so
    the few operations in there are left out.
    """
    job = open_job(config, {"": config})
    teacher, dataset = job.teacher, job.dataset
    assert teacher is not None
    batch = first_batch(config, dataset)

    def program(number: int, live: bool) -> Program:
        names = {str(run): config for run in range(number)}
        return Program(names, dataset.spec, dataset.items, batch, teacher if live else None)

    one, alone, together = program(1, True), program(1, False), program(runs, True)
    milliseconds = measuring.interleaved(
        {"one run": one.step, "one without teacher": alone.step, "all runs": together.step}
    )
    ids = batch.item_id.size
    of_all, of_one = (milliseconds[name]["median"] for name in ("all runs", "one run"))
    return {
        "ratio": together.flops / (runs * one.flops),
        "ratio of steps": of_all / (runs * of_one),
        "steps, ms": milliseconds,
        "step of all runs": measuring.floor(
            together.flops, 2 * ids * together.row_bytes("item"), of_all
        ),
        "flops of one run": {"with teacher": one.flops, "without": alone.flops},
    }


def entry_point(name: str, flags: Sequence[str]) -> float:
    """Runs an entry point; the seconds it took."""
    start = time.perf_counter()
    command = [sys.executable, "-m", f"experiments.{name}", "--config=configs/cascade.py", *flags]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(finished.stderr)
    seconds = time.perf_counter() - start
    print(f"{name}: {seconds:.1f} s", file=sys.stderr)
    return seconds
