"""Text for people at a terminal: bold where there is one, and ASCII where it shows no more."""

import codecs
import io
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


def replace_unprintable(*streams: TextIO) -> None:
    """Let streams write a character that their encoding lacks, such as ±, in ASCII."""
    codecs.register_error("in_ascii", _in_ascii)
    for stream in streams:
        # A notebook or a test may have put another stream there, which takes every character.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="in_ascii")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_ASCII)
    return text.encode("ascii", "replace").decode("ascii"), error.end
