"""The answer of a study: at most four short sentences, the settings that they are about, and notes.

Each sentence has one subject: the saving by the final ranker's scores, the number of candidates
that must pass, the users, and the next step if the study leaves something open.
"""

import math
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from kd_ranker.evaluation.baselines import LISTS
from kd_ranker.evaluation.metrics.target import CRITERION, PERCENT, at_target
from kd_ranker.evaluation.results import TEACHER
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.intervals import Interval, repeats_to_see
from kd_ranker.reporting.study import Pair, Study
from kd_ranker.reporting.tables import bounds_text, number, percents

# The change for users that a live test is planned for.
_EFFECT = 0.002
# One of this number of requests is to be scored whole, for an interval of the count of this width.
_WHOLE_ONE_IN = 200
_WHOLE_WIDTH = 0.1
# The repeats to add to a study that is undecided for users, and the most to advise.
_MORE_SEEDS = 3
_MOST_SEEDS = 20
_UNDECIDED = "undecided"
_UNKNOWN_NUMBER = "an unknown number of"
_FOR_USERS = at_target("passed_for_users")


class Answer(NamedTuple):
    """The answer for one dataset."""

    dataset: str
    sentences: tuple[str, ...]  # at most four, of at most 20 words each
    settings: dict[str, str]  # the settings that "with the scores" and "without" name
    notes: tuple[str, ...]  # what puts the sentences in doubt
    caveats: tuple[str, ...]  # the comparisons, and the coverage of the intervals

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
    with_scores = study.best_with_scores
    without = study.baseline
    if with_scores is None or without is None:
        return Answer(study.dataset, (_why_unknown(study),), {}, _allowed(study), ())
    saving = _Saving(study, estimates, with_scores, without)
    users = _users(study, estimates, with_scores, without)
    advice = ""
    if saving.is_open:
        advice = _seeds_for_saving(study, estimates, with_scores)
    elif users.is_open:
        advice = _more_seeds(study)
    advice = advice or users.plan
    sentences = [saving.verdict(), saving.counts(), users.sentence, advice]
    settings = {"with the scores": with_scores, "without": without}
    if without in LISTS:
        settings["without"] += ", a list of items without a user"
    if without == study.incumbent:
        settings["without"] += ", today's early ranker"
    pair = Pair(with_scores, without)
    notes = [
        *_scored_part(study, estimates, with_scores),
        *_doubts(study, estimates),
        *_simple_orders(estimates, with_scores),
        *_needed_by_users(study, estimates, pair),
        *_within_kinds(study, estimates, pair),
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
    """Return a change of a share for people: irrelevant, more, less, or undecided.

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
    return f"less {ends}" if change.high < 0 else f"{_UNDECIDED} {ends}"


def _percent(share: float, digits: int) -> str:
    return f"{number(100 * share, digits, signed=True)}%"


def _count(candidates: float) -> str:
    return number(candidates, 0) or _UNKNOWN_NUMBER


def _passed(estimates: Estimates, setting: str) -> str:
    """Return how many candidates must pass, or the bounds that the final ranker's scores leave."""
    return bounds_text(estimates.passed_bounds(setting)) or _UNKNOWN_NUMBER


class _Saving:
    """The saving by the scores: the cost of the funnel, or candidates where no cost is known."""

    def __init__(self, study: Study, estimates: Estimates, with_scores: str, without: str):
        self._study = study
        self._estimates = estimates
        self._with_scores = with_scores
        self._without = without
        self.interval = estimates.saved(with_scores)
        self._unit = study.saved_unit

    @property
    def _has_bounds(self) -> bool:
        """False if the log bounds one of the counts only from below."""
        for ranker in (self._with_scores, self._without):
            if math.isnan(self._estimates.passed_bounds(ranker).high):
                return False
        return True

    @property
    def is_open(self) -> bool:
        """True if repeats could still decide whether the scores save."""
        return (
            self._has_bounds
            and self.interval.n > 0
            and not (self.interval.low > 0 or self.interval.high < 0)
        )

    def verdict(self) -> str:
        """Return the sentence on the saving, with its 95% interval."""
        mean, low, high = percents(self.interval)
        if not mean:
            return "No repeat has both rankers, so what the scores save is unknown."
        if not self._has_bounds:
            return "This log cannot show how much the final ranker's scores save."
        if self._estimates.are_partly_scored:
            return f"If unscored candidates are worthless, {self._verdict_if_worthless()}"
        if not low:
            return f"The saving is {mean}% of the funnel's {self._unit}, without an interval."
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

    def _verdict_if_worthless(self) -> str:
        """Return the same in fewer words, since the assumption comes before it."""
        mean, low, high = percents(self.interval)
        if not low:
            return f"the saving is {mean}% of the funnel's {self._unit}, without an interval."
        if self.interval.low > 0:
            saved = f"{mean}% of the funnel's {self._unit} (95% interval {low} to {high}%)"
            return f"the final ranker's scores save {saved}."
        if self.interval.high < 0:
            more, least, most = percents(self.interval.scaled(-1))
            return (
                f"the scores save nothing: the funnel takes {more}% more {self._unit} "
                f"(95% interval {least} to {most}%)."
            )
        return (
            f"it is undecided whether the scores save {self._unit} (95% interval {low} to {high}%)."
        )

    def counts(self) -> str:
        """Return the sentence on how many candidates must pass: with scores, without, today."""
        incumbent = self._study.incumbent
        with_them = f"{self._passed(self._with_scores)} candidates"
        # Bounds take more words.
        sentence = (
            f"To pass for {PERCENT}: {with_them} with them"
            if self._estimates.are_partly_scored
            else f"For {PERCENT} of the final value, {with_them} must pass with them"
        )
        if incumbent != self._without:
            sentence += f", {self._passed(self._without)} without"
        if incumbent is None:
            return f"{sentence}."
        today = f"{self._passed(incumbent)} with today's ranker"
        best = ", the best without" if incumbent == self._without else ""
        return f"{sentence}, {today}{best}."

    def _passed(self, setting: str) -> str:
        return _passed(self._estimates, setting)


class _Users(NamedTuple):
    """The sentence on users; whether repeats could decide it; and the plan of a live test."""

    sentence: str
    is_open: bool = False
    plan: str = ""


def _users(study: Study, estimates: Estimates, with_scores: str, without: str) -> _Users:
    """Return what users have with the scores, against what they have without."""
    changes = [estimates.gap(with_scores, without, measure) for measure in study.users_measures]
    if not any(change.n for change in changes):
        return _Users("The change for users was not measured.")
    if study.knows_truth:
        at_passed, at_target = changes
        return _users_by_truth(study, at_passed, at_target)
    (change,) = changes
    if study.has_labels_beyond_shown:
        # The margin is relative to what users have without the scores, and a gap of NDCG is not.
        ndcg_without = estimates.of(without, study.users_measures[0]).mean
        text = change_text(change.scaled(1 / ndcg_without), study.config.report.margin)
        sentence = f"For users, by their labels: {text} if both pass {study.passed}."
        return _Users(sentence, text.startswith(_UNDECIDED))
    return _users_by_labels(estimates, with_scores, without, change)


def _users_by_truth(study: Study, at_passed: Interval, at_target: Interval) -> _Users:
    """Return the change in true value, with `funnel.passed` passed and with as many as needed."""
    margin = study.config.report.margin
    text_at_passed = change_text(at_passed, margin)
    text_at_target = change_text(at_target, margin)
    is_open = text_at_passed.startswith(_UNDECIDED) or text_at_target.startswith(_UNDECIDED)
    if at_target.n == 0:
        sentence = f"For users: {text_at_passed} if both pass {study.passed}."
    elif text_at_target == text_at_passed:
        sentence = (
            f"For users: {text_at_passed} if both pass {study.passed}, and if each passes its "
            "number."
        )
    else:
        sentence = (
            f"For users: {text_at_target} if each passes its number, {text_at_passed} if both "
            f"pass {study.passed}."
        )
    return _Users(sentence, is_open)


def _users_by_labels(
    estimates: Estimates, with_scores: str, without: str, change: Interval
) -> _Users:
    """Return the sign of the change in the value of the log's labels, and the plan of a test."""
    plan = ""
    if needed := estimates.live_test(with_scores, without, _EFFECT):
        plan = (
            f"To see a change of {100 * _EFFECT:g}%, an A/B test needs about "
            f"{_two_digits(needed.ab)} requests, an interleaved test at most "
            f"{_two_digits(needed.interleaved)}."
        )
    if reason := estimates.why_unlabeled((with_scores, without)):
        return _Users(f"The log cannot show the effect on users: {reason}.", plan=plan)
    if math.isnan(change.low) or change.low <= 0 <= change.high:
        return _Users("By the log's labels, the change for users is undecided.", True, plan)
    more_or_less = "more" if change.low > 0 else "less"
    sentence = f"By the log's labels, users have {more_or_less}"
    if estimates.labels_are_chosen:
        sentence += ": a sign only, as the size can be several times the truth"
    return _Users(f"{sentence}.", plan=plan)


def _two_digits(requests: float) -> str:
    """Return a count to two digits, as a plan is rough.

    >>> _two_digits(1_234_567.0)
    '1,200,000'
    """
    return f"{float(f'{requests:.2g}'):,.0f}"


def _seeds_for_saving(study: Study, estimates: Estimates, with_scores: str) -> str:
    """Return the number of seeds that would show a saving of the size at hand, and their flags."""
    saved = estimates.saved_over_draws(with_scores)
    if len(saved.repeats) < 2:
        flags = _flags_of_seeds(study, _MORE_SEEDS)
        plan = "How much seeds differ, one seed cannot show"
        return f"{plan}: add `{flags}`." if flags else f"{plan}."
    needed = repeats_to_see(saved, estimates.saved(with_scores).mean)
    if needed is None or needed > _MOST_SEEDS:
        return f"To see so small a difference takes more than {_MOST_SEEDS} seeds."
    # This study was unlucky where it should have been enough.
    needed = max(needed, len(saved.repeats) + 1)
    flags = _flags_of_seeds(study, needed)
    plan = f"To see a difference of this size, use {needed} seeds"
    return f"{plan}: add `{flags}`." if flags else f"{plan}."


def _more_seeds(study: Study) -> str:
    """Return the flags that add repeats to the sweep; "" for a study that is not one sweep's."""
    flags = _flags_of_seeds(study, study.rows["seed"].nunique() + _MORE_SEEDS)
    return f"For {_MORE_SEEDS} more seeds, add `{flags}`." if flags else ""


def _flags_of_seeds(study: Study, number: int) -> str:
    """Return the flags of a sweep with more seeds; "" for a study that is not one sweep's."""
    if len(study.configs) > 1 or study.rows["run"].eq("").any():
        return ""
    seeds = sorted({*study.rows["seed"].astype(int)})
    seeds += range(seeds[-1] + 1, seeds[-1] + 1 + number - len(seeds))
    seeds_text = ",".join(map(str, seeds))
    return f'--config.sweep.seeds="({seeds_text})" --config.sweep.extend=True'


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
        f"The saving is unknown: no measured student {absent}; sweep none and another mode "
        "(sweep.modes)."
    )


