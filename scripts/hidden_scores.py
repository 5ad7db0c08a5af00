"""Hide the scores of candidates that were not passed, and hold the report's bounds to the truth.

    python scripts/worlds.py --workdir=runs/worlds --config=configs/sweeps/cascade.py:worlds \\
        --tastes=1 --seeds=0,1,2,3
    python scripts/hidden_scores.py runs/worlds/*/sweep

In the cascade, the final ranker's scores of all test candidates are known. Each ranker of each
sweep that a funnel could use is measured twice: with all of them, and with those of the passed
candidates only, as most logs have them. Print a Markdown table of the candidates to pass for 99% of
the final value: if candidates without a score are worth nothing, if they are like the others, the
bounds of the report, and the truth. The last line counts the bounds that contain the truth.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kd_ranker.batch import FeatureSpec
from kd_ranker.cohorts.plan import open_sweep
from kd_ranker.evaluation import setting_names
from kd_ranker.evaluation.baselines import NO_RANKERS
from kd_ranker.evaluation.metrics.target import CRITERION
from kd_ranker.evaluation.results import Row
from kd_ranker.evaluation.whole import Bounds, bounds
from kd_ranker.pipeline.job import Teachers, make_job
from kd_ranker.pipeline.measure import measure
from kd_ranker.pipeline.sweeping import fitted_rivals
from kd_ranker.pipeline.trained import config_of
from kd_ranker.pipeline.trainees import Trainees, open_trainees
from kd_ranker.progress import Progress
from kd_ranker.requests.columns import Columns, Rows, Windows, row_type
from kd_ranker.requests.request import starts_of

SPLIT = "test"


class Case(NamedTuple):
    """A ranker of a sweep."""

    name: str
    if_worthless: float
    if_alike: float
    passed_auc: float
    truth: float

    @property
    def bounds(self) -> Bounds:
        """The bounds that the report gives without the truth."""
        return bounds(self.if_worthless, self.if_alike, self.passed_auc)

    @property
    def holds(self) -> bool:
        """True if the truth is within the bounds."""
        low, high = self.bounds
        return low <= self.truth and not self.truth > high


def main() -> None:
    """Measures each sweep twice, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("workdirs", nargs="+", type=Path, help="of sweeps of the cascade")
    flags = parser.parse_args()
    print("| sweep | ranker | worthless | alike | passed AUC | bounds | truth | holds |")
    print("|---" * 8 + "|")
    holds = []
    for workdir in flags.workdirs:
        for case in cases(workdir):
            low, high = case.bounds
            bounds = f"at least {low:.0f}" if math.isnan(high) else f"{low:.0f} to {high:.0f}"
            verdict = "yes" if case.holds else "NO"
            print(
                f"| {workdir} | {case.name} | {case.if_worthless:.0f} | {case.if_alike:.0f} "
                f"| {case.passed_auc:.2f} | {bounds} | {case.truth:.0f} "
                f"| {verdict} |",
                flush=True,
            )
            holds.append(case.holds)
    print(f"\n{sum(holds)} of {len(holds)} bounds contain the truth")


def cases(workdir: Path) -> Iterator[Case]:
    """Yield the rankers of a sweep, measured with all scores and with those of the passed."""
    config = config_of(workdir)
    trainees = open_trainees(config)
    dataset = trainees.dataset
    hidden = {SPLIT: with_scores_of_passed(dataset.columns[SPLIT], dataset.spec)}
    partly_scored = dataclasses.replace(dataset, columns={**dataset.columns, **hidden})
    truth = measured(trainees, workdir)
    for name, row in measured(
        dataclasses.replace(trainees, dataset=partly_scored), workdir
    ).items():
        yield Case(
            name,
            _number(row, CRITERION),
            _number(row, "passed_for_alike_99"),
            _number(row, "passed_auc"),
            _number(truth[name], CRITERION),
        )


def with_scores_of_passed(columns: Columns, spec: FeatureSpec) -> Columns:
    """Return requests without the scores of the candidates that were not passed."""
    counts = columns.counts
    score = columns.candidates.fields(slice(None), counts.retrieved)["teacher_probability"]
    first = starts_of(counts.retrieved)[:-1]
    place = np.arange(len(score)) - np.repeat(first, counts.retrieved)
    score = np.where((place < np.repeat(counts.passed, counts.retrieved))[:, None], score, np.nan)
    # A first row of NaN serves for padding.
    stored = np.concatenate([np.full((1, score.shape[1]), np.nan), score]).astype(np.float32)
    windows = Windows([stored.view(np.int32).reshape(-1)], score.shape[1])
    column = Rows(windows, row_type(spec, "scored"), score.shape[1] * (1 + first), score.shape[1])
    unscored = columns.candidates.first_fields(row_type(spec, "candidate"))
    return dataclasses.replace(
        columns, candidates=unscored._replace(type=columns.candidates.type, column=column)
    )


def _number(row: Row, column: str) -> float:
    number = row[column]
    assert isinstance(number, float)
    return number


def measured(trainees: Trainees, workdir: Path) -> dict[str, Row]:
    """Return the rows of the test split of a sweep's students and references, by their names."""
    config = trainees.config
    sweep = open_sweep(config, workdir, trainees.dataset.provenance)
    teachers = Teachers(trainees.dataset)
    chosen = setting_names.chosen(sweep.validation())
    rows_by_name: dict[str, Row] = {}
    for number, (cohort, folder) in enumerate(zip(sweep.cohorts, sweep.folders, strict=True)):
        job = make_job(trainees.of(cohort), teachers, Progress())
        serves = {name: chosen[name] for name in job.runs if name in chosen}
        first = number == 0
        rows = measure(
            job,
            SPLIT,
            job.restored(folder)[0],
            serves=serves,
            with_references=first,
            rivals=fitted_rivals(job, config.sweep.rivals) if first else (),
        ).rows
        for row in rows:
            if row["role"] != "teacher" and row["run"] not in NO_RANKERS and CRITERION in row:
                rows_by_name[f"{row['run']} ({row['serve']})"] = row
    return rows_by_name


if __name__ == "__main__":
    main()
