"""Trains the students of config.sweep.

For example:

    python -m experiments.sweep --config=configs/sweeps/cascade.py --workdir=runs/sweep
"""

from pathlib import Path

from ml_collections import ConfigDict

from kd_ranker.pipeline import commands
from kd_ranker.pipeline.launch import launch
from kd_ranker.report.tables import results_text


def main(config: ConfigDict, workdir: Path) -> None:
    if not commands.sweep(config, workdir):
        print(f"the sweep in {workdir} is complete; there is nothing to do")
    lines = commands.sweep_lines(config, workdir)
    print("\n".join(lines or [results_text(workdir, config.funnel.passed)]))


def start() -> None:
    launch(main, as_one=True)


if __name__ == "__main__":
    start()
