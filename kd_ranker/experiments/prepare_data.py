r"""Builds the dataset of requests for `config.data`.

With `config.data.infer`, it writes a first config for a log in place of it.

For example:

    python -m experiments.prepare_data --config=configs/cascade.py
    python -m experiments.prepare_data --config=configs/parquet.py \
        --config.data.path=log/ --config.data.infer
"""

from ml_collections import ConfigDict

from kd_ranker.pipeline import commands
from kd_ranker.pipeline.launch import launch
from kd_ranker.pipeline.remote import Place
from kd_ranker.sources.logs.data_report import PAGE


def main(config: ConfigDict, workdir: Place) -> None:
    if config.data.get("infer"):
        written = commands.first_config(config, workdir)
        print(f"config: {written.path}")
        print(f"edit it, first of all the {written.num_checks} lines below CHECK; then")
        print("\n".join(f"    {command}" for command in written.next_commands))
        return
    directory = commands.prepare_data(config, thorough=True)
    print(f"dataset: {directory}")
    if (directory / PAGE).exists():
        print(f"data report: {directory / PAGE}")
    print("\n".join(commands.data_lines(config)))


def start() -> None:
    launch(main, needs_workdir=False)


if __name__ == "__main__":
    start()
