"""The compilers of TPU and H100 on the project's own programs, for devices that are not here.

Nothing is timed. `large` is ten million items and a million users, 256 requests of 256 candidates,
embeddings of 64 with Adam; where a chip's memory does not hold that beside a live teacher, of 42.
"""

import argparse
import sys
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from kd_ranker.configs import cascade
from kd_ranker.requests.records import Dataset
from scripts.aot import programs, topologies

USERS, ITEMS, WIDTH, BATCH = 1_000_000, 10_000_000, 64, 256
RUNS = 16


class Case(NamedTuple):
    """A program and the devices that it is compiled for.

    Attributes:
      topology: one of `topologies.topology_names`.
      program: one of `programs.PROGRAMS`.
      mode: of the student, or of all runs.
      source: `teacher.source`.
      large: whether the sizes are those above, or the cascade's own.
      width: of the embeddings, where it is large.
      tables: `parallel.tables`.
      row_kernel: `parallel.row_kernel`.
    """

    topology: str
    program: str = "train"
    mode: str = "shared"
    source: str = "logged"
    large: bool = True
    width: int = WIDTH
    tables: str = "replicated"
    row_kernel: bool = False

    @property
    def name(self) -> str:
        """A name for people."""
        size = f"large{self.width}" if self.large else "cascade"
        sharded = (self.tables,) if self.tables != "replicated" else ()
        kernel = ("row_kernel",) if self.row_kernel else ()
        parts = (self.topology, size, self.program, self.mode, self.source, *sharded, *kernel)
        return "-".join(parts)


_WAYS = (
    ("none", "logged"),
    ("aux", "logged"),
    ("shared", "logged"),
    ("aux", "live"),
    ("shared", "live"),
)
_ONE_CHIP, _ONE_CARD = "v5e:1x1", "h100:1"

CASES = (
    # A v5e holds student and live teacher of 42, not of 64.
    *(
        Case(topology, mode=mode, source=source, width=WIDTH if source == "logged" else 42)
        for topology in (_ONE_CHIP, "v5e:4x4")
        for mode, source in _WAYS
    ),
    Case("v5e:2x2"),
    Case("v5p:2x2x1"),
    Case("v5p:2x2x1", source="live"),
    *(
        Case(topology, mode=mode, source=source)
        for topology in (_ONE_CARD, "h100:8")
        for mode, source in _WAYS
    ),
    *(Case(topology, tables="sharded") for topology in ("v5e:2x2", "v5e:4x4", "h100:8")),
    Case("v5e:4x4", source="live", tables="sharded"),
    *(Case(topology, row_kernel=True) for topology in (_ONE_CHIP, "v5p:2x2x1")),
    Case("v5e:2x2", tables="sharded", row_kernel=True),
    Case(_ONE_CHIP, "sweep", source="live", large=False, row_kernel=True),
    *(
        Case(topology, program, source="live", large=program != "sweep")
        for topology in (_ONE_CHIP, _ONE_CARD)
        for program in ("train_teacher", "sweep")
    ),
)
"""All that is compiled."""


def config_of(case: Case) -> ConfigDict:
    """The config of a case."""
    config = cascade()
    config.distill.mode, config.teacher.source = case.mode, case.source
    config.parallel.tables, config.parallel.row_kernel = case.tables, case.row_kernel
    config.sweep.modes, config.sweep.seeds = (case.mode,), tuple(range(RUNS))
    if case.large:
        for batch in (config.batch, config.teacher.batch):
            batch.requests = BATCH
        config.batch.candidates = BATCH
        config.student.width = config.teacher.width = case.width
    return config


def sample_of(case: Case) -> Dataset:
    """The sizes of a case's dataset, and its first requests."""
    config = config_of(case)
    # Not a dataset that was built: its own requests are as good.
    config.data.dir = "none"
    return programs.sample_of(config, *((USERS, ITEMS) if case.large else ()))


def find(case: Case) -> programs.Finding:
    """Compiles a case."""
    topology = topologies.open_topology(case.topology)
    return programs.compile_program(case.program, config_of(case), sample_of(case), topology)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compiles all cases whose compiler is installed, and prints the table."""
    findings = {}
    for case in CASES:
        if missing := topologies.missing_packages(case.topology):
            print(f"{case.name}: left out, without {missing}", file=sys.stderr)
            continue
        findings[case.name] = find(case)
        print(programs.findings_table([findings[case.name]]), file=sys.stderr, flush=True)
    table = programs.findings_table(list(findings.values()), "github")
    print(table, file=sys.stderr)
    return {"programs": {name: programs.line_of(finding) for name, finding in findings.items()}}
