"""Compile the programs of a config for TPUs or H100s that are not here, and print their needs.

    python scripts/compile_for.py --config=configs/cascade.py --topology=v5e:4x4

It prints one line per program: whether a device's memory holds it, bytes per device, cycles,
and copies of tables. It runs nothing and reads only the sizes and the first requests of the
dataset.
`./scripts/test_compilers.sh --setup` installs the compilers into `.venv-compilers`; see
`docs/accelerators.md`.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# A TPU or GPU that is there is left alone.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from ml_collections import ConfigDict  # noqa: E402

from kd_ranker.main import Command, Flag, run_command  # noqa: E402
from scripts.aot import programs, topologies  # noqa: E402

FLAGS = {
    "topology": Flag(f"one of: {', '.join(topologies.topology_names())}", None),
    "programs": Flag(
        f"some of: {', '.join(programs.PROGRAMS)}, with commas", "train,train_teacher"
    ),
    "users": Flag("in place of the dataset's number of users"),
    "items": Flag("in place of the dataset's number of items"),
}


def main(config: ConfigDict, flags: argparse.Namespace) -> None:
    """Compile the programs that the flags name."""
    topology = topologies.open_topology(flags.topology)
    users = int(flags.users) if flags.users else None
    items = int(flags.items) if flags.items else None
    sample = programs.sample_of(config, users, items)
    findings = []
    for name in flags.programs.split(","):
        print(f"compile_for: {name}", file=sys.stderr)
        findings.append(programs.compile_program(name, config, sample, topology))
    print(programs.findings_table(findings))


if __name__ == "__main__":
    example = "--config=configs/cascade.py --topology=v5e:4x4"
    command = Command(lambda api, config, flags: main(config, flags), FLAGS, example, text=__doc__)
    run_command(command, "python scripts/compile_for.py", sys.argv[1:])
