"""The answer of a study in a few sentences, with its caveats."""

import math
from collections.abc import Callable
from typing import NamedTuple

from kd_ranker.evaluation.metrics import TARGET, title_of
from kd_ranker.evaluation.references import LISTS
from kd_ranker.evaluation.results import TEACHER
from kd_ranker.evaluation.saving import CRITERION, SAVINGS
from kd_ranker.report.choices import (
    best_of_sizes,
    best_with_scores,
    cheapest,
    coverage,
    knows_truth,
    users_at_target,
    users_change,
    users_measure,
    why_unlabelled,
)
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import Interval
from kd_ranker.report.study import Study
from kd_ranker.report.tables import number

# The change for users that a live test is planned for.
_EFFECT = 0.002
_GOAL = f"{100 * TARGET:g}% of the final value"


class Answer(NamedTuple):
    """The answer, and the lines that qualify it.

    Attributes:
      sentence: the answer.
      caveats: the comparisons behind it, and the coverage of its intervals.
      warning: faults of the data that were allowed, or "".
    """

    sentence: str
    caveats: list[str]
    warning: str = ""

    @property
    def text(self) -> str:
        """The sentence, and the warning on the next line."""
        return "\n".join(filter(None, (self.sentence, self.warning)))


class _Compared(NamedTuple):
    """A study and the two rankers that its answer compares.

    Attributes:
      study: the study.
      estimates: its estimates.
      chosen: the best setting with scores.
      without: the best ranker without scores.
      gap: the difference of their `passed_for_99`.
    """

    study: Study
    estimates: Estimates
    chosen: str
    without: str
    gap: Interval

    def passed(self, setting: str) -> float:
        """The mean of `passed_for_99`."""
        return self.estimates.of(setting, CRITERION).mean


def answer(study: Study, estimates: Estimates) -> Answer:
    """Return what the funnel needs today, without the final ranker's scores, and with them.

    The answer reports a saving from the scores only if the whole 95% interval of the paired
    difference in `passed_for_99` is below 0. The change for users follows, since the final
    value is only the final ranker's opinion.
    """
    chosen, without = best_with_scores(study), study.baseline
    warning = ""
    if study.allowed:
        warning = f"{study.dataset}: data.allow let pass {'; '.join(study.allowed)}."
    if without is None or chosen is None:
        return Answer(f"{study.dataset}: {_nothing(study)}", [], warning)
    gap = estimates.gap(chosen, without, CRITERION)
    compared = _Compared(study, estimates, chosen, without, gap)
    parts = [part for sentence in _SENTENCES if (part := sentence(compared))]
    return Answer(f"{study.dataset}: {' '.join(parts)}", _caveats(compared), warning)


def _nothing(study: Study) -> str:
    """Return why there is no answer."""
    lead = "the saving from the final ranker's scores is unknown: "
    if study.rows[CRITERION].isna().all():
        return (
            f"{lead}{CRITERION} is unknown for every student, since no test or validation request "
            "holds a value of the final ranker; check data.teacher and value_weights."
        )
    missing = "learns from them" if study.baseline else "needs none of them"
    return (
        f"{lead}there is no measured student that {missing}; run a sweep with none and another "
        "mode in sweep.modes."
    )


def _teacher(of: _Compared) -> str:
    """Return a warning if the final ranker predicts users badly, else ""."""
    chance, below = [], []
    for task in of.study.tasks:
        measure, plain = f"user_auc/{task}", of.study.plain
        area = of.estimates.of(TEACHER, measure)
        found = f"AUC {task} {number(area.mean, 3)}"
        if area.mean <= 0.5 or area.low <= 0.5:
            chance.append(found)
        elif plain and of.estimates.gap(TEACHER, plain, measure).high < 0:
            below.append(f"{found}, mode none {number(of.estimates.of(plain, measure).mean, 3)}")
    if not (chance or below):
        return ""
    than = "chance" if chance else "a student of mode none"
    return (
        f"The final ranker is not shown to predict users better than {than} "
        f"({'; '.join(chance or below)}), so "
        "the following is about copying it, not about serving users."
    )


