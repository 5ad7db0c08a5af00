"""What a study shows beside its answer, as sentences; "" where nothing can be said."""

from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from kd_ranker.evaluation.metrics.registry import metric_of, title_of
from kd_ranker.evaluation.metrics.target import CRITERION, PERCENT, TARGET
from kd_ranker.evaluation.saving import SAVINGS
from kd_ranker.evaluation.setting_names import key_title, value_text
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.study import Study
from kd_ranker.reporting.tables import digits_of, important_columns, number, percents

_END_TO_END = title_of("end_to_end_hit_rate")


def _best_rankers(study: Study) -> dict[str, str]:
    """Return the settings that the answer compares, those that are measured, by their names."""
    rankers = {"the best with scores": study.best_with_scores, "the best without": study.baseline}
    return {name: setting for name, setting in rankers.items() if setting is not None}


def fewer_candidates(study: Study, estimates: Estimates) -> str:
    """Say how many fewer candidates must pass with the scores."""
    if study.best_with_scores is None:
        return ""
    with_scores = estimates.of(study.best_with_scores, CRITERION).mean
    others = {"the best without": study.baseline, "today's early ranker": study.incumbent}
    parts = []
    for name, setting in others.items():
        if setting is not None:
            share = 1 - with_scores / estimates.of(setting, CRITERION).mean
            if np.isfinite(share):
                parts.append(f"{abs(share):.0%} {'fewer' if share >= 0 else 'more'} than {name}")
    if not parts:
        return ""
    sentences = [
        f"The best with scores needs {' and '.join(parts)}.",
        _kept_today(study, estimates),
    ]
    return " ".join(filter(None, sentences))


def _kept_today(study: Study, estimates: Estimates) -> str:
    """Say what the funnel keeps today, and with how many the best rankers keep as much."""
    # Where only what passed has a score, today's ranker keeps all of the value that is known.
    if estimates.are_partly_scored or study.incumbent is None or study.best_with_scores is None:
        return ""
    kept = estimates.of(study.incumbent, f"value_captured@{study.passed}").mean
    if not np.isfinite(kept):
        return ""
    sentence = (
        f"Today's early ranker keeps {kept:.0%} of the final value with the {study.passed} that "
        "pass (dashed)"
    )
    needed = []
    for name, setting in _best_rankers(study).items():
        curve = estimates.curve(setting, "value_captured")
        if setting != study.incumbent and curve["mean"].max() >= kept:
            # Not every k of the curve is kept: interpolated on its logarithmic axis.
            enough = np.exp(np.interp(kept, curve["mean"], np.log(curve["k"])))
            needed.append(f"{name} needs {enough:.0f}")
    return f"{sentence}; for that, {' and '.join(needed)}." if needed else f"{sentence}."


def savings_at_targets(study: Study, estimates: Estimates) -> str:
    """Say what the scores save if another share of the final value must be kept.

    "" where the final ranker scored only a part: the counts have bounds, and savings none.
    """
    if estimates.are_partly_scored or study.best_with_scores is None or study.baseline is None:
        return ""
    shown: list[str] = []
    others: list[str] = []
    for target in estimates.targets:
        saved = estimates.cost_saved(study.best_with_scores, target)
        mean, low, high = percents(saved)
        if not low or target == TARGET:
            continue
        text = f"{100 * target:g}%: {mean}% ({low} to {high})"
        if saved.low > 0:
            shown.append(text)
        else:
            others.append(text)
    sentences = []
    if shown:
        sentences.append(
            f"The scores also save at other shares of the final value: {', '.join(shown)}."
        )
    if others:
        sentences.append(f"The scores are not shown to save at {', '.join(others)}.")
    return " ".join(sentences)


def saved_over_today(study: Study, estimates: Estimates) -> str:
    """Say what the best with scores saves against today's ranker, if the answer does not."""
    with_scores = study.best_with_scores
    if with_scores is None or study.incumbent in (None, study.baseline):
        return ""
    if estimates.are_partly_scored:
        return ""
    mean, low, high = percents(estimates.cost_saved(with_scores, over=study.incumbent))
    if not low:
        return ""
    return (
        f"Against today's early ranker, the best with scores saves {mean}% of the funnel's "
        f"{study.saved_unit} (95% interval {low} to {high}%), if each passes what it needs for "
        f"{PERCENT} of the final value."
    )


def at_an_end(study: Study) -> str:
    """Say which tuned numbers of the best rankers are the smallest or the largest that was tried.

    A better value may lie beyond it.
    """
    ends = []
    for name, setting in _best_rankers(study).items():
        rows = study.rows[study.rows["setting"] == setting]
        if rows.empty:
            continue  # a list or trees: only students are tuned here
        chosen = rows.iloc[0]
        rows_of_method = study.rows[study.rows["method"] == chosen["method"]]
        for column in ("distill_weight", *study.varying):
            if not is_numeric_dtype(rows_of_method[column]):
                continue
            tried = sorted(rows_of_method[column].dropna().unique())
            if len(tried) > 1 and chosen[column] in (tried[0], tried[-1]):
                number_chosen = f"{key_title(column)} {value_text(chosen[column])} of {name}"
                ends.append(f"{number_chosen} (tried: {', '.join(map(value_text, tried))})")
    if not ends:
        return ""
    return f"At an end of the values tried, so a better one may lie beyond: {'; '.join(ends)}."


