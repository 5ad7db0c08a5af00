"""Claims about distilling into an early ranker, tested on a study.

A claim is about one number. It *holds* if the whole 95% interval of that number lies on the claimed
side of the threshold, *does not hold* if the whole interval lies on the other side, and is
*undecided* if the interval includes the threshold or there is too little for one. It is *not
measured* if the study lacks what it takes. A difference that is sure to be too small to matter is
*equivalent*, see `intervals.verdict`.

Numbers are of the test split, at the setting that validation chose for each way (see
`saving.best_of_ways`), as that setting is served, but for claim (c), which compares all weights.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import pandas as pd

from kd_ranker.evaluation.metrics import TARGET
from kd_ranker.evaluation.results import setting_columns
from kd_ranker.evaluation.saving import CRITERION, best, by_repeat, of_split
from kd_ranker.report import intervals
from kd_ranker.report.choices import users_measures
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import EQUIVALENCE_CONFIDENCE, NOTHING, Interval, interval
from kd_ranker.report.study import Study

MISALIGNED_BELOW = 0.25
# A fall of what users have that is no fall: a share of what they would have if all were passed.
USERS_MARGIN = 0.002
# Differences in KL within this share of the baseline's are none.
KL_MARGIN = 0.1
# Of whom the teacher speaks in training.
REGIME = "teacher.stage"
# Two counts of FLOPs closer than this are one: results.csv holds seven digits.
_SAME_COST = 1e-5

Verdict = Literal["holds", "does not hold", "equivalent", "undecided", "not measured"]
Line = dict[str, object]

COLUMNS = (
    *("dataset", "claim", "statement", "setting", "measure"),
    *("mean", "low", "high", "n", "threshold", "verdict", "remark"),
)


def verdict(mean: Interval, side: Literal["below", "above"], threshold: float) -> Verdict:
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
    """Every claim on one study: `COLUMNS`, one row a number."""
    tests: list[Callable[[Study, Estimates], list[Line]]] = [
        misaligned, closer, shared_closer, serving_cost,
        survival, fewer_passed, users_keep, fewer_by_way,
    ]  # fmt: skip
    lines = [line for test in tests for line in test(study, estimates)]
    frame = pd.DataFrame(lines, columns=list(COLUMNS))
    return frame.assign(dataset=study.dataset)


def misaligned(study: Study, estimates: Estimates) -> list[Line]:
    """(a) Without distillation the student predicts users almost like the teacher, yet not it.

    The number is `alignment_ratio` of the baseline, and the claim that it is below 1/4. A student
    that agrees with the teacher has none, and of one that predicts users better than the teacher it
    is not said. `alignment_ratio_bce` is the number of the method's post.
    """
    statement = (
        "Without distillation the student predicts users nearly as well as the teacher, and not "
        "the teacher (alignment ratio below 1/4)"
    )
    lines = []
    for measure in ("alignment_ratio", "alignment_ratio_bce"):
        if study.baseline is None:
            lines.append(_not_measured("a", statement, measure, "there is no student of mode none"))
            continue
        mean = estimates.of(study.baseline, measure)
        line = _line("a", statement, study.baseline, measure, mean, "below", MISALIGNED_BELOW)
        if mean.n == 0:
            line["remark"] = "undefined: the student agrees with the teacher on the shown items"
        if mean.high < 0:
            line["verdict"] = "does not hold"
            line["remark"] = "below 0: the student predicts users better than this teacher does"
        lines.append(line)
    return lines


def closer(study: Study, estimates: Estimates) -> list[Line]:
    """(b) `aux` and `shared` each bring the student closer to the teacher.

    The number is the paired difference of `teacher_kl` to the baseline.
    """
    statement = "Mode {mode} brings what the student serves closer to the teacher"
    return _of_modes(study, estimates, "b", "teacher_kl", "below", statement)


def shared_closer(study: Study, estimates: Estimates) -> list[Line]:
    """(c) `shared` comes closer to the teacher than `aux`, with its user or its teacher heads.

    The number is `teacher_kl` of `shared` less that of `aux` in the same repeat and with the same
    loss, weight and whatever else varies, averaged over these within a repeat, so that nothing is
    chosen. It is read on validation, where all of them are measured.
    """
    rows = of_split(study.rows, "validation")
    lines = []
    for heads in ("user", "teacher"):
        statement = f"Mode shared comes closer to the teacher than mode aux with its {heads} heads"
        pairs = _same_but_for_mode(rows, heads)
        if not pairs:
            why = "there are no students of mode shared and mode aux that differ in nothing else"
            lines.append(_not_measured("c", statement, "teacher_kl", why))
            continue
        table = by_repeat(rows, "teacher_kl")
        gaps = pd.DataFrame({shared: table[shared] - table[aux] for shared, aux in pairs})
        # Only repeats that have every weight: the mean of one that lacks some is of other weights.
        whole = gaps.dropna().mean(axis="columns").to_numpy()
        where = f"mean over {len(pairs)} settings, on validation"
        line = _line("c", statement, where, "teacher_kl", interval(whole), "below", 0.0)
        if study.baseline is not None:
            margin = KL_MARGIN * float(table[study.baseline].mean())
            if _equivalent(interval(whole), interval(whole, EQUIVALENCE_CONFIDENCE), margin):
                line["verdict"] = "equivalent"
                line["remark"] = f"within ±{margin:.2g}, a tenth of what mode none has"
        lines.append(line)
    return lines


def serving_cost(study: Study, estimates: Estimates) -> list[Line]:
    """(d) Distillation adds no serving cost.

    The number is `flops_per_candidate` of what is served over the baseline's, less 1. The count is
    no matter of chance, so no interval is needed; a difference below 0.001% is none.
    """
    lines = []
    measure = "flops_per_candidate"
    for mode in ("aux", "shared"):
        statement = f"Mode {mode} adds no serving cost"
        chosen = _best_of_mode(study, mode)
        if study.baseline is None or chosen is None:
            lines.append(_not_measured("d", statement, measure, _lacking(study, mode)))
            continue
        more = estimates.relative_gap(chosen, study.baseline, measure)
        mean = more._replace(low=float("nan"), high=float("nan"))
        line = _line("d", statement, chosen, measure, mean, "below", 0.0)
        line["verdict"] = "holds" if more.mean <= _SAME_COST else "does not hold"
        line["remark"] = "relative to mode none; heads that are not served are not counted"
        lines.append(line)
    return lines


def survival(study: Study, estimates: Estimates) -> list[Line]:
    """(e) Distillation raises the share of the teacher's own top that is passed.

    The number is the paired difference of survival at `funnel.passed` to the baseline.
    """
    statement = "Mode {mode} lets more of the teacher's own top survive at " + (
        f"{study.passed} passed"
    )
    return _of_modes(study, estimates, "e", f"survival@{study.passed}", "above", statement)


def fewer_passed(study: Study, estimates: Estimates) -> list[Line]:
    """(e) ... so fewer candidates need passing at the same final value.

    The number is the paired difference of `passed_for_99` to the baseline.
    """
    statement = "With mode {mode} fewer candidates need passing for " + (
        f"{100 * TARGET:g}% of the final value"
    )
    return _of_modes(study, estimates, "e", CRITERION, "below", statement)


def users_keep(study: Study, estimates: Estimates) -> list[Line]:
    """(f) Users have no less: at what is passed, topline does not fall.

    The number is the paired difference of the true value captured to the baseline, or where that is
    not known of each task's `end_to_end_hit_rate`, at `funnel.passed`. The claim holds if it rises,
    or if it is sure to fall by less than `USERS_MARGIN`.
    """
    lines = []
    for mode in ("aux", "shared"):
        statement = f"With mode {mode} users have no less at {study.passed} passed"
        chosen = _best_of_mode(study, mode)
        for measure in users_measures(study):
            if study.baseline is None or chosen is None:
                lines.append(_not_measured("f", statement, measure, _lacking(study, mode)))
                continue
            gap = estimates.gap(chosen, study.baseline, measure)
            narrower = estimates.gap(chosen, study.baseline, measure, EQUIVALENCE_CONFIDENCE)
            found = intervals.verdict(gap, narrower, USERS_MARGIN)
            line = _line("f", statement, chosen, measure, gap, "above", -USERS_MARGIN)
            if gap.n:
                line["verdict"] = {
                    "higher": "holds",
                    "equivalent": "holds",
                    "lower": "does not hold",
                    "undecided": "undecided",
                }[found]
                line["remark"] = f"{found}, with a margin of {USERS_MARGIN:g}"
            lines.append(line)
    return lines


def fewer_by_way(study: Study, estimates: Estimates) -> list[Line]:
    """(g) The ways in which distillation lets fewer candidates be passed: by loss, by regime.

    The number is the paired difference of `passed_for_99` to the baseline, of each way's best.
    """
    if study.baseline is None:
        return []
    modes = study.tested.drop_duplicates("setting").set_index("setting")["mode"]
    lines = []
    for way, chosen in study.chosen.items():
        if chosen in modes and modes[chosen] != "none":
            gap = estimates.gap(chosen, study.baseline, CRITERION)
            statement = f"Fewer need passing with {way}"
            lines.append(_line("g", statement, chosen, CRITERION, gap, "below", 0.0))
    return [*lines, *_by_regime(study, estimates, study.baseline)]


def _by_regime(study: Study, estimates: Estimates, undistilled: str) -> list[Line]:
    """The same of the best way of each regime, where there are several."""
    distilled = study.tested[study.tested["mode"] != "none"]
    if REGIME not in distilled or distilled[REGIME].nunique() < 2:
        return []
    lines = []
    for regime, of_regime in distilled.groupby(REGIME, sort=False):
        chosen = best(study.rows, list(of_regime["setting"].unique()))
        if chosen is not None:
            gap = estimates.gap(chosen, undistilled, CRITERION)
            statement = f"Fewer need passing where the teacher speaks of the {regime} in training"
            line = _line("g", statement, chosen, CRITERION, gap, "below", 0.0)
            if not study.scored:
                line["remark"] = "; ".join(filter(None, [str(line["remark"]), "as far as its log"]))
            lines.append(line)
    return lines


RULES = {
    "a": "alignment ratio of mode none against 1/4, with the KL on the shown items below the line, "
    "and as the method's post has it with the cross entropy",
    "b": "teacher KL (mean over tasks) less that of mode none, paired",
    "c": "teacher KL of shared less that of aux, paired, all else equal, averaged over all weights",
    "d": "FLOPs a candidate of what is served over those of mode none, less 1; counted, so without "
    "an interval",
    "e": "survival, and passed for 99%, less those of mode none, paired",
    "f": "true value captured, or the share of what users did that is shown in the end, less that "
    "of mode none, paired",
    "g": "passed for 99% less that of mode none, paired, at the best setting of each way, and of "
    "each regime (of whom the teacher speaks in training) where there are several",
}


def _best_of_mode(study: Study, mode: str) -> str | None:
    """The best of a mode's chosen settings, by validation."""
    of_mode = study.tested.loc[study.tested["mode"] == mode, "setting"]
    return best(study.rows, list(of_mode.unique())) if len(of_mode) else None


