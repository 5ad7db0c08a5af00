"""The roles that the names of columns and a few facts about their values settle."""

from collections.abc import Callable

import pandas as pd

from kd_ranker.sources.logs.infer.guess import Guess, join, which
from kd_ranker.sources.logs.infer.sample import Sample
from kd_ranker.sources.logs.infer.words import NAMES, find_key, words
from kd_ranker.sources.logs.layout import OPEN, STAGES


def may_be_item(facts: pd.DataFrame) -> pd.Series:
    """Return whether each column hardly ever has a value twice in a request."""
    is_item_of_requests = (facts["request"] != 1) & (facts["in_requests"] > 0.95 * facts["rows"])
    return facts["is_id"] & (facts["known"] > 0.95) & is_item_of_requests


def may_be_label(facts: pd.DataFrame) -> pd.Series:
    """Return whether each column holds 0 and 1 that may differ among candidates."""
    return facts["binary"] & varies_in_requests(facts) & (facts["sure"] == "")


def may_be_teacher(facts: pd.DataFrame) -> pd.Series:
    """Return whether each column holds numbers that may differ among candidates."""
    is_number = facts["is_number"] & varies_in_requests(facts)
    return is_number & (facts["sure"] == "") & ~facts["early"]


def may_be_score(facts: pd.DataFrame) -> pd.Series:
    """Return whether each column may hold a model's scores."""
    return (facts["kind"] == "float") & (facts["distinct"] >= 10)


def is_probability(facts: pd.DataFrame) -> pd.Series:
    """Return whether each column may hold a model's probabilities."""
    return may_be_score(facts) & (facts["low"] >= 0) & (facts["high"] <= 1)


def may_count_places(facts: pd.DataFrame) -> pd.Series:
    """Return whether each column holds whole numbers from 0 or 1, besides those that mean none."""
    return (facts["kind"] == "integer") & facts["first_place"].isin([0, 1])


def varies_in_requests(facts: pd.DataFrame) -> pd.Series:
    """Return whether each column may differ among candidates, and is not one of the item."""
    return (facts["request"] != 1) & (facts["item"] != 1)


def _may_be_request(facts: pd.DataFrame) -> pd.Series:
    return facts["is_id"] & facts["groups"]


def _may_be_user(facts: pd.DataFrame) -> pd.Series:
    may_own_requests = (facts["request"] != 0) & (facts["item"] != 1)
    return facts["is_id"] & may_own_requests & (facts["distinct"] >= 10)


def _may_be_time(facts: pd.DataFrame) -> pd.Series:
    may_be_of_request = (facts["request"] != 0) & (facts["item"] != 1) & (facts["user"] != 1)
    return facts["is_time"] & may_be_of_request


def _may_be_stage(facts: pd.DataFrame) -> pd.Series:
    return facts["has_stages"] & (facts["known"] > 0.95) & varies_in_requests(facts)


def _may_be_position(facts: pd.DataFrame) -> pd.Series:
    return may_count_places(facts) & varies_in_requests(facts) & facts["placed"]


def _may_be_weight(facts: pd.DataFrame) -> pd.Series:
    return facts["is_number"] & (facts["low"] >= 0) & (facts["item"] != 1)


def _may_be_version(facts: pd.DataFrame) -> pd.Series:
    return facts["is_few"] & (facts["item"] != 1) & (facts["user"] != 1)


def _may_be_incumbent(facts: pd.DataFrame) -> pd.Series:
    return facts["is_number"]


def _may_be_propensity(facts: pd.DataFrame) -> pd.Series:
    return _may_be_weight(facts) & (facts["high"] <= 1)


# Role -> whether the values of each column fit, by the facts; in the order of their search.
FITS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "request": _may_be_request,
    "item": may_be_item,
    "user": _may_be_user,
    "time": _may_be_time,
    "stage": _may_be_stage,
    "position": _may_be_position,
    "label_weight": _may_be_weight,
    "teacher_version": _may_be_version,
    "teacher_weight": _may_be_weight,
    "incumbent": _may_be_incumbent,
    "propensity": _may_be_propensity,
}
REQUIRED = ("request", "item", "time")
# What a question calls a role, if not by its key.
CALLED = {
    "incumbent": "score of today's early ranker",
    "teacher_version": "version of the final ranker",
}


def choose(role: str, sample: Sample, used: list[str]) -> Guess:
    """Return the column that has the facts and the name of a role, or the two likeliest."""
    facts = sample.facts.drop(used, errors="ignore")
    if role == "stage":
        texts = [stage_texts(sample, column) for column in facts.index]
        facts = facts.assign(has_stages=list(map(bool, texts)))
    fitting = facts[FITS[role](facts)]
    sure = list(fitting.index[fitting["sure"] == role])
    if len(sure) == 1:
        return Guess(sure[0])
    if role == "stage" and len(fitting) == 1:
        return Guess(fitting.index[0])
    likely = [*sure, *fitting.index[fitting["hint"] == role]]
    if role in REQUIRED:
        likely += _look_alikes(role, facts)
    if role not in REQUIRED and not likely:
        return Guess("")
    return Guess("" if role in REQUIRED else OPEN, "", which(role, likely))


def sure_columns(role: str, sample: Sample) -> list[str]:
    """Return the columns that are called like a role, and whose values fit."""
    facts = sample.facts
    if role == "stage":
        return []
    return [*facts.index[FITS[role](facts) & (facts["sure"] == role)]]


def _look_alikes(role: str, facts: pd.DataFrame) -> list[str]:
    """Return columns that a user may have meant, by a part of their names or by their values."""
    by_name = [name for name in facts.index if has_word_of(role, name)]
    is_time = (facts["kind"] == "time") | (facts["unit"] != "")
    by_values = is_time if role == "time" else facts["is_id"]
    return [*by_name, *facts.index[by_values]]


def has_word_of(role: str, column: str) -> bool:
    """Return whether the name of a column has a word that alone, or with id, is a role's name."""
    names = [{*words(name)} - {"id"} for name in NAMES["sure"][role]]
    known = set().union(*(name for name in names if len(name) == 1))
    return bool(known & {*words(column)})


def stage_texts(sample: Sample, column: str) -> dict[str, str]:
    """Return the texts of each stage in a column, as the config has them; {} if one names none."""
    facts = sample.facts.loc[column]
    if not facts["is_few"]:
        return {}
    values = sorted(sample.texts(column).dropna().unique())
    if facts["binary"] and facts["sure"] == "shown":
        return dict(zip(("retrieved", "shown"), values, strict=False))
    texts: dict[str, list[str]] = {}
    for value in values:
        texts.setdefault(find_key(value, NAMES["stages"]), []).append(value)
    has_other_stage = {"shown"} < {*texts}
    has_comma = any("," in value for value in values)  # which separates texts in a config
    if "" in texts or has_comma or not has_other_stage:
        return {}
    return {stage: join(texts[stage]) for stage in STAGES if stage in texts}


def named_stages(sample: Sample, column: str, stages: dict[str, str]) -> dict[str, str]:
    """Return the texts of each stage, as the user named them; {} without those of the shown."""
    if not column:
        return {}
    for stage in STAGES:
        if text := sample.named.get(f"data.stages.{stage}"):
            stages[stage] = text
    return stages if "shown" in stages else {}
