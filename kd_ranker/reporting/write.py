"""Write a report: tables, figures, and one page that needs no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import vl_convert
from markupsafe import Markup, escape

from kd_ranker.evaluation.metrics.registry import metric_of, title_of
from kd_ranker.reporting import figures, findings, tables
from kd_ranker.reporting.answer import Answer, answer
from kd_ranker.reporting.claims import claims
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.study import Study, read_studies
from kd_ranker.reporting.summary import summary
from kd_ranker.reporting.tables import Table
from kd_ranker.reporting.timeout import timeout_sentence, timeout_table
from kd_ranker.requests.templates import templates_of
from kd_ranker.training.workdir import write_atomically

PAGE = "report.html"
TABLES = "tables"
FIGURES = "figures"
# The part of Vega's bundle that page.js uses.
_GLOBALS = "window.vegaEmbed = vegaEmbed;"


class SectionTables(NamedTuple):
    """The tables of a section of the page, by the question that they answer."""

    costs: list[Table]
    tuned: list[Table]
    results: list[Table]


class Section(NamedTuple):
    """The part of the page about one dataset."""

    study: Study
    answer: Answer
    doubts: tuple[str, ...]  # where the saving is not shown, and what is worse
    over_today: str  # the saving against today's ranker; "" if it is not known
    timeout: str  # what is left if the final ranker times out; "" if it is not known
    tuned: str  # where a better setting may lie; "" if nothing says so
    summary: str  # the table for a terminal
    figures: list[figures.Figure]
    claims: Table
    verdicts: str  # how many claims have which verdict
    tables: SectionTables
    formulas: dict[str, str]  # of the measures in the tables, by their titles


def write_report(
    workdirs: Sequence[Path], output: Path, names: Mapping[str, str] | None = None
) -> list[Section]:
    """Write `report.html`, `tables/` and `figures/` below `output`.

    Args:
      workdirs: of sweeps; those of the same dataset are joined.
      output: a folder.
      names: by path, the names of workdirs on the page; None takes the paths.

    Returns:
      The part of the page about each dataset, with its answer.
    """
    tested = []
    sections = []
    for study in read_studies(workdirs):
        estimates = Estimates(study)
        tested_claims = claims(study, estimates)
        tested.append(tested_claims)
        sections.append(_write_study(study, estimates, tested_claims, output))
    _write_csv(output / TABLES / "claims.csv", pd.concat(tested))
    texts = [section.claims.markdown() for section in sections]
    write_atomically(output / TABLES / "claims.md", "\n".join(texts))
    # The page holds Vega, the figures' data, styles and scripts.
    template = templates_of("kd_ranker.reporting").get_template("page.html")
    vega = Markup(vl_convert.javascript_bundle(_GLOBALS))
    html = template.render(
        sections=sections,
        chart=figures.page_chart,
        image=figures.page_image,
        training=figures.TRAINING,
        with_code=_with_code,
        vega=vega,
        zip=zip,
    )
    for path, name in (names or {}).items():
        html = html.replace(path, escape(name))
    write_atomically(output / PAGE, html)
    return sections


def _write_study(
    study: Study, estimates: Estimates, tested_claims: pd.DataFrame, output: Path
) -> Section:
    name = study.file_name
    numbers = tables.comparison(study, estimates)
    main = tables.main_table(study, estimates, numbers)
    difference = tables.difference_table(study, estimates)
    cost = tables.cost_table(study, estimates)
    timeout = timeout_table(study, estimates)
    tuning = tables.tuning_table(study)
    tables_by_file = {
        name: main,
        f"{name}-difference": difference,
        f"{name}-cost": cost,
        f"{name}-timeout": timeout,
        f"{name}-tuning": tuning,
    }
    _write_csv(output / TABLES / f"{name}.csv", numbers)
    for file, table in tables_by_file.items():
        if table is not None:
            write_atomically(output / TABLES / f"{file}.md", table.markdown())
            write_atomically(output / TABLES / f"{file}.tex", table.latex())
    drawn = figures.figures(study, estimates)
    for figure in drawn:
        for ending, content in figures.files(figure).items():
            write_atomically(output / FIGURES / f"{name}-{figure.name}.{ending}", content)
    return Section(
        study=study,
        answer=answer(study, estimates),
        doubts=(
            findings.savings_at_targets(study, estimates),
            findings.worse_measures(study, estimates),
            findings.failed_claims(tested_claims),
        ),
        over_today=findings.saved_over_today(study, estimates),
        timeout=timeout_sentence(study, estimates),
        tuned=findings.at_an_end(study),
        summary=summary(study, estimates),
        figures=drawn,
        claims=tables.claims_table(study.dataset, tested_claims),
        verdicts=_counted_verdicts(tested_claims),
        tables=SectionTables(
            costs=_present(cost, timeout), tuned=[tuning], results=_present(main, difference)
        ),
        formulas=_formulas(study),
    )


def _with_code(sentence: str) -> Markup:
    """Return a sentence for a page, with the parts between backticks as code."""
    parts = str(escape(sentence)).split("`")
    return Markup(
        "".join(f"<code>{part}</code>" if at % 2 else part for at, part in enumerate(parts))
    )


def _formulas(study: Study) -> dict[str, str]:
    """Return the formulas of the main measures by their titles, as text."""
    formulas = {}
    for column in [*tables.important_columns(study), *study.users_measures]:
        measure = column.partition("/")[0]  # without a task
        metric = metric_of(measure)
        if metric is not None:
            # Markdown's emphasis: the page shows a formula as it stands.
            formulas[title_of(measure)] = metric.formula.replace("*", "")
    return formulas


def _present(*of_section: Table | None) -> list[Table]:
    return [table for table in of_section if table is not None]


def _counted_verdicts(tested_claims: pd.DataFrame) -> str:
    """Return for example "5 hold, 2 undecided"."""
    words = {
        "holds": "hold",
        "does not hold": "do not hold",
        "equivalent": "without a difference",
        "undecided": "undecided",
        "not measured": "not measured",
    }
    counts = tested_claims["verdict"].value_counts()
    return ", ".join(
        f"{counts[verdict]} {text}" for verdict, text in words.items() if verdict in counts
    )


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_atomically(path, frame.to_csv(index=False, lineterminator="\n", float_format="%.7g"))
