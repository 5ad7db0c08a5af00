"""Trains the final ranker.

For example:

    python -m experiments.train_teacher --config=configs/cascade.py --workdir=runs/teacher
"""

from ml_collections import ConfigDict

from kd_ranker.pipeline import commands
from kd_ranker.pipeline.launch import launch
from kd_ranker.pipeline.remote import Place


def main(config: ConfigDict, workdir: Place) -> None:
    commands.train_teacher(config, workdir)
    print(commands.results_text(workdir))


def start() -> None:
    launch(main, as_one=True)


if __name__ == "__main__":
    start()
