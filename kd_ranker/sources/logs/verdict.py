"""Whether a log makes a dataset: count it, report on it, and refuse one that must not be used."""

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs import data_report, findings
from kd_ranker.sources.logs.data_report import Counts, Report, count_rejected
from kd_ranker.sources.logs.findings import Finding
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.tables import Tables

# Folder below `data.dir` for the report of a log that makes no dataset.
REFUSED = "refused_log"


def count_log(tables: Tables) -> Counts:
    """Count by the tables of `report.sql`.

    Raises:
      UserError: the log has a column of splits, and not one valid split for each request.
    """
    layout, database = tables.layout, tables.database
    if layout.split == "column":
        _check_split_column(tables)
    statements = tables.query.statements("report.sql")
    database.run(statements)
    names = re.findall(r'^CREATE TABLE ("[^"]+"|\w+)', "\n".join(statements), re.M)
    names.remove("sampled")  # for `find_leaks`
    counts = Counts(
        rejected=count_rejected(database),
        tables={name.strip('"'): database.rows(f"SELECT * FROM {name}") for name in names},
        leaks={},
    )
    if counts.candidates != counts.used + sum(counts.rejected.values()):
        raise RuntimeError(f"{counts.candidates} candidates, {counts.used} used, {counts.rejected}")
    if not counts.used:
        return counts
    return counts._replace(leaks=findings.find_leaks(database, layout))


def _check_split_column(tables: Tables) -> None:
    query = "SELECT count(*) AS number, min(request) AS example FROM bad_splits"
    (bad,) = tables.database.rows(query)
    if bad["number"]:
        raise UserError(
            f"data.columns.split: in column {tables.layout.columns['split']!r}, "
            f"{bad['number']:,} requests, such as {bad['example']!r}, do not have one of "
            f"{', '.join(SPLITS)} in all of their rows; write one into each"
        )


def report_on_log(tables: Tables, counts: Counts, splits: Sequence[str]) -> Report:
    """Return the report on a log.

    Raises:
      UserError: the log makes no dataset with requests in each of the splits; the report is in the
        folder `REFUSED`.
    """
    layout = tables.layout
    report = data_report.make_data_report(tables.log, layout, counts, tables.some_numbers)

    def time_hint() -> str:
        column = layout.columns["time"]
        return findings.time_hint(tables.some_numbers(column), tables.some_texts(column), layout)

    all_findings = findings.find(report, time_hint)
    report["allowed"] = []
    for finding in all_findings:
        verdict = "Refused"
        if finding.name in layout.allow:
            verdict = "Allowed"
            report["allowed"].append(finding._asdict())
        report["remarks"].append(f"{verdict}, {finding.name}: {finding.text}.")
    reason = next(_reasons_to_refuse(layout, counts, report, all_findings, splits), "")
    if reason:
        directory = Path(layout.directory) / REFUSED
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        write_report(tables, report, directory)
        page = directory / data_report.PAGE
        raise UserError(f"{layout.path}: {reason}{_rejected_in_words(counts)}; see {page}")
    return report


def _rejected_in_words(counts: Counts) -> str:
    if not counts.rejected:
        return ""
    numbers = ", ".join(f"{name} {number:,}" for name, number in counts.rejected.items())
    remedy = (
        "; give guests an id per request, by data.sql" if "missing_user" in counts.rejected else ""
    )
    return f"; rejected were: {numbers}{remedy}"


def _reasons_to_refuse(
    layout: LogLayout,
    counts: Counts,
    report: Report,
    all_findings: Sequence[Finding],
    splits: Sequence[str],
) -> Iterator[str]:
    """Yield the reasons for making no dataset of a log; the first one tells the most."""
    about_times = "".join(
        f"; {finding.text}" for finding in all_findings if finding.name == "times"
    )
    if not counts.used:
        yield f"not one row of the log can be used{about_times}"
        return
    for split in splits:
        if split not in report["splits"]:
            yield (
                f"no request is left for the split {split!r} by data.split={layout.split!r} with "
                f"{_cause_of_empty_split(layout, about_times)}"
            )
    propensities = counts.row("propensities")
    if bad := propensities.get("bad"):
        yield (
            f"data.columns.propensity: {bad:,} of {propensities['shown']:,} values of column "
            f"{layout.columns['propensity']!r} on shown candidates are not in (0, 1], such as "
            f"{propensities['least']:g}"
        )
    if layout.strict:
        faults = _faults_in_words(report)
        if faults:
            yield f"data.strict=True, and the log has faults: {faults}"
    if refusal := findings.refusal(all_findings, layout.allow):
        yield refusal


def _cause_of_empty_split(layout: LogLayout, about_times: str) -> str:
    if layout.split == "column":
        return f"column {layout.columns['split']!r}"
    shares = (
        f"data.validation_share={layout.validation_share} and data.test_share={layout.test_share}"
    )
    if layout.split == "time":
        advice = "give each split times of its own, or set data.split to 'request' or 'user'"
        return f"{shares}; {advice}{about_times}"
    return shares


def _faults_in_words(report: Report) -> str:
    """Return the number of each kind of fault in the rows of a log; "" for none."""
    faults: dict[str, int] = {
        "rejected candidates": report["candidates"]["rejected"],
        "invalid values": sum(column["out_of_range"] for column in report["columns"]),
        "candidates of another teacher version": report["teacher"]["other_version"],
        "requests of several times": report["requests"]["several_times"],
    }
    return ", ".join(f"{number:,} {fault}" for fault, number in faults.items() if number)


def write_report(tables: Tables, report: Report, directory: Path) -> None:
    """Write the report and the rejected rows."""
    data_report.write_data_report(report, directory)
    data_report.write_rejected(
        tables.database,
        tables.log,
        tables.layout,
        tables.query.types,
        directory / data_report.REJECTED_FOLDER,
    )
