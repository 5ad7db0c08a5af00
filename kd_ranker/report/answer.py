"""The answer of a study in a sentence, and how far it can be trusted."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from kd_ranker.evaluation.metrics import TARGET, title_of
from kd_ranker.evaluation.saving import CRITERION
from kd_ranker.report.choices import (
    best_distilled,
    best_of_sizes,
    cheapest,
    users_curves,
    users_measures,
)
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import Interval
from kd_ranker.report.study import Study
from kd_ranker.report.tables import number

_GOAL = f"{100 * TARGET:g}% of the final value"


class Answer(NamedTuple):
    """One sentence, and the lines that qualify it.

    Attributes:
      sentence: the answer.
      caveats: how it was come by.
      warning: faults of the data that were allowed; "" where there are none.
    """

    sentence: str
    caveats: list[str]
    warning: str = ""

    @property
    def told(self) -> str:
        """The sentence, and the warning on a line of its own."""
        return "\n".join(filter(None, (self.sentence, self.warning)))


def answer(study: Study, estimates: Estimates) -> Answer:
    """The distilled setting that validation chose, what it saves on the test, and for whom.

    It is said to save if the whole 95% interval of its paired difference to the baseline in
    `passed_for_99` is below 0. What users have of it is said in the same sentence, since the final
    value is the teacher's own opinion.
    """
    chosen, undistilled = best_distilled(study), study.baseline
    warning = ""
    if study.allowed:
        warning = f"{study.dataset}: data.allow let pass {'; '.join(study.allowed)}."
    if undistilled is None or chosen is None:
        lacking = "mode none to compare with" if undistilled is None else "a mode that distils"
        return Answer(
            f"{study.dataset}: nothing can be said about what distillation saves: there is no "
            f"measured student of {lacking}; run a sweep whose sweep.modes hold none and another "
            "mode.",
            [],
            warning,
        )
    gap = estimates.gap(chosen, undistilled, CRITERION)
    parts = [
        _saving(estimates, chosen, undistilled, gap),
        _users(study, estimates, chosen),
        _sizes(study, estimates),
    ]
    sentence = " ".join(part for part in parts if part)
    return Answer(f"{study.dataset}: {sentence}", _caveats(study, gap), warning)


def _saving(estimates: Estimates, chosen: str, undistilled: str, gap: Interval) -> str:
    before, after = (estimates.of(name, CRITERION).mean for name in (undistilled, chosen))
    goal = f"for {_GOAL}"
    if math.isnan(gap.mean):
        return (
            f"no repeat has both “{chosen}” and “{undistilled}”, so nothing can be said about what "
            "distillation saves."
        )
    if gap.mean >= 0:
        return (
            f"distillation saves nothing here: with “{chosen}” the final ranker needs {after:.0f} "
            f"candidates a request {goal}, and with “{undistilled}” {before:.0f}"
            f"{_in_brackets(gap, 'more')}."
        )
    finding = (
        f"with “{chosen}” the final ranker needs {after:.0f} candidates a request {goal} instead "
        f"of the {before:.0f} with “{undistilled}”{_in_brackets(gap, 'fewer')}"
    )
    if math.isnan(gap.low):
        return f"{finding}; that is too little data to say anything of chance."
    if gap.high >= 0:
        return f"a saving is not shown: {finding}, and the interval includes 0."
    saving = estimates.of(chosen, "funnel_cost_saving")
    if math.isnan(saving.mean):
        return f"{finding}."
    verb = "saves" if saving.mean >= 0 else "costs another"
    counted = "cost" if estimates.study.costs.teacher else "compute"
    return f"{finding}, which {verb} {_percent(saving)} of the funnel's {counted}."


def _users(study: Study, estimates: Estimates, chosen: str) -> str:
    """The change of what users have: when as many are passed, and when what is saved is saved."""
    assert study.baseline is not None
    pair = (study.baseline, chosen)
    as_many = [
        _change(measure, [estimates.of(name, measure) for name in pair], gap)
        for measure in users_measures(study)
        if not math.isnan((gap := estimates.gap(chosen, study.baseline, measure)).mean)
    ]
    if not as_many:
        return "How much users have of it was not measured."
    told = f"By what users would have: {'; '.join(as_many)}."
    saved = [
        _change(curve, [estimates.at_target(name, TARGET, curve) for name in pair], gap)
        for curve in users_curves(study)
        if not math.isnan(
            (gap := estimates.gap_at_target(chosen, study.baseline, TARGET, curve)).mean
        )
    ]
    if not saved:
        return told
    return f"{told} Where each passes as many as it needs for {_GOAL}, {'; '.join(saved)}."


def _change(measure: str, pair: Sequence[Interval], gap: Interval) -> str:
    """A measure without distillation and with it, and the difference."""
    verdict = "falls" if gap.high < 0 else "rises" if gap.low > 0 else "shows no difference"
    before, after = (number(of.mean, 3) for of in pair)
    return f"the {title_of(measure)} {verdict}, from {before} to {after}{_interval(gap, 3)}"


def _sizes(study: Study, estimates: Estimates) -> str:
    """The cheapest funnel of all sizes of students, and of those that do not distil."""
    sizes = best_of_sizes(study)["size"].nunique()
    settings = study.tested.drop_duplicates("setting")
    undistilled = settings.loc[settings["mode"] == "none", "setting"]
    chosen, without = (cheapest(study, list(of)) for of in (settings["setting"], undistilled))
    if sizes < 2 or chosen is None:
        return ""

    def told(name: str) -> str:
        passed = estimates.of(name, CRITERION).mean
        share = _percent(estimates.cost_share(name, TARGET), digits=1)
        return f"“{name}”, which passes {passed:.0f} candidates at {share}"

    text = (
        f"Of {sizes} sizes, the cheapest funnel for {100 * TARGET:g}% is that of {told(chosen)} of "
        "what the final ranker alone costs"
    )
    if without in (None, chosen):
        return f"{text}."
    return f"{text}; of students that do not distil it is that of {told(str(without))}."


def _caveats(study: Study, gap: Interval) -> list[str]:
    settings = study.rows["setting"].nunique()
    ways = len(study.chosen)
    covered = {
        "both": f"the test requests and {gap.n} repeats",
        "requests": "the test requests, and not the seeds, of which there is one",
        "repeats": f"{gap.n} repeats, and not the test requests",
        "nothing": "nothing",
    }[gap.covers]
    return [
        f"{settings} settings of {ways} ways were compared on validation; the best of each way was "
        "then read on the test.",
        f"Intervals cover {covered}; the repeats have {_several(len(study.teachers), 'teacher')} "
        f"and {_several(study.tested['data_seed'].nunique(), 'order')} of the data.",
    ]


def _several(number: int, of: str) -> str:
    return f"{number} {of}s" if number > 1 else f"one {of}"


def _in_brackets(gap: Interval, word: str) -> str:
    change = abs(gap.mean)
    sign = -1 if word == "fewer" else 1
    low, high = sorted((sign * gap.low, sign * gap.high))
    told = "" if math.isnan(gap.low) else f", 95% interval {number(low, 0)} to {number(high, 0)}"
    return f" ({change:.0f} {word}{told})"


def _percent(share: Interval, digits: int = 0) -> str:
    """A share without its sign, in percent, with its interval."""
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
