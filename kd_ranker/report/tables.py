"""Tables of results for people."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tabulate import tabulate

from kd_ranker.evaluation import results
from kd_ranker.evaluation.metrics import TARGET, metric_of, summary_columns, title_of
from kd_ranker.evaluation.references import NO_RANKERS
from kd_ranker.evaluation.saving import CRITERION, SAVINGS, of_split
from kd_ranker.report.choices import users_at_target, users_measure
from kd_ranker.report.claims import RULES
from kd_ranker.report.comparison import important_columns
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import Interval, interval
from kd_ranker.report.study import NAMED, Study, key_title, text_of

# What students may cost a candidate, over the teacher: 5% is the method's own figure.
STUDENT_COSTS = (0.01, 0.05, 0.1)


def results_text(workdir: Path, passed: int) -> str:
    """The table of a workdir's `results.csv`, and where that lies."""
    path = workdir / results.FILE
    return f"{summary_table(results.read_csv(path), passed)}\n\nresults: {path}"


def summary_table(frame: pd.DataFrame, passed: int) -> str:
    """The columns of `results.csv` that matter, as aligned text.

    Rows that differ only in their seeds become one: the mean and, from two seeds on, its standard
    error.

    Args:
      frame: one or more `results.csv`, see `results.read_csv`.
      passed: `config.funnel.passed`, the k of the funnel's columns.
    """
    frame = of_split(frame, "test")
    tasks = [name.split("/")[1] for name in frame.columns if name.startswith("user_bce/")]
    shown = [column for column in summary_columns(tasks, passed) if column in frame]
    setting = [column for column in results.setting_columns(frame) if column in frame]
    # Only what differs is worth a column.
    varying = [column for column in setting[NAMED:] if frame[column].nunique() > 1]
    lines = []
    named = frame.assign(reference=frame["member"].where(frame["role"] != "student"))
    keys = ["dataset", "role", "reference", *setting]
    for _, group in named.groupby(keys, sort=False, dropna=False):
        first = group.iloc[0]
        # Mode none has no loss to weigh.
        distilled = pd.notna(first["distill_loss"])
        line = {
            "model": first["mode"] if first["role"] == "student" else first["member"],
            "serve": first["serve"],
            "weight": text_of(first["distill_weight"]) if distilled else "",
            **{key_title(column): text_of(first[column]) for column in varying},
            "seeds": str(_healthy(group)),
        }
        for column in shown:
            values = group[column].dropna()
            line[title_of(column, short=True)] = _mean_and_error(values) if len(values) else ""
        lines.append(line)
    return pd.DataFrame(lines).to_string(index=False)


def _healthy(group: pd.DataFrame) -> int:
    """The number of rows of members whose loss stayed finite."""
    frozen = group["non_finite_step"].notna().sum() if "non_finite_step" in group else 0
    return len(group) - int(frozen)


def _mean_and_error(values: pd.Series) -> str:
    numbers = values.to_numpy(dtype=float)
    digits = 0 if np.abs(numbers).max() >= 10 else 3
    # Adding 0 turns the -0 of a tiny negative number into 0.
    mean = f"{round(numbers.mean(), digits) + 0.0:.{digits}f}"
    if len(numbers) < 2:
        return mean
    return f"{mean}±{numbers.std(ddof=1) / np.sqrt(len(numbers)):.{digits}f}"


class Cell(NamedTuple):
    """A cell for people.

    Attributes:
      text: its text; of a number the mean.
      error: half the width of the interval, "" without one.
      value: what to sort by: the text, or the number that is not rounded.
      best: whether it is marked.
    """

    text: str
    error: str = ""
    value: str | float = ""
    best: bool = False


class Table(NamedTuple):
    """A table for people: its title, the columns' titles, lines of cells, and notes below it."""

    title: str
    columns: list[str]
    lines: list[list[Cell]]
    notes: list[str]


