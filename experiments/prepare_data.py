"""Builds the dataset of requests for `config.data`."""

from pathlib import Path

from ml_collections import ConfigDict

from experiments.launch import launch
from kd_ranker import commands
from kd_ranker.data.parquet.report import PAGE


def main(config: ConfigDict, workdir: Path) -> None:
    del workdir
    directory = commands.prepare_data(config)
    print(f"dataset: {directory}")
    if (directory / PAGE).exists():
        print(f"data report: {directory / PAGE}")


if __name__ == "__main__":
    launch(main, needs_workdir=False)