def _scored_share(estimates: Estimates, student: str) -> float:
    """Return the share of the test candidates with a value of the final ranker; 1 if unknown."""
    share = estimates.of(student, "scored_share").mean
    # The file has seven digits.
    return 1.0 if math.isnan(share) or share > 1 - 1e-6 else share


def _scored_part(study: Study, estimates: Estimates, student: str) -> Iterator[str]:
    """Yield notes on counts and bounds if the final ranker scored a part of the candidates."""
    share = _scored_share(estimates, student)
    measured = estimates.of(student, "measured_requests").mean
    if measured < estimates.num_requests:
        yield (
            f"The final ranker scored {measured:,.0f} of {estimates.num_requests:,} test requests "
            "whole. Candidates to pass are counted on these."
        )
    if share < 1:
        yield (
            f"The final ranker scored {100 * share:.0f}% of the measured test candidates. The "
            "others count as worth nothing."
        )
    if estimates.are_partly_scored:
        yield (
            "A count has two bounds. The lower one holds if candidates without a score are like "
            "the scored ones, the upper one if they are worth nothing. A ranker that repeats the "
            "choice of the scored candidates, as today's does, has no upper bound."
        )
        needed = estimates.requests_for(student, CRITERION, _WHOLE_WIDTH)
        if needed > 0:
            num_requests = needed * _WHOLE_ONE_IN
            days = num_requests / study.requests_a_day
            duration = "" if math.isnan(days) else f", {_days(days)} at the rate of this log"
            yield (
                "To count exactly, let the final ranker score all candidates of 1 request in "
                f"{_WHOLE_ONE_IN}. About {_two_digits(needed)} such requests give the count to "
                f"±{100 * _WHOLE_WIDTH:g}%: those of {_two_digits(num_requests)} "
                f"requests{duration}."
            )