def main_table(study: Study, estimates: Estimates, numbers: pd.DataFrame) -> Table:
    """The chosen setting of each way on the main measures, read on the test split.

    With the teacher and the references, sorted by how many have to be passed.

    Args:
      study: the study.
      estimates: its estimates.
      numbers: its `comparison`.
    """
    measures = important_columns(study)
    best = set(numbers.loc[numbers["best"], ["setting", "measure"]].itertuples(index=False))
    rows = pd.concat([study.teachers, of_split(study.references, "test"), study.tested])
    lines = []
    for setting, of_setting in rows.groupby("setting", sort=False):
        means = {measure: estimates.of(str(setting), measure) for measure in measures}
        cells = [
            _number(mean, _digits(measure), best=(setting, measure) in best)
            for measure, mean in means.items()
        ]
        first, repeats = of_setting.iloc[0], max(mean.n for mean in means.values())
        keys = [*_key_cells(study, first), _scores_cell(first), Cell(str(repeats), value=repeats)]
        lines.append((estimates.of(str(setting), CRITERION).mean, [*keys, *cells]))
    # The fewest passed first: a list of items that beats a model stands above it.
    lines.sort(key=lambda line: (math.isnan(line[0]), line[0]))
    columns = [*_key_titles(study), "scores", "repeats", *map(title_of, measures)]
    title = f"{study.dataset}: the best of each way, on test"
    return Table(title, columns, [cells for _, cells in lines], _notes(study))


def _scores_cell(row: pd.Series) -> Cell:
    """The cell that marks whether a ranker needs the final ranker's scores."""
    if row["role"] == "teacher" or row["member"] in NO_RANKERS:
        return Cell("")
    return Cell("yes" if row["needs_scores"] else "no")


def difference_table(study: Study, numbers: pd.DataFrame) -> Table | None:
    """The changes against the baseline, on the measures that matter; None without a baseline."""
    undistilled = study.baseline
    # A saving is a difference to the baseline already.
    measures = [column for column in important_columns(study) if column not in SAVINGS]
    compared = numbers[numbers["setting"] != undistilled]
    if undistilled is None or compared.empty:
        return None
    lines = []
    for _, of_setting in compared.groupby("setting", sort=False):
        by_measure = {line["measure"]: line for line in of_setting.to_dict("records")}
        cells = []
        for measure in measures:
            line = by_measure[measure]
            gap = Interval(
                line["difference"], line["difference_low"], line["difference_high"], line["pairs"]
            )
            cells.append(_number(gap, _digits(measure), signed=True))
        pairs = int(of_setting["pairs"].max())
        keys = _key_cells(study, of_setting.iloc[0])
        lines.append([*keys, Cell(str(pairs), value=pairs), *cells])
    notes = [
        f"The setting less {undistilled} in the same repeat, on the same test requests; ± is half "
        "the 95% interval of that paired difference, not corrected for the number of settings."
    ]
    columns = [*_key_titles(study), "pairs", *map(title_of, measures)]
    return Table(f"{study.dataset}: difference to {undistilled}", columns, lines, notes)


def saving_table(study: Study, estimates: Estimates) -> Table | None:
    """The saving at every target, and with students of other costs; None without a baseline.

    A line per chosen way and cost of its student, a column per target.
    """
    if study.baseline is None:
        return None
    settings = study.tested.drop_duplicates("setting")
    settings = settings[settings["setting"] != study.baseline]
    costs = {None: "as measured"} | {share: f"{100 * share:g}%" for share in STUDENT_COSTS}
    lines = []
    for setting in settings["setting"]:
        for cost, told in costs.items():
            savings = [
                _number(estimates.saving(setting, target, cost), 3) for target in estimates.targets
            ]
            keys = [Cell(setting, value=setting), Cell(told, value=cost or 0.0)]
            lines.append([*keys, *savings])
    columns = ["setting", "student's cost", *(f"{100 * of:g}%" for of in estimates.targets)]
    notes = [
        f"The share of the funnel's cost, {study.costs.unit}, that is saved against "
        f"{study.baseline}, if both pass as many as keep so much of the final value. The student's "
        "cost is that of a candidate over the teacher's, of either student; as measured, it is "
        f"what {'the config says' if study.costs.student else 'the compiled models take'}. ± is "
        "half the 95% interval."
    ]
    return Table(f"{study.dataset}: saving by target and cost", columns, lines, notes)


