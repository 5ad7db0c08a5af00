"""Claims about distilling into an early ranker, tested on a study.

A claim is about one number. It *holds* if the whole 95% interval of that number lies on the claimed
side of the threshold, *does not hold* if the whole interval lies on the other side, and is
*undecided* if the interval includes the threshold or there is too little data for one. It is *not
measured* if the study lacks the numbers.

Numbers are of the test split, at the setting that validation chose for each way (see
`saving.best_of_ways`), with its serving choice; claim (c) compares all settings. Differences are
paired, and against the best on validation of the ranker without scores of the final ranker and the
lists of items that need them. A student that costs
more than `EARLY` of the final ranker per candidate is no early ranker, and no claim holds for it.
So no claim holds for a list of items, for an exact copy of the teacher, or for a useless student.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from kd_ranker.evaluation.metrics import TARGET
from kd_ranker.evaluation.references import NEED_SCORES
from kd_ranker.evaluation.results import TEACHER, setting_columns
from kd_ranker.evaluation.saving import CRITERION, best, by_repeat, of_split
from kd_ranker.report import intervals
from kd_ranker.report.choices import (
    COVERED,
    coverage,
    knows_truth,
    users_at_target,
    users_measure,
)
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import EQUIVALENCE_CONFIDENCE, NOTHING, Interval, interval
from kd_ranker.report.study import Study

MISALIGNED_BELOW = 0.25
# The most that an early ranker may cost per candidate, over the final ranker: the method's figure.
EARLY = 0.05
# A difference of mean tau that counts as none.
TAU_MARGIN = 0.01
# Of whom the teacher speaks in training.
REGIME = "teacher.stage"

Side = Literal["below", "above"]
Verdict = Literal["holds", "does not hold", "equivalent", "undecided", "not measured"]
Line = dict[str, object]

COLUMNS = (
    *("dataset", "claim", "statement", "setting", "measure"),
    *("mean", "low", "high", "n", "threshold", "verdict", "remark"),
)

RULES = {
    "a": "alignment ratio of plain mode none against 1/4, on shown items that the teacher knows: "
    "user BCE of the student less that of the teacher, over the teacher KL; and as the method's "
    "post has it, over the cross entropy. Both must predict users better than chance",
    "b": "Kendall's tau to the teacher's order less that of the best without scores, or list, "
    "paired",
    "c": "tau of shared less that of aux, paired, all else equal, averaged over all settings",
    "d": "the saving in the funnel's cost against the same, with the student's cost",
    "e": "survival, and passed for 99%, less those of the same, paired",
    "f": "what users have less what they have with the same, paired, with as many "
    "passed, and with as many as each needs for 99%; only if fewer need passing",
    "g": "passed for 99% less that of the same, paired, at the best setting of each "
    "way that learns from scores, and of each regime (of whom the teacher speaks in training) if "
    "there are several",
}


class _Change(NamedTuple):
    """A claim about a change that each mode makes.

    Attributes:
      claim: a key of `RULES`.
      statement: with a place for the mode.
      measure: a column of `results.csv`; a saving is a change already.
      side: on which the change lies.
    """

    claim: str
    statement: str
    measure: str
    side: Side


def verdict(mean: Interval, side: Side, threshold: float) -> Verdict:
    """The verdict on a claimed side of a threshold.

    >>> verdict(Interval(0.2, 0.18, 0.22, 3), "below", 0.25)
    'holds'
    >>> verdict(Interval(0.2, 0.1, 0.3, 3), "below", 0.25)
    'undecided'
    """
    if mean.n == 0:
        return "not measured"
    below, above = mean.high < threshold, mean.low > threshold
    if not (below or above):
        return "undecided"
    return "holds" if below == (side == "below") else "does not hold"


def claims(study: Study, estimates: Estimates) -> pd.DataFrame:
    """Every claim on one study: `COLUMNS`, one row per number."""
    tests: list[Callable[[Study, Estimates], Iterator[Line]]] = [
        misaligned, changes, shared_closer, users_keep, fewer_by_way,
    ]  # fmt: skip
    lines = [line for test in tests for line in test(study, estimates)]
    frame = pd.DataFrame(lines, columns=list(COLUMNS)).sort_values("claim", kind="stable")
    return frame.assign(dataset=study.dataset).reset_index(drop=True)


def misaligned(study: Study, estimates: Estimates) -> Iterator[Line]:
    """(a) Plain mode `none` predicts users almost like the teacher, and does not follow it.

    The number is `alignment_ratio` on the shown items, and the claim that it is below 1/4. It is
    undefined for a student that agrees with the teacher. Below 0, the student predicts users better
    than the teacher, which is no misalignment of a good student.
    """
    statement = (
        "Without distillation the student predicts users nearly as well as the teacher, and not "
        "the teacher (alignment ratio below 1/4)"
    )
    for measure in ("alignment_ratio", "alignment_ratio_bce"):
        if study.plain is None:
            yield _not_measured("a", statement, measure, "there is no student of mode none")
            continue
        mean = estimates.of(study.plain, measure)
        line = _line("a", statement, study.plain, measure, mean, "below", MISALIGNED_BELOW)
        if mean.n == 0:
            line["remark"] = "undefined: the student agrees with the teacher on the shown items"
        elif by_chance := _no_better_than_chance(study, estimates):
            line |= {"verdict": "does not hold", "remark": by_chance}
        elif mean.high < 0:
            line["verdict"] = "does not hold"
            line["remark"] = "below 0: the student predicts users better than this teacher does"
        yield line


def _no_better_than_chance(study: Study, estimates: Estimates) -> str:
    """A remark if mode `none` or the teacher predicts some task by chance; "" if neither does."""
    for name in (str(study.plain), TEACHER):
        for task in study.tasks:
            area = estimates.of(name, f"user_auc/{task}")
            if area.low <= 0.5:
                return f"AUC {task} of {name} includes 0.5: it predicts users by chance"
    return ""


def changes(study: Study, estimates: Estimates) -> Iterator[Line]:
    """(b), (d), (e) The changes that the best setting of each mode with scores makes."""
    passed, goal = study.passed, f"{100 * TARGET:g}% of the final value"
    rival = _rival(study)
    for change in (
        _Change("b", "Mode {mode} brings the order nearer to the teacher's",
                "teacher_tau", "above"),
        _Change("d", "Mode {mode} saves cost at " + goal, "funnel_cost_saving", "above"),
        _Change("e", f"Mode {{mode}} lets more of the teacher's own top survive at {passed} passed",
                f"survival@{passed}", "above"),
        _Change("e", "With mode {mode} fewer candidates need passing for " + goal,
                CRITERION, "below"),
    ):  # fmt: skip
        for mode in ("aux", "shared"):
            statement = change.statement.format(mode=mode)
            chosen = _best_of_mode(study, mode)
            if rival is None or chosen is None:
                why = _lacking(study, mode)
                yield _not_measured(change.claim, statement, change.measure, why)
                continue
            mean = _change(estimates, chosen, rival, change.measure)
            line = _line(change.claim, statement, chosen, change.measure, mean, change.side, 0.0)
            yield _only_early(_ratio(study, estimates, chosen), line)


def shared_closer(study: Study, estimates: Estimates) -> Iterator[Line]:
    """(c) `shared` comes closer to the teacher's order than `aux`, with either of its heads.

    The number is `teacher_tau` of `shared` less that of `aux` in the same repeat and with the same
    loss, weight and other keys, averaged over these within a repeat, so that nothing is chosen. It
    is read on validation, where all of them are measured.
    """
    rows = of_split(study.rows, "validation")
    for heads in ("user", "teacher"):
        statement = f"Mode shared comes closer to the teacher than mode aux with its {heads} heads"
        pairs = _same_except_mode(rows, heads)
        if not pairs:
            why = "there are no students of mode shared and mode aux that differ in nothing else"
            yield _not_measured("c", statement, "teacher_tau", why)
            continue
        table = by_repeat(rows, "teacher_tau")
        gaps = pd.DataFrame({shared: table[shared] - table[aux] for shared, aux in pairs})
        # Only repeats that have every setting: the mean of another one is of other settings.
        whole = gaps.dropna().mean(axis="columns").to_numpy()
        where = f"mean over {len(pairs)} settings, on validation"
        line = _line("c", statement, where, "teacher_tau", interval(whole), "above", 0.0)
        narrower = interval(whole, EQUIVALENCE_CONFIDENCE)
        if intervals.verdict(interval(whole), narrower, TAU_MARGIN) == "equivalent":
            line |= {"verdict": "equivalent", "remark": f"within ±{TAU_MARGIN:g}"}
        elif line["verdict"] == "holds" and (table[list(gaps)].mean() <= 0).any():
            line |= {"verdict": "does not hold", "remark": "a student of mode shared has no order"}
        yield _only_early(float(by_repeat(rows, "cost_ratio")[list(gaps)].max().max()), line)


def users_keep(study: Study, estimates: Estimates) -> Iterator[Line]:
    """(f) Users have no less, with as many passed, and where the saving is taken.

    The numbers are the paired differences of `users_measure` and `users_at_target`. Of true values,
    the claim holds if users have more, or surely lose less than `report.margin`. An estimate from
    labels has a sign and no size: the claim holds if it is above 0. It never holds if no saving is
    shown, since a ranker that changes nothing costs users nothing.
    """
    rival = _rival(study)
    margin = study.margin if knows_truth(study) else 0.0
    statement = "With mode {mode} fewer need passing and users have no less"
    for mode in ("aux", "shared"):
        chosen = _best_of_mode(study, mode)
        for measure in (users_measure(study), *users_at_target(study)):
            told = statement.format(mode=mode)
            if rival is None or chosen is None:
                yield _not_measured("f", told, measure, _lacking(study, mode))
                continue
            covered = coverage(study, estimates, [chosen, rival])
            if not covered >= COVERED:
                yield _not_measured("f", told, measure, "the log cannot say: too little coverage")
                continue
            gap = estimates.gap(chosen, rival, measure)
            line = _line("f", told, chosen, measure, gap, "above", -margin)
            fewer = verdict(_change(estimates, chosen, rival, CRITERION), "below", 0.0)
            if line["verdict"] == "holds" and fewer != "holds":
                line |= {"verdict": fewer, "remark": "no saving is shown"}
            yield _only_early(_ratio(study, estimates, chosen), line)


def fewer_by_way(study: Study, estimates: Estimates) -> Iterator[Line]:
    """(g) The ways with scores that let fewer candidates be passed: by loss, by regime."""
    rival = _rival(study)
    if rival is None:
        return
    learned = study.tested[study.tested["needs_scores"]]
    named = {way: setting for way, setting in study.chosen.items()
             if setting in set(learned["setting"])}  # fmt: skip
    statements = {f"Fewer need passing with {way}": setting for way, setting in named.items()}
    if REGIME in learned and learned[REGIME].nunique() > 1:
        for regime, of_regime in learned.groupby(REGIME, sort=False):
            statement = f"Fewer need passing where the teacher scores the {regime} in training"
            if (chosen := best(study.rows, list(of_regime["setting"].unique()))) is not None:
                statements[statement] = chosen
    for statement, setting in statements.items():
        gap = _change(estimates, setting, rival, CRITERION)
        line = _line("g", statement, setting, CRITERION, gap, "below", 0.0)
        yield _only_early(_ratio(study, estimates, setting), line)


def _rival(study: Study) -> str | None:
    """The best on validation of the baseline and the lists that need scores; None without one."""
    if study.baseline is None:
        return None
    rows = pd.concat([study.rows, study.references])
    known = set(of_split(study.references, "validation")["setting"])
    return best(rows, [study.baseline, *(name for name in NEED_SCORES if name in known)])


def _change(estimates: Estimates, setting: str, rival: str, measure: str) -> Interval:
    """The paired difference of a measure to the rival; of a saving, what is saved over it."""
    if measure == "funnel_cost_saving":
        return estimates.saving_over(setting, rival)
    return estimates.gap(setting, rival, measure)


def _ratio(study: Study, estimates: Estimates, setting: str) -> float:
    """The cost of a candidate, over the final ranker's, in the units of `costs` where given."""
    if study.costs.teacher and study.costs.student:
        return study.costs.student / study.costs.teacher
    return estimates.of(setting, "cost_ratio").mean


