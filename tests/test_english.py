"""Docstrings in plain English: a first line is a verb or noun phrase that stands alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "kd_ranker"
QUESTIONS = {"What", "How", "Whether", "Where", "Which", "Who", "Those"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def riddles(text: str) -> Iterator[str]:
    """The line and the beginning of each docstring that begins like a question."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0].strip(".,:;") in QUESTIONS:
                yield f"line {node.body[0].lineno}: {' '.join(words[:8])} …"


def test_no_docstring_begins_like_a_question():
    files = sorted(PACKAGE.rglob("*.py"))
    assert files
    found = [f"{file}, {riddle}" for file in files for riddle in riddles(file.read_text())]
    assert not found, "\n".join(found)


def test_a_docstring_that_begins_like_a_question_is_told():
    text = '"""Reads."""\ndef f():\n    """What is known of it."""\nclass A:\n    """Whatever."""\n'
    assert list(riddles(text)) == ["line 3: What is known of it. …"]
