"""The answer of a study: at most four short sentences, the settings that they are about, and notes.

A sentence says one thing: what the final ranker's scores save, how many candidates must pass, what
users have, and what to do where the study leaves something open.
"""

import math
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from kd_ranker.evaluation.metrics import TARGET
from kd_ranker.evaluation.references import LISTS
from kd_ranker.evaluation.results import TEACHER
from kd_ranker.evaluation.saving import CRITERION
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import Interval
from kd_ranker.report.study import Study
from kd_ranker.report.tables import number, percents

# The change for users that a live test is planned for.
_EFFECT = 0.002
# The repeats that an undecided answer asks for.
_MORE_SEEDS = 3
_TARGET = f"{100 * TARGET:g}%"


class Answer(NamedTuple):
    """The answer to what distillation saves on one dataset."""

    dataset: str
    sentences: tuple[str, ...]  # at most four, of at most 20 words each
    settings: dict[str, str]  # which setting "with the scores" and "without" stand for
    notes: tuple[str, ...]  # what puts the sentences in doubt
    caveats: tuple[str, ...]  # what was compared, and what the intervals cover

    @property
    def sentence(self) -> str:
        """The sentences as one line."""
        return f"{self.dataset}: {' '.join(self.sentences)}"

    @property
    def text(self) -> str:
        """The answer for a terminal: the sentences, then a line per setting and note."""
        width = max(map(len, self.settings), default=0)
        settings = [f"  {role:{width}}  {name}" for role, name in self.settings.items()]
        notes = [f"  note: {note}" for note in self.notes]
        # Settings have no words to break at.
        return "\n".join([_folded(self.sentence), *settings, *map(_folded, notes)])


def answer(study: Study, estimates: Estimates) -> Answer:
    """Return what the funnel needs today, without the final ranker's scores, and with them."""
    with_scores, without = study.best_with_scores, study.baseline
    if with_scores is None or without is None:
        return Answer(study.dataset, (_why_unknown(study),), {}, _allowed(study), ())
    saving = _Saving(study, estimates, with_scores, without)
    users = _users(study, estimates, with_scores, without)
    sentences = [saving.verdict(), saving.counts(), users.sentence]
    if saving.is_open or users.is_open:
        sentences.append(_more_seeds(study))
    elif users.plan:
        sentences.append(users.plan)
    settings = {"with the scores": with_scores, "without": without}
    if without in LISTS:
        settings["without"] += ", a list of items without a user"
    if without == study.incumbent:
        settings["without"] += ", today's early ranker"
    notes = [
        *_bounds(study, estimates),
        *_doubts(study, estimates),
        *_payment(study, with_scores, saving),
        *_allowed(study),
    ]
    return Answer(
        study.dataset,
        tuple(filter(None, sentences)),
        settings,
        tuple(notes),
        _caveats(study, saving.interval),
    )


