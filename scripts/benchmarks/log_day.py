"""The last of 30 files of a log of `make_log.py` added to a dataset, against a whole build."""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kd_ranker import api
from kd_ranker.configs import parquet
from scripts.benchmarks.log_build import MAKE_LOG, MEMORY

BAR, FILES, TURNS = 0.1, 30, 5


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both on one thread: the second build of the whole log, and the median of five days."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "log"
        flags = ["--rows", str(arguments.rows), "--files", str(FILES)]
        subprocess.run([sys.executable, MAKE_LOG, log, *flags], check=True, capture_output=True)
        _seconds(log, folder / "first")
        whole = _seconds(log, folder / "whole")
        last = max(log.iterdir()).rename(folder / "last.parquet")
        _seconds(log, folder / "before")
        last.rename(log / "zz.parquet")
        days = [
            _seconds(log, folder / f"after{turn}", str(folder / "before")) for turn in range(TURNS)
        ]
    ratio = statistics.median(days) / whole
    found = {"rows": arguments.rows, "seconds": {"whole": whole, "days": days}}
    return {**found, "ratio": ratio, "bar": BAR, "passed": ratio <= BAR}


def _seconds(log: Path, data_dir: Path, extends: str = "") -> float:
    config = parquet()
    config.data.path, config.data.dir, config.data.memory = str(log), str(data_dir), MEMORY
    config.data.extends, config.data.allow = extends, ("few_positives",)
    start = time.perf_counter()
    api.prepare(config)
    return time.perf_counter() - start
