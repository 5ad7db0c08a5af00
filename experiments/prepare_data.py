"""Builds the dataset of requests for `config.data`.

With `config.data.infer`, it writes a first config for a log in place of it.
"""

from pathlib import Path

from ml_collections import ConfigDict

from experiments.launch import launch
from kd_ranker import commands


def main(config: ConfigDict, workdir: Path) -> None:
    if not config.data.get("infer"):
        print(f"dataset: {commands.prepare_data(config)}")
        return
    written = commands.first_config(config, workdir)
    print(f"config: {written.path}")
    print(f"edit it, first of all the {written.num_checks} lines below CHECK; then")
    print("\n".join(f"    {command}" for command in written.next_commands))


if __name__ == "__main__":
    launch(main, needs_workdir=False)