def _folded(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def change_text(change: Interval, margin: float) -> str:
    """Return a change of a share for people: none that is relevant, more, less, or undecided.

    A change is relevant if it exceeds `margin`. No interval that merely includes 0 is called "no
    difference": it may hide a gain or a loss as large as its ends.

    >>> change_text(Interval(0.0001, -0.0006, 0.0008, 3), 0.002)
    'no relevant difference (within 0.2%)'
    >>> change_text(Interval(0.0035, 0.0022, 0.0047, 7), 0.002)
    'more (+0.22% to +0.47%)'
    >>> change_text(Interval(0.0039, -0.0001, 0.0079, 3), 0.002)
    'undecided (−0.01% to +0.79%)'
    """
    if math.isnan(change.low):
        return f"{_percent(change.mean, 2)}, without an interval"
    if -margin < change.low and change.high < margin:
        return f"no relevant difference (within {100 * margin:g}%)"
    ends = f"({_percent(change.low, 2)} to {_percent(change.high, 2)})"
    if change.low > 0:
        return f"more {ends}"
    return f"less {ends}" if change.high < 0 else f"undecided {ends}"


def _percent(share: float, digits: int) -> str:
    return f"{number(100 * share, digits, signed=True)}%"


def _count(candidates: float) -> str:
    return number(candidates, 0) or "an unknown number of"


class _Saving:
    """What the scores save: the cost of the funnel, or candidates where no cost is known."""

    def __init__(self, study: Study, estimates: Estimates, with_scores: str, without: str):
        self._study, self._estimates = study, estimates
        self._with_scores, self._without = with_scores, without
        self.of_cost = estimates.saving(with_scores, over=without)
        fewer = estimates.fewer(with_scores, without)
        has_cost = not math.isnan(self.of_cost.mean)
        self.interval = self.of_cost if has_cost else fewer
        self._unit = "candidates"
        if has_cost:
            self._unit = "cost" if study.costs.teacher else "compute"

    @property
    def is_open(self) -> bool:
        """True if repeats could still decide whether the scores save."""
        return self.interval.n > 0 and not (self.interval.low > 0 or self.interval.high < 0)

    def verdict(self) -> str:
        """Return the sentence on the saving, with its 95% interval."""
        mean, low, high = percents(self.interval)
        if not mean:
            return "No repeat has both rankers, so what the scores save is unknown."
        if not low:
            return (
                f"One repeat shows a saving of {mean}% of the funnel's {self._unit}, without an "
                "interval."
            )
        if self.interval.low > 0:
            return (
                f"The final ranker's scores save {mean}% of the funnel's {self._unit} "
                f"(95% interval {low} to {high}%)."
            )
        if self.interval.high < 0:
            more, least, most = percents(self.interval.scaled(-1))
            return (
                f"The final ranker's scores save nothing: with them, the funnel takes {more}% more "
                f"{self._unit} (95% interval {least} to {most}%)."
            )
        return (
            f"Whether the final ranker's scores save any of the funnel's {self._unit} is undecided "
            f"(95% interval {low} to {high}%)."
        )

    def counts(self) -> str:
        """Return the sentence on how many candidates must pass: with scores, without, today."""
        passed = {
            name: _count(self._estimates.of(name, CRITERION).mean)
            for name in (self._with_scores, self._without, self._study.incumbent)
            if name is not None
        }
        sentence = (
            f"For {_TARGET} of the final value, {passed[self._with_scores]} candidates must pass "
            f"with them, {passed[self._without]} without"
        )
        if self._study.incumbent is None:
            return f"{sentence}."
        if _scored_share(self._study, self._estimates) < 1:
            return f"{sentence}, and at least {passed[self._study.incumbent]} today."
        if self._study.incumbent == self._without:
            return f"{sentence}, by today's early ranker."
        return f"{sentence}, and {passed[self._study.incumbent]} with today's early ranker."


class _Users(NamedTuple):
    """The sentence on users; whether repeats could decide it; and the plan of a live test."""

    sentence: str
    is_open: bool = False
    plan: str = ""


def _users(study: Study, estimates: Estimates, with_scores: str, without: str) -> _Users:
    """Return what users have with the scores, against what they have without."""
    pair = (with_scores, without)
    margin = study.config.report.margin
    changes = [estimates.gap(*pair, measure) for measure in study.users_measures]
    changes = [change for change in changes if change.n]
    if not changes:
        return _Users("The change for users was not measured.")
    if study.knows_truth:
        texts = [change_text(change, margin) for change in changes]
        is_open = any(text.startswith("undecided") for text in texts)
        at_passed, *at_target = texts
        if not at_target:
            sentence = f"For users: {at_passed}, with {study.passed} passed."
        elif at_target == [at_passed]:
            sentence = f"For users: {at_passed}, with that many passed and with {study.passed}."
        else:
            sentence = (
                f"For users: {at_target[0]} with that many passed, {at_passed} with {study.passed}."
            )
        return _Users(sentence, is_open)
    live = estimates.live_test(*pair, _EFFECT)
    plan = ""
    if live:
        ab_test, interleaved = (f"{float(f'{requests:.2g}'):,.0f}" for requests in live)
        plan = (
            f"To see a change of {100 * _EFFECT:g}%, an A/B test needs about {ab_test} requests, "
            f"an interleaved test at most {interleaved}."
        )
    if reason := estimates.why_unlabelled(pair):
        return _Users(f"The log cannot show the effect on users: {reason}.", plan=plan)
    (change,) = changes
    if math.isnan(change.low) or change.low <= 0 <= change.high:
        return _Users("By the log's labels, the change for users is undecided.", True, plan)
    more_or_less = "more" if change.low > 0 else "less"
    sentence = f"By the log's labels, users have {more_or_less}"
    if estimates.labels_are_chosen:
        sentence += ": a sign only, as the size can be several times the truth"
    return _Users(f"{sentence}.", plan=plan)


def _more_seeds(study: Study) -> str:
    """Return the flags that add repeats to the sweep; "" for a study that is not one sweep's."""
    if len(study.configs) > 1 or study.rows["member"].eq("").any():
        return ""
    seeds = sorted({*study.rows["seed"].astype(int)})
    more = range(seeds[-1] + 1, seeds[-1] + 1 + _MORE_SEEDS)
    named = ",".join(map(str, [*seeds, *more]))
    return (
        f'For three more seeds, add `--config.sweep.seeds="({named})" --config.sweep.extend=True`.'
    )


def _why_unknown(study: Study) -> str:
    if study.rows.empty:
        return (
            "The saving is unknown: the loss of every student stopped being finite; try smaller "
            "learning rates."
        )
    if study.rows[CRITERION].isna().all():
        return (
            "The saving is unknown: no test or validation request holds a value of the final "
            "ranker; check data.teacher and value_weights."
        )
    absent = "learns from the scores" if study.baseline else "needs no scores"
    return (
        f"The saving is unknown: no measured student {absent}; run a sweep with none and another "
        "mode in sweep.modes."
    )


def _scored_share(study: Study, estimates: Estimates) -> float:
    """Return the share of the test candidates with a value of the final ranker; 1 if unknown."""
    share = estimates.of(str(study.best_with_scores), "scored_share").mean
    # The file has seven digits.
    return 1.0 if math.isnan(share) or share > 1 - 1e-6 else share


def _bounds(study: Study, estimates: Estimates) -> Iterator[str]:
    """Yield a note if counts are bounds, since the final ranker scored a part of the candidates."""
    share = _scored_share(study, estimates)
    if share < 1:
        yield (
            f"The final ranker scored {100 * share:.0f}% of the test candidates, and the others "
            "count as worth nothing. So counts are lower bounds for whoever chose the scored ones: "
            "today's early ranker, if it filled the log."
        )


def _doubts(study: Study, estimates: Estimates) -> Iterator[str]:
    """Yield doubts about the final ranker, and simple orders that do as well as a student."""
    by_chance, below_plain = [], []
    for task in study.config.tasks:
        measure = f"user_auc/{task}"
        area = estimates.of(TEACHER, measure)
        found = f"AUC {task} {number(area.mean, 3)}"
        if area.mean <= 0.5 or area.low <= 0.5:
            by_chance.append(found)
        elif study.plain and estimates.gap(TEACHER, study.plain, measure).high < 0:
            of_plain = number(estimates.of(study.plain, measure).mean, 3)
            below_plain.append(f"{found}, mode none {of_plain}")
    if by_chance or below_plain:
        than = "chance" if by_chance else "a student of mode none"
        yield (
            f"The final ranker is not shown to predict users better than {than} "
            f"({'; '.join(by_chance or below_plain)}): this is about copying it, not about "
            "serving users."
        )
    yield from _simple_orders(study, estimates)


def _simple_orders(study: Study, estimates: Estimates) -> Iterator[str]:
    chosen = str(study.best_with_scores)
    as_good = {}
    for name in sorted({"random", *LISTS} & set(estimates.settings)):
        gap = estimates.gap(chosen, name, CRITERION)
        if (gap.mean if math.isnan(gap.high) else gap.high) >= 0:
            as_good[name] = estimates.of(name, CRITERION).mean
    if as_good:
        name = min(as_good, key=lambda name: as_good[name])
        title = "A random order" if name == "random" else f"A list without a user, {name},"
        passed = estimates.of(chosen, CRITERION).mean
        verb = "does" if as_good[name] <= passed else "may do"
        yield (
            f"{title} {verb} as well as the best student: it needs {_count(as_good[name])} "
            f"candidates, the student {_count(passed)}."
        )


def _payment(study: Study, with_scores: str, saving: _Saving) -> Iterator[str]:
    """Yield a note if no setting that saves surely keeps users within the margin."""
    change = study.users_change(with_scores)
    if not saving.interval.low > 0 or change is None or study.keeps_users(with_scores):
        return
    if math.isnan(change.low):
        yield "One repeat cannot show whether users pay for the saving."
        return
    margin = f"{100 * study.config.report.margin:g}%"
    yield (
        f"No way with scores surely keeps users within {margin} of what they have without: on "
        f"validation, the change of this one is {_percent(change.low, 1)} to "
        f"{_percent(change.high, 1)}. Users may pay for the saving."
    )


def _allowed(study: Study) -> tuple[str, ...]:
    """Return a note on faults of the log that its config accepts."""
    return (f"data.allow let pass {'; '.join(study.allowed)}.",) if study.allowed else ()


def _caveats(study: Study, saving: Interval) -> tuple[str, ...]:
    """Return the comparisons behind the answer, and the coverage of its intervals."""
    covered = {
        "both": f"the test requests and {saving.n} repeats",
        "requests": "the test requests, and not the seeds, since there is only one",
        "repeats": f"{saving.n} repeats, and not the test requests",
        "nothing": "nothing",
    }[saving.covers]
    teachers = _counted(study.num_teachers, "teacher")
    orders = _counted(study.tested["data_seed"].nunique(), "order")
    return (
        f"{study.rows['setting'].nunique()} settings of {len(study.chosen)} ways were compared on "
        "validation; the best of each way was then read on the test.",
        f"Intervals cover {covered}; the repeats have {teachers} and {orders} of the data.",
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}s" if count > 1 else f"one {noun}"
