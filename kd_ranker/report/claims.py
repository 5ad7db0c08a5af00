"""Claims about distilling into an early ranker, tested on a study.

A claim is about one number. It *holds* if the whole 95% interval of that number over repeats lies
on the claimed side of the threshold, *does not hold* if the whole interval lies on the other side,
and is *undecided* if the interval includes the threshold or there are too few repeats for one. It
is *not measured* if the study lacks what it takes.

Distances to the teacher are `teacher_kl`, the mean over tasks. In a paired difference `teacher_bce`
gives the same number: the two differ by the teacher's own entropy, which both students meet.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import pandas as pd

from kd_ranker.evaluation.results import setting_columns
from kd_ranker.evaluation.saving import baseline, best, by_repeat
from kd_ranker.report.intervals import Interval, difference, interval
from kd_ranker.report.study import Study

MISALIGNED_BELOW = 0.25
# Two counts of FLOPs closer than this are one: results.csv holds seven digits.
_SAME_COST = 1e-5

Verdict = Literal["holds", "does not hold", "undecided", "not measured"]
Line = dict[str, object]
_NOTHING = Interval(float("nan"), float("nan"), float("nan"), 0)

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


def claims(study: Study) -> pd.DataFrame:
    """Every claim on one study: `COLUMNS`, one row a number."""
    tests: list[Callable[[Study], list[Line]]] = [
        misaligned, closer, shared_closer, serving_cost, survival, fewer_passed,
    ]  # fmt: skip
    lines = [line for test in tests for line in test(study)]
    frame = pd.DataFrame(lines, columns=list(COLUMNS))
    return frame.assign(dataset=study.dataset)


def misaligned(study: Study) -> list[Line]:
    """(a) Without distillation the student predicts users almost like the teacher, yet not it.

    The number is `alignment_ratio` of the baseline: what the student loses to the teacher on user
    labels over what it loses on the teacher's probabilities. The claim is that it is below 1/4.
    """
    statement = (
        "Without distillation the student predicts users nearly as well as the teacher, and not "
        "the teacher (alignment ratio below 1/4)"
    )
    undistilled = baseline(study.rows)
    if undistilled is None:
        return [
            _not_measured("a", statement, "alignment_ratio", "there is no student of mode none")
        ]
    mean = interval(by_repeat(study.rows, "alignment_ratio")[undistilled].to_numpy())
    line = _line("a", statement, undistilled, "alignment_ratio", mean, "below", MISALIGNED_BELOW)
    if mean.mean < 0:
        line["remark"] = "below 0: the student predicts users better than this teacher does"
    return [line]


def closer(study: Study) -> list[Line]:
    """(b) `aux` and `shared` each bring the student closer to the teacher.

    The number is the paired difference of `teacher_kl` to the baseline, with the user heads, at the
    mode's best weight. The weight is chosen by `passed_for_99`, so not by what is tested.
    """
    statement = "Mode {mode} brings the student's user heads closer to the teacher"
    return _at_best_weights(study, "b", "teacher_kl", "below", statement)


def shared_closer(study: Study) -> list[Line]:
    """(c) `shared` comes closer to the teacher than `aux`.

    The number is `teacher_kl` of `shared` less that of `aux`, user heads both, of the same repeat
    and the same weight, loss, temperature and learning rate; averaged over these within a repeat
    first, so that no weight is chosen. A row for each weight follows.
    """
    statement = "Mode shared comes closer to the teacher than mode aux, user heads both"
    pairs = _same_but_for_mode(study.rows, "shared", "aux")
    if not pairs:
        why = "there are no students of mode shared and mode aux at the same weight"
        return [_not_measured("c", statement, "teacher_kl", why)]
    table = by_repeat(study.rows, "teacher_kl")
    gaps = pd.DataFrame({shared: table[shared] - table[aux] for shared, aux in pairs})
    # Only repeats that have every weight: the mean of one that lacks some is of other weights.
    whole = gaps.dropna().mean(axis="columns").to_numpy()
    lines = [
        _line("c", statement, "mean over all weights", "teacher_kl", interval(whole), "below", 0.0)
    ]
    for shared, aux in pairs if len(pairs) > 1 else []:
        gap = difference(table, shared, aux)
        at_weight = shared.removeprefix("shared, ")
        lines.append(_line("c", statement, at_weight, "teacher_kl", gap, "below", 0.0))
    return lines


def serving_cost(study: Study) -> list[Line]:
    """(d) `shared` costs no more to serve than no distillation, `aux` does.

    The number is `flops_per_candidate` over the baseline's, less 1. It counts all heads of the
    model, whichever of them rank. The count is no matter of chance, so no interval is needed; a
    difference below 0.001% is none.
    """
    lines = []
    undistilled = baseline(study.rows)
    for mode, statement, costs_more in (
        ("shared", "Mode shared adds no serving cost", False),
        ("aux", "Mode aux adds serving cost with its second set of heads", True),
    ):
        chosen = best(study.rows, _user_heads(study.rows, mode))
        if undistilled is None or chosen is None:
            why = _lacking(undistilled, mode)
            lines.append(_not_measured("d", statement, "flops_per_candidate", why))
            continue
        table = by_repeat(study.rows, "flops_per_candidate")
        ratios = (table[chosen] / table[undistilled] - 1).dropna().to_numpy()
        mean = interval(ratios)._replace(low=float("nan"), high=float("nan"))
        line = _line("d", statement, chosen, "flops_per_candidate", mean, "above", 0.0)
        if mean.n:
            more = bool(ratios.mean() > _SAME_COST)
            line["verdict"] = "holds" if more == costs_more else "does not hold"
            line["remark"] = "relative to mode none, all heads counted"
        lines.append(line)
    return lines


def survival(study: Study) -> list[Line]:
    """(e) Distillation raises the share of the teacher's own top that is passed.

    The number is the paired difference of survival at `funnel.passed` to the baseline, for `aux`
    and `shared` each at its best weight (by `passed_for_99`) and user heads. The best is picked by
    looking, so the remark says at how many weights it holds.
    """
    statement = "Mode {mode} lets more of the teacher's own top survive at " + (
        f"{study.passed} passed"
    )
    return _at_best_weights(study, "e", f"survival@{study.passed}", "above", statement)


def fewer_passed(study: Study) -> list[Line]:
    """(e) ... so fewer candidates need passing at the same final value.

    The number is the paired difference of `passed_for_99` to the baseline, at the same settings as
    the survival. That is the measure by which the setting was chosen, so it is optimistic.
    """
    statement = "With mode {mode} fewer candidates need passing for 99% of the final value"
    return _at_best_weights(study, "e", "passed_for_99", "below", statement)


RULES = {
    "a": "alignment ratio of mode none against 1/4",
    "b": "teacher KL (mean over tasks) less that of mode none, paired; user heads, at the mode's "
    "best weight by passed for 99%",
    "c": "teacher KL of shared less that of aux, paired, user heads both, at the same weight; the "
    "first row averages over all weights, the others are one weight each",
    "d": "FLOPs a candidate over those of mode none, less 1; counted, so without an interval",
    "e": "survival, and passed for 99%, less those of mode none, paired; user heads, at the mode's "
    "best weight by passed for 99%, which makes the estimate optimistic",
}


def _user_heads(rows: pd.DataFrame, mode: str) -> list[str]:
    return list(rows.loc[(rows["mode"] == mode) & (rows["serve"] == "user"), "setting"].unique())


def _same_but_for_mode(rows: pd.DataFrame, mode: str, other: str) -> list[tuple[str, str]]:
    """The pairs of settings of two modes, user heads, that differ in nothing else."""
    keys = [key for key in setting_columns(rows) if key != "mode"]
    settings = rows[rows["serve"] == "user"].drop_duplicates("setting")
    ours, theirs = (settings[settings["mode"] == name] for name in (mode, other))
    joined = ours.merge(theirs, on=keys, suffixes=("", "_other"))
    return list(zip(joined["setting"], joined["setting_other"], strict=True))


def _at_best_weights(
    study: Study, claim: str, measure: str, side: Literal["below", "above"], statement: str
) -> list[Line]:
    """A line for `aux` and one for `shared`; `statement` has a place for the mode."""
    return [
        _at_best_weight(study, claim, mode, measure, side, statement.format(mode=mode))
        for mode in ("aux", "shared")
    ]


def _at_best_weight(
    study: Study,
    claim: str,
    mode: str,
    measure: str,
    side: Literal["below", "above"],
    statement: str,
) -> Line:
    undistilled, settings = baseline(study.rows), _user_heads(study.rows, mode)
    chosen = best(study.rows, settings)
    if undistilled is None or chosen is None:
        return _not_measured(claim, statement, measure, _lacking(undistilled, mode))
    table = by_repeat(study.rows, measure)
    line = _line(
        claim, statement, chosen, measure, difference(table, chosen, undistilled), side, 0.0
    )
    gaps = [difference(table, setting, undistilled) for setting in settings]
    better = sum((gap.mean < 0) if side == "below" else (gap.mean > 0) for gap in gaps)
    holding = sum(verdict(gap, side, 0.0) == "holds" for gap in gaps)
    remark = (
        f"better on average at {better} of {len(settings)} settings; the interval excludes 0 at "
        f"{holding}"
    )
    return line | {"remark": "; ".join(str(part) for part in (line["remark"], remark) if part)}


def _lacking(undistilled: str | None, mode: str) -> str:
    missing = "none" if undistilled is None else mode
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
    remark = {0: "no repeat has what it takes", 1: "one repeat gives no interval"}.get(mean.n, "")
    return {
        "claim": claim,
        "statement": statement,
        "setting": setting,
        "measure": measure,
        **mean._asdict(),
        "threshold": threshold,
        "verdict": verdict(mean, side, threshold),
        "remark": remark,
    }


def _not_measured(claim: str, statement: str, measure: str, why: str) -> Line:
    line = _line(claim, statement, "", measure, _NOTHING, "below", np.nan)
    return line | {"remark": why}
