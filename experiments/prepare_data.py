"""Builds the dataset of requests for `config.data`."""

from pathlib import Path

from ml_collections import ConfigDict

from experiments.launch import launch
from kd_ranker import commands


def main(config: ConfigDict, workdir: Path) -> None:
    del workdir
    print(f"dataset: {commands.prepare_data(config)}")


if __name__ == "__main__":
    launch(main, needs_workdir=False)
