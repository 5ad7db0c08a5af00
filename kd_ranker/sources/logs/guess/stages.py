"""Stages of the candidates of a log: retrieved, passed, shown."""

import collections
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int8, Int64

from kd_ranker.batch import Stage
from kd_ranker.sources.logs.guess import names
from kd_ranker.sources.logs.guess.column import (
    Column,
    distinct_in_rows,
    is_binary,
    positives_of,
    value_text,
)
from kd_ranker.sources.logs.guess.ids import NONE, Facts, Fit, Guess, best_guess, said_by_name

_MAX_STAGES = 8


def guess_stage(
    facts: Facts,
    left: Mapping[str, Column],
    binary: Mapping[str, Column],
    named: Mapping[str, str],
) -> tuple[Guess, dict[str, str], Guess, Int8[np.ndarray, "rows"] | None]:
    """The stage column, its text for each stage, the reason, and the stage of each candidate."""
    none = {"retrieved": "", "passed": "", "shown": ""}
    fits, stages_of = [], {}
    for name, column in left.items():
        if not _may_be_stage(column) and name != named.get("stage"):
            continue
        by_name = names.match(name, names.SYNONYMS["stage"])
        is_shown = names.match(name, names.SHOWN_NAMES) == 2 and is_binary(column)
        if is_binary(column):
            if not is_shown:
                continue
            stages = _stages_of_yes_or_no(column)
            check = "" if column.kind == "bool" else "1 taken for shown, 0 for not shown"
            guess = Guess("", "each candidate says only whether it was shown", check)
            score = 3.0
        else:
            words = _stages_by_words(column)
            counts = _stages_by_labels(column, binary, left)
            if not words and not counts and not by_name and name not in named.values():
                continue
            stages, guess = words or counts or _stages_by_number(column)
            score = 1.5 * by_name + 3 * bool(words) + 2 * bool(counts)
        stages_of[name] = (stages, guess)
        why = f"{said_by_name(name, 'stage')}{distinct_in_rows(column)} values"
        why += ", which differ within a request"
        fits.append(Fit(name, score + 10 * (name == named.get("stage")), 0, why))
    fits = [fit for fit in fits if fit.score >= 2]
    if not fits:
        return NONE, none, Guess("", "there is no stage column"), None
    guess = best_guess(fits, lambda fit: False, least=2)
    stages, stages_guess = stages_of[guess.column]
    column = left[guess.column]
    level = np.zeros(len(column.code), np.int8)
    of_stage = {"retrieved": Stage.RETRIEVED, "passed": Stage.PASSED, "shown": Stage.SHOWN}
    for code in range(column.distinct):
        for stage, text in stages.items():
            if text and text == value_text(column, code):
                level[column.code == code] = of_stage[stage]
    others = _others(column, stages)
    if others and not stages_guess.check:
        check = f"rows of {', '.join(map(repr, others))} would be rejected: there are three stages"
        stages_guess = stages_guess._replace(check=check)
    return guess, none | stages, stages_guess, level


def _may_be_stage(column: Column) -> bool:
    may_be = column.kind in ("bool", "integer", "string")
    return may_be and 2 <= column.distinct <= _MAX_STAGES


def _stages_of_yes_or_no(column: Column) -> dict[str, str]:
    texts = {
        bool(number): value_text(column, code) for code, number in enumerate(column.value_numbers)
    }
    return {"retrieved": texts.get(False, ""), "shown": texts.get(True, "")}


def _others(column: Column, stages: Mapping[str, str]) -> list[str]:
    """Texts of rows that are none of the stages, "None" for rows without any."""
    texts = {value_text(column, code) for code in range(column.distinct)}
    if not column.known.all():
        texts.add("None")
    return sorted(texts - set(stages.values()))


def _stages_by_words(column: Column) -> tuple[dict[str, str], Guess] | None:
    """Stages by the words of values, if one means shown and another one a stage before."""
    if column.kind != "string":
        return None
    stages: dict[str, str] = {}
    several = []
    counts = np.bincount(column.code[column.known], minlength=column.distinct)
    for code in np.argsort(-counts):
        text = value_text(column, int(code))
        stage = names.stage_of_value(text)
        if stage and stage in stages:
            several.append(f"{text!r} for {stage}, too")
        elif stage:
            stages[stage] = text
    if "shown" not in stages or len(stages) < 2:
        return None
    check = f"{'; '.join(several)}: its rows would be rejected" if several else ""
    return stages, Guess("", "what its values mean", check)


