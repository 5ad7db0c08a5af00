"""A log of your own in Parquet files."""

from ml_collections import ConfigDict

from configs import defaults


def feature(
    of: str,
    kind: str,
    column: str = "",
    hashed: bool = False,
    size: int = 100_000,
    length: int = 1,
    standardise: bool = True,
    cheap: bool = True,
) -> ConfigDict:
    """A feature of `of` (user, item, candidate or context), read from `column`, or its own name."""
    return ConfigDict(
        dict(
            of=of,
            kind=kind,
            column=column,
            hashed=hashed,
            size=size,
            length=length,
            standardise=standardise,
            cheap=cheap,
        )
    )


def get_config(variant: str = "") -> ConfigDict:
    """The template; `--config.data.infer=True` writes one for a log."""
    defaults.check_variant(variant)
    config = defaults.get_config()
    config.data.name = "parquet"
    config.data.path = ""  # file, directory, glob, or fsspec URL of these
    config.data.rows = "candidate"  # or "request": a row a request, with list columns
    config.data.columns = ConfigDict(
        dict(
            request="request_id",
            time="time",
            user="user_id",
            item="item_id",
            stage="",
            position="",
            label_weight="",
            teacher_version="",
            teacher_weight="",
        )
    )
    config.data.stages = ConfigDict(dict(retrieved="retrieved", passed="passed", shown="shown"))
    config.data.labels = ConfigDict(dict(watch="watch", like="like", share="share"))
    config.data.teacher = ConfigDict(dict(watch="teacher_probability_watch"))
    config.data.teacher_version = ""
    config.data.teacher_signal = "probability"
    config.data.time_unit = "s"
    config.data.features = ConfigDict(dict(age=feature("user", "dense")))
    config.data.split = "time"
    config.data.test_share = 0.1
    config.data.strict = False
    config.data.processes = 1
    config.data.infer = False  # write a first config for the log in place of its dataset
    config.data.rows_in_memory = 2_000_000
    return config
