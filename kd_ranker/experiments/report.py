"""Writes tables, figures and report.html from the workdirs of one or more sweeps.

For example:

    python -m experiments.report --workdir=runs/report runs/sweep runs/another_sweep
"""

from kd_ranker.pipeline import commands
from kd_ranker.pipeline.launch import launch_on_workdirs
from kd_ranker.pipeline.remote import Place


def main(workdirs: list[Place], output: Place) -> None:
    answers, page = commands.report(workdirs, output)
    print("\n".join(answers))
    print(f"report: {page}")


def start() -> None:
    launch_on_workdirs(main)


if __name__ == "__main__":
    start()
