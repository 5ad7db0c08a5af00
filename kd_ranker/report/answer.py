"""The answer of a study in a few sentences, with its caveats."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from kd_ranker.evaluation.metrics import TARGET, title_of
from kd_ranker.evaluation.references import LISTS
from kd_ranker.evaluation.results import TEACHER
from kd_ranker.evaluation.saving import CRITERION, SAVINGS
from kd_ranker.report.choices import (
    COVERED,
    best_of_sizes,
    best_with_scores,
    cheapest,
    coverage,
    knows_truth,
    users_at_target,
    users_change,
    users_measure,
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
    parts = [
        _teacher(study, estimates),
        _as_good(estimates, chosen),
        _needs(study, estimates, without),
        _scores(estimates, chosen, without, gap),
        _users(study, estimates, chosen, without),
        _sizes(study, estimates),
    ]
    sentence = " ".join(part for part in parts if part)
    return Answer(f"{study.dataset}: {sentence}", _caveats(study, gap), warning)


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


def _teacher(study: Study, estimates: Estimates) -> str:
    """Return a warning if the final ranker predicts users badly, else ""."""
    chance, below = [], []
    for task in study.tasks:
        measure = f"user_auc/{task}"
        area = estimates.of(TEACHER, measure)
        found = f"AUC {task} {number(area.mean, 3)}"
        if area.mean <= 0.5 or area.low <= 0.5:
            chance.append(found)
        elif study.plain and estimates.gap(TEACHER, study.plain, measure).high < 0:
            below.append(f"{found}, mode none {number(estimates.of(study.plain, measure).mean, 3)}")
    if not (chance or below):
        return ""
    than = "chance" if chance else "a student of mode none"
    return (
        f"The final ranker is not shown to predict users better than {than} "
        f"({'; '.join(chance or below)}), so "
        "the following is about copying it, not about serving users."
    )


def _as_good(estimates: Estimates, chosen: str) -> str:
    """Return a warning if a simple order may need as few candidates as the best student."""
    student = estimates.of(chosen, CRITERION).mean
    as_good = {}
    for name in {"random", *LISTS} & set(estimates.settings):
        gap = estimates.gap(chosen, name, CRITERION)
        if (gap.mean if math.isnan(gap.high) else gap.high) >= 0:
            as_good[name] = estimates.of(name, CRITERION).mean
    if not as_good:
        return ""
    name = min(as_good, key=lambda of: (as_good[of], of))
    kind = "A random order" if name == "random" else f"A list of items without a user, “{name}”,"
    verb = "does" if as_good[name] <= student else "may do"
    return (
        f"{kind} {verb} as well as the best student: it needs {as_good[name]:.0f} candidates per "
        f"request for {_GOAL}, the student {student:.0f}."
    )


def _needs(study: Study, estimates: Estimates, without: str) -> str:
    """Return the candidates to pass today, and without the final ranker's scores."""
    today = {study.incumbent: "today's early ranker", study.plain: "mode none"}
    passed = {
        title: f"{estimates.of(name, CRITERION).mean:.0f}"
        for name, title in today.items()
        if name is not None
    }
    needed = estimates.of(without, CRITERION).mean
    kind = ", a list of items without a user" if without in LISTS else ""
    best = f"“{without}”{kind}"
    if not passed:
        return (
            f"For {_GOAL} the final ranker needs {needed:.0f} candidates per request with the best "
            f"early ranker that needs no scores of the final ranker, {best}."
        )
    named = " and ".join(f"{number} with {title}" for title, number in passed.items())
    named = named.replace(" with", " candidates per request with", 1)
    found = f"For {_GOAL} the final ranker needs {named}."
    if without in today:
        return (
            f"{found} On validation, no other ranker without the final ranker's scores needs fewer."
        )
    return (
        f"{found} With the best early ranker that learns from the log without the final ranker's "
        f"scores, it needs {needed:.0f} ({best})."
    )


