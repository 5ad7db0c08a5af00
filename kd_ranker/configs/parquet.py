"""Your own log, in Parquet files: copy this file, and put in the names of your columns.

`docs/own_logs.md` explains it step by step, and `docs/config.md` has the keys that keep their
defaults here. Columns that the config does not name are not read.
"""

from ml_collections import ConfigDict

from kd_ranker.config import defaults
from kd_ranker.config.defaults import feature


def get_config(variant: str = "") -> ConfigDict:
    """A log with the columns that `scripts/make_log.py` writes."""
    defaults.check_variant(variant)
    config = defaults.get_config("parquet")
    config.tasks = ("watch", "like")
    config.value_weights = (1.0, 2.0)  # one per task

    config.data.path = ""  # file, directory, glob, or a URL of these that fsspec can open
    config.data.sql = ""  # instead of path: a SELECT, as DuckDB runs it
    config.data.rows = "candidate"  # one row per candidate; or request: one per request
    # Role -> column; "" if the log lacks it. Of the first four, only user may be "".
    config.data.columns = dict(
        request="request_id",
        time="time",
        user="user_id",
        item="item_id",
        stage="stage",
        position="position",  # of shown candidates, the first place first
        label_weight="",  # 1 / the rate at which such candidates were kept
        teacher_version="teacher_version",
        teacher_weight="",  # 0 where the teacher's values do not count
        incumbent="",  # score of the current early ranker, higher first
        early_scores="",  # columns of scores before the final ranker, with commas; higher first
        propensity="",  # probability with which a shown candidate was shown: random slots
        split="",  # train, validation or test, for data.split = "column"
    )
    # Stage -> its text in the stage column; integers as text. Without a stage column, a candidate
    # with a position or a label was shown, and one with a teacher value was passed.
    config.data.stages = dict(retrieved="retrieved", passed="passed", shown="shown")
    # Task -> column: 0 or 1, for shown candidates.
    config.data.labels = dict(watch="watch", like="like")
    # Task -> column; without a logged teacher: {}.
    config.data.teacher = dict(watch="teacher_probability_watch", like="teacher_probability_like")
    config.data.teacher_signal = "probability"  # or rank, score: the teacher columns hold those
    config.data.time_unit = "s"  # of a column of numbers: s, ms, us; timestamps contain it
    config.data.time_format = ""  # of texts that are not ISO 8601: "%d/%m/%Y %H:%M:%S"
    config.data.features = dict(
        age=feature("user", "dense"),
        country=feature("user", "category"),
        hour=feature("context", "dense"),
        device=feature("context", "category"),
        author=feature("item", "category", hashed=True, size=10_000),
        duration=feature("item", "dense"),
        quality=feature("item", "dense", cheap=False),
        tags=feature("item", "bag", length=4),
        score=feature("candidate", "dense"),
        source=feature("candidate", "category"),
        recent=feature("user", "history", length=20),
    )
    config.data.split = "time"  # or request, user: by hash; or column: data.columns.split
    config.data.validation_share = 0.1  # with split "time", the requests before the test ones
    config.data.test_share = 0.1
    # Findings that prevent a dataset unless named here: rejected, one_label, few_positives, …
    config.data.allow = ()

    config.funnel.retrieved = 200  # the most candidates of a request; more are rejected
    config.funnel.update(passed=50, shown=10, report_at=(10, 20, 50, 100))
    config.teacher.source = "logged"  # the teacher in the log; live: one that is trained here
    return config
