"""Writes EB-NeRD as a log that `configs/ebnerd.py` names the columns of.

    python scripts/ebnerd_log.py RAW LOG

RAW is an unpacked EB-NeRD (J. Kruse, K. Lindskow, S. Kalloori et al., "EB-NeRD: A Large-Scale
Dataset for News Recommendation", RecSys Challenge 2024): `articles.parquet`, and in `train` and
`validation` a `behaviors.parquet` and a `history.parquet`. LOG gets a file of each of the two, a
row an impression, with a list of each thing that differs from article to article.

Nothing of it tells the future. Left out are `total_inviews`, `total_pageviews` and
`total_read_time` of articles, which count until long after an impression, its own clicks included;
`last_modified_time`; and `read_time` and `scroll_percentage` of an impression, which are those of
the page that it is shown on and known when the user leaves that. Of a history, events count that
came strictly before.
"""

import argparse
from pathlib import Path

import ibis
import ibis.expr.types as ir
from ibis import _

SPLITS = ("train", "validation")
HISTORY = 50  # of a user, the latest
READ = 30  # seconds on the clicked page that count as having read it

IN_LOG = ("device_type", "is_sso_user", "is_subscriber", "gender", "postcode", "age")
OF_ARTICLE = ("category", "article_type", "premium", "topics", "sentiment_score")


def main() -> None:
    """Writes the log that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("raw", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--memory", type=float, default=4.0, help="GiB; the rest goes to disk")
    arguments = parser.parse_args()
    arguments.log.mkdir(parents=True, exist_ok=True)
    folder = arguments.log / ".spilled"
    engine = ibis.duckdb.connect(
        memory_limit=f"{arguments.memory * 1024:.0f}MiB", temp_directory=str(folder)
    )
    for split in SPLITS:
        sql = str(ibis.to_sql(log_of(engine, arguments.raw, split)))
        engine.con.sql(sql).write_parquet(
            str(arguments.log / f"{split}.parquet"), compression="zstd"
        )


def log_of(engine: ibis.BaseBackend, raw: Path, split: str) -> ir.Table:
    """The log of a split: a row an impression, in the order of time."""
    articles = engine.read_parquet(raw / "articles.parquet")
    behaviors = engine.read_parquet(raw / split / "behaviors.parquet")
    history = engine.read_parquet(raw / split / "history.parquet")
    return (
        behaviors.join(candidates(behaviors, articles), "impression_id")
        .left_join(views_before(behaviors, history), "impression_id")
        .select(
            "impression_id", "impression_time", "user_id", *IN_LOG,
            "session_id", "item", "click", "read", "hours_old", *OF_ARTICLE,
            recent=ibis.coalesce(_.recent, ibis.literal([], "array<int64>")),
            front_page=_.article_id.isnull(),
        )
        .order_by("impression_time", "impression_id")
    )  # fmt: skip


def candidates(behaviors: ir.Table, articles: ir.Table) -> ir.Table:
    """`impression_id`, and lists: the articles in view, what is known of them, and labels."""
    inview = behaviors.article_ids_inview
    asked = behaviors.select(
        *("impression_id", "impression_time", "article_ids_clicked", "next_read_time"),
        ranked=inview.zip(ibis.range(0, inview.length(), 1)).unnest(),
    )
    asked = asked.mutate(item=_.ranked.f1, place=_.ranked.f2)
    asked = asked.mutate(click=_.article_ids_clicked.contains(_.item).cast("int8"))
    # How long is known of the one page that was opened.
    asked = asked.mutate(read=(ibis.coalesce(_.next_read_time, 0) >= READ).cast("int8") * _.click)
    known = articles.select("published_time", *OF_ARTICLE, item=_.article_id)
    joined = asked.left_join(known, "item").mutate(
        hours_old=(_.impression_time.epoch_seconds() - _.published_time.epoch_seconds()) / 3600.0
    )
    lists = ("item", "click", "read", "hours_old", *OF_ARTICLE)
    one = ibis.struct({name: joined[name] for name in ("place", *lists)})
    grouped = joined.group_by("impression_id").agg(all=one.collect().sort())
    return grouped.select("impression_id", **{name: field(name) for name in lists})


def field(name: str) -> ibis.Deferred:
    """A field of each of the structs in `all`."""
    return _.all.map(lambda each: each[name])


def views_before(behaviors: ir.Table, history: ir.Table) -> ir.Table:
    """`impression_id`, and `recent`: what the user had viewed strictly before, the latest last."""
    views = history.select("user_id", event=_.impression_time_fixed.zip(_.article_id_fixed))
    asked = behaviors.select("impression_id", "impression_time", "user_id").join(views, "user_id")
    before = asked.event.filter(lambda each: each.f1 < asked.impression_time).sort()
    return asked.select("impression_id", recent=before[-HISTORY:].map(lambda each: each.f2))


if __name__ == "__main__":
    main()