def cost_table(study: Study, estimates: Estimates) -> Table | None:
    """The costs of a candidate, and of the funnel that keeps `TARGET`; None without a teacher's.

    The teacher, then the chosen setting of each way; with a live teacher also what training costs.
    """
    if not len(study.teachers):
        return None
    users = users_at_target(study)
    of_teacher = float(study.teachers["flops_per_candidate"].mean())
    costs = study.costs
    alone = [Cell("teacher alone", value="teacher alone"), Cell("")]
    lines = [[*alone, _flops(of_teacher), Cell("100%", value=1.0), *[Cell("")] * len(users)]]
    for first in study.tested.drop_duplicates("setting").to_dict("records"):
        setting, flops = str(first["setting"]), float(first["flops_per_candidate"])
        share = estimates.cost_share(setting, TARGET)
        percent = Interval(100 * share.mean, 100 * share.low, 100 * share.high, share.n)
        lines.append(
            [
                Cell(setting, value=setting),
                _number(estimates.of(setting, CRITERION), 0),
                _flops(flops),
                _number(percent, 1),
                *(_number(estimates.of(setting, measure), 4) for measure in users),
            ]
        )
    notes = [
        f"The funnel's cost is that of a request which passes as many as keep {100 * TARGET:g}% of "
        f"the final value, {costs.unit}, as a share of what the final ranker alone costs on all "
        "candidates; the last columns are what users have then. ± is half the 95% interval."
    ]
    if study.scored:
        notes.append(_training_cost(study, of_teacher))
    columns = ["", f"passed for {100 * TARGET:g}%", "FLOPs a candidate", "funnel's cost (%)"]
    return Table(
        f"{study.dataset}: cost of the funnel", [*columns, *map(title_of, users)], lines, notes
    )


def _flops(count: float) -> Cell:
    return Cell(f"{count:,.0f}", value=count)


def _training_cost(study: Study, of_teacher: float) -> str:
    """The cost in training of a live teacher's scores, beside that of a student."""
    teacher = study.scored * of_teacher
    # A backward pass takes about two forward ones.
    student = 3 * study.scored * float(study.tested["flops_per_candidate"].max())
    return (
        f"In training the live teacher scores {study.scored} candidates of each request, once for "
        f"all students of a cohort: {teacher:.3g} FLOPs a request, {teacher / student:.0f} times "
        f"the {student:.3g} of a student's own step (forward, and twice that backward)."
    )


def tuning_table(study: Study) -> Table:
    """Every setting on validation by the criterion, with the one that was chosen of each way."""
    rows = of_split(study.rows, "validation")
    measures = [CRITERION, f"value_captured@{study.passed}", users_measure(study)]
    lines = []
    for setting, of_setting in rows.groupby("setting", sort=False):
        cells = [_number(interval(of_setting[of].to_numpy(float)), _digits(of)) for of in measures]
        chosen = "chosen" if setting in study.chosen.values() else ""
        keys = _key_cells(study, of_setting.iloc[0])
        repeats = Cell(str(len(of_setting)), value=len(of_setting))
        lines.append([*keys, Cell(chosen, value=chosen), repeats, *cells])
    columns = [*_key_titles(study), "", "repeats", *map(title_of, measures)]
    notes = [
        "All that was tried, on the validation split; of each way the setting with the smallest "
        f"mean {title_of(CRITERION)} was chosen. ± is half the 95% interval over repeats."
    ]
    return Table(f"{study.dataset}: every setting, on validation", columns, lines, notes)


def claims_table(dataset: str, claims: pd.DataFrame) -> Table:
    """The claims as a table for people.

    Args:
      dataset: its name.
      claims: of `claims.claims`.
    """
    lines = []
    for _, claim in claims.iterrows():
        mean = Interval(claim["mean"], claim["low"], claim["high"], claim["n"])
        title, digits = title_of(claim["measure"]), _digits(claim["measure"])
        span = (
            ""
            if np.isnan(mean.low)
            else f"{number(mean.low, digits)} to {number(mean.high, digits)}"
        )
        lines.append(
            [
                Cell(claim["claim"], value=claim["claim"]),
                Cell(claim["statement"], value=claim["statement"]),
                Cell(claim["verdict"], value=claim["verdict"]),
                Cell(claim["setting"], value=claim["setting"]),
                Cell(title, value=title),
                _number(mean._replace(low=np.nan, high=np.nan), digits),
                Cell(span, value="" if np.isnan(mean.low) else mean.low),
                Cell(str(mean.n), value=mean.n),
                Cell(claim["remark"], value=claim["remark"]),
            ]
        )
    columns = [
        *("", "claim", "verdict", "setting", "measure"),
        *("value", "95% interval", "repeats", "remark"),
    ]
    notes = [
        "A claim holds if the whole interval lies on the claimed side of its threshold, does not "
        "hold if the whole interval lies on the other side, and is undecided if the interval "
        "includes the threshold or one repeat gives none. Intervals are not corrected for the "
        "number of claims.",
        *(f"({claim}) {rule}." for claim, rule in RULES.items()),
    ]
    return Table(f"{dataset}: claims", columns, lines, notes)


def _digits(measure: str) -> int:
    metric = metric_of(measure)
    return metric.digits if metric else 3


