"""Test claims about distilling into an early ranker on a study.

A claim is a number and the side of a threshold; `docs/report.md` lists them. It *holds* if the
whole 95% interval is on the claimed side, *does not hold* if the whole interval is on the other,
and is *undecided* if the interval includes the threshold or there is too little data for one. It
is *not measured* if the study lacks the numbers.

Numbers are of the test split, at the setting that validation chose for each way (see
`saving.best_of_ways`), with its serving choice; claim (c) compares all settings. Differences are
paired, against the rival: the best on validation of the ranker without scores of the final ranker
and the lists of items that need them. A student that costs more than `EARLY` of the final ranker
per candidate is no early ranker, and no claim holds for it. So no claim holds for a list of items,
for an exact copy of the teacher, or for a useless student.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from kd_ranker.evaluation.metrics import TARGET
from kd_ranker.evaluation.references import NEED_SCORES
from kd_ranker.evaluation.results import TEACHER, setting_columns
from kd_ranker.evaluation.saving import CRITERION, SAVINGS, best, by_repeat, of_split
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import NOTHING, Interval, interval
from kd_ranker.report.study import Study

MISALIGNED_BELOW = 0.25
# The highest cost of an early ranker per candidate, over the final ranker: the method's figure.
EARLY = 0.05
# A difference of mean tau within this margin counts as none.
TAU_MARGIN = 0.01
# The candidates that the teacher scores in training.
REGIME = "teacher.stage"

Side = Literal["below", "above"]
Verdict = Literal["holds", "does not hold", "equivalent", "undecided", "not measured"]
Line = dict[str, object]


class _Change(NamedTuple):
    """A claim about the change that a chosen setting makes against the rival.

    `of_users` also needs a saving, and labels that cover the change.
    """

    claim: str
    statement: str
    measure: str
    side: Side
    threshold: float = 0.0
    of_users: bool = False


def claims(study: Study, estimates: Estimates) -> pd.DataFrame:
    """Return every claim on one study: its dataset and the columns of `_line`, a row per number."""
    tests = (_misaligned, _of_modes, _shared_closer, _of_ways)
    lines = [{"dataset": study.dataset} | of for test in tests for of in test(study, estimates)]
    return pd.DataFrame(lines).sort_values("claim", kind="stable", ignore_index=True)


def verdict(mean: Interval, side: Side, threshold: float) -> Verdict:
    """Return the verdict on a claimed side of a threshold.

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


def _misaligned(study: Study, estimates: Estimates) -> Iterator[Line]:
    """(a) Plain mode `none` predicts users almost like the teacher, and does not follow it.

    The ratio is undefined for a student that agrees with the teacher. Below 0, the student
    predicts users better than the teacher, which is no misalignment of a good student.
    """
    statement = (
        "Without distillation the student predicts users nearly as well as the teacher, and not "
        "the teacher (alignment ratio below 1/4)"
    )
    areas = {
        f"AUC {task} of {name} includes 0.5: it predicts users by chance": estimates.of(
            name, f"user_auc/{task}"
        ).low
        for name in (str(study.plain), TEACHER)
        for task in study.tasks
    }
    by_chance = next((remark for remark, low in areas.items() if low <= 0.5), "")
    for measure in ("alignment_ratio", "alignment_ratio_bce"):
        if study.plain is None:
            yield _line("a", statement, measure, remark="there is no student of mode none")
            continue
        mean = estimates.of(study.plain, measure)
        line = _line("a", statement, measure, study.plain, mean, "below", MISALIGNED_BELOW)
        if mean.n == 0:
            line["remark"] = "undefined: the student agrees with the teacher on the shown items"
        elif by_chance or mean.high < 0:
            below = "below 0: the student predicts users better than this teacher does"
            line |= {"verdict": "does not hold", "remark": by_chance or below}
        yield line


