"""Show which method of learning the final ranker's scores inherits the least of its errors.

    python scripts/worlds.py --workdir=runs/noises --config=configs/sweeps/cascade.py:worlds \\
        --tastes=1 --noises=1,2,4 --seeds=0,1,2,3 --config.data.validation_requests=1000
    python scripts/inherited.py runs/noises/*/sweep

The cascade knows the truth, and `data.noise` scales the errors of its final ranker. A student that
learned them passes candidates that the final ranker overrates. Its funnel keeps much of the final
ranker's value and less of the true value.

Each row of the Markdown table is a way to serve in the worlds of one `data.noise`: the user heads,
the teacher heads or the blend of a student of mode `aux`, and mode `shared`. It has the candidates
to pass for 99% of the final value, and the differences to the best student without scores in the
final value and in the true value that are kept with `funnel.passed` passed, in percent. "Inherited"
is the first less the second: a gain by the final ranker's errors. The numbers are means over the
draws of the data, with Student's 95% intervals, on validation requests, where every way to serve is
measured. Settings that differ only in the distill weight are averaged.
"""

import argparse
from pathlib import Path

import pandas as pd

from kd_ranker.evaluation import results
from kd_ranker.evaluation.metrics.target import CRITERION
from kd_ranker.evaluation.saving import needs_scores
from kd_ranker.reporting.intervals import interval
from kd_ranker.training import workdir as workdirs

KEYS = ["noise", "loss", "mode", "serve"]
CHANGES = ["final value", "true value", "inherited"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("workdirs", nargs="+", type=Path, help="of sweeps of the cascade")
    folders = parser.parse_args().workdirs
    rows = pd.concat([_rows(folder) for folder in folders], ignore_index=True)
    head = ["data.noise", *KEYS[1:], CRITERION, *CHANGES]
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    for names, group in rows.groupby(KEYS):
        cells = [*names, f"{group[CRITERION].mean():.0f}"]
        for column in CHANGES:
            change = interval(100 * group[column].to_numpy())
            cells.append(f"{change.mean:+.2f} ({change.low:+.2f} to {change.high:+.2f})")
        print(f"| {' | '.join(map(str, cells))} |")


def _rows(folder: Path) -> pd.DataFrame:
    """A row per student that learns from the scores of one sweep, and per way to serve it."""
    config = workdirs.read_config(folder)
    rows = results.read_csv(folder / results.FILE)
    rows = rows[(rows["role"] == "student") & (rows["split"] == "validation")]
    learned = needs_scores(rows)
    without = rows[~learned].sort_values(CRITERION).iloc[0]
    students = rows[learned].assign(noise=config.data.noise)
    for column, name in (("value_captured", "final value"), ("true_value_captured", "true value")):
        at_passed = f"{column}@{config.funnel.passed}"
        students[name] = students[at_passed] - without[at_passed]
    students["inherited"] = students["final value"] - students["true value"]
    students = students.rename(columns={"distill_loss": "loss"})
    return students.groupby(KEYS, as_index=False)[[CRITERION, *CHANGES]].mean()


if __name__ == "__main__":
    main()
