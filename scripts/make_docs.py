#!/usr/bin/env python
"""Writes the parts of the docs that derive from the code: `python scripts/make_docs.py`."""

import re
from pathlib import Path

import grimp

from kd_ranker.config.schema import keys_page
from kd_ranker.evaluation.metrics.registry import METRICS

DOCS = Path(__file__).parent.parent / "docs"


def pages() -> dict[Path, str]:
    """The text of each page that is made, or of which a part is."""
    architecture = DOCS / "architecture.md"
    drawn = re.sub(
        r"(?<=```mermaid\n).*?(?=```)", rooms(), architecture.read_text(), count=1, flags=re.S
    )
    return {
        DOCS / "config.md": keys_page(),
        DOCS / "columns.md": columns_page(),
        architecture: drawn,
    }


_COLUMNS = """\
# Columns

The formula of each measure in `results.csv`, see [Measures](measures.md) for the terms. w is a
label weight or teacher weight, p the model's probability, q the teacher's, y a user label. k
candidates pass, and m are shown (`funnel.shown`).

`scripts/make_docs.py` writes this page from `kd_ranker/evaluation/metrics/`.

"""


def columns_page() -> str:
    """The page of the metrics, a line an entry."""
    lines = ["| column | formula | better |", "|---|---|---|"]
    for metric in METRICS.values():
        axes = "@k" * ("k" in metric.per) + "/<task>" * ("task" in metric.per)
        axes += "_<percent>" * ("target" in metric.per)
        lines.append(f"| `{metric.name}{axes}` | {metric.formula} | {metric.better or ''} |")
    return _COLUMNS + "\n".join([*lines, ""])


def rooms() -> str:
    """The rooms and their imports as a Mermaid graph.

    An arrow stands for what a room hands on to another, against the direction of the import. It is
    left out where a longer way says it as well.
    """
    graph = grimp.build_graph("kd_ranker")
    imports: dict[str, set[str]] = {}
    for room in sorted(graph.find_children("kd_ranker")):
        inside = {room, *graph.find_descendants(room)}
        below = set[str]()
        for file in inside:
            below |= graph.find_modules_directly_imported_by(file)
        imports[_name(room)] = {_name(module) for module in below - inside}
    arrows = [
        f"  {other} --> {room}"
        for room in imports
        for other in sorted(imports[room])
        if not any(other in _reached(imports, between) for between in imports[room] - {other})
    ]
    return "\n".join(["graph TD", *arrows, ""])


def _name(module: str) -> str:
    return module.split(".")[1]


def _reached(imports: dict[str, set[str]], room: str) -> set[str]:
    return imports[room].union(*(_reached(imports, other) for other in imports[room]))


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
