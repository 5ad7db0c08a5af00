"""Test claims about distilling into an early ranker on a study; `docs/decisions.md` has the rules.

A claim is a measure, the side of a threshold, and a text. Most measures are differences to the
ranker to beat: the best on validation of the ranker without scores of the final ranker and the
lists of items that need them. So no claim holds for a list, nor for a useless student.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from kd_ranker.evaluation.baselines import NEED_SCORES
from kd_ranker.evaluation.metrics.target import PERCENT, at_target
from kd_ranker.evaluation.results import TEACHER
from kd_ranker.evaluation.saving import SAVINGS, best, by_repeat, of_split
from kd_ranker.evaluation.setting_names import SETTING_COLUMNS
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.intervals import NOTHING, Interval, interval
from kd_ranker.reporting.study import Study

MISALIGNED_BELOW = 0.25
# The highest cost of an early ranker per candidate, over the final ranker: the method's figure.
EARLY = 0.05
# What the claims call the share of candidates that need not pass, see `Estimates.candidates_saved`.
FEWER = at_target("fewer_for")
# A difference of mean tau within this margin counts as none.
TAU_MARGIN = 0.01

Verdict = Literal["holds", "does not hold", "equivalent", "undecided", "not measured"]
Line = dict[str, object]


class _Claim(NamedTuple):
    claim: str
    statement: str
    measure: str
    side: Literal["below", "above"]
    threshold: float = 0.0

    def verdict(self, mean: Interval) -> Verdict:
        if mean.n == 0:
            return "not measured"
        sides = {"below": mean.high < self.threshold, "above": mean.low > self.threshold}
        if not any(sides.values()):
            return "undecided"
        return "holds" if sides[self.side] else "does not hold"

    def line(self, setting: str = "", mean: Interval = NOTHING, ratio: float = 0.0) -> Line:
        """Return a row of `claims`; `ratio` is the cost per candidate over the teacher's."""
        verdict = self.verdict(mean)
        remark = ""
        if verdict == "holds" and round(ratio, 2) > EARLY:
            verdict = "does not hold"
            remark = (
                f"no early ranker: it costs {100 * ratio:.0f}% of the final ranker per candidate"
            )
        elif mean.n == 0:
            remark = "no repeat has the numbers"
        elif np.isnan(mean.low):
            remark = "one repeat gives no interval"
        return {
            **self._asdict(),
            "setting": setting,
            **mean._asdict(),
            "verdict": verdict,
            "remark": remark,
        }


def claims(study: Study, estimates: Estimates) -> pd.DataFrame:
    """Return every claim on one study: its dataset, the claim, its number and its verdict."""
    lines = pd.DataFrame(
        [
            *_misaligned(study, estimates),
            *_changes(study, estimates),
            *_shared_closer(study, estimates),
        ]
    )
    lines.insert(0, "dataset", study.dataset)
    return lines.drop(columns="covers").sort_values("claim", kind="stable", ignore_index=True)


def _misaligned(study: Study, estimates: Estimates) -> Iterator[Line]:
    """(a) Plain mode `none` predicts users almost like the teacher, and does not follow it."""
    statement = (
        "Without distillation the student predicts users nearly as well as the teacher, but not "
        "the teacher (alignment ratio below 1/4)"
    )
    plain = study.plain or ""
    by_chance = [
        f"AUC {task} of {name} includes 0.5: it predicts users by chance"
        for name in (plain, TEACHER)
        for task in study.config.tasks
        if estimates.of(name, f"user_auc/{task}").low <= 0.5
    ]
    for measure in ("alignment_ratio", "alignment_ratio_bce"):
        mean = estimates.of(plain, measure)
        line = _Claim("a", statement, measure, "below", MISALIGNED_BELOW).line(plain, mean)
        if not plain:
            line["remark"] = "there is no student of mode none"
        elif mean.n == 0:
            line["remark"] = "undefined: the student agrees with the teacher on the shown items"
        elif by_chance:
            line["verdict"] = "does not hold"
            line["remark"] = by_chance[0]
        elif mean.high < 0:
            line["verdict"] = "does not hold"
            line["remark"] = "below 0: the student predicts users better than this teacher does"
        yield line


