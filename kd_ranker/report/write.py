"""Writes a report: tables, figures and the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from markupsafe import escape

from kd_ranker.report import charts
from kd_ranker.report.answer import answer
from kd_ranker.report.claims import claims
from kd_ranker.report.comparison import comparison
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.figures import figures
from kd_ranker.report.page import Section, page
from kd_ranker.report.study import Study, read_studies
from kd_ranker.report.tables import (
    Table,
    claims_table,
    cost_table,
    difference_table,
    latex,
    main_table,
    markdown,
    saving_table,
    tuning_table,
)
from kd_ranker.training.workdir import write_atomically

PAGE, TABLES, FIGURES = "report.html", "tables", "figures"


def write_report(
    workdirs: Sequence[Path], output: Path, names: Mapping[str, str] | None = None
) -> list[str]:
    """Writes `report.html`, `tables/` and `figures/` below `output`.

    Args:
      workdirs: of sweeps; those of the same dataset are joined.
      output: a folder.
      names: what the page calls the workdirs, by their paths; None calls them by these.

    Returns:
      The answer to each dataset: a sentence, and a line on what was allowed of its faults.
    """
    estimates = [Estimates(study) for study in read_studies(workdirs)]
    of_claims = [claims(of.study, of) for of in estimates]
    sections = [
        _write_study(of.study, of, tested, output)
        for of, tested in zip(estimates, of_claims, strict=True)
    ]
    _write_csv(output / TABLES / "claims.csv", pd.concat(of_claims))
    write_atomically(
        output / TABLES / "claims.md", "\n".join(markdown(section.claims) for section in sections)
    )
    html = page(sections)
    for path, name in (names or {}).items():
        html = html.replace(path, escape(name))
    write_atomically(output / PAGE, html)
    return [section.answer.told for section in sections]


def _write_study(study: Study, estimates: Estimates, tested: pd.DataFrame, output: Path) -> Section:
    name = study.file_name
    numbers = comparison(study, estimates)
    tables: dict[str, Table | None] = {
        name: main_table(study, estimates, numbers),
        f"{name}-difference": difference_table(study, numbers),
        f"{name}-saving": saving_table(study, estimates),
        f"{name}-cost": cost_table(study, estimates),
        f"{name}-tuning": tuning_table(study),
    }
    _write_csv(output / TABLES / f"{name}.csv", numbers)
    for file, table in tables.items():
        if table:
            write_atomically(output / TABLES / f"{file}.md", markdown(table))
            write_atomically(output / TABLES / f"{file}.tex", latex(table))
    drawn = figures(study, estimates)
    for figure in drawn:
        if len(figure.data):
            for ending, content in charts.files(figure).items():
                write_atomically(output / FIGURES / f"{name}-{figure.name}.{ending}", content)
    return Section(
        study=study,
        answer=answer(study, estimates),
        figures=drawn,
        claims=claims_table(study.dataset, tested),
        tables=[table for table in tables.values() if table],
    )


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_atomically(path, frame.to_csv(index=False, lineterminator="\n", float_format="%.7g"))
