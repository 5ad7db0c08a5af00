"""The report's tables: the comparison of settings, and its excerpts for people."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kd_ranker.evaluation import results, setting_names
from kd_ranker.evaluation.baselines import NO_RANKERS
from kd_ranker.evaluation.metrics import registry
from kd_ranker.evaluation.metrics.registry import metric_of, title_of
from kd_ranker.evaluation.metrics.target import CRITERION, PERCENT
from kd_ranker.evaluation.saving import SAVINGS, of_split
from kd_ranker.evaluation.setting_names import NAMED, key_title, value_text
from kd_ranker.evaluation.whole import Bounds
from kd_ranker.reporting.claims import FEWER
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.intervals import NOTHING, Interval, interval
from kd_ranker.reporting.study import Study

# A mean, with or without the half-width of its interval, or a count.
_NUMBER = r"[−+]?[\d.,]+%?(?: ± .*)?|"


class Table(NamedTuple):
    """A table for people: texts by column title, and notes below.

    A mean is "mean ± half-width", and "" where it is not known. `best` is True where a cell is
    marked; None marks nothing.
    """

    title: str
    cells: pd.DataFrame
    notes: list[str]
    best: pd.DataFrame | None = None

    @property
    def marks(self) -> np.ndarray:
        """True where a cell is marked, [lines, columns]."""
        if self.best is None:
            return np.zeros(self.cells.shape, bool)
        return self.best.to_numpy(bool)

    @property
    def numeric(self) -> list[bool]:
        """True for the columns of numbers, which are aligned to the right."""
        return [
            bool(self.cells[name].astype(str).str.fullmatch(_NUMBER).all()) for name in self.cells
        ]

    def markdown(self) -> str:
        """Return the table as Markdown, with its notes below."""
        cells = self.cells.astype(str).map(_in_markdown)  # without rows, columns have no type
        cells = cells.rename(columns=_in_markdown)
        marked = cells.where(~self.marks, "**" + cells + "**")
        body = marked.to_markdown(index=False, tablefmt="github", disable_numparse=True)
        notes = [f"{_in_markdown(note)}\n" for note in self.notes]
        return "\n".join([f"# {_in_markdown(self.title)}", "", body, "", *notes])

    def latex(self) -> str:
        r"""Return the table as LaTeX (needs `\usepackage{booktabs}`), its notes as comments."""
        bold = np.where(self.marks, "font-weight: bold", "")
        # An empty line in a cell would end the table.
        cells = self.cells.astype(str).map(_on_one_line).rename(columns=_on_one_line)
        style = cells.style.hide(axis="index").apply(lambda _: bold, axis=None)
        style = style.format(escape="latex").format_index(escape="latex", axis="columns")
        alignment = "".join("r" if numeric else "l" for numeric in self.numeric)
        body = style.to_latex(column_format=alignment, hrules=True, convert_css=True)
        for character, command in (("−", "$-$"), ("±", r"$\pm$"), ("λ", r"$\lambda$")):
            body = body.replace(character, command)
        comments = [f"% {_on_one_line(text)}" for text in (self.title, *self.notes)]
        return "\n".join([*comments, body])


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _in_markdown(text: str) -> str:
    """Return Markdown that shows a text as it is, on one line: names in a log may hold markup."""
    escaped = html.escape(_on_one_line(text), quote=False)
    return re.sub(r"[\\`*\[\]|]", r"\\\g<0>", escaped)


def number(value: float, digits: int, signed: bool = False) -> str:
    """Return a number for people: a true minus sign, no negative zero; "" for NaN.

    >>> number(-0.0314, 2), number(-0.0001, 2), number(0.5, 1, signed=True)
    ('−0.03', '0.00', '+0.5')
    """
    if np.isnan(value):
        return ""
    # Adding 0 turns the -0 of a tiny negative number into 0.
    rounded = round(value, digits) + 0.0
    sign = "+" if signed and rounded > 0 else ""
    return f"{sign}{rounded:.{digits}f}".replace("-", "−")


def mean_text(mean: Interval, digits: int, signed: bool = False) -> str:
    """Return a mean with half the width of its interval; "" if it is not known.

    >>> mean_text(Interval(0.5, 0.375, 0.625, 3), 3)
    '0.500 ± 0.125'
    """
    half = mean.high - mean.mean
    # Counts, such as FLOPs, do not vary.
    error = f" ± {number(half, digits)}" if half > 1e-9 else ""
    return number(mean.mean, digits, signed) + error


def bounds_text(bounds: Bounds) -> str:
    """Return a number of candidates, or its bounds; "" if it is not known.

    >>> bounds_text(Bounds(320.0, 320.0)), bounds_text(Bounds(62.0, float("nan")))
    ('320', 'at least 62')
    >>> bounds_text(Bounds(163.0, 513.0))
    '163 to 513'
    """
    low = number(bounds.low, 0)
    high = number(bounds.high, 0)
    if not low or low == high:
        return low
    return f"{low} to {high}" if high else f"at least {low}"


def percents(share: Interval) -> tuple[str, str, str]:
    """Return the mean and the ends of a share as percent; with a decimal where all are small.

    >>> percents(Interval(0.252, 0.055, 0.45, 3)), percents(Interval(0.004, -0.002, 0.01, 3))
    (('25', '6', '45'), ('0.4', '−0.2', '1.0'))
    """
    ends = np.array([100 * share.mean, 100 * share.low, 100 * share.high])
    largest = np.abs(ends[~np.isnan(ends)]).max(initial=0)
    digits = 0 if largest >= 5 else 1
    mean, low, high = (number(value, digits) for value in ends)
    return mean, low, high


def results_text(workdir: Path, passed: int, width: int | None = None) -> str:
    """Return the main columns of a workdir's `results.csv` as aligned text, and its path.

    Rows of the test split that differ only in their seeds become one: the mean and, from two seeds
    on, half its 95% interval over seeds.

    Args:
      workdir: the folder of a run or a sweep.
      passed: the k of the funnel's columns.
      width: the most characters of a line; measures that do not fit are left out, and the last line
        counts them. None writes all of them.
    """
    path = workdir / results.FILE
    named = setting_names.SETTING_COLUMNS[NAMED:]
    frame = setting_names.with_names(of_split(results.read_csv(path), "test"), named)
    tasks = [name.split("/")[1] for name in frame.columns if name.startswith("user_bce/")]
    known = frame.dropna(axis="columns", how="all")
    varying = [column for column in named if frame[column].nunique() > 1]
    by_setting = frame.groupby("setting", sort=False)
    cells = _key_cells(by_setting.head(1), varying)
    cells["seeds"] = [int(rows["non_finite_step"].isna().sum()) for _, rows in by_setting]
    left_out = 0
    for measure in registry.main_columns(tasks, passed):
        if measure not in known:
            continue
        texts = [_over_repeats(rows[measure], measure) for _, rows in by_setting]
        wider = cells.assign(**{title_of(measure): texts})
        if width is not None and _width(wider) > width:
            left_out += 1
        else:
            cells = wider
    more = f" ({left_out} more measures; --wide prints them)" if left_out else ""
    return f"{cells.to_string(index=False)}\n\nresults: {path}{more}"


def _width(cells: pd.DataFrame) -> int:
    """Return the number of characters in a line of a table as text."""
    return len(cells.to_string(index=False).partition("\n")[0])


def _over_repeats(values: pd.Series, measure: str) -> str:
    return mean_text(interval(values.to_numpy(float)), digits_of(measure))


def important_columns(study: Study) -> list[str]:
    """Return the columns of a paper's table that were measured: the funnel's first."""
    known = pd.concat([study.tested, study.teachers]).dropna(axis="columns", how="all")
    columns = registry.main_columns(study.config.tasks, study.passed)
    return [column for column in columns if column in known]


def comparison(study: Study, estimates: Estimates) -> pd.DataFrame:
    """Return every chosen setting and rival on every measure of the test split, not rounded.

    Its columns: the dataset, the setting and its keys, the measure; `mean`, `low`, `high` and `n`
    over repeats; the same of the paired difference to the baseline (`pairs` counts its repeats);
    and `best`, whether the setting is marked in its column (see `marked`).
    """
    keys = [*dict.fromkeys([*setting_names.SETTING, *study.varying])]
    references = of_split(study.references, "test")
    rivals = references[references["setting"].isin(study.rivals)]
    rows = pd.concat([study.tested, rivals]).drop_duplicates("setting")
    settings = rows.set_index("setting")[keys]
    lines: list[dict[str, Any]] = []
    for measure in map(str, study.rows):
        metric = metric_of(measure)
        if metric is None or not metric.compared:
            continue
        means = {str(setting): estimates.of(str(setting), measure) for setting in settings.index}
        winner = marked(estimates, measure, means, metric.better)
        for setting, mean in means.items():
            gap = NOTHING
            if study.baseline not in (None, setting):
                gap = estimates.gap(setting, str(study.baseline), measure)
            lines.append(
                {
                    "dataset": study.dataset,
                    "setting": setting,
                    **settings.loc[setting],
                    "measure": measure,
                    **mean._asdict(),
                    "difference": gap.mean,
                    "difference_low": gap.low,
                    "difference_high": gap.high,
                    "pairs": gap.n,
                    "best": setting == winner,
                }
            )
    gap_columns = ["difference", "difference_low", "difference_high", "pairs"]
    columns = ["dataset", "setting", *keys, "measure", *Interval._fields, *gap_columns, "best"]
    return pd.DataFrame(lines, columns=columns)


def marked(
    estimates: Estimates, measure: str, means: Mapping[str, Interval], better: str | None
) -> str | None:
    """Return the setting to mark as the best in its column, or None.

    The rule: the setting with the best mean, if the 95% interval of its paired difference to
    *every* other setting excludes 0. For independent normal means of equal variance, comparing the
    winner with the runner-up needs no correction for the number of settings (Hung and Fithian,
    "Rank verification for exponential families", Ann. Stat. 2019). Here variances differ and are
    estimated, so the winner is compared with all. The rule is for one column at a time: of twenty
    columns of noise, one may carry a mark.

    `means` are those of each setting. Unless `better` is "lower" or "higher", there is no best.
    """
    if better not in ("lower", "higher"):
        return None
    sign = 1 if better == "higher" else -1
    known = {setting: mean.mean for setting, mean in means.items() if mean.n}
    if len(known) < 2:
        return None
    winner = max(known, key=lambda setting: sign * known[setting])
    for other in known:
        if other != winner and not estimates.gap(winner, other, measure).scaled(sign).low > 0:
            return None
    return winner


def main_table(study: Study, estimates: Estimates, numbers: pd.DataFrame) -> Table:
    """Return the chosen setting of each method on the main measures, read on the test split.

    With the teacher and the references, sorted by how many have to be passed: a list of items
    that beats a model is above it. `numbers` is the study's `comparison`.
    """
    rows = pd.concat([study.teachers, of_split(study.references, "test"), study.tested])
    rows = rows.drop_duplicates("setting")
    passed = [estimates.of(str(setting), CRITERION).mean for setting in rows["setting"]]
    rows = rows.assign(passed=passed).sort_values("passed", kind="stable", na_position="last")
    means = {
        measure: [estimates.of(str(setting), measure) for setting in rows["setting"]]
        for measure in important_columns(study)
    }
    cells = _key_cells(rows, study.varying)
    others = (rows["role"] == "teacher") | rows["run"].isin(NO_RANKERS)
    cells["scores"] = rows["needs_scores"].map({True: "yes", False: "no"}).mask(others, "").values
    cells = _with_means(cells, "repeats", means)
    winners = numbers[numbers["best"] & numbers["measure"].isin(list(means))]
    winner_by_title = dict(zip(winners["measure"].map(title_of), winners["setting"], strict=True))
    best = pd.DataFrame(
        {title: (rows["setting"] == winner_by_title.get(title)).to_numpy() for title in cells}
    )
    notes = [
        "Means over repeats (seeds) on the test split: of each method the setting that did best on "
        "validation. No choice has seen the test requests, but the same trained students are read "
        "on both splits. ± is half the 95% interval, over test requests and repeats where the sums "
        "of each request were kept. Teacher KL is the mean over tasks. "
        f"Saving is the share of the funnel's cost, {study.costs.unit}, that is saved against the "
        "best ranker that needs no scores of the final ranker; cost ratio is of FLOPs. Scores: "
        "whether it needs the final ranker's scores or order.",
        "Bold: the best mean of the column, where the 95% interval of its paired difference to "
        "every other setting excludes 0. Otherwise nothing is bold. The winner "
        "needs no further correction for the number of settings (Hung and Fithian 2019), but the "
        "rule is for one column at a time.",
    ]
    if _has_best_bce(study, estimates):
        notes.append(
            f"{study.plain} has the lowest user BCE: it learns nothing but the probability of an "
            "action on shown candidates. Unshown negatives lower the probabilities, and losses on "
            "an order do not keep them calibrated. BCE measures how well users are predicted, "
            "not how well candidates are ordered; compare AUC."
        )
    if len(study.diverged):
        names = ", ".join(
            f"{row['run'] or row['setting']} (step {row['non_finite_step']:g})"
            for row in study.diverged.to_dict("records")
        )
        notes.append(f"Left out, because their loss stopped being finite: {names}.")
    return Table(f"{study.dataset}: the best of each method, on test", cells, notes, best)


def _has_best_bce(study: Study, estimates: Estimates) -> bool:
    """Test whether plain mode `none` predicts users best without passing fewest."""
    if study.plain in (None, study.baseline):
        return False
    measures = [f"user_bce/{task}" for task in study.config.tasks]
    losses = {
        str(setting): sum(estimates.of(str(setting), measure).mean for measure in measures)
        for setting in study.tested["setting"].unique()
    }
    return min(losses, key=lambda setting: losses[setting]) == study.plain


def difference_table(study: Study, estimates: Estimates) -> Table | None:
    """Return the changes against the baseline on the main measures; None without a baseline."""
    settings = study.tested[study.tested["setting"] != study.baseline].drop_duplicates("setting")
    if study.baseline is None or settings.empty:
        return None
    gaps = {
        measure: [
            estimates.gap(setting, study.baseline, measure) for setting in settings["setting"]
        ]
        for measure in important_columns(study)
        # A saving is a difference to the baseline already.
        if measure not in SAVINGS
    }
    cells = _with_means(_key_cells(settings, study.varying), "pairs", gaps, signed=True)
    notes = [
        f"The setting less {study.baseline} in the same repeat, on the same test requests; ± is "
        "half the 95% interval of that paired difference, not corrected for the number of settings."
    ]
    return Table(f"{study.dataset}: difference to {study.baseline}", cells, notes)


def _with_means(
    cells: pd.DataFrame, repeats: str, means: Mapping[str, list[Interval]], signed: bool = False
) -> pd.DataFrame:
    """Return cells with a column of the numbers of repeats, and one of texts per measure."""
    counts = [
        str(max(mean.n for mean in means_of_row))
        for means_of_row in zip(*means.values(), strict=True)
    ]
    texts = {
        title_of(measure): [mean_text(mean, digits_of(measure), signed) for mean in column]
        for measure, column in means.items()
    }
    return cells.assign(**{repeats: counts}, **texts)


def cost_table(study: Study, estimates: Estimates) -> Table | None:
    """Return the cost of the funnel of each chosen setting; None without a teacher's cost.

    For `TARGET`, with the value for users then; and the saving at every target.
    """
    if not len(study.teachers):
        return None
    users_measures = study.users_measures[1:]
    targets = estimates.targets
    teacher_flops = float(study.teachers["flops_per_candidate"].mean())
    empty = [""] * (len(users_measures) + len(targets))
    lines = [["only the teacher", "", f"{teacher_flops:,.0f}", "100%", *empty]]
    flops = study.tested.drop_duplicates("setting").set_index("setting")["flops_per_candidate"]
    for setting, setting_flops in zip(map(str, flops.index), flops, strict=True):
        percent = estimates.cost_share(setting).scaled(100)
        line = [
            setting,
            mean_text(estimates.of(setting, CRITERION), 0),
            f"{setting_flops:,.0f}",
            mean_text(percent, 1),
        ]
        line += [mean_text(estimates.of(setting, measure), 4) for measure in users_measures]
        line += [mean_text(estimates.cost_saved(setting, target), 3) for target in targets]
        lines.append(line)
    notes = [
        f"The funnel's cost is that of a request which passes as many as keep {PERCENT} of "
        f"the final value, {study.costs.unit}, as a share of the cost of only the final ranker on "
        "all candidates; the columns that follow are the users' value then. The saving is the "
        f"share of the cost that is saved against {study.baseline}, if both pass enough candidates "
        "to keep a share of the final value. ± is half the 95% interval."
    ]
    columns = ["", f"passed for {PERCENT}", "FLOPs per candidate", "funnel's cost (%)"]
    columns += [title_of(measure) for measure in users_measures]
    columns += [f"saving at {100 * target:g}%" for target in targets]
    cells = pd.DataFrame(lines, columns=columns, dtype=object)
    return Table(f"{study.dataset}: cost of the funnel", cells, notes)


def tuning_table(study: Study) -> Table:
    """Return every setting on validation by the criterion, with the chosen ones of each method."""
    rows = of_split(study.rows, "validation")
    settings = rows.drop_duplicates("setting")
    cells = _key_cells(settings, study.varying)
    is_stopped = settings["is_stopped"].to_numpy()
    if is_stopped.any():
        steps = settings["step"].map("{:.0f}".format).to_numpy()
        cells["steps"] = np.where(is_stopped, steps + ", stopped", steps)
    chosen = settings["setting"].isin(list(study.chosen.values()))
    cells[""] = np.where(chosen, "chosen", "")
    by_setting = rows.groupby("setting", sort=False)
    cells["repeats"] = by_setting.size().astype(str).to_numpy()
    for measure in (CRITERION, f"value_captured@{study.passed}", study.users_measures[0]):
        cells[title_of(measure)] = [
            _over_repeats(values, measure) for _, values in by_setting[measure]
        ]
    notes = [
        "All that was tried, on the validation split; of each method the setting with the smallest "
        f"mean {title_of(CRITERION)} was chosen. ± is half the 95% interval over repeats."
    ]
    if is_stopped.any():
        notes.append(
            "A stopped setting was behind others of its method, and has the numbers of the step at "
            "which halving stopped it. Do not compare it with one that trained to the end."
        )
    return Table(f"{study.dataset}: every setting, on validation", cells, notes)


def claims_table(dataset: str, claims: pd.DataFrame) -> Table:
    """Return the claims of `claims.claims` on a dataset as a table for people."""
    means = []
    ends = []
    for line in claims.to_dict("records"):
        digits = digits_of(line["measure"])
        low = number(line["low"], digits)
        means.append(number(line["mean"], digits))
        ends.append(f"{low} to {number(line['high'], digits)}" if low else "")
    cells = pd.DataFrame(
        {
            "": claims["claim"],
            "claim": claims["statement"],
            "verdict": claims["verdict"],
            "value": means,
            "95% interval": ends,
            "measure": claims["measure"].map(title_of).replace(FEWER, f"fewer for {PERCENT}"),
            "setting": claims["setting"],
            "repeats": claims["n"].astype(str),
            "remark": claims["remark"],
        }
    )
    notes = [
        "A claim holds if the whole interval is on the claimed side of its threshold, does not "
        "hold if the whole interval is on the other side, and is undecided if the interval "
        "includes the threshold or one repeat gives none. Intervals are not corrected for the "
        "number of claims.",
        "(a) is of plain mode none. (c) is shared less aux, all else equal, averaged over the "
        "settings that both trained in full. The other numbers are paired differences to the best "
        "on validation of the rankers without scores and the lists of items; (f) holds only if (d) "
        "does.",
    ]
    return Table(f"{dataset}: claims", cells, notes)


def digits_of(measure: str) -> int:
    """Return the digits after the decimal point of a measure in tables."""
    metric = metric_of(measure)
    return metric.digits if metric else 3


def _key_cells(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return the columns that name a setting, or only the first for a ranker without a model."""
    is_student = rows["mode"].notna()
    # Mode none has no distillation loss to weigh.
    weights = rows["distill_weight"].where(rows["distill_loss"].notna())
    cells = {
        "mode": rows["mode"].astype(object).fillna(rows["setting"]),
        "serves": rows["serve"].where(is_student, ""),
        "weight": weights.map(value_text),
        **{key_title(name): rows[name].where(is_student).map(value_text) for name in columns},
    }
    return pd.DataFrame(cells, dtype=object).reset_index(drop=True)
