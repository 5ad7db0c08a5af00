"""The rules by which a column gets its role: a weight for what holds, and the reason in words.

A role goes to the column of the highest score: that of its name, and the sum of the weights of the
rules that hold. Columns that score nearly as high, and a score too low to be sure, are a doubt.
Other rules are lists, of which the first that holds counts. Each asks of `f`, a row of the table of
`facts`, with what else is known by then.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kd_ranker.sources.logs.guess import names
from kd_ranker.sources.logs.guess.facts import Table
from kd_ranker.sources.logs.leaks import SHOWN, TELLS_LABEL, TELLS_SHOWN

# Of chance, beyond which what is seen proves nothing.
LEVEL = 1e-3
_FEW_NUMBERS, _LARGE = 32, 2**31
# Columns that are called alike but for a number, and so make a vector.
_SERIES = 4
# Shares of a label's uncertainty that are worth a doubt: of any feature, and of one called like
# what is known only afterwards.
_SUSPECT, _SOMEWHAT = 0.2, 0.05


class Guess(NamedTuple):
    """One guess.

    Attributes:
      column: the column, or another value; "" for none.
      why: the reason for the guess.
      check: other columns that it may be, or a doubt; "" if the guess is sure.
    """

    column: str
    why: str
    check: str = ""


NONE = Guess("", "the log seems to have none")


class Role(NamedTuple):
    """A role.

    Attributes:
      by_name: the weight of a name that is like those of the role; twice that, if it is one.
      least: the score that a column must have.
      sure: the score below which a guess is doubtful.
      may_be: what must hold.
    """

    by_name: float
    least: float
    sure: float
    may_be: Callable[[Any], object]


class Rule(NamedTuple):
    """One reason for a role or for a verdict on a feature, or against it.

    Attributes:
      role: the role or verdict.
      weight: added to the score where the rule holds; times the number that `holds` gives.
      holds: what must hold.
      why: the reason, a format of the fact `f`; "" for one that goes without saying.
      check: a doubt.
    """

    role: str
    weight: float
    holds: Callable[[Any], object]
    why: str = ""
    check: str = ""


def _may_be_item(f: Any) -> bool:
    is_once = f.request_repeats <= 0.02 and f.known >= 0.98 * f.rows
    is_position = f.match < 2 and f.request_counting > 0.9
    is_once |= f.Index == names.SYNONYMS["item"][0]
    return f.is_id and not f.of_request and is_once and not is_position


def _may_be_stage(f: Any) -> bool:
    if f.is_binary:
        return names.is_shown(f.Index)
    is_few = f.kind in ("bool", "integer", "string") and 2 <= f.distinct <= 8
    is_told = f.words_mean or f.labelled or f.match > 0
    return is_few and is_told and f.role in ("", "stage")


def _may_be_position(f: Any) -> bool:
    is_count = f.is_whole and f.kind != "bool" and not f.is_binary and f.request_counting >= 0.5
    is_another = names.teacher_match(f.Index, "", is_rank=True) or f.role
    return f.is_whole and (f.match == 2 or (is_count and (f.match > 0 or not is_another)))


def _may_be_weight(f: Any) -> bool:
    return f.match == 2 and f.is_number and f.low >= 0 and not f.item_constant


def _may_be_version(f: Any) -> bool:
    # That of an item or a user is one of something else, of a phone, say.
    is_owned = f.item_constant or (f.of_request and f.user_constant)
    is_few = f.kind in ("bool", "integer", "string") and f.distinct <= 100
    return f.match == 2 and is_few and not is_owned


def _is_one_of_shown(f: Any) -> bool:
    """True if a column is 1 only where a candidate was shown, and by no chance."""
    if f.shown_rows_outside < 1000 or f.shown_ones_outside:
        return False
    share = f.shown_rows_inside / (f.shown_rows_inside + f.shown_rows_outside)
    return is_no_chance(f.shown_ones_inside, share, f.tests)


def is_just_shown(f: Any) -> bool:
    """True if a column is known everywhere, and 1 just where a candidate was shown."""
    either = max(f.shown_rows_inside + f.shown_ones_outside, 1)
    return f.known == f.rows and f.shown_ones_inside >= 0.99 * either


ROLES = {
    "request": Role(2, 2, 4, lambda f: f.match == 2 or (
        f.distinct >= 2 and f.per_value >= 1.5 and f.apart)),
    "request of rows": Role(2, 0, 2, lambda f: f.is_id and (
        f.rows == f.known <= f.distinct / 0.98)),
    "item": Role(2, 1, 2, _may_be_item),
    "user": Role(2, 2, 3, lambda f: f.is_id and not f.is_time and (
        f.distinct >= 2 and (f.match or f.follows))),
    "time": Role(1.5, 3, 4, lambda f: f.kind in ("integer", "float", "time") and (
        f.distinct >= 2 and (f.match or f.is_time))),
    "stage": Role(1.5, 2, 2, _may_be_stage),
    "position": Role(2, 4, 4, _may_be_position),
    "label": Role(1.5, 3, 3, lambda f: True),
    # These only a name can tell; the values may speak against it.
    "label_weight": Role(1, 2, 0, _may_be_weight),
    "teacher_weight": Role(1, 2, 0, _may_be_weight),
    "teacher_version": Role(1, 2, 0, _may_be_version),
    "incumbent": Role(1, 2, 0, lambda f: f.match == 2 and f.is_number),
    "propensity": Role(1, 2, 0, _may_be_weight),
}  # fmt: skip

RULES = (
    Rule("request", 0, lambda f: True,
         "groups of about {f.per_value:,.0f} rows, which share {f.n_follows}"),
    Rule("request", 3, lambda f: f.time, "{f.time!r} among them"),
    Rule("request", 1, lambda f: f.side_by_side),
    Rule("request", 1, lambda f: f.follows),
    Rule("request", -1, lambda f: f.is_time),
    Rule("request of rows", 2, lambda f: True, "different in each of {f.rows:,} rows"),
    Rule("request of rows", -2, lambda f: f.is_time),
    Rule("item", 0, lambda f: not f.request_repeats, "never twice in a request"),
    Rule("item", 0, lambda f: f.request_repeats,
         "never twice in a request, but for {f.request_repeats:.1%}"),
    Rule("item", 0, lambda f: True, "{f.distinct:,} values in {f.known:,} rows"),
    Rule("item", 1, lambda f: min(f.follows, 3), "it fixes {f.n_follows}"),
    Rule("item", 1, lambda f: f.listed, "{f.listed!r} lists such values"),
    Rule("item", -1, lambda f: f.match < 2 and f.distinct > 0.95 * f.known),
    Rule("item", -2, lambda f: f.is_time or f.words > 1.5),
    Rule("user", 0, lambda f: True, "{f.distinct:,} values in {f.known:,} requests"),
    Rule("user", 1, lambda f: min(f.follows, 3), "it fixes {f.n_follows}"),
    Rule("user", 1, lambda f: f.distinct >= max(10, 0.02 * f.known)),
    Rule("time", 2, lambda f: f.is_time, "dates of this century"),
    Rule("time", 2, lambda f: f.of_request, "constant within a request"),
    # A time of an item or a user is when these came to be.
    Rule("time", -2, lambda f: f.item_constant and not f.of_request),
    Rule("time", -2, lambda f: f.user_constant and f.of_request),
    Rule("stage", 0, lambda f: True, "{f.distinct} values, which differ within a request"),
    Rule("stage", 3, lambda f: f.words_mean or f.is_binary),
    Rule("stage", 2, lambda f: f.labelled),
    Rule("position", 0, lambda f: f.request_owners,
         "counts from 0 or 1 in {f.request_counting:.0%} of requests"),
    Rule("position", 2, lambda f: f.request_counting > 0.9),
    Rule("position", 2, lambda f: f.shown_alone, "known where shown"),
    Rule("label", 3, lambda f: f.shown_alone, "known only where shown"),
    Rule("label", 3, _is_one_of_shown, "1 only where shown"),
    Rule("label", 3, lambda f: f.foretold, "{f.foretold!r} foretells it"),
    Rule("label", -2, lambda f: is_just_shown(f) and not f.match),
    Rule("label", -9, lambda f: f.shown_anywhere and not f.shown_alone),
    Rule("label", -9, lambda f: f.series >= _SERIES and not (
        f.match or f.shown_alone or _is_one_of_shown(f))),
)  # fmt: skip


def _most_told(f: Any) -> float:
    return max((share for of, share in f.told.items() if of != SHOWN), default=0.0)


def _is_afterwards(f: Any) -> bool:
    return f.of == "candidate" and names.is_known_afterwards(f.Index)


def _is_called_a_label(f: Any) -> bool:
    return f.of == "candidate" and f.kind != "list" and names.task_of_label(f.Index)[1]


def _is_name_of_its_own(f: Any) -> bool:
    """True if nearly every owner has a value of its own: another id, a title, free text."""
    is_long = names.has_word(f.Index, "identifiers") or max(-f.low, f.high) >= _LARGE
    may_be = f.kind == "string" or (f.is_number and is_long)
    is_each = f.owners >= 50 and f.distinct >= 0.95 * f.owners
    return (f.kind == "string" and f.words > 6) or (may_be and is_each)


FEATURE_RULES = (
    Rule("left out", 0, lambda f: f.against, "{f.against}"),
    Rule("left out", 0, lambda f: f.shown_alone,
         "missing where a candidate was not shown: known only afterwards"),
    Rule("left out", 0, lambda f: f.passed_alone,
         "missing where a candidate was not passed: too late for an early ranker"),
    Rule("left out", 0, lambda f: f.shown_nothing,
         "nearly always the same where a candidate was not shown, and not elsewhere"),
    Rule("left out", 0, lambda f: f.told.get(SHOWN, 0) >= TELLS_SHOWN,
         "tells which candidates were shown: {shown:.0%} of that uncertainty"),
    Rule("left out", 0, lambda f: _most_told(f) >= (
         _SOMEWHAT if _is_afterwards(f) else TELLS_LABEL),
         "tells too much of {most!r} to be known before: {told:.0%} of its uncertainty"),
    Rule("left out", 0, lambda f: _is_afterwards(f) and not f.told,
         "CHECK: known only afterwards? a label, of 0 and 1, may be made of it"),
    Rule("left out", 0, lambda f: _is_called_a_label(f) and f.nonsense,
         "CHECK: called like a label, but not 0 or 1"),
    Rule("left out", 0, _is_name_of_its_own, "{f.distinct:,} values for {owners}: an id or text"),
    Rule("doubt", 0, _is_called_a_label,
         "called like a label, but as often 1 where nothing was shown"),
    # A score that ranked them may be known before, and then is a feature worth having.
    Rule("doubt", 0, lambda f: f.told.get(SHOWN, 0) >= TELLS_LABEL,
         "tells {shown:.0%} of the uncertainty what was shown: is it known before?"),
    Rule("doubt", 0, lambda f: _most_told(f) >= _SUSPECT,
         "tells {told:.0%} of the uncertainty of {most!r}: is it known before?"),
    Rule("doubt", 0, _is_afterwards, "known only afterwards?"),
    Rule("doubt", 0, lambda f: f.of == "candidate" and names.has_word(f.Index, "outputs", "ranks"),
         "whose score? is it known to an early ranker?"),
    Rule("category", 0, lambda f: f.kind == "string" and f.digits and f.distinct > _FEW_NUMBERS,
         "{f.distinct:,} texts", "all are numbers: a column of numbers would have an order"),
    Rule("category", 0, lambda f: f.kind == "string", "{f.distinct:,} texts"),
    Rule("category", 0, lambda f: f.kind == "bool", "{f.distinct:,} truth values"),
    Rule("dense", 0, lambda f: not f.is_whole, "numbers with fractions"),
    Rule("category", 0, lambda f: names.has_word(f.Index, "identifiers"),
         "{f.distinct:,} numbers, names by its name"),
    Rule("dense", 0, lambda f: names.has_word(f.Index, "quantities"),
         "{f.distinct:,} numbers, an amount by its name"),
    Rule("dense", 0, lambda f: f.kind == "float" and f.nonsense <= 0.01, "0 or 1"),
    Rule("dense", 0, lambda f: f.kind == "float" and f.series >= _SERIES,
         "numbers, one of {f.series} columns of a vector by their names"),
    Rule("category", 0, lambda f: f.distinct <= _FEW_NUMBERS, "{f.distinct:,} whole numbers"),
    Rule("category", 0, lambda f: max(-f.low, f.high) >= _LARGE,
         "{f.distinct:,} whole numbers, as long as ids are", "or 'dense', if amounts"),
    Rule("dense", 0, lambda f: True, "{f.distinct:,} whole numbers",
         "or 'category', if these are ids"),
)  # fmt: skip


def first(f: Any, *verdicts: str) -> Guess:
    """The first of `FEATURE_RULES` with one of these verdicts that holds; `NONE` if none does."""
    rule = next((of for of in FEATURE_RULES if of.role in verdicts and of.holds(f)), None)
    if rule is None:
        return NONE
    most = max(((x, of) for of, x in f.told.items() if of != SHOWN), default=(0.0, ""))
    owners = counted(f.owners, "request" if f.of == "context" else f.of)
    words = {"shown": f.told.get(SHOWN, 0), "told": most[0], "most": most[1], "owners": owners}
    return Guess(rule.role, rule.why.format(f=f, **words), rule.check)


def score_of(role: str, f: Any) -> tuple[float, str]:
    """The score of a column for a role, and the reasons in words."""
    score, reasons = ROLES[role].by_name * f.match, ["its name"] * bool(f.match)
    for rule in RULES:
        if rule.role == role and (held := rule.holds(f)):
            score += rule.weight * (held if isinstance(held, int) else 1)
            reasons += [rule.why.format(f=f)] if rule.why else []
    return score, "; ".join(reasons)


def best(
    role: str,
    facts: Table,
    named: Mapping[str, str],
    same: Callable[[str, str], bool] = lambda one, other: False,
) -> Guess:
    """The column that a role goes to; `NONE` if it goes to none.

    Args:
      role: one of `ROLES`.
      facts: on the columns that may have it.
      named: role -> the column that the user has named.
      same: True for two columns that come to the same.
    """
    key = role.partition(" ")[0]
    if key in named:
        return Guess(named[key], "named by you")
    of, fits = ROLES[role], []
    for f in with_matches(facts, key).itertuples():
        score, why = score_of(role, f)
        if of.may_be(f) and score >= of.least:
            # Of equal scores, the more values the better; of names, the first.
            tie = -f.distinct if of.sure else names.place_of(f.Index, key)
            fits.append((-score, tie, f.Index, why))
    if not fits:
        return NONE
    (score, _, column, why), *others = sorted(fits)
    close = [other for low, _, other, _ in others if low <= score + 1 and not same(column, other)]
    check = f"or {', '.join(map(repr, close[:3]))}" if close else ""
    return Guess(column, why, check or "little speaks for it" * (-score < of.sure))


def with_matches(facts: Table, role: str) -> Table:
    """The same with `match`, `names.match` of each name for a role."""
    return facts.assign(match=[names.match(of, names.SYNONYMS[role]) for of in facts.index])


def counted(number: int, noun: str) -> str:
    """A number of things, in words.

    >>> counted(1, "column"), counted(2000, "column")
    ('1 column', '2,000 columns')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def is_no_chance(times: int, share: float, tests: int) -> bool:
    """True if so many independent rows all fall on a share of them by no chance.

    A binomial test at `LEVEL`, divided by the number of tests (Bonferroni): share ^ times is the
    chance that they do.

    >>> is_no_chance(1, 0.3, 80), is_no_chance(20, 0.3, 80)
    (False, True)
    """
    return times * math.log(max(share, 1e-300)) < math.log(LEVEL / max(tests, 1))