def _same_but_for_mode(rows: pd.DataFrame, heads: str) -> list[tuple[str, str]]:
    """The pairs of settings of shared, and of aux with these heads, that differ in nothing else."""
    keys = [key for key in setting_columns(rows) if key not in ("mode", "serve")]
    settings = rows.drop_duplicates("setting")
    shared = settings[settings["mode"] == "shared"]
    aux = settings[(settings["mode"] == "aux") & (settings["serve"] == heads)]
    joined = shared.merge(aux, on=keys, suffixes=("", "_other"))
    return list(zip(joined["setting"], joined["setting_other"], strict=True))


def _of_modes(
    study: Study,
    estimates: Estimates,
    claim: str,
    measure: str,
    side: Literal["below", "above"],
    statement: str,
) -> list[Line]:
    """A line for `aux` and one for `shared`; `statement` has a place for the mode."""
    lines = []
    for mode in ("aux", "shared"):
        told = statement.format(mode=mode)
        chosen = _best_of_mode(study, mode)
        if study.baseline is None or chosen is None:
            lines.append(_not_measured(claim, told, measure, _lacking(study, mode)))
            continue
        gap = estimates.gap(chosen, study.baseline, measure)
        lines.append(_line(claim, told, chosen, measure, gap, side, 0.0))
    return lines


def _equivalent(gap: Interval, narrower: Interval, margin: float) -> bool:
    return intervals.verdict(gap, narrower, margin) == "equivalent"


def _lacking(study: Study, mode: str) -> str:
    missing = "none" if study.baseline is None else mode
    return f"there is no measured student of mode {missing}"


def _line(
    claim: str,
    statement: str,
    setting: str,
    measure: str,
    mean: Interval,
    side: Literal["below", "above"],
    threshold: float,
) -> Line:
    remark = ""
    if mean.n == 0:
        remark = "no repeat has what it takes"
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
    line = _line(claim, statement, "", measure, NOTHING, "below", np.nan)
    return line | {"remark": why}
