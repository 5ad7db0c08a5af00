"""The words in names of columns, compared without case, plural and separators with `names.json`."""

import functools
import json
import keyword
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

NAMES: dict[str, Any] = json.loads((Path(__file__).parent / "names.json").read_text("utf-8"))


@functools.cache
def words(name: str) -> tuple[str, ...]:
    """Return the words of a name in lower case and the singular.

    >>> words("lastItemIDs"), words("ordCnt30d")
    (('last', 'item', 'id'), ('ord', 'cnt', '30d'))
    """
    starts = "(?<=[a-z0-9])(?=[A-Z])|(?<=[a-z])(?=[0-9])"
    spaced = re.sub(starts, " ", unicodedata.normalize("NFKC", name))
    parts = filter(None, re.split(r"[\W_]+", spaced.lower()))
    return tuple(re.sub(r"(?<=[^\W_]{2})(?<![suio])s$", "", part) for part in parts)


def find_key(name: str, names: Mapping[str, Sequence[str]]) -> str:
    """Return the first key that lists a name, in any spelling; "" for none."""
    joined = "".join(words(name))
    for key, listed in names.items():
        if any(joined == "".join(words(other)) for other in listed):
            return key
    return ""


def is_showing(name: str) -> bool:
    """Return whether a name says that something was shown, which no user does.

    >>> is_showing("srp_impressions"), is_showing("delivered"), is_showing("order_delivered")
    (True, True, False)
    """
    listed = [*NAMES["sure"]["shown"], *NAMES["stages"]["shown"]]
    return words(name)[-1:] == ("impression",) or bool(find_key(name, {"shown": listed}))


def without(name: str, *groups: str) -> tuple[str, ...]:
    """Return the words of a name that are in no group of `NAMES`."""
    unwanted = {word for group in groups for word in NAMES[group]}
    return tuple(word for word in words(name) if word not in unwanted)


def identifier(name: str, taken: Collection[str] = ()) -> str:
    """Return a name as a key of a config, other than those that are taken.

    >>> identifier("item.views (7d)"), identifier("7d"), identifier("items"), identifier("点击")
    ('item_views_7d', 'c_7d', 'items_', '点击')
    """
    text = re.sub(r"\W+", "_", unicodedata.normalize("NFKC", name)).strip("_") or "column"
    text = text if text.isidentifier() else f"c_{text}"
    while text in taken or keyword.iskeyword(text) or hasattr(ConfigDict, text):
        text += "_"
    return text
