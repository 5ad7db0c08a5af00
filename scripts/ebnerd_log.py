"""Write EB-NeRD as a log that `configs/ebnerd.py` names the columns of.

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

import duckdb

SPLITS = ("train", "validation")
HISTORY = 50  # of a user, the latest
READ = 30  # seconds on the clicked page that count as having read it

IN_LOG = ("device_type", "is_sso_user", "is_subscriber", "gender", "postcode", "age")
OF_ARTICLE = ("category", "article_type", "premium", "topics", "sentiment_score")
LISTS = ("item", "click", "read", "hours_old", *OF_ARTICLE)


def main() -> None:
    """Write the log that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("raw", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--memory", type=float, default=4.0, help="GiB; the rest goes to disk")
    arguments = parser.parse_args()
    arguments.log.mkdir(parents=True, exist_ok=True)
    con = duckdb.connect()
    con.execute(f"SET memory_limit = '{arguments.memory * 1024:.0f}MiB'")
    con.execute("SET temp_directory = ?", [str(arguments.log / ".spilled")])
    for split in SPLITS:
        for table in ("articles", f"{split}/behaviors", f"{split}/history"):
            file = str(arguments.raw / f"{table}.parquet")
            con.read_parquet(file).create_view(Path(table).name, replace=True)
        con.sql(SQL).write_parquet(str(arguments.log / f"{split}.parquet"), compression="zstd")


# A row per impression, in the order of time.
SQL = f"""
    WITH asked AS (SELECT impression_id, impression_time, next_read_time, article_ids_clicked,
            unnest(article_ids_inview) AS item, unnest(range(len(article_ids_inview))) AS place
        FROM behaviors),
    -- How long is known of the one page that was opened.
    known AS (SELECT *, list_contains(article_ids_clicked, item)::TINYINT AS click,
            (coalesce(next_read_time, 0) >= {READ})::TINYINT * click AS read,
            (epoch(impression_time) - epoch(published_time)) / 3600 AS hours_old
        FROM asked LEFT JOIN articles ON item = article_id),
    candidates AS (SELECT impression_id,
            {", ".join(f"list({name} ORDER BY place) AS {name}" for name in LISTS)}
        FROM known GROUP BY impression_id),
    views AS (SELECT impression_id, list_sort(list_filter(
            list_zip(impression_time_fixed, article_id_fixed),
            lambda each: each[1] < impression_time))[-{HISTORY}:] AS latest
        FROM behaviors JOIN history USING (user_id))
    SELECT impression_id, impression_time, user_id, {", ".join(IN_LOG)}, session_id,
        {", ".join(LISTS)}, coalesce(list_transform(latest, lambda each: each[2]), []) AS recent,
        article_id IS NULL AS front_page
    FROM behaviors JOIN candidates USING (impression_id) LEFT JOIN views USING (impression_id)
    ORDER BY impression_time, impression_id
"""


if __name__ == "__main__":
    main()
