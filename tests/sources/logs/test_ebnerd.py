"""EB-NeRD through the path of own logs: the example of a public dataset that needs no source."""

import contextlib
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from kd_ranker.configs import ebnerd
from kd_ranker.requests.request import SPLITS
from tests.sources import ebnerd_files, faulty_logs

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "ebnerd_log.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The raw files' rows, and the folder of the log."""
    root = tmp_path_factory.mktemp("ebnerd")
    files = ebnerd_files.write(root / "raw")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), str(root / "raw"), str(root / "log")])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return files, root / "log"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_log_says_what_the_files_say(made, split):
    files, log = made
    behaviors = {row["impression_id"]: row for row in files[f"{split}/behaviors"]}
    articles = {row["article_id"]: row for row in files["articles"]}
    views = {row["user_id"]: row for row in files[f"{split}/history"]}
    rows = pq.read_table(log / f"{split}.parquet").to_pylist()
    assert sorted(row["impression_id"] for row in rows) == sorted(behaviors)
    times = [row["impression_time"] for row in rows]
    assert times == sorted(times)
    cut = 0
    for row in rows:
        raw = behaviors[row["impression_id"]]
        assert row["item"] == raw["article_ids_inview"]
        clicks = [int(item in raw["article_ids_clicked"]) for item in row["item"]]
        assert row["click"] == clicks
        assert row["read"] == [click * (raw["next_read_time"] >= 30) for click in clicks]
        assert row["front_page"] == (raw["article_id"] is None)
        for place, item in enumerate(row["item"]):
            known = articles.get(item, {})
            for name in ("category", "premium", "topics", "article_type", "sentiment_score"):
                assert row[name][place] == known.get(name), name
            old = row["hours_old"][place]
            if known:
                seconds = (raw["impression_time"] - known["published_time"]).total_seconds()
                assert old == pytest.approx(seconds / 3600, abs=1 / 3600)
            else:
                assert old is None
        seen = views.get(raw["user_id"], {"impression_time_fixed": [], "article_id_fixed": []})
        pairs = zip(seen["impression_time_fixed"], seen["article_id_fixed"], strict=True)
        before = [item for time, item in pairs if time < raw["impression_time"]]
        assert row["recent"] == before
        cut += len(before) < len(seen["article_id_fixed"])
    assert cut, "some views came after the impression"


def test_nothing_that_is_known_afterwards_is_in_the_log(made):
    columns = set(pq.read_schema(made[1] / "train.parquet").names)
    told = {"total_inviews", "total_pageviews", "total_read_time", "last_modified_time"}
    told |= {"read_time", "scroll_percentage", "next_read_time", "next_scroll_percentage"}
    assert not columns & told


def test_the_config_makes_a_dataset_of_it(made, tmp_path):
    files, log = made
    config = ebnerd()
    config.data.path, config.data.dir = str(log), str(tmp_path)
    config.data.allow = ("few_positives",)
    with contextlib.closing(faulty_logs.open_source(config)) as source:
        requests = faulty_logs.all_requests(source)
        assert np.isfinite(source.item_features).all()
    everything = [request for split in SPLITS for request in requests[split]]
    raw = [row for split in ("train", "validation") for row in files[f"{split}/behaviors"]]
    assert len(everything) == len(raw)
    shown = sum(len(row["article_ids_inview"]) for row in raw)
    assert sum(len(request.item_id) for request in everything) == shown
    assert all(request.num_passed == len(request.item_id) for request in everything)
    clicks = sum(len(row["article_ids_clicked"]) for row in raw)
    assert sum(int(request.user_label[:, 0].sum()) for request in everything) == clicks
    latest = {split: [request.time for request in requests[split]] for split in SPLITS}
    assert max(latest["train"]) < min(latest["test"])
    assert any(len(request.history_id) > 3 for request in everything)
