"""Does the main job: the dataset, the teacher where the log has none, a sweep, the report.

For example:

    python -m experiments.run --config=configs/sweeps/cascade.py --workdir=runs/cascade
"""

import sys

from ml_collections import ConfigDict

from kd_ranker.pipeline import commands
from kd_ranker.pipeline.launch import launch
from kd_ranker.pipeline.remote import Place


def main(config: ConfigDict, workdir: Place) -> None:
    made = commands.run(config, workdir, say=lambda step: print(f"run: {step}", file=sys.stderr))
    print(commands.results_text(made.students))
    print("\n".join(["", *made.answers, "", "run: done. What was made:"]))
    print(f"  teacher   {made.teacher or 'none: the log has its own'}")
    print(f"  students  {made.students}")
    print(f"  report    {made.page}")


def start() -> None:
    launch(main)


if __name__ == "__main__":
    start()
