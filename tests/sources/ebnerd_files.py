"""Writes a small EB-NeRD in the published layout, with rows that are made up."""

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FIRST = datetime.datetime(2023, 5, 18, 7)
ARTICLES = 60
DAYS = {"train": (0, 7), "validation": (7, 14)}


def after(hours: float) -> datetime.datetime:
    return FIRST + datetime.timedelta(hours=hours)


def articles(generator: np.random.Generator) -> list[dict[str, Any]]:
    """The last of those that are in view are not among them."""
    return [
        {
            "article_id": 9_000_000 + 10 * number,
            "title": f"Title {number}",
            "last_modified_time": after(24.0 * 40),
            "premium": bool(generator.random() < 0.2),
            "published_time": after(float(generator.uniform(-200, 200))),
            "article_type": str(generator.choice(["article_default", "article_video"])),
            "topics": [f"topic {code}" for code in generator.integers(0, 9, generator.integers(3))],
            "category": int(generator.integers(100, 106)),
            "subcategory": [int(generator.integers(10))],
            "sentiment_score": float(generator.random()),
            "total_inviews": int(generator.integers(10**6)),
            "total_pageviews": int(generator.integers(10**5)),
            "total_read_time": float(generator.integers(10**7)),
        }
        for number in range(ARTICLES - 2)
    ]  # fmt: skip


def behaviors(
    generator: np.random.Generator, split: str, impressions: int, users: int
) -> list[dict[str, Any]]:
    start, end = DAYS[split]
    rows = []
    for number in range(impressions):
        size = int(generator.integers(5, 12))
        inview = 9_000_000 + 10 * generator.choice(ARTICLES, size, replace=False)
        clicked = inview[: int(generator.choice([1, 1, 1, 2]))]
        own = float(generator.integers(1, 90))
        rows.append(
            {
                "impression_id": 1000 * (1 + start) + number,
                "article_id": int(inview[0]) if generator.random() < 0.3 else None,
                "impression_time": after(float(generator.uniform(24 * start, 24 * end))),
                "read_time": own,
                "scroll_percentage": float(generator.uniform(0, 100)),
                "device_type": int(generator.integers(1, 4)),
                "article_ids_inview": generator.permutation(inview).tolist(),
                "article_ids_clicked": clicked.tolist(),
                "user_id": int(generator.integers(users)) + 10_000,
                "is_sso_user": bool(generator.random() < 0.5),
                "gender": int(generator.integers(2)) if generator.random() < 0.1 else None,
                "postcode": int(generator.integers(5)) if generator.random() < 0.1 else None,
                "age": 10 * int(generator.integers(2, 9)) if generator.random() < 0.1 else None,
                "is_subscriber": bool(generator.random() < 0.2),
                "session_id": number // 3,
                "next_read_time": float(generator.integers(1, 90)),
                "next_scroll_percentage": float(generator.uniform(0, 100)),
            }
        )
    return rows


def history(generator: np.random.Generator, split: str, users: int) -> list[dict[str, Any]]:
    """Views of the three weeks before a split, and some that reach into it; one user has none."""
    start = 24.0 * DAYS[split][0]
    rows = []
    for user in range(users - 1):
        number = int(generator.integers(1, 12))
        times = np.sort(generator.uniform(start - 21 * 24, start + 24, number))
        rows.append(
            {
                "user_id": user + 10_000,
                "impression_time_fixed": [after(float(time)) for time in times],
                "scroll_percentage_fixed": generator.uniform(0, 100, number).tolist(),
                "article_id_fixed": (9_000_000 + 10 * generator.integers(0, 60, number)).tolist(),
                "read_time_fixed": generator.uniform(0, 90, number).tolist(),
            }
        )
    return rows


def write(root: Path, impressions: int = 200, users: int = 30) -> dict[str, list[dict[str, Any]]]:
    """Writes the files; returns the rows of each by its name below `root`."""
    generator = np.random.default_rng(0)
    files = {"articles": articles(generator)}
    for split in DAYS:
        files[f"{split}/behaviors"] = behaviors(generator, split, impressions, users)
        files[f"{split}/history"] = history(generator, split, users)
    for name, rows in files.items():
        path = root / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
    return files
