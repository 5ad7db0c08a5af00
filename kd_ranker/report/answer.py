"""The answer of a study in a sentence, and how far it can be trusted."""

import math
from typing import NamedTuple

from kd_ranker.evaluation.saving import CRITERION, baseline, best, by_repeat, settings_of
from kd_ranker.report.choices import CrossValidated, cross_validated
from kd_ranker.report.intervals import Interval, difference, interval
from kd_ranker.report.study import Study
from kd_ranker.report.tables import number


class Answer(NamedTuple):
    """One sentence, and the lines that qualify it."""

    sentence: str
    caveats: list[str]


def answer(study: Study) -> Answer:
    """The setting that needs the fewest candidates passed, and the saving of that.

    The setting is the best by `choices.best`. It is said to save if the whole 95% interval of its
    paired difference to the baseline in `passed_for_99` is below 0, and if the cross-validated
    estimate, which has not seen what it is read on, saves too.
    """
    rows = study.rows
    undistilled = baseline(rows)
    if undistilled is None:
        return _unanswered(study, "no measured student of mode none to compare with")
    distilled = settings_of(rows, distilled=True)
    chosen = best(rows, distilled)
    if chosen is None:
        return _unanswered(study, "no measured student that distils")
    table = by_repeat(rows, CRITERION)
    before, after = (interval(table[name].to_numpy()) for name in (undistilled, chosen))
    gap = difference(table, chosen, undistilled)
    if not gap.n:
        return _unanswered(study, f"no repeat that has both {chosen} and {undistilled}")
    saving = interval(by_repeat(rows, "funnel_cost_saving")[chosen].to_numpy())
    validated = cross_validated(rows)
    sentence = _sentence(undistilled, chosen, before, after, gap, saving, validated)
    return Answer(f"{study.dataset}: {sentence}", _caveats(len(distilled), gap, validated))


def _unanswered(study: Study, why: str) -> Answer:
    return Answer(
        f"{study.dataset}: nothing can be said about what distillation saves: there is {why}; run "
        "a sweep whose sweep.modes hold none and another mode.",
        [],
    )


def _sentence(
    undistilled: str, chosen: str, before: Interval, after: Interval, gap: Interval,
    saving: Interval, validated: CrossValidated | None,
) -> str:  # fmt: skip
    if gap.mean >= 0:
        return (
            "no distilled student lets the final ranker do with fewer candidates for 99% of the "
            f"final value: the best of them, “{chosen}”, needs {after.mean:.0f}, mode "
            f"{undistilled} {before.mean:.0f}."
        )
    finding = (
        f"with “{chosen}” the final ranker needs {after.mean:.0f} candidates a request for 99% of "
        f"the final value instead of the {before.mean:.0f} of mode {undistilled}"
    )
    compute = ""
    if saving.n:
        verb = "saves" if saving.mean >= 0 else "costs another"
        compute = f", which {verb} {_percent(saving)} of the funnel's compute"
    if gap.n < 2:
        return f"{finding}{compute}; that is one repeat, which says nothing of chance."
    fewer = f"{-gap.mean:.0f} fewer, {_range(-gap.high, -gap.low)}"
    if gap.high >= 0:
        return (
            f"a saving is not shown: {finding}, but the interval of that difference includes 0 "
            f"({fewer})."
        )
    if validated and validated.fewer <= 0:
        return (
            f"a saving is not shown: {finding} ({fewer}), but a setting that was chosen on other "
            "repeats needs no fewer."
        )
    return f"{finding} ({fewer}){compute}."


def _caveats(compared: int, gap: Interval, validated: CrossValidated | None) -> list[str]:
    repeats = f"{gap.n} repeats" if gap.n > 1 else "one repeat"
    lines = [
        f"{compared} distilled settings were compared on the same test requests over {repeats}; "
        "the best of several looks better than it is."
        if compared > 1
        else f"One distilled setting was measured, over {repeats}."
    ]
    if validated is None:
        lines.append(
            "A cross-validated estimate needs at least two repeats: give more sweep.seeds."
        )
    else:
        settings = list(dict.fromkeys(validated.chosen))
        saving = (
            ""
            if math.isnan(validated.saving)
            else f" and a saving of {number(100 * validated.saving, 0)}%"
        )
        lines.append(
            "Cross-validated over repeats (the setting is chosen on the other repeats and read on "
            f"the one left out, {len(validated.chosen)} times): {validated.passed:.0f} candidates, "
            f"{_more_or_fewer(validated.fewer)} than without distillation{saving}. "
            f"Chosen: {'; '.join(settings)}. All repeats share the test requests; how far these "
            "stand for others is not covered."
        )
    return lines


def _more_or_fewer(fewer: float) -> str:
    return f"{fewer:.0f} fewer" if fewer >= 0 else f"{-fewer:.0f} more"


def _percent(share: Interval) -> str:
    """A share without its sign, in percent, with its interval."""
    sign = -1 if share.mean < 0 else 1
    low, high = sorted((100 * sign * share.low, 100 * sign * share.high))
    text = f"{number(100 * abs(share.mean), 0)}%"
    return text if math.isnan(low) else f"{text} ({_range(low, high)})"


def _range(low: float, high: float) -> str:
    return f"95% interval {number(low, 0)} to {number(high, 0)}"
