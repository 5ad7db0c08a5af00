r"""Trains one student.

For example:

    python -m experiments.train --config=configs/cascade.py --workdir=runs/student \
        --config.teacher.source=logged --config.distill.mode=shared
"""

from pathlib import Path

from ml_collections import ConfigDict

from kd_ranker.pipeline import commands
from kd_ranker.pipeline.launch import launch
from kd_ranker.report.tables import results_text


def main(config: ConfigDict, workdir: Path) -> None:
    commands.train(config, workdir)
    print(results_text(workdir, config.funnel.passed))


def start() -> None:
    launch(main, as_one=True)


if __name__ == "__main__":
    start()