def _of_modes(study: Study, estimates: Estimates) -> Iterator[Line]:
    """(b), (d), (e), (f) The changes that the best setting of each mode with scores makes."""
    goal = f"{100 * TARGET:g}% of the final value"
    # An estimate from labels has a sign and no size, so no loss of users is surely small.
    margin = study.margin if study.knows_truth else 0.0
    users = "With mode {mode} fewer need passing and users have no less"
    changes = [
        _Change("b", "Mode {mode} brings the order nearer to the teacher's", "teacher_tau",
                "above"),
        _Change("d", "Mode {mode} saves cost at " + goal, SAVINGS[0], "above"),
        _Change("e", "Mode {mode} lets more of the teacher's own top survive at "
                f"{study.passed} passed", f"survival@{study.passed}", "above"),
        _Change("e", "With mode {mode} fewer candidates need passing for " + goal, CRITERION,
                "below"),
    ]  # fmt: skip
    modes = {}
    for mode in ("aux", "shared"):
        rows = study.tested[(study.tested["mode"] == mode) & study.tested["needs_scores"]]
        modes[mode] = best(study.rows, list(rows["setting"].unique())) if len(rows) else None
    for change in changes:
        for mode, chosen in modes.items():
            yield _changed(study, estimates, change, mode, chosen)
    for mode, chosen in modes.items():
        for measure in (study.users_measure, *study.users_at_target):
            change = _Change("f", users, measure, "above", -margin, of_users=True)
            yield _changed(study, estimates, change, mode, chosen)


def _of_ways(study: Study, estimates: Estimates) -> Iterator[Line]:
    """(g) The ways with scores that let fewer candidates be passed: by loss, by regime."""
    learned = study.tested[study.tested["needs_scores"]]
    statements: dict[str, str | None] = {
        f"Fewer need passing with {way}": setting
        for way, setting in study.chosen.items()
        if setting in set(learned["setting"])
    }
    if REGIME in learned and learned[REGIME].nunique() > 1:
        for regime, of_regime in learned.groupby(REGIME, sort=False):
            statement = f"Fewer need passing where the teacher scores the {regime} in training"
            statements[statement] = best(study.rows, list(of_regime["setting"].unique()))
    for statement, chosen in statements.items():
        if chosen is not None and study.baseline is not None:
            change = _Change("g", statement, CRITERION, "below")
            yield _changed(study, estimates, change, "", chosen)


def _changed(
    study: Study, estimates: Estimates, claim: _Change, mode: str, chosen: str | None
) -> Line:
    """Return the line of a change that a chosen setting of a mode makes against the rival."""
    statement, rival, remark = claim.statement.format(mode=mode), _rival(study), ""
    if rival is None:
        remark = "there is no measured ranker without scores"
    elif chosen is None:
        remark = f"there is no measured student of mode {mode} that learns from scores"
    elif claim.of_users and (why := estimates.why_unlabelled([chosen, rival])):
        remark = f"the log cannot show it: {why}"
    if remark or rival is None or chosen is None:
        return _line(claim.claim, statement, claim.measure, remark=remark)
    if claim.measure == SAVINGS[0]:
        change = estimates.saving(chosen, over=rival)
    else:
        change = estimates.gap(chosen, rival, claim.measure)
    of_claim = claim.measure, chosen, change, claim.side, claim.threshold
    line = _line(claim.claim, statement, *of_claim)
    if claim.of_users and line["verdict"] == "holds":
        # A ranker that changes nothing costs users nothing.
        fewer = verdict(estimates.gap(chosen, rival, CRITERION), "below", 0.0)
        if fewer != "holds":
            line |= {"verdict": fewer, "remark": "no saving is shown"}
    ratio = estimates.of(chosen, "cost_ratio").mean
    if study.costs.teacher and study.costs.student:
        ratio = study.costs.student / study.costs.teacher
    return _only_early(ratio, line)