def _scores(estimates: Estimates, chosen: str, without: str, gap: Interval) -> str:
    """Return the effect of the final ranker's scores."""
    after = estimates.of(chosen, CRITERION).mean
    if math.isnan(gap.mean):
        return f"No repeat has both “{chosen}” and “{without}”, so their difference is unknown."
    if gap.mean >= 0:
        change = _in_brackets(gap, "more")
        return f"The scores save nothing here: with “{chosen}” it needs {after:.0f}{change}."
    finding = f"it needs {after:.0f} with “{chosen}”{_in_brackets(gap, 'fewer')}"
    if math.isnan(gap.low):
        return f"With the scores {finding}; no interval is known."
    if gap.high >= 0:
        return f"No gain from the scores is shown: {finding}, and the interval includes 0."
    saving = estimates.of(chosen, SAVINGS[0])
    if math.isnan(saving.mean):
        return f"With the scores {finding}."
    unit = "cost" if estimates.study.costs.teacher else "compute"
    others = {
        SAVINGS[1]: (estimates.study.plain, "mode none"),
        SAVINGS[2]: (estimates.study.incumbent, "today's early ranker, taken as free"),
    }
    more = [
        f"against {title} it {_saves(estimates.of(chosen, column))}"
        for column, (name, title) in others.items()
        if name not in (None, without)
    ]
    found = f"With the scores {finding}, which {_saves(saving)} of the funnel's {unit}"
    return f"{found} ({'; '.join(more)})." if more else f"{found}."


def _saves(saving: Interval) -> str:
    return f"saves {_percent(saving)}" if saving.mean >= 0 else f"adds {_percent(saving)}"


def _users(study: Study, estimates: Estimates, chosen: str, without: str) -> str:
    """Return the change for users, with equal numbers passed and with the saving."""
    as_many = estimates.gap(chosen, without, users_measure(study))
    if math.isnan(as_many.mean):
        return "The change for users was not measured."
    if not knows_truth(study):
        return _from_labels(study, estimates, chosen, without, as_many)
    measures = [users_measure(study), *users_at_target(study)]
    found = f"For users: {'; '.join(_changes(estimates, measures, chosen, without))}."
    change = users_change(study, chosen)
    saves = estimates.gap(chosen, without, CRITERION).high < 0
    if not saves or change is None or change.low > -study.margin:
        return found
    if math.isnan(change.low):
        return f"{found} One repeat cannot show whether users pay for the saving."
    ends = " to ".join(f"{100 * end:+.1f}%".replace("-", "−") for end in (change.low, change.high))
    return (
        f"{found} No way with scores surely keeps the value for users within "
        f"{100 * study.margin:g}% of the value without them: on validation, the change of "
        f"this one is {ends}. So users may pay for the saving."
    )


def _from_labels(
    study: Study, estimates: Estimates, chosen: str, without: str, change: Interval
) -> str:
    """Return the direction of the change for users by the log's labels, if they show it."""
    covered = coverage(study, estimates, [chosen, without])
    plan = _live_test(study, estimates, chosen, without)
    if math.isnan(covered):
        return (
            "This log cannot show the effect of the scores on users: candidates that today's "
            f"early ranker left out have no labels.{plan}"
        )
    share = f"{100 * covered:.0f}% of the items that these funnels would show"
    if covered < COVERED:
        return (
            "This log cannot show the effect of the scores on users: it could have labels of only "
            f"{share}.{plan}"
        )
    more = "more" if change.low > 0 else "less" if change.high < 0 else ""
    found = f"users have {more}" if more else "no change for users is shown"
    return f"By the labels of the log, which can cover {share}, {found} (a sign, not a size).{plan}"


def _live_test(study: Study, estimates: Estimates, chosen: str, without: str) -> str:
    """Return the requests that live tests need, see `Estimates.live_test`; "" if unknown."""
    needed = estimates.live_test(chosen, without, _EFFECT)
    if needed is None:
        return ""
    ab, interleaved = (f"{float(f'{number:.2g}'):,.0f}" for number in needed)
    return (
        f" To see a change of {100 * _EFFECT:g}%, an A/B test needs about {ab} requests, an "
        f"interleaved test at most {interleaved}."
    )


