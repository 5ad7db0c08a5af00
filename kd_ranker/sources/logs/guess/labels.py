"""Columns of labels, and of a teacher that foretold these."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool

from kd_ranker.sources.logs.guess import evidence, names
from kd_ranker.sources.logs.guess.column import (
    Column,
    distinct_in_rows,
    is_binary,
    is_known_where,
    positives_of,
)
from kd_ranker.sources.logs.guess.ids import Facts, Guess


def find_scores(facts: Facts, left: Mapping[str, Column]) -> dict[str, Column]:
    """Columns of numbers in [0, 1] that belong neither to a user nor to an item."""
    scores = {}
    for name, column in left.items():
        if column.kind != "float" or distinct_in_rows(column) <= 2:
            continue
        numbers = column.numbers[np.isfinite(column.numbers)]
        # Logs hold nonsense, too.
        inside = ((numbers >= 0) & (numbers <= 1)).mean() if len(numbers) else 0.0
        if inside >= 0.95 and not facts.is_of_item(column):
            scores[name] = column
    return scores


def guess_labels(
    facts: Facts,
    binary: Mapping[str, Column],
    scores: Mapping[str, Column],
    shown: Bool[np.ndarray, "rows"] | None,
    left_out: dict[str, str],
) -> dict[str, Guess]:
    """Task -> its column, the most frequent first."""
    guesses: dict[str, tuple[float, Guess]] = {}
    known_names = {name for name in binary if names.task_of_label(name)[1]}
    for name, column in binary.items():
        if names.match(name, names.SHOWN_NAMES) == 2:
            left_out[name] = "says whether a candidate was shown"
            continue
        task, is_known = names.task_of_label(name)
        positives, rate = positives_of(column), _rate(column)
        if shown is not None and not is_known and _is_just(column, shown):
            left_out[name] = "CHECK: a label weight? 1 where a candidate was shown, 0 elsewhere"
            continue
        why, check = f"0 or 1, {rate:.1%} of them 1", ""
        if shown is not None and is_known_where(column, shown):
            why += "; known only where shown"
        elif shown is not None and not positives[~shown].any() and (~shown).sum() >= 1000:
            why += "; 1 only where shown"
        elif shown is not None and _rate(column, ~shown) >= 0.2 * _rate(column, shown):
            # Known everywhere and 1 anywhere: a user cannot click on a candidate that is not shown.
            continue
        elif is_known:
            if shown is not None:
                check = f"{int(positives[~shown].sum()):,} are 1 where nothing was shown"
        elif shown is not None:
            left_out[name] = "CHECK: a label or a feature? 1 where nothing was shown, but rarely"
            continue
        elif foretold := _foretold_by(column, scores):
            why += f"; {foretold!r} foretells it"
            check = "or a feature" if not known_names else ""
        elif known_names:
            left_out[name] = "CHECK: a label or a feature? 0 or 1, and its name does not say"
            continue
        else:
            check = "or a feature, to which its name would not speak either"
        if not positives.any():
            check = "never 1 in the sample"
        elif wrong := int((column.known & ~np.isin(column.numbers, (0.0, 1.0))).sum()):
            check = f"{wrong:,} of the sample are neither 0 nor 1, and would be rejected"
        if is_known:
            why = f"its name; {why}"
        if task in guesses:
            task = names.identifier(name)
        guesses[task] = (rate, Guess(name, why, check))
    ordered = sorted(guesses.items(), key=lambda entry: (-entry[1][0], entry[0]))
    return {task: guess for task, (_, guess) in ordered}


def _is_just(column: Column, shown: Bool[np.ndarray, "rows"]) -> bool:
    """True if a binary column is known everywhere, and 1 just where a candidate was shown."""
    positives = positives_of(column)
    either = int((positives | shown).sum())
    return bool(column.known.all()) and int((positives & shown).sum()) >= 0.99 * max(either, 1)


def _rate(column: Column, mask: Bool[np.ndarray, "rows"] | None = None) -> float:
    """The share of 1 among the known values."""
    known = column.known if mask is None else column.known & mask
    return float(positives_of(column)[known].mean()) if known.any() else 0.0


def _foretold_by(column: Column, scores: Mapping[str, Column]) -> str:
    positives = positives_of(column)
    for name, score in scores.items():
        both = column.known
        if evidence.skill(score.numbers[both], positives[both]) > 0.01:
            return name
    return ""


def find_labelled(facts: Facts, labels: Mapping[str, Guess]) -> Bool[np.ndarray, "rows"] | None:
    """True for candidates that have a label; None if all do, or there are no labels."""
    known = [facts.columns[guess.column].known for guess in labels.values()]
    labelled = np.any(known, axis=0) if known else None
    return None if labelled is None or labelled.all() else labelled


def guess_teacher(
    facts: Facts,
    left: Mapping[str, Column],
    labels: Mapping[str, Guess],
    scores: Mapping[str, Column],
    shown: Bool[np.ndarray, "rows"] | None,
    left_out: dict[str, str],
) -> tuple[dict[str, Guess], str]:
    """Task -> the column of its teacher, and the signal that these hold."""
    of_labels = {guess.column for guess in labels.values()}
    rest = {name: column for name, column in left.items() if name not in of_labels}
    skills = {
        (task, name): _skill(facts, guess.column, score, shown)
        for task, guess in labels.items()
        for name, score in scores.items()
    }
    fits = []
    for (task, name), gain in skills.items():
        by_name = names.teacher_match(name, task)
        if by_name or gain > 0.005:
            fits.append((by_name + min(max(gain, 0.0), 0.99), by_name, gain, task, name))
    teacher: dict[str, Guess] = {}
    for _, by_name, gain, task, name in sorted(fits, reverse=True):
        if task in teacher or name in {guess.column for guess in teacher.values()}:
            continue
        # A column that names another task is not for this one.
        if not by_name and any(names.teacher_match(name, other) for other in labels):
            continue
        why = f"{'its name; ' if by_name else ''}in [0, 1]"
        why += f"; foretells {task!r} better than its base rate" if gain > 0 else ""
        check = "" if by_name else "its name does not say so"
        if by_name and -1 < gain <= 0:
            check = f"as probabilities of {task!r}, these numbers do worse than its base rate"
        teacher[task] = Guess(name, why, check)
    if teacher:
        _leave_out_outputs(rest, teacher, scores, skills, left_out)
        return {task: teacher[task] for task in labels if task in teacher}, "probability"
    ranks = _guess_ranks(facts, rest, labels)
    _leave_out_outputs(rest, ranks, scores, skills, left_out)
    return ranks, "rank" if ranks else "probability"


def _skill(
    facts: Facts, label: str, score: Column, shown: Bool[np.ndarray, "rows"] | None
) -> float:
    column = facts.columns[label]
    labelled = column.known if shown is None else column.known & shown
    return evidence.skill(score.numbers[labelled], positives_of(column)[labelled])


def _leave_out_outputs(
    rest: Mapping[str, Column],
    teacher: Mapping[str, Guess],
    scores: Mapping[str, Column],
    skills: Mapping[tuple[str, str], float],
    left_out: dict[str, str],
) -> None:
    """Leaves out other outputs of models: a feature may not tell what a teacher foretells."""
    used = {guess.column for guess in teacher.values()}
    for name in rest:
        if name in used:
            continue
        foretold = [task for (task, other), gain in skills.items() if other == name and gain > 0.01]
        if names.is_output_of_model(name) and rest[name].kind in ("float", "integer"):
            left_out[name] = "CHECK: a model's output? the teacher's are others, if there are any"
        elif name in scores and foretold:
            left_out[name] = f"CHECK: a model's output? it foretells {foretold[0]!r} like one"


def _guess_ranks(
    facts: Facts, rest: Mapping[str, Column], labels: Mapping[str, Guess]
) -> dict[str, Guess]:
    """Task -> positions that a teacher has logged."""
    ranks: dict[str, Guess] = {}
    for name, column in rest.items():
        if not column.is_whole or is_binary(column):
            continue
        share = evidence.permutation_share(column.numbers, facts.request)
        fits = [(names.teacher_match(name, task, is_rank=True), task) for task in labels]
        by_name, task = max(fits, default=(0, ""), key=lambda fit: fit[0])
        if not by_name or share < 0.9 or task in ranks:
            continue
        check = "" if by_name > 1 else "these positions may stand for another task"
        why = f"its name; counts from 0 or 1 in {share:.0%} of requests"
        ranks[task] = Guess(name, why, check)
    return ranks
