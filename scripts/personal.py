"""Print how personal data are: the variance within a request that the item alone explains.

    python scripts/personal.py datasets/requests/cascade-0123abcd/2.2.0
    python scripts/personal.py movies-judgments.tsv.gz --columns=0,2,3
    python scripts/personal.py ml-100k/u.data --columns=0,1,2

A folder is a built dataset: its test requests give the share for the true value, for the value of
the logged final ranker, and for user labels, with the value weights of `--weights`. Any other path
is a file of tab-separated values with numbers in its last column: request, item, value.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from kd_ranker.requests import storage

LIMIT = 500  # requests of a dataset


def item_share(request: np.ndarray, item: np.ndarray, value: np.ndarray) -> float:
    """Share of the variance of `value` within requests that only the item explains.

        (1 − 1 / M) Σ_i n_i · c_i / Σ u v

    v is the value less its request's mean, and u = v / (1 − 1 / n) in a request of n entries. n_i
    is the number of entries of item i, c_i the mean product of two different ones of its u, and
    M = (Σ n_i)² / Σ n_i² corrects for distinct items in a request. It is the method of moments
    (Searle, Casella and McCulloch 1992). Items and requests with one entry are left out. The share
    of labels, which also vary by chance, is a lower bound of that of the probabilities.
    """
    values = pd.Series(value).groupby(request)
    within, number = value - values.transform("mean"), values.transform("size")
    u = (within * number / (number - 1))[number > 1]
    entries = pd.DataFrame({"n": 1, "u": u, "squares": u**2, "total": u * within})
    sums = entries.loc[u.index].groupby(item[number > 1]).sum()
    often = sums[sums["n"] > 1]
    explained = (often["u"] ** 2 - often["squares"]) / (often["n"] - 1)
    distinct = 1 - (often["n"] ** 2).sum() / max(often["n"].sum(), 1) ** 2
    return distinct * explained.sum() / (often["total"].sum() or np.nan)


def main() -> None:
    """Prints a line per kind of value."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("path", type=Path, help="a dataset's folder, or a file")
    parser.add_argument("--columns", default="0,1,2", help="request, item and value in a file")
    parser.add_argument("--weights", default="1,2,4", help="value weights, one per task")
    flags = parser.parse_args()
    if flags.path.is_dir():
        weights = np.array([float(weight) for weight in flags.weights.split(",")])
        shares = dict(_of_dataset(flags.path, weights))
    else:
        columns = [int(column) for column in flags.columns.split(",")]
        table = pd.read_csv(flags.path, sep="\t", header=None, dtype=str)[columns]
        value = pd.to_numeric(table[columns[2]], errors="coerce")
        table = table[value.notna()]
        request, item = (table[column].to_numpy() for column in columns[:2])
        shares = {"labels": item_share(request, item, value.dropna().to_numpy())}
    for name, share in shares.items():
        print(f"{name:12} {share:.3f}")


def _of_dataset(folder: Path, weights: np.ndarray) -> Iterator[tuple[str, float]]:
    name, data_dir = folder.parent.name, str(folder.parents[2])
    columns = storage.open_dataset(name, data_dir, "prepare_data").columns["test"]
    some = slice(0, LIMIT)
    counts = columns.counts.of(some)
    candidates = columns.candidates.fields(some, counts.retrieved)
    request = np.repeat(np.arange(len(counts.retrieved)), counts.retrieved)
    truth = columns.known.fields(some, counts.known)["true_probability"]
    if len(truth) and not np.isnan(truth).any():
        yield "truth", item_share(request, candidates["item_id"], truth @ weights)
    logged = candidates["teacher_probability"] @ weights
    scored = np.isfinite(logged)
    if scored.any():
        share = item_share(request[scored], candidates["item_id"][scored], logged[scored])
        yield "final ranker", share
    shown = columns.candidates.fields(some, counts.shown)["item_id"]
    label = columns.labels.fields(some, counts.shown)["user_label"] @ weights
    of_shown = np.repeat(np.arange(len(counts.shown)), counts.shown)
    yield "labels", item_share(of_shown, shown, label.astype(float))


if __name__ == "__main__":
    main()
