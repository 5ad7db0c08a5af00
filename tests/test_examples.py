"""The examples use what outsiders may rely on; `scripts/test_wheel.sh` runs them."""

import ast

import pytest

import kd_ranker as kd
from tests.small import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_uses_public_names_alone(path):
    tree = ast.parse(path.read_text())
    imported = [
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else map(str, node.names))
        if "kd_ranker" in ast.unparse(node) and ast.unparse(node) != "import kd_ranker as kd"
    ]
    assert imported == []
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "kd"
    }
    assert used
    assert used <= {*kd.__all__}


def test_there_are_the_three_that_the_docs_name():
    assert {path.stem for path in EXAMPLES} == {"a_new_loss", "own_log", "quickstart"}