def _rival(study: Study) -> str | None:
    """Return the best on validation of the baseline and the lists that need scores, if any."""
    if study.baseline is None:
        return None
    rows = pd.concat([study.rows, study.references])
    known = set(of_split(study.references, "validation")["setting"])
    return best(rows, [study.baseline, *(name for name in NEED_SCORES if name in known)])


def _shared_closer(study: Study, estimates: Estimates) -> Iterator[Line]:
    """(c) `shared` comes closer to the teacher's order than `aux`, with either of its heads.

    The tau of `shared` less that of `aux` in the same repeat and with the same loss, weight and
    other keys, averaged over these within a repeat, so that nothing is chosen. It is of validation,
    where all of them are measured.
    """
    rows = of_split(study.rows, "validation")
    table, ratios = by_repeat(rows, "teacher_tau"), by_repeat(rows, "cost_ratio")
    for heads in ("user", "teacher"):
        statement = f"Mode shared comes closer to the teacher than mode aux with its {heads} heads"
        pairs = _same_except_mode(rows, heads)
        if not pairs:
            why = "there are no students of mode shared and mode aux that differ in nothing else"
            yield _line("c", statement, "teacher_tau", remark=why)
            continue
        gaps = pd.DataFrame({shared: table[shared] - table[aux] for shared, aux in pairs})
        # Only repeats that have every setting: the mean of another one is of other settings.
        whole = gaps.dropna().mean(axis="columns").to_numpy()
        # Two one-sided tests at 5% each (Schuirmann, J. Pharmacokinet. Biopharm. 1987).
        mean, narrower = interval(whole), interval(whole, 0.90)
        setting = f"mean over {len(pairs)} settings, on validation"
        line = _line("c", statement, "teacher_tau", setting, mean, "above", 0.0)
        if narrower.low > -TAU_MARGIN and narrower.high < TAU_MARGIN:
            line |= {"verdict": "equivalent", "remark": f"within ±{TAU_MARGIN:g}"}
        elif line["verdict"] == "holds" and (table[list(gaps)].mean() <= 0).any():
            line |= {"verdict": "does not hold", "remark": "a student of mode shared has no order"}
        yield _only_early(float(ratios[list(gaps)].max().max()), line)


def _same_except_mode(rows: pd.DataFrame, heads: str) -> list[tuple[str, str]]:
    """Return pairs of settings of shared, and of aux with these heads, that else are equal."""
    keys = [key for key in setting_columns(rows) if key not in ("mode", "serve")]
    settings = rows.drop_duplicates("setting")
    shared = settings[settings["mode"] == "shared"]
    aux = settings[(settings["mode"] == "aux") & (settings["serve"] == heads)]
    joined = shared.merge(aux, on=keys, suffixes=("", "_other"))
    return list(zip(joined["setting"], joined["setting_other"], strict=True))


def _only_early(ratio: float, line: Line) -> Line:
    """Return the line; a claim does not hold at a cost ratio above `EARLY`, in whole percent."""
    if line["verdict"] == "holds" and round(ratio, 2) > EARLY:
        remark = f"no early ranker: it costs {100 * ratio:.0f}% of the final ranker per candidate"
        return line | {"verdict": "does not hold", "remark": remark}
    return line


def _line(
    claim: str, statement: str, measure: str, setting: str = "", mean: Interval = NOTHING,
    side: Side = "below", threshold: float = np.nan, remark: str = "",
) -> Line:  # fmt: skip
    """Return a row of `claims`; one without a number is not measured, for the reason `remark`."""
    if not remark and mean.n == 0:
        remark = "no repeat has the numbers"
    elif not remark and np.isnan(mean.low):
        remark = "one repeat gives no interval"
    return {
        "claim": claim, "statement": statement, "setting": setting, "measure": measure,
        "mean": mean.mean, "low": mean.low, "high": mean.high, "n": mean.n,
        "threshold": threshold, "verdict": verdict(mean, side, threshold), "remark": remark,
    }  # fmt: skip