def _as_good(of: _Compared) -> str:
    """Return a warning if a simple order may need as few candidates as the best student."""
    as_good = {}
    for name in {"random", *LISTS} & set(of.estimates.settings):
        gap = of.estimates.gap(of.chosen, name, CRITERION)
        if (gap.mean if math.isnan(gap.high) else gap.high) >= 0:
            as_good[name] = of.passed(name)
    if not as_good:
        return ""
    name = min(as_good, key=lambda name: (as_good[name], name))
    kind = "A random order" if name == "random" else f"A list of items without a user, “{name}”,"
    verb = "does" if as_good[name] <= of.passed(of.chosen) else "may do"
    return (
        f"{kind} {verb} as well as the best student: it needs {as_good[name]:.0f} candidates per "
        f"request for {_GOAL}, the student {of.passed(of.chosen):.0f}."
    )


def _needs(of: _Compared) -> str:
    """Return the candidates to pass today, and without the final ranker's scores."""
    today = {of.study.incumbent: "today's early ranker", of.study.plain: "mode none"}
    passed = [
        f"{of.passed(name):.0f} with {title}" for name, title in today.items() if name is not None
    ]
    needed, best = of.passed(of.without), f"“{of.without}”"
    if of.without in LISTS:
        best += ", a list of items without a user"
    if not passed:
        return (
            f"For {_GOAL} the final ranker needs {needed:.0f} candidates per request with the best "
            f"early ranker that needs no scores of the final ranker, {best}."
        )
    named = " and ".join(passed).replace(" with", " candidates per request with", 1)
    found = f"For {_GOAL} the final ranker needs {named}."
    if of.without in today:
        return (
            f"{found} On validation, no other ranker without the final ranker's scores needs fewer."
        )
    return (
        f"{found} With the best early ranker that learns from the log without the final ranker's "
        f"scores, it needs {needed:.0f} ({best})."
    )


def _scores(of: _Compared) -> str:
    """Return the effect of the final ranker's scores."""
    gap, after = of.gap, of.passed(of.chosen)
    if math.isnan(gap.mean):
        return (
            f"No repeat has both “{of.chosen}” and “{of.without}”, so their difference is unknown."
        )
    if gap.mean >= 0:
        change = f"{gap.mean:.0f} more{_ends(gap)}"
        return f"The scores save nothing here: with “{of.chosen}” it needs {after:.0f} ({change})."
    fewer = Interval(-gap.mean, -gap.high, -gap.low, gap.n)
    finding = f"it needs {after:.0f} with “{of.chosen}” ({fewer.mean:.0f} fewer{_ends(fewer)})"
    if math.isnan(gap.low):
        return f"With the scores {finding}; no interval is known."
    if gap.high >= 0:
        return f"No gain from the scores is shown: {finding}, and the interval includes 0."
    saving = of.estimates.of(of.chosen, SAVINGS[0])
    if math.isnan(saving.mean):
        return f"With the scores {finding}."
    unit = "cost" if of.study.costs.teacher else "compute"
    others = {
        SAVINGS[1]: (of.study.plain, "mode none"),
        SAVINGS[2]: (of.study.incumbent, "today's early ranker, taken as free"),
    }
    more = "; ".join(
        f"against {title} it {_saves(of.estimates.of(of.chosen, column))}"
        for column, (name, title) in others.items()
        if name not in (None, of.without)
    )
    found = f"With the scores {finding}, which {_saves(saving)} of the funnel's {unit}"
    return f"{found} ({more})." if more else f"{found}."


def _users(of: _Compared) -> str:
    """Return the change for users, with equal numbers passed and with the saving."""
    study, measures = of.study, [users_measure(of.study), *users_at_target(of.study)]
    gaps = {measure: of.estimates.gap(of.chosen, of.without, measure) for measure in measures}
    if math.isnan(gaps[measures[0]].mean):
        return "The change for users was not measured."
    if not knows_truth(study):
        return _from_labels(of, gaps[measures[0]])
    changes = [_change(of, measure, gap) for measure, gap in gaps.items() if gap.n]
    found = f"For users: {'; '.join(changes)}."
    change = users_change(study, of.chosen)
    if not of.gap.high < 0 or change is None or change.low > -study.margin:
        return found
    if math.isnan(change.low):
        return f"{found} One repeat cannot show whether users pay for the saving."
    ends = " to ".join(f"{100 * end:+.1f}%".replace("-", "−") for end in (change.low, change.high))
    return (
        f"{found} No way with scores surely keeps the value for users within "
        f"{100 * study.margin:g}% of the value without them: on validation, the change of "
        f"this one is {ends}. So users may pay for the saving."
    )