def _stages_by_labels(
    column: Column, binary: Mapping[str, Column], left: Mapping[str, Column]
) -> tuple[dict[str, str], Guess] | None:
    """Stages by the rows where labels are known, or, if that is everywhere, where they are 1.

    Labelled candidates were shown. Passed is the value for which another column, of a teacher, is
    known besides; without such, the rarer of the other values.
    """
    counts = np.bincount(column.code[column.known], minlength=column.distinct)
    occurring = [int(code) for code in np.argsort(counts) if counts[code]]
    if min(counts[code] for code in occurring) < 100:
        return None
    shown, how = _labelled_value(column, binary, counts)
    rest = [code for code in occurring if code != shown]
    if shown is None or not rest:
        return None
    known = _also_known_for(column, left, shown, rest)
    before = [code for code in rest if code != known]
    stages = {"shown": value_text(column, shown), "retrieved": value_text(column, before[-1])}
    if len(rest) > 1:
        stages["passed"] = value_text(column, before[-2] if known is None else known)
    checks = []
    if len(rest) > 1 and known is None:
        checks.append("passed and retrieved by their numbers: the fewer are passed")
    if others := _others(column, stages):
        checks.append(f"rows of {', '.join(map(repr, others))} would be rejected")
    why = f"labels are {how} for {stages['shown']!r} alone"
    return stages, Guess("", why, "; ".join(checks))


def _labelled_value(
    column: Column, binary: Mapping[str, Column], counts: Int64[np.ndarray, "distinct"]
) -> tuple[int | None, str]:
    """The one value for which labels are known, or for which alone most of them are ever 1."""
    votes: collections.Counter[tuple[int, str]] = collections.Counter()
    for label in binary.values():
        how = "1" if label.known.all() else "known"
        rows = column.known & (positives_of(label) if how == "1" else label.known)
        share = np.bincount(column.code[rows], minlength=column.distinct) / np.maximum(counts, 1)
        with_labels = np.flatnonzero(share > (0 if how == "1" else 0.02))
        if len(with_labels) == 1 and (how == "1" or share[with_labels[0]] > 0.9):
            votes[int(with_labels[0]), how] += 1
    return votes.most_common(1)[0][0] if votes else (None, "")


def _also_known_for(
    column: Column, left: Mapping[str, Column], shown: int, rest: Sequence[int]
) -> int | None:
    """The one value of `rest` for which some column is known that is known for `shown` as well."""
    counts = np.bincount(column.code[column.known], minlength=column.distinct)
    for other in left.values():
        known = column.known & other.known
        share = np.bincount(column.code[known], minlength=column.distinct) / np.maximum(counts, 1)
        also = [code for code in rest if share[code] > 0.02]
        # Logs have gaps, and a column with gaps at random is known of all stages.
        if len(rest) > 1 and len(also) == 1 and min(share[shown], share[also[0]]) >= 0.5:
            return also[0]
    return None


def _stages_by_number(column: Column) -> tuple[dict[str, str], Guess]:
    """Stages by the numbers of their rows alone, the rarest first."""
    counts = np.bincount(column.code[column.known], minlength=column.distinct)
    order = [value_text(column, int(code)) for code in np.argsort(counts) if counts[code]]
    rarest_first = ["shown", "retrieved"] if len(order) == 2 else ["shown", "passed", "retrieved"]
    stages = dict(zip(rarest_first, order, strict=False))
    return stages, Guess("", "by their numbers: the rarer, the narrower", "what each value means")


def find_shown(
    facts: Facts, binary: Mapping[str, Column], level: Int8[np.ndarray, "rows"] | None
) -> Bool[np.ndarray, "rows"] | None:
    """True for candidates that were shown, by their stage or by the presence of labels."""
    if level is not None:
        return level == Stage.SHOWN
    partly = [column.known for column in binary.values() if not column.known.all()]
    if not partly:
        return None
    # Labels are known together; a feature that is sometimes missing is so by itself.
    patterns: dict[bytes, list[Bool[np.ndarray, "rows"]]] = {}
    for known in partly:
        patterns.setdefault(known.tobytes(), []).append(known)
    most = max(patterns.values(), key=len)
    return most[0]
