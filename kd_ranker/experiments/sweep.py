"""Trains the students of config.sweep.

For example:

    python -m experiments.sweep --config=configs/sweeps/cascade.py --workdir=runs/sweep
"""

from ml_collections import ConfigDict

from kd_ranker.pipeline import commands
from kd_ranker.pipeline.launch import launch
from kd_ranker.pipeline.remote import Place


def main(config: ConfigDict, workdir: Place) -> None:
    # Of the others, the number of a cohort says nothing.
    if not commands.sweep(config, workdir) and not config.sweep.part.isdecimal():
        print(f"the sweep in {workdir} is complete; there is nothing to do")
    print("\n".join(commands.sweep_lines(config, workdir)))


def start() -> None:
    launch(main, as_one=True)


if __name__ == "__main__":
    start()
