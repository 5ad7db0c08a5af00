"""Judgements by the names of columns: the roles in a log that each may have.

The names and the words that they are made of stand in `names.json`.
"""

import functools
import itertools
import json
import keyword
import re
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

# The words themselves, by what they are for.
_WORDS: dict[str, Any] = json.loads((Path(__file__).parent / "names.json").read_text())
# Role -> the names that a column of it goes by, the first of which is the template's. They match
# however they are written: `request_id`, `requestId`, `REQUESTID`, `request_ids`.
SYNONYMS: dict[str, list[str]] = _WORDS["roles"]
# Columns that say of each candidate only whether it was shown.
SHOWN_NAMES: list[str] = _WORDS["shown"]
# Names of the values of a stage column, from the widest stage to the narrowest.
STAGE_WORDS: dict[str, list[str]] = _WORDS["stages"]
KNOWN_TASKS = frozenset(_WORDS["tasks"])

_LABEL_AFFIXES, _HISTORIES = frozenset(_WORDS["label_affixes"]), frozenset(_WORDS["histories"])
_TEACHER_WORDS, _OUTPUT_WORDS = frozenset(_WORDS["teacher"]), frozenset(_WORDS["outputs"])
_PREDICTIONS, _RANK_WORDS = frozenset(_WORDS["predictions"]), frozenset(_WORDS["ranks"])
# Rates that models predict are called after themselves: pctr is the probability of a click.
_RATES: dict[str, list[str]] = _WORDS["rates"]
_AFTERWARDS, _USE = frozenset(_WORDS["afterwards"]), frozenset(_WORDS["uses"])
_AMOUNT, _QUANTITIES = frozenset(_WORDS["amounts"]), frozenset(_WORDS["quantities"])
_IDENTIFIERS = frozenset(_WORDS["identifiers"])
_OWNERS: dict[str, list[str]] = _WORDS["owners"]


