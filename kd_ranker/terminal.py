"""Text for people at a terminal: bold where there is one, and ASCII where it shows no more."""

import re
from typing import TextIO

from termcolor import colored

_ASCII = str.maketrans(
    {
        "±": "+/-",
        "−": "-",
        "–": "-",
        "“": '"',
        "”": '"',
        "’": "'",
        "→": "->",
        "λ": "lambda",
        "…": "...",
    }
)


def with_bold_verdict(answer: str) -> str:
    """Return an answer with its first sentence in bold, if it is printed on a terminal.

    NO_COLOR and FORCE_COLOR decide otherwise (https://no-color.org).
    """
    first = re.match(r"(?:[^:]*: )?(.*?\.)(?=\s|$)", answer, re.DOTALL)
    if first is None:
        return answer
    start, end = first.span(1)
    return answer[:start] + colored(first[1], attrs=["bold"]) + answer[end:]


def printable(text: str, stream: TextIO) -> str:
    """Return a text with replacements for what the encoding of a stream lacks, such as ±."""
    encoding = stream.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_ASCII).encode(encoding, "replace").decode(encoding)
    return text