def _days(days: float) -> str:
    """Return a number of days to two digits, and at least one.

    >>> _days(0.2), _days(1234.0)
    ('1 day', '1,200 days')
    """
    number_of_days = max(1, math.ceil(days)) if days < 10 else days
    return f"{_two_digits(number_of_days)} {'day' if number_of_days == 1 else 'days'}"


def _doubts(study: Study, estimates: Estimates) -> Iterator[str]:
    """Yield a doubt about the final ranker, if it predicts users no better than a student."""
    by_chance = []
    below_plain = []
    for task in study.config.tasks:
        measure = f"user_auc/{task}"
        auc = estimates.of(TEACHER, measure)
        auc_text = f"AUC {task} {number(auc.mean, 3)}"
        if auc.mean <= 0.5 or auc.low <= 0.5:
            by_chance.append(auc_text)
        elif study.plain and estimates.gap(TEACHER, study.plain, measure).high < 0:
            plain_auc = number(estimates.of(study.plain, measure).mean, 3)
            below_plain.append(f"{auc_text}, mode none {plain_auc}")
    if by_chance:
        doubt = f"is not shown to predict users better than chance ({'; '.join(by_chance)})"
    elif below_plain:
        doubt = f"predicts users worse than a student of mode none ({'; '.join(below_plain)})"
    else:
        return
    yield f"The final ranker {doubt}: this is about copying it, not about serving users."


