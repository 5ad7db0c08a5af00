"""Compile the programs of a config for TPUs or H100s that are not here, and print their needs.

    python scripts/compile_for.py --config=configs/cascade.py --topology=v5e:4x4

It prints one line per program: whether a device's memory holds it, bytes per device, FLOPs, and
what limits it. It runs nothing and reads only the sizes and the first requests of the dataset.
`./scripts/test_compilers.sh --setup` installs the compilers into `.venv-compilers`; see
`docs/accelerators.md`.
"""

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

from absl import flags  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from kd_ranker.ahead import programs, topologies  # noqa: E402
from kd_ranker.errors import UserError  # noqa: E402
from kd_ranker.pipeline.launch import launch  # noqa: E402

_TOPOLOGY = flags.DEFINE_string("topology", None, f"One of: {', '.join(topologies.names())}.")
_PROGRAMS = flags.DEFINE_list(
    "programs", None, f"Some of: {', '.join(programs.PROGRAMS)}; without it, those of a single run."
)
_USERS = flags.DEFINE_integer("users", None, "In place of the dataset's number of users.")
_ITEMS = flags.DEFINE_integer("items", None, "In place of the dataset's number of items.")
_JSON = flags.DEFINE_string("json", None, "A file for what was found.")
_HLO = flags.DEFINE_string("hlo", None, "A folder for the text of the optimised programs.")


def main(config: ConfigDict, workdir: Path) -> None:
    """Compile the programs that the flags name."""
    del workdir
    if not _TOPOLOGY.value:
        raise UserError(f"--topology is required; give one of: {', '.join(topologies.names())}")
    topology = topologies.open_topology(_TOPOLOGY.value)
    with tempfile.TemporaryDirectory() as folder:
        sizes = programs.sizes_of(config, Path(folder), _USERS.value, _ITEMS.value)
        findings = []
        for name in _PROGRAMS.value or programs.programs_of(config):
            print(f"compile_for: {name}", file=sys.stderr)
            findings.append(programs.compile_program(name, config, sizes, topology))
    print("\n".join([programs.findings_table(findings), *programs.advice(config, sizes, topology)]))
    if _JSON.value:
        found = {finding.name: programs.as_json(finding) for finding in findings}
        Path(_JSON.value).write_text(json.dumps(found, indent=2) + "\n")
    if _HLO.value:
        Path(_HLO.value).mkdir(parents=True, exist_ok=True)
        for finding in findings:
            (Path(_HLO.value) / f"{finding.name}.hlo").write_text(finding.text or finding.refused)


if __name__ == "__main__":
    launch(main, needs_workdir=False)