def _only_early(ratio: float, line: Line) -> Line:
    """The line, which does not hold at a cost ratio above `EARLY`, in whole percent."""
    if line["verdict"] == "holds" and round(ratio, 2) > EARLY:
        remark = f"no early ranker: it costs {100 * ratio:.0f}% of the final ranker per candidate"
        return line | {"verdict": "does not hold", "remark": remark}
    return line


def _best_of_mode(study: Study, mode: str) -> str | None:
    """The best of a mode's chosen settings that learn from scores, by validation."""
    rows = study.tested[(study.tested["mode"] == mode) & study.tested["needs_scores"]]
    return best(study.rows, list(rows["setting"].unique())) if len(rows) else None


def _same_except_mode(rows: pd.DataFrame, heads: str) -> list[tuple[str, str]]:
    """The pairs of settings of shared, and of aux with these heads, that differ in nothing else."""
    keys = [key for key in setting_columns(rows) if key not in ("mode", "serve")]
    settings = rows.drop_duplicates("setting")
    shared = settings[settings["mode"] == "shared"]
    aux = settings[(settings["mode"] == "aux") & (settings["serve"] == heads)]
    joined = shared.merge(aux, on=keys, suffixes=("", "_other"))
    return list(zip(joined["setting"], joined["setting_other"], strict=True))


def _lacking(study: Study, mode: str) -> str:
    if study.baseline is None:
        return "there is no measured ranker without scores"
    return f"there is no measured student of mode {mode} that learns from scores"


def _line(
    claim: str, statement: str, setting: str, measure: str, mean: Interval, side: Side,
    threshold: float,
) -> Line:  # fmt: skip
    remark = ""
    if mean.n == 0:
        remark = "no repeat has the numbers"
    elif np.isnan(mean.low):
        remark = "one repeat gives no interval"
    return {
        "claim": claim,
        "statement": statement,
        "setting": setting,
        "measure": measure,
        "mean": mean.mean,
        "low": mean.low,
        "high": mean.high,
        "n": mean.n,
        "threshold": threshold,
        "verdict": verdict(mean, side, threshold),
        "remark": remark,
    }


def _not_measured(claim: str, statement: str, measure: str, why: str) -> Line:
    return _line(claim, statement, "", measure, NOTHING, "below", np.nan) | {"remark": why}
