"""Write a report: tables, figures, and one page that needs no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import vl_convert
from markupsafe import Markup, escape

from kd_ranker.reporting import figures, tables
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


class Section(NamedTuple):
    """The part of the page about one dataset."""

    study: Study
    answer: Answer
    timeout: str  # what is left if the final ranker times out; "" if it is not known
    summary: str  # the table for a terminal
    figures: list[figures.Figure]
    claims: Table
    tables: list[Table]


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
    html = template.render(sections=sections, chart=figures.page_chart, vega=vega, zip=zip)
    for path, name in (names or {}).items():
        html = html.replace(path, escape(name))
    write_atomically(output / PAGE, html)
    return sections


def _write_study(
    study: Study, estimates: Estimates, tested_claims: pd.DataFrame, output: Path
) -> Section:
    name = study.file_name
    numbers = tables.comparison(study, estimates)
    tables_by_file = {
        name: tables.main_table(study, estimates, numbers),
        f"{name}-difference": tables.difference_table(study, estimates),
        f"{name}-cost": tables.cost_table(study, estimates),
        f"{name}-timeout": timeout_table(study, estimates),
        f"{name}-tuning": tables.tuning_table(study),
    }
    _write_csv(output / TABLES / f"{name}.csv", numbers)
    written = {file: table for file, table in tables_by_file.items() if table is not None}
    for file, table in written.items():
        write_atomically(output / TABLES / f"{file}.md", table.markdown())
        write_atomically(output / TABLES / f"{file}.tex", table.latex())
    drawn = figures.figures(study, estimates)
    for figure in drawn:
        for ending, content in figures.files(figure).items():
            write_atomically(output / FIGURES / f"{name}-{figure.name}.{ending}", content)
    return Section(
        study=study,
        answer=answer(study, estimates),
        timeout=timeout_sentence(study, estimates),
        summary=summary(study, estimates),
        figures=drawn,
        claims=tables.claims_table(study.dataset, tested_claims),
        tables=list(written.values()),
    )


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_atomically(path, frame.to_csv(index=False, lineterminator="\n", float_format="%.7g"))
