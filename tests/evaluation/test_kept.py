"""What requests add, written and read again."""

import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest

from kd_ranker.evaluation import kept
from kd_ranker.evaluation.kept import Kept
from kd_ranker.evaluation.totals import Each

TASKS = ("watch", "like")


def each_of(seed: int, requests: int, ks: int, tasks: int) -> Each:
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32)

    alone = {"user_bce": draw(requests, tasks), "requests": np.ones(requests, np.float32)}
    alone["requests"][0] = np.nan
    curves = {"survival": draw(requests, ks), "positives_kept": draw(requests, ks, tasks)}
    return Each(alone, curves)


def written(tmp_path, of: Kept, tasks=TASKS) -> Kept:
    for name, content in kept.files(of, tasks).items():
        (tmp_path / name).write_bytes(content)
    return kept.read(tmp_path)


@pytest.mark.parametrize(
    ("requests", "ks", "tasks"),
    [
        (5, (1, 4, 9), TASKS),
        (1, (1, 4, 9), TASKS),
        (5, (1,), TASKS),
        (5, (1, 4, 9), TASKS[:1]),
        # As many k as tasks, and as requests.
        (2, (1, 9), TASKS),
        (1, (1,), TASKS[:1]),
    ],
)
def test_what_is_read_is_what_was_written(tmp_path, requests, ks, tasks):
    rankers = [("teacher", "user"), ("aux-seed0", "user"), ("aux-seed0", "blend"), ("", "user")]
    each = {who: each_of(i, requests, len(ks), len(tasks)) for i, who in enumerate(rankers)}
    found = written(tmp_path, Kept(np.array(ks), each), tasks)
    np.testing.assert_array_equal(found.ks, ks)
    assert list(found.each) == rankers
    for who, of in each.items():
        for here, there in zip(of, found.each[who], strict=True):
            assert here.keys() == there.keys()
            for name in here:
                assert there[name].dtype == np.float32
                np.testing.assert_array_equal(here[name], there[name], err_msg=name)


def test_the_files_are_tables_that_others_can_read(tmp_path):
    each = {("a", "user"): each_of(0, 3, 2, 2), ("b", "user"): each_of(1, 3, 2, 2)}
    written(tmp_path, Kept(np.array([1, 10]), each))
    files = (kept.FILE, kept.CURVES_FILE)
    alone, curves = (pq.read_table(tmp_path / file).to_pandas() for file in files)
    assert list(alone) == ["member", "serve", "request", "user_bce/watch", "user_bce/like",
                           "requests"]  # fmt: skip
    row = alone[(alone["member"] == "b") & (alone["request"] == 2)]
    assert row["user_bce/like"].item() == each["b", "user"].alone["user_bce"][2, 1]
    assert list(curves) == ["member", "serve", "request", "k", "survival", "positives_kept/watch",
                            "positives_kept/like"]  # fmt: skip
    row = curves[(curves["member"] == "a") & (curves["request"] == 1) & (curves["k"] == 10)]
    assert row["survival"].item() == each["a", "user"].curves["survival"][1, 1]
    assert row["positives_kept/watch"].item() == each["a", "user"].curves["positives_kept"][1, 1, 0]


def test_the_same_numbers_are_the_same_bytes():
    of = Kept(np.array([1, 10]), {("a", "user"): each_of(0, 3, 2, 2)})
    assert kept.files(of, TASKS) == kept.files(of, TASKS)


def test_curves_are_kept_at_few_k_from_the_first_to_the_last_with_those_that_are_named():
    ks = kept.kept_ks(2000, [200, 333, 5000])
    assert (ks[0], ks[-1]) == (1, 2000)
    assert {200, 333} <= set(ks)
    assert len(ks) < 80
    # A line between two of them is short against where it lies.
    assert max(after / before for before, after in itertools.pairwise(ks[10:])) < 1.2
    assert kept.kept_ks(1, [200]) == [1]
    assert kept.kept_ks(5, []) == [1, 2, 3, 4, 5]
