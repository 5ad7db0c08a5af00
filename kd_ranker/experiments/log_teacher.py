r"""Writes a copy of the dataset with the probabilities of the teacher in config.teacher.workdir.

With `data.name = "parquet"`, the log is written back with the teacher's columns added, too. A run
that was killed goes on where it stopped.

For example:

    python -m experiments.log_teacher --config=configs/cascade.py \
        --config.teacher.workdir=runs/teacher
"""

from ml_collections import ConfigDict

from kd_ranker.pipeline import commands
from kd_ranker.pipeline.launch import launch
from kd_ranker.pipeline.remote import Place


def main(config: ConfigDict, workdir: Place) -> None:
    del workdir
    logged = commands.log_teacher(config)
    print(f"dataset: {logged.dataset}")
    if logged.log:
        print(f"scored log: {logged.log.directory}")
        print(f"its new columns: {', '.join(logged.log.columns)}")


def start() -> None:
    launch(main, needs_workdir=False)


if __name__ == "__main__":
    start()
