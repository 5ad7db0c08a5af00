"""Writes a copy of the dataset with the probabilities of the teacher in config.teacher.workdir."""

from pathlib import Path

from ml_collections import ConfigDict

from experiments.launch import launch
from kd_ranker import commands


def main(config: ConfigDict, workdir: Path) -> None:
    del workdir
    print(f"dataset: {commands.log_teacher(config)}")


if __name__ == "__main__":
    launch(main, needs_workdir=False)