def _key_titles(study: Study) -> list[str]:
    return ["mode", "serves", "weight", *map(key_title, study.varying)]


def _key_cells(study: Study, keys: pd.Series) -> list[Cell]:
    """The cells that name a setting, or a ranker that is no student."""
    if keys.get("role", "student") != "student":
        name = str(keys["setting"])
        return [Cell(name, value=name), *[Cell("")] * (len(_key_titles(study)) - 1)]
    mode, serves = str(keys["mode"]), str(keys["serve"])
    weight = float(keys["distill_weight"])
    cells = [
        Cell(mode, value=mode),
        Cell(serves, value=serves),
        # Mode none has no distillation loss to weigh.
        Cell(f"{weight:g}", value=weight) if pd.notna(keys["distill_loss"]) else Cell(""),
    ]
    for column in study.varying:
        text = text_of(keys[column])
        cells.append(Cell(text, value=keys[column] if text else ""))
    return cells


def _number(mean: Interval, digits: int, signed: bool = False, best: bool = False) -> Cell:
    if np.isnan(mean.mean):
        return Cell("")
    half = mean.high - mean.mean
    return Cell(
        text=number(mean.mean, digits, signed),
        # What is counted, as FLOPs are, does not vary.
        error=number(half, digits) if half > 1e-9 else "",
        value=mean.mean,
        best=best,
    )


def number(value: float, digits: int, signed: bool = False) -> str:
    """A number for people: a true minus sign, no negative zero.

    >>> number(-0.0314, 2), number(-0.0001, 2), number(0.5, 1, signed=True)
    ('−0.03', '0.00', '+0.5')
    """
    # Adding 0 turns the -0 of a tiny negative number into 0.
    rounded = round(value, digits) + 0.0
    return f"{rounded:{'+' if signed and rounded else ''}.{digits}f}".replace("-", "−")


def _notes(study: Study) -> list[str]:
    notes = [
        "Means over repeats (seeds), on the test split, which no choice has seen: of each way the "
        "setting that did best on validation. ± is half the 95% interval, over test requests and "
        "repeats where what each request adds was kept. Teacher KL is the mean over tasks. Saving "
        f"is the share of the funnel's cost, {study.costs.unit}, that is saved against the best "
        "ranker that needs no scores of the final ranker; cost ratio is of FLOPs. Scores: whether "
        "it needs the final ranker's scores or order.",
        "Bold: the best mean of the column, where the 95% interval of its paired difference to "
        "every other setting excludes 0. Nothing is bold where that cannot be said. The winner "
        "needs no further correction for the number of settings (Hung and Fithian 2019), but each "
        "column stands for itself.",
    ]
    if len(study.frozen):
        names = ", ".join(
            f"{line['member'] or line['setting']} (step {line['non_finite_step']:g})"
            for line in study.frozen.to_dict("records")
        )
        notes.append(f"Left out, because their loss stopped being finite: {names}.")
    return notes


def markdown(table: Table) -> str:
    """A table as Markdown, its notes below."""

    def text(cell: Cell) -> str:
        joined = f"{cell.text} ± {cell.error}" if cell.error else cell.text
        return f"**{joined}**" if cell.best else joined

    lines = [[text(cell) for cell in line] for line in table.lines]
    body = tabulate(lines, table.columns, tablefmt="github", disable_numparse=True)
    return "\n".join([f"# {table.title}", "", body, "", *(f"{note}\n" for note in table.notes)])


def latex(table: Table) -> str:
    r"""A table as LaTeX (needs `\usepackage{booktabs}`), its notes as comments above."""

    def text(cell: Cell) -> str:
        joined = f"{cell.text} ± {cell.error}" if cell.error else cell.text
        return rf"\textbf{{{_latex(joined)}}}" if cell.best else _latex(joined)

    frame = pd.DataFrame(
        [[text(cell) for cell in line] for line in table.lines],
        columns=[_latex(column) for column in table.columns],
    )
    # Names to the left, numbers to the right.
    names = next((table.columns.index(of) for of in ("repeats", "pairs") if of in table.columns), 2)
    alignment = "l" * names + "r" * (len(table.columns) - names)
    body = frame.to_latex(index=False, escape=False, column_format=alignment)
    comments = [f"% {line}" for line in (table.title, *table.notes)]
    return "\n".join([*comments, body])


def _latex(text: str) -> str:
    special = {"−": "$-$", "±": r"$\pm$", "λ": r"$\lambda$"}
    special |= {character: f"\\{character}" for character in "%&_#$"}
    return "".join(special.get(character, character) for character in text)
