"""Roles of the columns of a log: time, stage, position, labels, the values of a teacher."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ibis
import ibis.expr.types as ir
import pandas as pd
from ibis import _

from kd_ranker.batch import Stage
from kd_ranker.sources.logs.guess import names
from kd_ranker.sources.logs.guess.facts import Table
from kd_ranker.sources.logs.guess.ibis_leaks import code_of
from kd_ranker.sources.logs.guess.ids import Log
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

_LEAST_ANSWERS = 30
# The share of a label's uncertainty that a teacher, and another output of a model, takes away.
_TEACHES, _FORETELLS = 0.005, 0.01
_YES = {"1": "shown", "1.0": "shown", "True": "shown"} | dict.fromkeys(
    ("0", "0.0", "False"), "retrieved"
)


@dataclasses.dataclass(frozen=True)
class Roles:
    """The roles of the columns of a log.

    Attributes:
      columns: role -> its column, for the keys of `config.data.columns`.
      time_unit: of an integer time column.
      stages: stage -> its text in the stage column, "" for none; with the reason and a doubt.
      shown, passed: `AT` and `is_so`; None if the log does not tell.
      labels: task -> its column.
      teacher: task -> its column.
      teacher_signal: "probability" or "rank".
      teacher_version: the version that counts.
      left_out: column that has no role and is not for a ranker to read -> the reason.
      facts: those of the log, with `shown_`, see `Cells.where`.
    """

    columns: dict[str, Guess]
    time_unit: Guess
    stages: dict[str, Guess]
    shown: ir.Table | None
    passed: ir.Table | None
    labels: dict[str, Guess]
    teacher: dict[str, Guess]
    teacher_signal: str
    teacher_version: Guess
    left_out: dict[str, str]
    facts: Table

    def used(self) -> set[str]:
        """The columns that have a role."""
        guesses = [*self.columns.values(), *self.labels.values(), *self.teacher.values()]
        return {guess.column for guess in guesses if guess.column}


def find_roles(log: Log, named: Mapping[str, str]) -> Roles:
    """Finds the roles of all other columns; `named` are those that the user has named."""
    columns, facts, table = dict(log.columns), log.facts, log.sample.table
    free = facts.drop([of.column for of in columns.values() if of.column])
    time = best("time", free, named)
    no_time = Guess("", "no column looks like the time of a request", "name the column")
    columns["time"] = time if time.column else no_time
    left = free[~free.of_request & (free.index != time.column)]
    binary = [f.Index for f in left.itertuples() if _may_be_label(f)]
    columns["stage"], stages = _stage(log, left, binary, named)
    binary = [name for name in binary if name != columns["stage"].column]
    shown, passed = _flags(log, columns["stage"].column, stages, facts.loc[binary])
    facts = log.facts.join(log.cells.where(shown).add_prefix("shown_"))
    is_score = (left.kind == "float") & (left.distinct > 2) & ~left.item_constant
    is_score &= left.inside >= 0.95 * left.known
    scores = [name for name in left.index[is_score] if name not in binary]
    skills = _skills(log, binary, scores, shown)
    labels, left_out = _labels(facts.loc[binary], skills, shown is not None)
    of_labels = [guess.column for guess in labels.values()]
    if shown is None and labels and (facts.known < facts.rows)[of_labels].all():
        shown = table.select(AT, is_so=any_known(table, of_labels))
        facts = log.facts.join(log.cells.where(shown).add_prefix("shown_"))
    if not columns["stage"].column and shown is None:
        check = "no candidate lacks its labels: was each of them shown?"
        columns["stage"] = columns["stage"]._replace(check=check)
    rest = facts.loc[[name for name in left.index if name not in of_labels]]
    teacher, signal, outputs = _teacher(rest, labels, skills)
    by_name = ("label_weight", "teacher_version", "teacher_weight", "incumbent", "propensity")
    for role in ("position", *by_name):
        used = [of.column for of in (*columns.values(), *labels.values(), *teacher.values())]
        among = facts.loc[left.index] if role == "position" else facts
        is_asked = bool(teacher) or not role.startswith("teacher")
        columns[role] = best(role, among.drop(used, errors="ignore"), named) if is_asked else NONE
    position = columns["position"].column
    if position and "position" not in named and not columns["stage"].column:
        # Without a stage, candidates with a position count as shown.
        columns["position"] = NONE if facts.shown_outside[position] else columns["position"]
    return Roles(
        columns=columns,
        time_unit=_time_unit(log, time.column),
        stages=stages,
        shown=shown,
        passed=passed,
        labels=labels,
        teacher=teacher,
        teacher_signal=signal,
        teacher_version=_most_frequent(log, columns["teacher_version"].column),
        left_out=left_out | outputs,
        facts=facts,
    )


def any_known(table: ir.Table, columns: Sequence[str]) -> ir.BooleanValue:
    """True where one of some columns of numbers, or more, hold a value."""
    return ibis.coalesce(*(table[name].cast("float64") for name in columns)).notnull()


def _flags(
    log: Log, stage: str, stages: Mapping[str, Guess], binary: Table
) -> tuple[ir.Table | None, ir.Table | None]:
    """The candidates that were shown, and passed, by their stage, or else by what is known."""
    table = log.sample.table
    if stage:
        codes = {of.column: 1 + STAGES.index(name) for name, of in stages.items() if of.column}
        level = ibis.coalesce(code_of(table[stage], codes), 0)
        passed = table.select(AT, is_so=level >= int(Stage.PASSED))
        return table.select(AT, is_so=level == int(Stage.SHOWN)), (
            passed if stages["passed"].column else None
        )
    # Labels are known together; a feature that is sometimes missing is so by itself.
    partly = binary[binary.known < binary.rows]
    if not len(partly):
        return None, None
    together = partly.groupby(["known", "places"]).known.transform("size")
    return table.select(AT, is_so=table[together.idxmax()].notnull()), None


def _time_unit(log: Log, name: str) -> Guess:
    if not name:
        return Guess("s", "there is no time column")
    f = log.facts.loc[name]
    if f.kind == "time":
        return Guess("s", f"without effect: a {log.footers.types[name][0]} says its unit itself")
    span = f"{name!r} goes from {f.low:.0f} to {f.high:.0f}"
    if f.unit:
        return Guess(f.unit, f"{span}: since 1970, this is a day of this century")
    return Guess("s", span, "or 'ms', 'us': these numbers are no dates of this century")


def _may_be_label(f: Any) -> bool:
    """True for zeros and ones; those of items are features of theirs, unless called a label."""
    if f.role or names.is_shown(f.Index):
        return False
    is_called_so = names.task_of_label(f.Index)[1]
    return f.nonsense <= 0.05 if is_called_so else f.is_binary and not f.item_constant


def _values(log: Log, name: str) -> Table:
    """By text of a column and other column, how many rows of the text are `known`, and `ones`."""
    table, cells = log.sample.table, log.cells
    known = table.filter(table[name].notnull())
    value = known[name]
    text = ibis.ifelse(value, "True", "False") if value.type().is_boolean() else value
    each = cells.table.join(known.select(AT, text=text.cast("string")), AT)
    found = each.group_by("text", "column").agg(known=_.count(), ones=(_.number == 1).sum())
    t = cells.engine.fetch(found).to_pandas().fillna(0)
    t["column"] = cells.facts.index[t.column]
    return t.set_index(["text", "column"])[["known", "ones"]].astype(float)


def _rows(values: Table, name: str) -> Any:
    """The rows of each text of a column, the rarest first."""
    return values.known.xs(name, level="column").sort_index().sort_values(kind="stable")


def _stage(
    log: Log, left: Table, binary: Sequence[str], named: Mapping[str, str]
) -> tuple[Guess, dict[str, Guess]]:
    """The stage column, and its text for each stage."""
    found: dict[str, dict] = {}
    meanings: dict[str, tuple[dict[str, str], str, str]] = {}
    for f in left.itertuples():
        is_few = f.kind in ("bool", "integer", "string") and 2 <= f.distinct <= 8
        may_be = is_few and (names.is_shown(f.Index) or not f.is_binary)
        if may_be or f.Index == named.get("stage"):
            values = _values(log, f.Index)
            words = _by_words(_rows(values, f.Index), f)
            told, is_proven = _by_values(values, f.Index, left, binary)
            found[f.Index] = {"words_mean": bool(words), "labelled": is_proven}
            stages, why, check = words or told
            others = {*values.index.levels[0], *["None"] * (f.known < f.rows)} - {*stages.values()}
            listed = ", ".join(map(repr, sorted(others)))
            rest = f"rows of {listed} would be rejected: there are three stages"
            meanings[f.Index] = stages, why, check or rest * bool(others)
    guess = NONE
    if found:
        guess = best("stage", left.loc[[*found]].join(pd.DataFrame(found).T), named)
    if not guess.column:
        return NONE, {}
    stages, *reasons = meanings[guess.column]
    first_, *others_ = STAGES
    texts = {first_: Guess(stages.get(first_, ""), *reasons)}
    return guess, texts | {of: Guess(stages.get(of, ""), "") for of in others_}


def _by_words(rows: Any, f: Any) -> tuple[dict[str, str], str, str] | None:
    """Stages by what values mean, if one means shown and another one a stage before."""
    mean: Callable[[str], str | None] = _YES.get if f.is_binary else names.stage_of_value
    meant = {text: mean(text) for text in reversed(rows.index)}
    stages: dict[str, str] = {}
    for text, stage in meant.items():
        stages |= {stage: text} if stage and stage not in stages else {}
    if "shown" not in stages or len(stages) < 2:
        return None
    if f.is_binary:
        check = "" if f.kind == "bool" else "1 taken for shown, 0 for not shown"
        return stages, "each candidate says only whether it was shown", check
    others = [of for of, stage in meant.items() if stage and of not in stages.values()]
    several = "; ".join(f"{text!r} for {meant[text]}, too" for text in others)
    return stages, "what its values mean", f"{several}: its rows would be rejected" * bool(several)


def _by_values(
    values: Table, name: str, left: Table, binary: Sequence[str]
) -> tuple[tuple[dict[str, str], str, str], bool]:
    """Stages by what is known of the rows of each value: the further they came, the more.

    Returns:
      The stages, the reason, and a doubt; and True if labels prove the value that was shown: all
      that are known, or 1, fall on it by no chance.
    """
    rows, t = _rows(values, name), values.unstack("text").reindex(left.index).fillna(0)
    always = left.index[left.known == left.rows].intersection(binary)
    t.loc[always, "known"] = t.loc[always, "ones"].to_numpy()
    counts = t["known"][rows.index]
    shares = counts / rows
    # Logs have faults: a few rows that know it by mistake do not count.
    richness = shares.where(shares > 0.02, 0).sum()
    of_labels = counts.loc[list(binary)]
    is_all = of_labels.div(of_labels.sum(axis=1), axis=0) >= 0.98
    tests, share = is_all.size, rows / rows.sum()
    proven = of_labels.where(is_all, 0).apply(
        lambda n: n.map(lambda times: is_no_chance(times, share[n.name], tests))
    )
    votes = proven.sum()
    is_proven = bool(len(of_labels)) and votes.max() > 0
    shown = votes.idxmax() if is_proven else ""
    # Of those that are equally rich, the rarer came further.
    order = sorted(rows.index, key=lambda of: (of != shown, -round(richness[of], 1), rows[of]))
    stages = dict(zip(("shown", "passed"), order[:-1], strict=False)) | {"retrieved": order[-1]}
    why, check = f"labels are known, or 1, for {shown!r} alone", ""
    if not is_proven:
        why, check = "by their numbers: the rarer, the narrower", "what each value means"
    elif len(order) > 2 and richness[order[1]] - richness[order[-1]] < 0.5:
        check = "passed and retrieved by their numbers: the fewer are passed"
    return (stages, why, check), is_proven


def _skills(
    log: Log, labels: Sequence[str], scores: Sequence[str], shown: ir.Table | None
) -> dict[tuple[str, str], float]:
    """(label, score) -> what the score is worth as a probability, where candidates were shown.

    It is 1 − BCE / BCE(base rate): negative for numbers that are no probabilities of the label. -1
    stands for too few to tell, and 0 for a gain that may be chance: a likelihood ratio of r in
    favour of what is not so has a chance of at most 1 / r.
    """
    if not labels or not scores:
        return {}
    table, cells = log.sample.table, log.cells
    answers = {name: table[name].cast("float64") for name in labels}
    flags = table.select(
        AT, **{name: ibis.ifelse(y.isin((0.0, 1.0)), y, None) for name, y in answers.items()}
    )
    if shown is not None:
        flags = flags.semi_join(shown.filter(shown.is_so), AT)
    places = cells.facts.index.get_indexer(list(scores)).tolist()
    each = cells.table.filter(cells.table.column.isin(places), cells.table.number.between(0, 1))
    each = each.join(flags, AT)
    p = each.number.clip(1e-6, 1 - 1e-6)
    sums: dict[str, ir.Value] = {}
    for label in labels:
        y = each[label]
        gain = ibis.ifelse(y == 1, p.ln(), (1 - p).ln()).sum(where=y.notnull())
        sums |= {f"all {label}": y.count(), f"yes {label}": y.sum(), f"log {label}": gain}
    found = cells.fetch(each.group_by("column").agg(**sums), "column").fillna(0)
    tests = len(labels) * len(scores)
    return {
        (label, score): _skill(tests, *(row[f"{of} {label}"] for of in ("all", "yes", "log")))
        for score, row in found.iterrows()
        for label in labels
    }


def _skill(tests: int, number: float, yes: float, log_likelihood: float) -> float:
    if min(yes, number - yes) < _LEAST_ANSWERS:
        return -1.0
    base = yes / number
    entropy = -float(number) * (base * math.log(base) + (1 - base) * math.log(1 - base))
    gain = entropy + log_likelihood
    is_chance = 0 < gain <= math.log(tests / LEVEL)
    return 0.0 if is_chance else max(-1.0, float(gain / entropy))


def _labels(
    binary: Table, skills: Mapping[tuple[str, str], float], is_shown_told: bool
) -> tuple[dict[str, Guess], dict[str, str]]:
    """Task -> its column, the most frequent first; and columns to leave out -> the reason."""
    foretold = {label: score for (label, score), skill in skills.items() if skill > _FORETELLS}
    binary = binary.assign(
        match=[2 * names.task_of_label(name)[1] for name in binary.index],
        tests=len(binary),
        foretold=[foretold.get(name, "") for name in binary.index],
    ).sort_values("ones", ascending=False, kind="stable")
    scored = [(*score_of("label", f), f) for f in binary.itertuples()]
    sure = ROLES["label"].sure
    has_sure = any(score >= sure for score, *_rest in scored)
    guesses: dict[str, Guess] = {}
    left_out: dict[str, str] = {}
    for score, why, f in scored:
        outside, wrong = f.shown_ones_outside, f.known - f.zeros - f.ones
        if 0 <= score < sure and (has_sure or is_shown_told):
            what = "a label weight" if is_just_shown(f) else "a label or a feature"
            told = f"0 or 1, {outside:,} of them 1 where nothing was shown"
            left_out[f.Index] = f"CHECK: {what}? {told}"
        elif score >= 0:
            doubts = {
                "never 1 in the sample": not f.ones,
                f"{wrong:,} of the sample are neither 0 nor 1, and would be rejected": wrong,
                f"{outside:,} are 1 where nothing was shown": outside,
                "or a feature": not f.match and not is_shown_told,
            }
            check = next((doubt for doubt, holds in doubts.items() if holds), "")
            task = names.task_of_label(f.Index)[0]
            rate = f"0 or 1, {f.ones / max(f.known, 1):.1%} of them 1"
            guess = Guess(f.Index, "; ".join(filter(None, (why, rate))), check)
            task = names.identifier(f.Index) if task in guesses else task
            guesses[names.unused(task, guesses)] = guess
    return guesses, left_out


def _teacher(
    rest: Table, labels: Mapping[str, Guess], skills: Mapping[tuple[str, str], float]
) -> tuple[dict[str, Guess], str, dict[str, str]]:
    """Task -> the column of its teacher, their signal, and other outputs of models, left out."""
    of_task = {
        (task, name): skills[label.column, name]
        for task, label in labels.items()
        for name in rest.index
        if (label.column, name) in skills
    }
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
    outputs: dict[str, str] = {}
    for f in rest.drop([guess.column for guess in teacher.values()]).itertuples():
        foretold = [of for of in labels if of_task.get((of, f.Index), 0) > _FORETELLS]
        if names.is_output_of_model(f.Index) and f.is_number:
            why = "CHECK: a model's output? the teacher's are others, if there are any"
            outputs[f.Index] = why
        elif foretold:
            outputs[f.Index] = f"CHECK: a model's output? it foretells {foretold[0]!r} like one"
    return teacher, signal, outputs


def _ranks(rest: Table, labels: Mapping[str, Guess]) -> dict[str, Guess]:
    """Task -> positions that a teacher has logged."""
    ranks: dict[str, Guess] = {}
    counting = rest[rest.is_whole & ~rest.is_binary & (rest.request_counting >= 0.9)]
    for name, share in counting.request_counting.items():
        fits = [(names.teacher_match(name, task, is_rank=True), task) for task in labels]
        by_name, task = max(fits, default=(0, ""), key=lambda fit: fit[0])
        if by_name and task not in ranks:
            check = "" if by_name > 1 else "these positions may stand for another task"
            why = f"its name; counts from 0 or 1 in {share:.0%} of requests"
            ranks[task] = Guess(name, why, check)
    return ranks


def _most_frequent(log: Log, name: str) -> Guess:
    if not name:
        return Guess("", "no version is told apart")
    rows = _rows(_values(log, name), name)
    *others, version = rows.index
    share = float(rows[version] / rows.sum())
    listed = ", ".join(map(repr, others[:-4:-1]))
    check = f"or {listed}; what other versions wrote counts for nothing" * (share < 0.9)
    why = f"the version of {share:.0%} of the candidates, out of {len(rows)}"
    return Guess(version, why, check)