def worse_measures(study: Study, estimates: Estimates) -> str:
    """Say in which main measures the best with scores is worse, by its whole interval."""
    with_scores = study.best_with_scores
    if with_scores is None or study.baseline is None:
        return ""
    num_compared = 0
    worse = []
    for measure in important_columns(study):
        metric = metric_of(measure)
        if metric is None or metric.better not in ("lower", "higher"):
            continue
        # The answer has the saving, which counts the cost.
        if measure in (*SAVINGS, "cost_ratio"):
            continue
        change = estimates.gap(with_scores, study.baseline, measure)
        if np.isnan(change.low):
            continue
        num_compared += 1
        gain = change if metric.better == "higher" else change.scaled(-1)
        if gain.high < 0:
            digits = digits_of(measure)
            low = number(change.low, digits, signed=True)
            high = number(change.high, digits, signed=True)
            worse.append(f"{title_of(measure)} ({low} to {high})")
    if not num_compared:
        return ""
    if not worse:
        return (
            f"In none of {num_compared} main measures is the best with scores shown to be worse "
            "than the best without."
        )
    sentence = (
        f"The best with scores is worse than the best without in {', '.join(worse)}; brackets are "
        "95% intervals of the difference."
    )
    if any(text.startswith(_END_TO_END) for text in worse):
        sentence += (
            f" The {_END_TO_END} counts what the log did not show as lost, so it falls with almost "
            "any change."
        )
    return sentence


def failed_claims(claims: pd.DataFrame) -> str:
    """Say which statements do not hold; `claims` has a row per statement and measure."""
    failed = claims.loc[claims["verdict"] == "does not hold", "statement"].unique()
    if not len(failed):
        return ""
    return f"Claims that do not hold, by one measure or more: {'; '.join(failed)}."


def saving_methods(data: pd.DataFrame, margin: float) -> str:
    """Say how many methods save, and how many save and keep users, by their whole intervals.

    Args:
      data: a row per method, with the lower ends `saving_low` and `users_low`.
      margin: the loss for users that counts as none, a share.
    """
    saves = data["saving_low"] > 0
    keeps_users = data["users_low"] > -margin
    return (
        f"With 95% confidence, {saves.sum()} of {len(data)} methods save against the best without, "
        f"and {(saves & keeps_users).sum()} save and keep users within {100 * margin:g}%."
    )


def share_kept(study: Study, estimates: Estimates, measure: str) -> str:
    """Say what the best rankers keep of a measure if `funnel.passed` candidates pass."""
    parts = []
    for name, setting in _best_rankers(study).items():
        value = estimates.of(setting, f"{measure}@{study.passed}").mean
        if np.isfinite(value):
            text = f"{value:.1%}" if measure.endswith("value_captured") else f"{value:.4f}"
            parts.append(f"{text} with {name}")
    return f"If {study.passed} pass, it is {' and '.join(parts)}." if parts else ""


def best_of_losses(data: pd.DataFrame) -> str:
    """Say which method predicts users best, and which follows the teacher best.

    `data` has a row per setting: its `line` in the figure, `user_bce` and `teacher_bce`.
    """
    methods = data["line"].to_numpy()
    users = methods[data["user_bce"].to_numpy().argmin()]
    teacher = methods[data["teacher_bce"].to_numpy().argmin()]
    if users == teacher:
        return f"“{users}” predicts users best, and follows the teacher best."
    return f"“{users}” predicts users best, and “{teacher}” follows the teacher best."


def falling_losses(data: pd.DataFrame, loss: str) -> str:
    """Say how many lines end lower than they begin; `data` has a row per `line` and `step`."""
    by_line = _by_line(data, loss)
    num_lower = int((by_line.last() < by_line.first()).sum())
    return f"The loss of {num_lower} of {by_line.ngroups} methods ends lower than it began."


def largest_rise(data: pd.DataFrame, norm: str) -> str:
    """Say by which factor a line rises most between two steps of the log."""
    by_step = data.sort_values("step", kind="stable")
    ratios = (by_step[norm] / _by_line(data, norm).shift()).to_numpy()
    if np.isnan(ratios).all():
        return ""
    place = int(np.nanargmax(ratios))
    line = by_step["line"].to_numpy()[place]
    factor = f"{ratios[place]:.1f}"
    return f"The largest rise between two logged steps is by a factor of {factor}: “{line}”."


def _by_line(data: pd.DataFrame, measure: str) -> Any:
    return data.sort_values("step", kind="stable").groupby("line")[measure]
