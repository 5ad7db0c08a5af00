"""The SQL of this package, which DuckDB runs, translated for Spark by SQLGlot."""

import re

import sqlglot
from sqlglot import exp

# A statement that begins with it is written for Spark, since it has no translation.
SPARK_ONLY = "/* spark */"
_NAMES = {"ROUND_EVEN": "BROUND", "FAVG": "AVG"}


def in_spark(query: str) -> str:
    """A query of DuckDB as Spark runs it."""
    return sqlglot.parse_one(query, read="duckdb").transform(_translated).sql("spark")


def created(statement: str) -> tuple[str, bool, str]:
    """A CREATE statement: the name, True for a table and not a view, and the query for Spark."""
    found = re.fullmatch(r'CREATE (TABLE|VIEW) "?([^"]+?)"? AS\s+(.*)', statement, re.DOTALL)
    assert found
    kind, name, query = found.groups()
    text = query.removeprefix(SPARK_ONLY)
    return name, kind == "TABLE", in_spark(query) if text == query else text


def _translated(node: exp.Expression) -> exp.Expression:
    """Translate names of functions and slices of lists, which SQLGlot leaves unchanged."""
    if isinstance(node, exp.Anonymous) and node.name.upper() in _NAMES:
        return exp.Anonymous(this=_NAMES[node.name.upper()], expressions=node.expressions)
    if isinstance(node, exp.Bracket) and isinstance(node.expressions[0], exp.Slice):
        items, part = node.this, node.expressions[0]
        one = exp.Literal.number(1)
        if part.this is None:
            return exp.Anonymous(this="SLICE", expressions=[items, one, part.expression])
        if part.this == part.expression:
            return exp.Anonymous(this="SLICE", expressions=[items, part.this, one])
        # The last entries: all of a shorter list.
        length = part.this.this
        first = exp.ArraySize(this=items.copy()) - length.copy() + one
        start = exp.Greatest(this=first, expressions=[one.copy()])
        return exp.Anonymous(this="SLICE", expressions=[items, start, length])
    return node