@functools.cache
def tokens_of(name: str) -> tuple[str, ...]:
    """The words of a name, in lower case and the singular.

    >>> tokens_of("lastItemIDs"), tokens_of("item.views_7d")
    (('last', 'item', 'id'), ('item', 'view', '7d'))
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    words = re.split("[ _]+", _legal(spaced).lower())
    return tuple(_singular(word) for word in words if word)


def _legal(name: str) -> str:
    """A name as Python normalizes it, with spaces for characters that no identifier has."""
    normal = unicodedata.normalize("NFKC", name)
    return "".join(of if f"a{of}".isidentifier() else " " for of in normal)


def _singular(word: str) -> str:
    is_plural = word.endswith("s") and not word.endswith(("ss", "us", "is", "os"))
    return word[:-1] if is_plural and len(word) > 2 else word


def _joined(name: str) -> str:
    return "".join(tokens_of(name))


def match(name: str, synonyms: Sequence[str]) -> int:
    """2 where `name` is one of `synonyms`, 1 where it ends in one of several words, else 0.

    >>> match("VideoID", ("item_id", "video_id")), match("first_video_id", ("video_id",))
    (2, 1)
    >>> match("item_count", ("item_id", "item"))
    0
    """
    if _joined(name) in map(_joined, synonyms):
        return 2
    words = tokens_of(name)
    endings = [tokens_of(synonym) for synonym in synonyms]
    return int(any(len(ending) > 1 and words[-len(ending) :] == ending for ending in endings))


def role_of(name: str) -> str:
    """The role whose name a column has; "" for none."""
    return next((role for role in SYNONYMS if match(name, SYNONYMS[role]) == 2), "")


def is_unwanted(task: str) -> bool:
    """True for what users do to be rid of an item."""
    return task in _WORDS["unwanted"]


def place_of(name: str, role: str) -> int:
    """The place of a name among those of a role; their number if it is none of them."""
    matches = [match(name, [synonym]) == 2 for synonym in SYNONYMS[role]]
    return matches.index(True) if True in matches else len(matches)


def is_shown(name: str) -> bool:
    """True for the name of a column that says of each candidate only whether it was shown."""
    return match(name, SHOWN_NAMES) == 2


def stage_of_value(value: str) -> str | None:
    """The stage that a value of a stage column names, if it does.

    >>> stage_of_value("PRE_RANKED"), stage_of_value("red")
    ('passed', None)
    """
    for stage, words in STAGE_WORDS.items():
        if match(value, words) == 2:
            return stage
    return None


def _stem(word: str) -> str:
    """`clicked` -> `click`, `liked` -> `like`; other words as they are."""
    for stem in (word[:-2], word[:-1]) if word.endswith("ed") else ():
        if stem in KNOWN_TASKS:
            return stem
    return word


def task_of_label(name: str) -> tuple[str, bool]:
    """The task that a label column may stand for, and True if its name is a known one.

    >>> task_of_label("is_clicked"), task_of_label("label_long_view"), task_of_label("f7")
    (('click', True), ('long_view', True), ('f7', False))
    """
    words = [_stem(word) for word in tokens_of(name) if word not in _LABEL_AFFIXES]
    for task in ("_".join(words), "_".join(words[1:]) if words[:1] == ["user"] else ""):
        if task in KNOWN_TASKS:
            return task, True
    # `longview`, without a word's end to see.
    for task in sorted(KNOWN_TASKS):
        if "".join(words) == task.replace("_", ""):
            return task, True
    return identifier("_".join(words) or name), False


def is_output_of_model(name: str) -> bool:
    """True for the name of an output of a ranker, which foretells a task.

    >>> is_output_of_model("final_score"), is_output_of_model("p_like"), is_output_of_model("pctr")
    (True, True, True)
    >>> is_output_of_model("retrieval_score")
    False
    """
    words = set(tokens_of(name))
    is_scored_task = bool(words & _OUTPUT_WORDS) and any(
        _stem(word) in KNOWN_TASKS for word in words
    )
    is_output = bool(words & (_TEACHER_WORDS | _PREDICTIONS)) or is_scored_task
    return is_output or bool(_rate_tasks(name))


def has_word(name: str, *groups: str) -> bool:
    """True if a name has a word of a group: "histories", "outputs", "ranks" and the like.

    Of "identifiers", which say that values are names even if they are numbers, it is the last word.
    """
    words = tokens_of(name)
    return any(
        word in _WORDS[group]
        for group in groups
        for word in (words[-1:] if group == "identifiers" else words)
    )


def _rate_tasks(name: str) -> Sequence[str]:
    joined = _joined(name)
    return next((tasks for rate, tasks in _RATES.items() if joined.endswith(f"p{rate}")), [])


def teacher_match(name: str, task: str, is_rank: bool = False) -> int:
    """Score of a name for the teacher's column of a task; 0 if it does not name the task.

    >>> teacher_match("teacher_probability_like", "like"), teacher_match("like_score", "like")
    (3, 2)
    >>> teacher_match("pctr", "click"), teacher_match("like", "like"), teacher_match("f3", "like")
    (2, 0, 0)
    >>> teacher_match("final_rank", "like", is_rank=True)
    1
    """
    words = tokens_of(name)
    outputs = _RANK_WORDS if is_rank else _OUTPUT_WORDS
    rest = [_stem(word) for word in words if word not in _TEACHER_WORDS | outputs]
    is_teacher = bool(_TEACHER_WORDS & set(words))
    if len(rest) == len(words) and task not in _rate_tasks(name):
        glued = _joined(name) == f"p{''.join(tokens_of(task))}"
        return 2 if glued and not is_rank else 0
    of_task = "".join(rest) == "".join(tokens_of(task)) or task in _rate_tasks(name)
    if of_task:
        return 3 if is_teacher else 2
    return int(is_rank and is_teacher and not rest)


def is_known_afterwards(name: str) -> bool:
    """True for the name of something that users do, beyond the 0 or 1 of a label.

    >>> is_known_afterwards("dwell_ms"), is_known_afterwards("watchTime")
    (True, True)
    >>> is_known_afterwards("duration")
    False
    """
    words = set(tokens_of(name))
    glued = any(_joined(name) == f"{use}{amount}" for use in _USE for amount in _AMOUNT)
    return bool(words & _AFTERWARDS) or bool(words & _USE and words & _AMOUNT) or glued


def owner_of(name: str) -> str | None:
    """The owner that a name tells: user, item or context, by its first such word.

    >>> owner_of("user_age"), owner_of("authorAge"), owner_of("user-item_affinity")
    ('user', 'item', None)
    """
    told = [owner for word in tokens_of(name) for owner in _OWNERS if word in _OWNERS[owner]]
    return told[0] if told and not {"user", "item"} <= {*told} else None


def identifier(name: str) -> str:
    """`name` as a key of a config: letters and digits of any script, and underscores.

    >>> identifier("item.views (7d)"), identifier("7d"), identifier("items"), identifier("class")
    ('item_views_7d', 'c_7d', 'items_', 'class_')
    >>> identifier("点击"), identifier("Größe (cm²)"), identifier("?")
    ('点击', 'Größe_cm2', 'column')
    """
    text = re.sub(" +", "_", _legal(name)).strip("_") or "column"
    if not text.isidentifier():
        text = f"c_{text}"
    # A key that is a method's name could not be reached with a dot.
    return f"{text}_" if keyword.iskeyword(text) or hasattr(ConfigDict, text) else text


def unused(name: str, taken: Collection[str]) -> str:
    """`name`, or with the first number from 2 that makes it differ from those taken.

    >>> unused("click", ()), unused("click", ("click", "click_2"))
    ('click', 'click_3')
    """
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(of for of in itertools.chain([name], numbered) if of not in taken)