def _simple_orders(estimates: Estimates, student: str) -> Iterator[str]:
    """Yield a note if a random order or a list is not shown to need more than the student."""
    passed_by_order = {}
    for name in sorted({"random", *LISTS} & set(estimates.settings)):
        gap = estimates.gap(student, name, CRITERION)
        highest = gap.mean if math.isnan(gap.high) else gap.high
        if highest >= 0:
            passed_by_order[name] = estimates.of(name, CRITERION).mean
    if passed_by_order:
        best = min(passed_by_order, key=lambda name: passed_by_order[name])
        title = "A random order" if best == "random" else f"A list without a user, {best},"
        does = passed_by_order[best] <= estimates.of(student, CRITERION).mean
        yield (
            f"{title} {'does' if does else 'may do'} as well as the best student: it needs "
            f"{_passed(estimates, best)} candidates, the student {_passed(estimates, student)}."
        )


def _needed_by_users(study: Study, estimates: Estimates, answered: Pair) -> Iterator[str]:
    """Yield how many must pass for users, if labels of more than the shown items show it."""
    if math.isnan(estimates.of(answered.with_scores, _FOR_USERS).mean):
        return
    rankers = {"with the scores": answered.with_scores, "without": answered.without}
    if study.incumbent not in (None, answered.without):
        rankers["with today's ranker"] = str(study.incumbent)
    counts = []
    for words, setting in rankers.items():
        counts.append(f"{_count(estimates.of(setting, _FOR_USERS).mean)} {words}")
    yield (
        f"Candidates to pass for users, for {PERCENT} of the NDCG by labels of the list that "
        f"the final ranker makes: {', '.join(counts)}."
    )


def _within_kinds(study: Study, estimates: Estimates, answered: Pair) -> Iterator[str]:
    """Yield what the scores save within each kind of rankers that the answer does not compare."""
    for kind, pair in study.same_kind.items():
        if pair == answered:
            continue
        difference = estimates.candidates_saved(pair.with_scores, pair.without)
        word = "fewer"
        if difference.mean < 0:
            difference = difference.scaled(-1)
            word = "more"
        mean, low, high = percents(difference)
        interval = f" (95% interval {low} to {high}%)" if low else ""
        with_scores = _passed(estimates, pair.with_scores)
        without = _passed(estimates, pair.without)
        yield (
            f"Among {kind}, the best with scores needs {with_scores} candidates and the best "
            f"without {without}: {mean}% {word}{interval}."
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
        f"No method with scores is shown to keep users within {margin} of their value without: on "
        f"validation, the change of this one is {_percent(change.low, 1)} to "
        f"{_percent(change.high, 1)}. Users may pay for the saving."
    )


def _allowed(study: Study) -> tuple[str, ...]:
    """Return a note on faults of the log that its config accepts."""
    if not study.allowed:
        return ()
    return (f"Accepted by data.allow: {'; '.join(study.allowed)}.",)


def _caveats(study: Study, saving: Interval) -> tuple[str, ...]:
    """Return the comparisons behind the answer, and the coverage of its intervals."""
    covered = {
        "both": f"Intervals cover the test requests and {saving.n} repeats",
        "requests": "Intervals cover the test requests, and not the seeds, since there is only one",
        "repeats": f"Intervals cover {saving.n} repeats, and not the test requests",
        "nothing": "There are no intervals",
    }[saving.covers]
    teachers = _counted(study.num_teachers, "teacher")
    orders = _counted(study.tested["data_seed"].nunique(), "order")
    return (
        *(["These data are simulated; no people took part."] if study.is_simulated else []),
        f"{study.rows['setting'].nunique()} settings of {len(study.chosen)} methods were compared "
        "on validation; the best of each method was then read on the test.",
        f"{covered}; the repeats have {teachers} and {orders} of the data.",
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}s" if count > 1 else f"one {noun}"
