"""Docstrings, comments and messages in plain English."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "kd_ranker"
QUESTIONS = {"What", "How", "Whether", "Where", "Which", "Who", "Those"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# Turns that take a second reading, and what to write instead.
TURNS = {
    r"\banew\b": "again",
    r"\bbut for\b": "except",
    r"\bas far as\b": "to the extent that",
    r"\bbesides?\b": "next to, in addition to",
    r"\bso many\b": "n, that many",
    r"\b(go|goes|going|went) on\b": "continue, resume",
    r"\bof (its|their|one's) own\b": "its own X, separate",
    r", say\b": "for example",
    r"\balone\b": "only",
    r"\b(told|tells?|says?|said|speaks?)\b": "reports, records, contains",
    r"\b(lies|lie|lying|stands?|standing)\b(?! (in|between|outside) [\[(0-9])": "is, is stored",
    r"\b(none that|of which there|of whom|whose|whom)\b": "a verb; owner, fingerprint",
    r"\b(of|for|by|in|with|is|are|as|that|than|to|and|or|on) what\b|^What\b": "name the thing",
    r"\b(put away|put back|let go)\b": "clean up, restore, release",
    r"\b(nobody|no one)\b|\b(is|are) none\b": "a negated verb",
    r"\b(meets?|met|hears?|heard)\b": "learns from, receives",
    r"\b(a|an|one) \w+ an? (request|task|member|candidate|line|row|day|step|column|item)\b": "per",
    r"\bas (it|they) should\b": "expected",
    r"\b(asks?|asked|asking)\b": "queries, needs, requests",
}


def riddles(text: str) -> Iterator[str]:
    """The line and the beginning of each docstring that begins like a question."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0].strip(".,:;") in QUESTIONS:
                yield f"line {node.body[0].lineno}: {' '.join(words[:8])} …"


def turns(text: str) -> Iterator[str]:
    """The line, the turn and a better one, of each turn in a comment or a string."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if name in ("COMMENT", "STRING", "FSTRING_MIDDLE"):
            for turn, better in TURNS.items():
                for found in re.finditer(turn, token.string):
                    line = token.start[0] + token.string[: found.start()].count("\n")
                    yield f"line {line}: {found[0]!r} (better: {better})"


def test_no_docstring_begins_like_a_question():
    files = sorted(PACKAGE.rglob("*.py"))
    assert files
    found = [f"{file}, {riddle}" for file in files for riddle in riddles(file.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("room", sorted(path.name for path in PACKAGE.iterdir()))
def test_no_turn_that_takes_a_second_reading(room):
    path = PACKAGE / room
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    found = [f"{file}, {turn}" for file in files for turn in turns(file.read_text())]
    assert not found, "\n".join(found)


def test_both_faults_are_found():
    text = '"""Reads."""\ndef f():\n    """What is known of it."""\nclass A:\n    """Whatever."""\n'
    assert list(riddles(text)) == ["line 3: What is known of it. …"]
    text = '# It must lie in [0, 1].\nx = f"the file lies {1}"\n"""Reads\nit anew."""\n'
    assert [turn.split(" (")[0] for turn in turns(text)] == ["line 2: 'lies'", "line 4: 'anew'"]
