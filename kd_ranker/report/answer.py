"""The answer of a study in a few sentences, with its caveats.

This file has the facts, and `templates/answer.txt` the text.
"""

import math
from typing import Any, NamedTuple

from kd_ranker.evaluation.metrics import TARGET, title_of
from kd_ranker.evaluation.references import LISTS
from kd_ranker.evaluation.results import TEACHER
from kd_ranker.evaluation.saving import CRITERION, SAVINGS
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import Interval
from kd_ranker.report.study import Study
from kd_ranker.report.tables import number
from kd_ranker.requests.templates import templates_of

# The change for users that a live test is planned for.
_EFFECT = 0.002


class Answer(NamedTuple):
    """The answer in a few sentences, and the lines that qualify it.

    The warning is on faults of the data that were allowed, or "".
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
    chosen, without = study.best_with_scores, study.baseline
    facts: dict[str, Any] = {
        "study": study, "chosen": chosen, "without": without, "criterion": CRITERION,
        "target": f"{100 * TARGET:g}%", "effect": _EFFECT, "lists": LISTS, "of": estimates.of,
        "passed": lambda name: (
            number(estimates.of(name, CRITERION).mean, 0) or "an unknown number of"
        ),
        "number": number, "title_of": title_of,
    }  # fmt: skip
    caveats = []
    if chosen is not None and without is not None:
        gap = estimates.gap(chosen, without, CRITERION)
        facts |= _of_rankers(study, estimates, chosen)
        facts |= _of_saving(study, estimates, chosen, without, gap)
        facts |= _of_users(study, estimates, (chosen, without), gap)
        caveats = _caveats(study, gap)
    text = templates_of("kd_ranker.report").get_template("answer.txt").render(facts)
    allowed = f"{study.dataset}: data.allow let pass {'; '.join(study.allowed)}."
    sentence = f"{study.dataset}: {' '.join(text.split())}"
    return Answer(sentence, caveats, allowed if study.allowed else "")


def _of_rankers(study: Study, estimates: Estimates, chosen: str) -> dict[str, Any]:
    """Return doubts about the final ranker, and a simple order that may be as good as a student."""
    chance, below = [], []
    for task in study.config.tasks:
        measure, plain = f"user_auc/{task}", study.plain
        area = estimates.of(TEACHER, measure)
        found = f"AUC {task} {number(area.mean, 3)}"
        if area.mean <= 0.5 or area.low <= 0.5:
            chance.append(found)
        elif plain and estimates.gap(TEACHER, plain, measure).high < 0:
            below.append(f"{found}, mode none {number(estimates.of(plain, measure).mean, 3)}")
    than = "chance" if chance else "a student of mode none"
    as_good = {}
    for name in {"random", *LISTS} & set(estimates.settings):
        gap = estimates.gap(chosen, name, CRITERION)
        if (gap.mean if math.isnan(gap.high) else gap.high) >= 0:
            as_good[name] = estimates.of(name, CRITERION).mean
    simple = min(as_good, key=lambda name: (as_good[name], name), default="")
    return {"doubts": {"than": than, "found": chance or below}, "simple": simple}


def _of_saving(
    study: Study, estimates: Estimates, chosen: str, without: str, gap: Interval
) -> dict[str, Any]:
    """Return the rankers of today, and the saving from the final ranker's scores."""
    today = {study.incumbent: "today's early ranker", study.plain: "mode none"}
    others = {
        "mode none": (study.plain, SAVINGS[1]),
        "today's early ranker, taken as free": (study.incumbent, SAVINGS[2]),
    }
    return {
        "gap": gap,
        "fewer": gap.scaled(-1),
        "today": {name: title for name, title in today.items() if name is not None},
        "saving": estimates.of(chosen, SAVINGS[0]),
        "others": {
            title: saving
            for title, (name, column) in others.items()
            if name not in (None, without) and (saving := estimates.of(chosen, column)).n
        },
    }


def _of_users(
    study: Study, estimates: Estimates, pair: tuple[str, str], gap: Interval
) -> dict[str, Any]:
    """Return the change for users; `paid` is that on validation if they may pay for the saving."""
    truth, paid = study.knows_truth, study.users_change(pair[0])
    if not gap.high < 0 or study.keeps_users(pair[0]):
        paid = None
    live = None if truth else estimates.live_test(*pair, _EFFECT)
    return {
        "truth": truth,
        "users": {measure: estimates.gap(*pair, measure) for measure in study.users_measures},
        "paid": paid,
        "unlabelled": estimates.why_unlabelled(pair),
        "covered": estimates.coverage(pair),
        # Two digits: the plan is rough.
        "live": live and [f"{float(f'{requests:.2g}'):,.0f}" for requests in live],
    }


def _caveats(study: Study, gap: Interval) -> list[str]:
    """Return the comparisons behind the answer, and the coverage of its intervals."""
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
