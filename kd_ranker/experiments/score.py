r"""Writes a log with the probabilities and the value of a trained ranker beside each candidate.

`--workdir` is that of a teacher, a student or a sweep which was trained on a log, and whose config
stands in for `--config`; `--config.data.path` is the log. A run that was killed goes on where it
stopped.

For example:

    python -m experiments.score --workdir=runs/sweep --config.data.path=/data/another_log \
        --out=scored
"""

from ml_collections import ConfigDict

from kd_ranker.pipeline import commands
from kd_ranker.pipeline.launch import launch_on_run
from kd_ranker.pipeline.remote import Place, local_folder

TAKES_CONFIG = True
FLAGS = {
    "member": ("", "the student of a sweep; without it, the best one on validation"),
    "out": ("", "the folder to write to; without it, one below config.data.dir"),
}


def main(config: ConfigDict, workdir: Place, member: str, out: str) -> None:
    folder = local_folder("--out", out) if out else None
    scored, lines = commands.score(config, workdir, member, folder)
    print("\n".join(lines))
    print(f"scored log: {scored.directory}")
    print(f"its new columns: {', '.join(scored.columns)}")


def start() -> None:
    launch_on_run(main, TAKES_CONFIG, **FLAGS)


if __name__ == "__main__":
    start()
