"""Writes tables, figures and report.html from the workdirs of one or more sweeps."""

from pathlib import Path

from kd_ranker.pipeline import commands
from kd_ranker.pipeline.launch import launch_on_workdirs


def main(workdirs: list[Path], output: Path) -> None:
    answers, page = commands.report(workdirs, output)
    print("\n".join(answers))
    print(f"report: {page}")


if __name__ == "__main__":
    launch_on_workdirs(main)