def _changes(study: Study, estimates: Estimates) -> Iterator[Line]:
    """(b) and (d) to (g) The changes of chosen settings with scores against the one to beat."""
    goal = f"{PERCENT} of the final value"
    top = f"the teacher's own top survive at {study.passed} passed"
    # An estimate from labels has a sign and no size, so no loss of users is surely small.
    margin = study.config.report.margin if study.knows_truth else 0.0
    ranked = of_split(pd.concat([study.rows, study.references]), "validation")
    lists = [name for name in NEED_SCORES if (ranked["setting"] == name).any()]
    to_beat = None
    if study.baseline is not None:
        to_beat = best(ranked, [study.baseline, *lists])
    learned = study.tested[study.tested["needs_scores"]]
    for mode in ("aux", "shared"):
        settings = list(learned.loc[learned["mode"] == mode, "setting"].unique())
        chosen = best(study.rows, settings)
        nearer = f"Mode {mode} brings the order nearer to the teacher's"
        saves = f"Mode {mode} saves cost at {goal}"
        survive = f"Mode {mode} lets more of {top}"
        fewer = f"With mode {mode} fewer candidates need passing for {goal}"
        users = f"Mode {mode} saves cost and users have no less"
        mode_claims = [
            _Claim("b", nearer, "teacher_tau", "above"),
            _Claim("d", saves, SAVINGS[0], "above"),
            _Claim("e", survive, f"survival@{study.passed}", "above"),
            _Claim("e", fewer, FEWER, "above"),
        ]
        mode_claims += [
            _Claim("f", users, measure, "above", -margin) for measure in study.users_measures
        ]
        for claim in mode_claims:
            yield _change(study, estimates, claim, chosen, to_beat)
    for method, setting in study.chosen.items():
        if to_beat and setting in set(learned["setting"]):
            claim = _Claim("g", f"Fewer need passing with {study.in_words[method]}", FEWER, "above")
            yield _change(study, estimates, claim, setting, to_beat)


def _change(
    study: Study, estimates: Estimates, claim: _Claim, chosen: str | None, to_beat: str | None
) -> Line:
    """Return the line of a setting's change against the one to beat, if both are known."""
    if to_beat is None or chosen is None:
        absent = "ranker without scores" if to_beat is None else "student of the mode with scores"
        return claim.line() | {"remark": f"there is no measured {absent}"}
    is_of_users = claim.claim == "f"
    if is_of_users and (reason := estimates.why_unlabeled([chosen, to_beat])):
        return claim.line() | {"remark": f"the log cannot show it: {reason}"}
    if claim.measure == SAVINGS[0]:
        change = estimates.cost_saved(chosen, over=to_beat)
    elif claim.measure == FEWER:
        change = estimates.candidates_saved(chosen, to_beat)
    else:
        change = estimates.gap(chosen, to_beat, claim.measure)
    ratio = estimates.of(chosen, "cost_ratio").mean
    if study.costs.teacher and study.costs.student:
        ratio = study.costs.student / study.costs.teacher
    line = claim.line(chosen, change, ratio)
    if is_of_users and claim.verdict(change) == "holds":
        # A ranker that changes nothing costs users nothing. The verdict is that of (d), or of (e)
        # where no cost is known, so that no two claims on one setting disagree.
        saved = estimates.cost_saved(chosen, over=to_beat)
        if saved.n == 0:
            saved = estimates.candidates_saved(chosen, to_beat)
        saves = _Claim("f", "", SAVINGS[0], "above").verdict(saved)
        if saves != "holds":
            line |= {"verdict": saves, "remark": "no saving is shown"}
    return line


def _shared_closer(study: Study, estimates: Estimates) -> Iterator[Line]:
    """(c) `shared` comes closer to the teacher's order than `aux`, with either of its heads.

    On validation, where all settings are measured: the paired tau of `shared` less that of `aux`,
    all else equal. It is averaged over the settings that both trained in full, within a repeat.
    """
    rows = study.trained_in_full
    alike = [key for key in (*SETTING_COLUMNS, "repeat") if key not in ("mode", "serve")]
    rows = rows.reindex(columns=["setting", "mode", "serve", *alike, "teacher_tau", "cost_ratio"])
    shared = rows[rows["mode"] == "shared"]
    aux = rows[rows["mode"] == "aux"]
    for heads in ("user", "teacher"):
        statement = f"Mode shared comes closer to the teacher than mode aux with its {heads} heads"
        claim = _Claim("c", statement, "teacher_tau", "above")
        pairs = shared.merge(aux[aux["serve"] == heads], on=alike, suffixes=("", "_of_aux"))
        if pairs.empty:
            why = (
                "there are no students of mode shared and mode aux, both trained in full, that "
                "differ in nothing else"
            )
            yield claim.line() | {"remark": why}
            continue
        gap = pairs["teacher_tau"] - pairs["teacher_tau_of_aux"]
        # Only repeats that have every setting: the mean of another one is of other settings.
        gaps = by_repeat(pairs.assign(gap=gap), "gap").dropna()
        mean_gaps = gaps.mean(axis="columns").to_numpy()
        # Two one-sided tests at 5% each (Schuirmann, J. Pharmacokinet. Biopharm. 1987).
        narrower = interval(mean_gaps, 0.90)
        number = gaps.shape[1]
        setting = f"mean over {number} setting{'s' if number > 1 else ''}, on validation"
        line = claim.line(setting, interval(mean_gaps), float(pairs["cost_ratio"].max()))
        if narrower.low > -TAU_MARGIN and narrower.high < TAU_MARGIN:
            line |= {"verdict": "equivalent", "remark": f"within ±{TAU_MARGIN:g}"}
        elif line["verdict"] == "holds":
            mean_tau = by_repeat(pairs, "teacher_tau").mean()
            if (mean_tau <= 0).any():
                line["verdict"] = "does not hold"
                line["remark"] = "a student of mode shared has no order"
        yield line