def _from_labels(of: _Compared, change: Interval) -> str:
    """Return the direction of the change for users by the log's labels, if they show it."""
    why = why_unlabelled(of.study, of.estimates, [of.chosen, of.without])
    if why:
        found = f"This log cannot show the effect of the scores on users: {why}."
    else:
        share = f"{100 * coverage(of.study, of.estimates, [of.chosen, of.without]):.0f}%"
        more = "more" if change.low > 0 else "less" if change.high < 0 else ""
        direction = f"users have {more}" if more else "no change for users is shown"
        found = (
            f"By the labels of the log, which can cover {share} of the items that these funnels "
            f"would show, {direction} (a sign, not a size)."
        )
    needed = of.estimates.live_test(of.chosen, of.without, _EFFECT)
    if needed is None:
        return found
    ab, interleaved = (f"{float(f'{requests:.2g}'):,.0f}" for requests in needed)
    return (
        f"{found} To see a change of {100 * _EFFECT:g}%, an A/B test needs about {ab} requests, an "
        f"interleaved test at most {interleaved}."
    )


def _change(of: _Compared, measure: str, gap: Interval) -> str:
    """Return a measure without the scores and with them, and the difference."""
    title = title_of(measure)
    before, after = (
        number(of.estimates.of(name, measure).mean, 4) for name in (of.without, of.chosen)
    )
    if math.isnan(gap.low):
        return f"the {title} goes from {before} to {after}, without an interval"
    verdict = "falls" if gap.high < 0 else "rises" if gap.low > 0 else "shows no difference"
    low, high = (number(end, 4, signed=True) for end in (gap.low, gap.high))
    return f"the {title} {verdict}, from {before} to {after} (difference {low} to {high})"


def _sizes(of: _Compared) -> str:
    """Return the cheapest funnel of all sizes of students, and of those without scores."""
    sizes = best_of_sizes(of.study)["size"].nunique()
    settings = of.study.tested.drop_duplicates("setting")
    without = settings.loc[~settings["needs_scores"], "setting"]
    chosen, plain = (cheapest(of.study, list(of_all)) for of_all in (settings["setting"], without))
    if sizes < 2 or chosen is None:
        return ""

    def described(name: str) -> str:
        share = _percent(of.estimates.cost_share(name, TARGET), digits=1)
        return f"“{name}”, which passes {of.passed(name):.0f} candidates at {share}"

    text = (
        f"Of {sizes} sizes, the cheapest funnel for {100 * TARGET:g}% is that of "
        f"{described(chosen)} of the cost of the final ranker on all candidates"
    )
    if plain in (None, chosen):
        return f"{text}."
    return f"{text}; of students that need no scores it is that of {described(str(plain))}."


_SENTENCES: tuple[Callable[[_Compared], str], ...] = (
    _teacher, _as_good, _needs, _scores, _users, _sizes,
)  # fmt: skip


def _caveats(of: _Compared) -> list[str]:
    study, gap = of.study, of.gap
    covered = {
        "both": f"the test requests and {gap.n} repeats",
        "requests": "the test requests, and not the seeds, since there is only one",
        "repeats": f"{gap.n} repeats, and not the test requests",
        "nothing": "nothing",
    }[gap.covers]
    counts = {"teacher": study.num_teachers, "order": study.tested["data_seed"].nunique()}
    teachers, orders = (
        f"{count} {name}s" if count > 1 else f"one {name}" for name, count in counts.items()
    )
    return [
        f"{study.rows['setting'].nunique()} settings of {len(study.chosen)} ways were compared on "
        "validation; the best of each way was then read on the test.",
        f"Intervals cover {covered}; the repeats have {teachers} and {orders} of the data.",
    ]


def _saves(saving: Interval) -> str:
    return f"{'saves' if saving.mean >= 0 else 'adds'} {_percent(saving)}"


def _percent(share: Interval, digits: int = 0) -> str:
    """Return a share without its sign, in percent, with its interval."""
    sign = -100 if share.mean < 0 else 100
    low, high = sorted((sign * share.low, sign * share.high))
    ends = _ends(Interval(sign * share.mean, low, high, share.n), digits)
    return f"{number(sign * share.mean, digits)}%" + (f" ({ends[2:]})" if ends else "")


def _ends(mean: Interval, digits: int = 0) -> str:
    """Return the ends of an interval as ", 95% interval 1 to 2"; "" if it is not known."""
    if math.isnan(mean.low):
        return ""
    return f", 95% interval {number(mean.low, digits)} to {number(mean.high, digits)}"
