#!/usr/bin/env python
"""Writes the parts of the docs that derive from the code: `python scripts/make_docs.py`."""

from pathlib import Path

from kd_ranker.config.page import keys_page

DOCS = Path(__file__).parent.parent / "docs"


def pages() -> dict[Path, str]:
    """The text of each page that is made."""
    return {DOCS / "config.md": keys_page()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
