"""Roles of the columns of a log: time, stage, position, labels, the values of a teacher."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import ibis
import ibis.expr.types as ir
from ibis import _

from kd_ranker.batch import Stage
from kd_ranker.sources.logs.guess import names
from kd_ranker.sources.logs.guess.facts import Fact
from kd_ranker.sources.logs.guess.ids import Ids
from kd_ranker.sources.logs.guess.rules import (
    LEVEL,
    NONE,
    ROLES,
    Guess,
    best,
    is_just_shown,
    is_no_chance,
    score_of,
)
from kd_ranker.sources.logs.guess.sample import AT
from kd_ranker.sources.logs.layout import STAGES
from kd_ranker.sources.logs.typed import code_of

_LEAST_ANSWERS = 30
# The share of a label's uncertainty that a teacher, and another output of a model, takes away.
_TEACHES, _FORETELLS = 0.005, 0.01
_YES = dict.fromkeys(("1", "1.0", "True"), "shown") | dict.fromkeys(
    ("0", "0.0", "False"), "retrieved"
)


class Roles(NamedTuple):
    """The roles of the columns of a log.

    Attributes:
      columns: role -> its column, for the keys of `config.data.columns`.
      time_unit: of an integer time column.
      stages: stage -> its text in the stage column, "" for none.
      stages_guess: the reason for these, and a doubt.
      shown, passed: `AT` and `is_so`; None if the log does not tell.
      labels: task -> its column.
      teacher: task -> its column.
      teacher_signal: "probability" or "rank".
      teacher_version: the version that counts.
      left_out: column that has no role and is not for a ranker to read -> the reason.
      facts: of all columns.
    """

    columns: dict[str, Guess]
    time_unit: Guess
    stages: dict[str, str]
    stages_guess: Guess
    shown: ir.Table | None
    passed: ir.Table | None
    labels: dict[str, Guess]
    teacher: dict[str, Guess]
    teacher_signal: str
    teacher_version: Guess
    left_out: dict[str, str]
    facts: dict[str, Fact]

    def used(self) -> set[str]:
        """The columns that have a role."""
        guesses = [*self.columns.values(), *self.labels.values(), *self.teacher.values()]
        return {guess.column for guess in guesses if guess.column}


def find_roles(ids: Ids, named: Mapping[str, str]) -> Roles:
    """Finds the roles of all other columns; `named` are those that the user has named."""
    columns = dict(ids.columns)
    free = {of: f for of, f in ids.facts.items() if of not in {x.column for x in columns.values()}}
    time = best("time", free.values(), named)
    no_time = Guess("", "no column looks like the time of a request", "name the column")
    columns["time"] = time if time.column else no_time
    left = {of: f for of, f in free.items() if of != time.column and not f.of_request}
    binary = {name: f for name, f in left.items() if _may_be_label(f)}
    columns["stage"], stages, stages_guess = _stage(ids, left, binary, named)
    binary.pop(columns["stage"].column, None)
    shown, passed = _flags(ids, columns["stage"].column, stages, binary)
    facts = _with_shown(ids, ids.facts, shown)
    scores = [name for name, f in left.items() if name not in binary and _may_be_score(f)]
    skills = _skills(ids, list(binary), scores, shown)
    left_out: dict[str, str] = {}
    labels = _labels([facts[name] for name in binary], skills, left_out)
    of_labels = [guess.column for guess in labels.values()]
    if shown is None and labels and all(facts[of].known < facts[of].rows for of in of_labels):
        table = ids.sample.table
        shown = table.select(AT, is_so=any_known(table, of_labels))
        facts = _with_shown(ids, facts, shown)
    if not columns["stage"].column and shown is None:
        check = "no candidate lacks its labels: was each of them shown?"
        columns["stage"] = columns["stage"]._replace(check=check)
    rest = [facts[name] for name in left if name not in of_labels]
    teacher, signal = _teacher(rest, labels, skills, left_out)
    for role in ("position", "label_weight", "teacher_version", "teacher_weight"):
        used = {of.column for of in (*columns.values(), *labels.values(), *teacher.values())}
        among = [facts[of] for of in (left if role == "position" else facts) if of not in used]
        is_asked = bool(teacher) or not role.startswith("teacher")
        columns[role] = best(role, among, named) if is_asked else NONE
    position = columns["position"].column
    if position and "position" not in named and not columns["stage"].column:
        where = facts[position].shown
        # Without a stage, candidates with a position count as shown.
        columns["position"] = NONE if where and where.outside else columns["position"]
    return Roles(
        columns=columns,
        time_unit=_time_unit(ids, time.column),
        stages=stages,
        stages_guess=stages_guess,
        shown=shown,
        passed=passed,
        labels=labels,
        teacher=teacher,
        teacher_signal=signal,
        teacher_version=_most_frequent(ids, columns["teacher_version"].column),
        left_out=left_out,
        facts=facts,
    )


def any_known(table: ir.Table, columns: Sequence[str]) -> ir.BooleanValue:
    """True where one of some columns of numbers, or more, hold a value."""
    return ibis.coalesce(*(table[name].cast("float64") for name in columns)).notnull()


def _with_shown(ids: Ids, facts: Mapping[str, Fact], shown: ir.Table | None) -> dict[str, Fact]:
    where = ids.cells.where(shown) if shown is not None else {}
    return {name: f.but(shown=where.get(name)) for name, f in facts.items()}


def _flags(
    ids: Ids, stage: str, stages: Mapping[str, str], binary: Mapping[str, Fact]
) -> tuple[ir.Table | None, ir.Table | None]:
    """The candidates that were shown, and passed, by their stage, or else by what is known."""
    table = ids.sample.table
    if stage:
        codes = {text: 1 + STAGES.index(of) for of, text in stages.items() if text}
        level = ibis.coalesce(code_of(table[stage], codes), 0)
        passed = table.select(AT, is_so=level >= int(Stage.PASSED)) if stages["passed"] else None
        return table.select(AT, is_so=level == int(Stage.SHOWN)), passed
    # Labels are known together; a feature that is sometimes missing is so by itself.
    partly = [f for f in binary.values() if f.known < f.rows]
    if not partly:
        return None, None
    patterns = Counter((f.known, f.places) for f in partly)
    name = max(partly, key=lambda f: patterns[f.known, f.places]).name
    return table.select(AT, is_so=table[name].notnull()), None


def _time_unit(ids: Ids, name: str) -> Guess:
    if not name:
        return Guess("s", "there is no time column")
    f = ids.facts[name]
    if f.kind == "time":
        return Guess("s", f"without effect: a {ids.footers.types[name][0]} says its unit itself")
    span = f"{name!r} goes from {f.low:.0f} to {f.high:.0f}"
    if f.time_unit:
        return Guess(f.time_unit, f"{span}: since 1970, this is a day of this century")
    return Guess("s", span, "or 'ms', 'us': these numbers are no dates of this century")


def _may_be_label(f: Fact) -> bool:
    """True for zeros and ones; those of items are features of theirs, unless called a label."""
    if names.role_of(f.name) or names.is_shown(f.name):
        return False
    is_called_so = names.task_of_label(f.name)[1]
    return f.is_binary(0.05) if is_called_so else f.is_binary() and not f.in_item.is_constant


def _may_be_score(f: Fact) -> bool:
    """True for numbers in [0, 1] that belong to no item."""
    is_fraction = f.kind == "float" and f.distinct > 2 and f.inside >= 0.95 * f.known
    return is_fraction and not f.in_item.is_constant


class _Values(NamedTuple):
    """The values of a column that may be a stage: text -> its rows, the rarest first.

    `known` and `ones` say of each other column how many of these know it, and how many hold 1.
    """

    rows: dict[str, int]
    known: dict[str, Counter[str]]
    ones: dict[str, Counter[str]]


def _values(ids: Ids, name: str) -> _Values:
    table, cells = ids.sample.table, ids.cells
    known = table.filter(table[name].notnull())
    value = known[name]
    text = ibis.ifelse(value, "True", "False") if value.type().is_boolean() else value
    each = cells.table.join(known.select(AT, text=text.cast("string")), AT)
    found = each.group_by("column", "text").agg(known=_.count(), ones=(_.number == 1).sum())
    counts: dict[str, dict[str, Counter[str]]] = {
        key: {of: Counter() for of in cells.columns} for key in ("known", "ones")
    }
    for row in cells.named(found):
        for key, of in counts.items():
            of[row["column"]][row["text"]] = row[key] or 0
    rows = dict(sorted(counts["known"][name].items(), key=lambda of: (of[1], of[0])))
    return _Values(rows, **counts)


def _stage(
    ids: Ids, left: Mapping[str, Fact], binary: Mapping[str, Fact], named: Mapping[str, str]
) -> tuple[Guess, dict[str, str], Guess]:
    """The stage column, its text for each stage, and the reason for these."""
    facts: list[Fact] = []
    meanings: dict[str, tuple[dict[str, str], Guess]] = {}
    others: dict[str, set[str]] = {}
    for name, f in left.items():
        is_few = f.kind in ("bool", "integer", "string") and 2 <= f.distinct <= 8
        if name == named.get("stage") or (is_few and (names.is_shown(name) or not f.is_binary())):
            values = _values(ids, name)
            words = _by_words(values, f, _YES.get if f.is_binary() else names.stage_of_value)
            told, is_proven = _by_values(values, binary, left)
            meanings[name] = words or told
            facts.append(f.but(words_mean=bool(words), labelled=is_proven))
            others[name] = {*values.rows, *["None"] * (f.known < f.rows)}
    guess = best("stage", facts, named)
    if not guess.column:
        return NONE, dict.fromkeys(STAGES, ""), Guess("", "there is no stage column")
    stages, why = meanings[guess.column]
    if (rest := others[guess.column] - {*stages.values()}) and not why.check:
        listed = ", ".join(map(repr, sorted(rest)))
        why = why._replace(check=f"rows of {listed} would be rejected: there are three stages")
    return guess, dict.fromkeys(STAGES, "") | stages, why


def _by_words(
    values: _Values, f: Fact, mean: Callable[[str], str | None]
) -> tuple[dict[str, str], Guess] | None:
    """Stages by what values `mean`, if one means shown and another one a stage before."""
    meant = {text: mean(text) for text in reversed(values.rows)}
    stages: dict[str, str] = {}
    for text, stage in meant.items():
        stages |= {stage: text} if stage and stage not in stages else {}
    if "shown" not in stages or len(stages) < 2:
        return None
    if f.is_binary():
        check = "" if f.kind == "bool" else "1 taken for shown, 0 for not shown"
        return stages, Guess("", "each candidate says only whether it was shown", check)
    others = [of for of, stage in meant.items() if stage and of not in stages.values()]
    several = "; ".join(f"{text!r} for {meant[text]}, too" for text in others)
    check = f"{several}: its rows would be rejected" if several else ""
    return stages, Guess("", "what its values mean", check)


def _by_values(
    values: _Values, binary: Mapping[str, Fact], left: Mapping[str, Fact]
) -> tuple[tuple[dict[str, str], Guess], bool]:
    """Stages by what is known of the rows of each value: the further they came, the more.

    Returns:
      The stages and the reason; and True if labels prove the value that was shown: all that are
      known, or 1, fall on it by no chance.
    """
    richness = dict.fromkeys(values.rows, 0.0)
    votes: Counter[str] = Counter()
    tests, rows = len(binary) * len(values.rows), sum(values.rows.values())
    for name, f in left.items():
        counts = values.ones[name] if name in binary and f.known == f.rows else values.known[name]
        for text, number in values.rows.items():
            # Logs have faults: a few rows that know it by mistake do not count.
            share, of_all = counts[text] / number, counts[text] / max(counts.total(), 1)
            richness[text] += share if share > 0.02 else 0
            is_all = name in binary and of_all >= 0.98
            votes[text] += is_all and is_no_chance(counts[text], number / rows, tests)
    shown = max(values.rows, key=lambda text: votes[text], default="")
    is_proven = votes[shown] > 0
    # Of those that are equally rich, the rarer came further.
    order = sorted(
        values.rows,
        key=lambda of: (not is_proven or of != shown, -round(richness[of], 1), values.rows[of]),
    )
    stages = dict(zip(("shown", "passed"), order[:-1], strict=False)) | {"retrieved": order[-1]}
    why, check = f"labels are known, or 1, for {shown!r} alone", ""
    if not is_proven:
        why, check = "by their numbers: the rarer, the narrower", "what each value means"
    elif len(order) > 2 and richness[order[1]] - richness[order[-1]] < 0.5:
        check = "passed and retrieved by their numbers: the fewer are passed"
    return (stages, Guess("", why, check)), is_proven


def _skills(
    ids: Ids, labels: Sequence[str], scores: Sequence[str], shown: ir.Table | None
) -> dict[tuple[str, str], float]:
    """(label, score) -> what the score is worth as a probability, where candidates were shown.

    It is 1 − BCE / BCE(base rate): negative for numbers that are no probabilities of the label. -1
    stands for too few to tell, and 0 for a gain that may be chance: a likelihood ratio of r in
    favour of what is not so has a chance of at most 1 / r.
    """
    if not labels or not scores:
        return {}
    table, cells = ids.sample.table, ids.cells
    answers = {name: table[name].cast("float64") for name in labels}
    flags = table.select(
        AT, **{name: ibis.ifelse(y.isin((0.0, 1.0)), y, None) for name, y in answers.items()}
    )
    if shown is not None:
        flags = flags.semi_join(shown.filter(shown.is_so), AT)
    places = [place for place, name in enumerate(cells.columns) if name in scores]
    each = cells.table.filter(cells.table.column.isin(places), cells.table.number.between(0, 1))
    each = each.join(flags, AT)
    p = each.number.clip(1e-6, 1 - 1e-6)
    sums: dict[str, ir.Value] = {}
    for label in labels:
        y = each[label]
        log = ibis.ifelse(y == 1, p.ln(), (1 - p).ln()).sum(where=y.notnull())
        sums |= {f"all {label}": y.count(), f"yes {label}": y.sum(), f"log {label}": log}
    found = {row["column"]: row for row in cells.named(each.group_by("column").agg(**sums))}
    tests = len(labels) * len(scores)
    return {
        (label, score): _skill(tests, *(row[f"{of} {label}"] or 0 for of in ("all", "yes", "log")))
        for score, row in found.items()
        for label in labels
    }


def _skill(tests: int, number: int, yes: float, log_likelihood: float) -> float:
    if min(yes, number - yes) < _LEAST_ANSWERS:
        return -1.0
    base = yes / number
    entropy = -number * (base * math.log(base) + (1 - base) * math.log(1 - base))
    gain = entropy + log_likelihood
    is_chance = 0 < gain <= math.log(tests / LEVEL)
    return 0.0 if is_chance else max(-1.0, gain / entropy)


def _labels(
    binary: Sequence[Fact], skills: Mapping[tuple[str, str], float], left_out: dict[str, str]
) -> dict[str, Guess]:
    """Task -> its column, the most frequent first."""
    foretold = {label: score for (label, score), skill in skills.items() if skill > _FORETELLS}
    looked = [
        f.but(
            match=2 * names.task_of_label(f.name)[1],
            tests=len(binary),
            foretold=foretold.get(f.name, ""),
        )
        for f in binary
    ]
    scored = [(*score_of("label", f), f) for f in looked]
    sure = ROLES["label"].sure
    has_sure = any(score >= sure for score, *_rest in scored)
    guesses: dict[str, tuple[float, Guess]] = {}
    for score, why, f in scored:
        outside = f.shown.ones_outside if f.shown else 0
        if 0 <= score < sure and (has_sure or f.shown):
            what = "a label weight" if is_just_shown(f) else "a label or a feature"
            left_out[f.name] = (
                f"CHECK: {what}? 0 or 1, {outside:,} of them 1 where nothing was shown"
            )
        elif score >= 0:
            task, rate = names.task_of_label(f.name)[0], f.ones / max(f.known, 1)
            wrong = f.known - f.zeros - f.ones
            doubts = (
                (not f.ones, "never 1 in the sample"),
                (wrong, f"{wrong:,} of the sample are neither 0 nor 1, and would be rejected"),
                (outside, f"{outside:,} are 1 where nothing was shown"),
                (not f.match and not f.shown, "or a feature"),
            )  # fmt: skip
            check = next((doubt for holds, doubt in doubts if holds), "")
            of_ones = f"0 or 1, {rate:.1%} of them 1"
            guess = Guess(f.name, "; ".join(filter(None, (why, of_ones))), check)
            guesses[names.identifier(f.name) if task in guesses else task] = (rate, guess)
    ordered = sorted(guesses.items(), key=lambda entry: (-entry[1][0], entry[0]))
    return {task: guess for task, (_rate, guess) in ordered}


def _teacher(
    rest: Sequence[Fact],
    labels: Mapping[str, Guess],
    skills: Mapping[tuple[str, str], float],
    left_out: dict[str, str],
) -> tuple[dict[str, Guess], str]:
    """Task -> the column of its teacher, and the signal that these hold."""
    of_task = {(task, f.name): skills[label.column, f.name] for task, label in labels.items()
               for f in rest if (label.column, f.name) in skills}  # fmt: skip
    fits = [
        (by_name + min(max(skill, 0), 0.99), by_name, skill, task, name)
        for (task, name), skill in of_task.items()
        if (by_name := names.teacher_match(name, task)) or skill > _TEACHES
    ]
    teacher: dict[str, Guess] = {}
    for _fit, by_name, skill, task, name in sorted(fits, reverse=True):
        is_taken = task in teacher or name in {guess.column for guess in teacher.values()}
        # A column that names another task is not for this one.
        if is_taken or (not by_name and any(names.teacher_match(name, of) for of in labels)):
            continue
        why = "its name; " * bool(by_name) + "in [0, 1]"
        why += f"; foretells {task!r} better than its base rate" * (skill > 0)
        check = "" if by_name else "its name does not say so"
        if by_name and -1 < skill <= 0:
            check = f"as probabilities of {task!r}, these numbers do worse than its base rate"
        teacher[task] = Guess(name, why, check)
    signal = "probability" if teacher else "rank"
    teacher = {task: teacher[task] for task in labels if task in teacher} or _ranks(rest, labels)
    used = {guess.column for guess in teacher.values()}
    for f in rest:
        foretold = [of for of in labels if of_task.get((of, f.name), 0) > _FORETELLS]
        if f.name not in used and names.is_output_of_model(f.name) and f.is_number:
            why = "CHECK: a model's output? the teacher's are others, if there are any"
            left_out[f.name] = why
        elif f.name not in used and foretold:
            left_out[f.name] = f"CHECK: a model's output? it foretells {foretold[0]!r} like one"
    return teacher, signal


def _ranks(rest: Sequence[Fact], labels: Mapping[str, Guess]) -> dict[str, Guess]:
    """Task -> positions that a teacher has logged."""
    ranks: dict[str, Guess] = {}
    for f in rest:
        fits = [(names.teacher_match(f.name, task, is_rank=True), task) for task in labels]
        by_name, task = max(fits, default=(0, ""), key=lambda fit: fit[0])
        counting = f.in_request.counting
        is_rank = f.is_whole and not f.is_binary() and counting >= 0.9
        if by_name and is_rank and task not in ranks:
            check = "" if by_name > 1 else "these positions may stand for another task"
            why = f"its name; counts from 0 or 1 in {counting:.0%} of requests"
            ranks[task] = Guess(f.name, why, check)
    return ranks


def _most_frequent(ids: Ids, name: str) -> Guess:
    if not name:
        return Guess("", "no version is told apart")
    rows = _values(ids, name).rows
    *others, version = rows
    share = rows[version] / sum(rows.values())
    check = (
        f"or {', '.join(map(repr, others[:-4:-1]))}; what other versions wrote counts for nothing"
    )
    why = f"the version of {share:.0%} of the candidates, out of {len(rows)}"
    return Guess(version, why, check * (share < 0.9))