def _changes(estimates: Estimates, measures: Sequence[str], chosen: str, without: str) -> list[str]:
    found = []
    for measure in measures:
        gap = estimates.gap(chosen, without, measure)
        if not math.isnan(gap.mean):
            pair = [estimates.of(name, measure) for name in (without, chosen)]
            found.append(_change(measure, pair, gap))
    return found


def _change(measure: str, pair: Sequence[Interval], gap: Interval) -> str:
    """Return a measure without the scores and with them, and the difference."""
    before, after = (number(of.mean, 4) for of in pair)
    if math.isnan(gap.low):
        return f"the {title_of(measure)} goes from {before} to {after}, without an interval"
    verdict = "falls" if gap.high < 0 else "rises" if gap.low > 0 else "shows no difference"
    return f"the {title_of(measure)} {verdict}, from {before} to {after}{_interval(gap, 4)}"


def _sizes(study: Study, estimates: Estimates) -> str:
    """Return the cheapest funnel of all sizes of students, and of those without scores."""
    sizes = best_of_sizes(study)["size"].nunique()
    settings = study.tested.drop_duplicates("setting")
    without = settings.loc[~settings["needs_scores"], "setting"]
    chosen, plain = (cheapest(study, list(of)) for of in (settings["setting"], without))
    if sizes < 2 or chosen is None:
        return ""

    def described(name: str) -> str:
        passed = estimates.of(name, CRITERION).mean
        share = _percent(estimates.cost_share(name, TARGET), digits=1)
        return f"“{name}”, which passes {passed:.0f} candidates at {share}"

    text = (
        f"Of {sizes} sizes, the cheapest funnel for {100 * TARGET:g}% is that of "
        f"{described(chosen)} of the cost of the final ranker on all candidates"
    )
    if plain in (None, chosen):
        return f"{text}."
    return f"{text}; of students that need no scores it is that of {described(str(plain))}."


def _caveats(study: Study, gap: Interval) -> list[str]:
    settings = study.rows["setting"].nunique()
    ways = len(study.chosen)
    covered = {
        "both": f"the test requests and {gap.n} repeats",
        "requests": "the test requests, and not the seeds, since there is only one",
        "repeats": f"{gap.n} repeats, and not the test requests",
        "nothing": "nothing",
    }[gap.covers]
    return [
        f"{settings} settings of {ways} ways were compared on validation; the best of each way was "
        "then read on the test.",
        f"Intervals cover {covered}; the repeats have "
        f"{_count(max(1, study.num_teachers), 'teacher')} and "
        f"{_count(study.tested['data_seed'].nunique(), 'order')} of the data.",
    ]


def _count(number: int, of: str) -> str:
    return f"{number} {of}s" if number > 1 else f"one {of}"


def _in_brackets(gap: Interval, word: str) -> str:
    change = abs(gap.mean)
    sign = -1 if word == "fewer" else 1
    low, high = sorted((sign * gap.low, sign * gap.high))
    ends = "" if math.isnan(gap.low) else f", 95% interval {number(low, 0)} to {number(high, 0)}"
    return f" ({change:.0f} {word}{ends})"


def _percent(share: Interval, digits: int = 0) -> str:
    """Return a share without its sign, in percent, with its interval."""
    sign = -1 if share.mean < 0 else 1
    low, high = sorted((100 * sign * share.low, 100 * sign * share.high))
    text = f"{number(100 * abs(share.mean), digits)}%"
    if math.isnan(low):
        return text
    return f"{text} (95% interval {number(low, digits)} to {number(high, digits)})"


def _interval(gap: Interval, digits: int) -> str:
    if math.isnan(gap.low):
        return ""
    low, high = (number(end, digits, signed=True) for end in (gap.low, gap.high))
    return f" (difference {low} to {high})"
