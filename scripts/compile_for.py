"""Compiles the programs of a config for TPUs or H100s that are not here, and says what they take.

    python scripts/compile_for.py --config=configs/cascade.py --topology=v5e:4x4

With --dry_run, what each host of a pod would hold and do, without compilers:

    python scripts/compile_for.py --config=configs/cascade.py --topology=v5e:4x4 --dry_run

It prints a line a program: whether a device's memory holds it, bytes a device, FLOPs, and what
limits it. Nothing is run, and no data but the dataset's sizes and first requests is read. But for
--dry_run it needs the compilers, which `./scripts/test_compilers.sh --setup` puts into
`.venv-compilers`; see `docs/accelerators.md`.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# A TPU or GPU that is there is left alone.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from ml_collections import ConfigDict  # noqa: E402

from kd_ranker.main import Command, Flag, run_command  # noqa: E402
from kd_ranker.pipeline import ahead, pods, topologies  # noqa: E402

FLAGS = {
    "topology": Flag(f"one of: {', '.join(topologies.names())}", None),
    "programs": Flag(
        f"some of: {', '.join(ahead.PROGRAMS)}; without it, those of a single run, with commas"
    ),
    "users": Flag("in place of the dataset's number of users"),
    "items": Flag("in place of the dataset's number of items"),
    "json": Flag("a file for what was found"),
    "hlo": Flag("a folder for the text of the optimised programs"),
    "dry_run": Flag("tell what each host of the devices would do, and compile nothing", False),
    "hosts": Flag(
        "with --dry_run, the number of hosts; 0 is one for four TPUs, or one of cards", "0"
    ),
}


def main(config: ConfigDict, given: argparse.Namespace) -> None:
    """Compiles what the flags name, or tells what hosts would do."""
    topology = None if given.dry_run else topologies.open_topology(given.topology)
    users, items = (int(number) if number else None for number in (given.users, given.items))
    with tempfile.TemporaryDirectory() as folder:
        sizes = ahead.sizes_of(config, Path(folder), users, items)
        if topology is None:
            _tell_of_hosts(config, sizes, given)
        else:
            _compile(config, sizes, topology, given)


def _tell_of_hosts(config: ConfigDict, sizes: ahead.Sizes, given: argparse.Namespace) -> None:
    of_config = [flag for flag in sys.argv[1:] if flag.startswith("--config")]
    for name in given.programs.split(",") if given.programs else ["train"]:
        planned = pods.plan(name, config, sizes, given.topology, int(given.hosts))
        print("\n".join(pods.lines(planned, of_config)))


def _compile(
    config: ConfigDict,
    sizes: ahead.Sizes,
    topology: topologies.Topology,
    given: argparse.Namespace,
) -> None:
    findings = []
    for name in given.programs.split(",") if given.programs else ahead.programs_of(config):
        print(f"compile_for: {name}", file=sys.stderr)
        findings.append(ahead.compile_program(name, config, sizes, topology))
    print("\n".join([ahead.findings_table(findings), *ahead.advice(config, sizes, topology)]))
    if given.json:
        found = {finding.name: ahead.as_json(finding) for finding in findings}
        Path(given.json).write_text(json.dumps(found, indent=2) + "\n")
    if given.hlo:
        Path(given.hlo).mkdir(parents=True, exist_ok=True)
        for finding in findings:
            (Path(given.hlo) / f"{finding.name}.hlo").write_text(finding.text or finding.refused)


if __name__ == "__main__":
    example = "--config=configs/cascade.py --topology=v5e:4x4"
    command = Command(lambda api, config, given: main(config, given), FLAGS, example, text=__doc__)
    run_command(command, "python scripts/compile_for.py", sys.argv[1:])
