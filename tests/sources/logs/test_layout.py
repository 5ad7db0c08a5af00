import pytest
from ml_collections import ConfigDict

from kd_ranker.config import checks
from kd_ranker.config.defaults import feature
from kd_ranker.configs import parquet
from kd_ranker.errors import UserError
from tests.faults import fault_of
from tests.sources.faulty_logs import layout as layout_of


def config_with(**changes):
    config = parquet()
    config.data.path = "somewhere"
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = config.data
        for part in sections:
            section = section[part]
        section[name] = value
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "data.path is empty; give a Parquet file, a directory or a glob"),
        ({"sql": "SELECT 1"}, "data.path and data.sql are both set"),
        ({"path": "a.csv", "engine": "spark"}, "data.engine='duckdb', and it is 'spark'"),
        ({"time_format": "noon"}, "data.time_format='noon' is no format; write it as for strptime"),
        ({"time_format": "%d", "engine": "spark"}, "data.time_format needs data.engine='duckdb'"),
        ({"columns__item": ""}, "data.columns.item is empty; name the column"),
        ({"columns__user": "", "split": "user"}, "data.split='user' needs data.columns.user; nam"),
        ({"split": "column"}, "data.split='column' needs data.columns.split; name its c"),
        ({"columns__split": "age", "split": "column"}, "data.features.age reads column 'age', whi"),
        ({"columns__usr": "user"}, "data.columns='usr' does not exist"),
        ({"teacher__share": "score"}, "data.teacher='share' does not exist; choose one of: like"),
        ({"stages__shown": ""}, "data.stages.shown is empty"),
        (
            {"stages": ConfigDict(dict(passed="yes")), "columns__position": ""},
            "data.stages has no text for shown candidates; add it, or name data.columns.position",
        ),
        ({"stages": ConfigDict(dict(retrieved=0, shown=2))}, "data.stages.retrieved=0 must be a t"),
        ({"labels": ConfigDict(dict(watch=3))}, "data.labels.watch=3 must be a text"),
        ({"stages__passed": "shown"}, "gives two stages the same text"),
        ({"stages__sent": "x"}, "data.stages='sent' does not exist; choose one of: passed"),
        ({"features__new": "dense"}, "data.features.new is no feature; write it with kd.configs."),
        ({"features__age": feature("group", "dense")}, "data.features.age.of='group' does not"),
        ({"features__age": feature("user", "text")}, "data.features.age.kind='text' does not"),
        ({"features__age": feature("item", "history")}, "of a history, it is one of: user,"),
        ({"features__age": feature("user", "history")}, "has 2 of kind 'history' (age, recent)"),
        ({"features__age": feature("user", "category", length=2)}, "'category' holds one value"),
        ({"validation_share": 0.9}, "data.validation_share=0.9 and data.test_share=0.1 leave no"),
        ({"features__tags": feature("item", "bag", length=0)}, "length=0 must be at least 1"),
        ({"features__watch": feature("candidate", "dense")}, "is that of data.labels.watch"),
        ({"features__place": feature("item", "dense", "position")}, "of data.columns.position"),
        ({"columns__teacher_weight": "score"}, "leave it out of data.features"),
    ],
)  # fmt: skip
def test_each_fault_is_one_line_that_says_what_to_change(changes, message):
    assert message in fault_of(layout_of, config_with(**changes))


def test_the_incumbents_score_and_ids_may_be_features():
    who = feature("user", "category", column="user_id")
    layout = layout_of(config_with(columns__incumbent="score", features__who=who))
    assert {"score", "user_id"} <= {of.column for of in layout.features}


def test_the_config_is_valid_and_has_the_tasks_of_its_labels():
    config = config_with()
    config.parallel.devices = 1
    checks.validate(config)
    config.tasks, config.value_weights = ("watch", "share"), (1.0, 1.0)
    with pytest.raises(UserError, match="tasks='share' does not exist; choose one of: like, watch"):
        checks.validate(config)


def test_a_task_that_the_final_ranker_does_not_predict_has_no_worth():
    config = config_with()
    config.parallel.devices = 1
    config.teacher.source = "logged"
    del config.data.teacher["like"]
    with pytest.raises(
        UserError, match=r"value_weights gives 'like' a worth of .* name its column"
    ):
        checks.validate(config)
    config.value_weights = (1.0, 0.0)
    checks.validate(config)


def test_a_config_survives_the_file_that_a_workdir_keeps(tmp_path):
    from kd_ranker.training import workdir

    config = config_with()
    workdir.write_config(tmp_path, "train", config, {"dataset": "d"})
    assert layout_of(workdir.read_config(tmp_path)) == layout_of(config)


def test_a_stage_may_have_several_texts():
    layout = layout_of(config_with(stages__passed="ranked, filtered"))
    assert layout.stages == {"retrieved": 1, "ranked": 2, "filtered": 2, "shown": 3}


def test_what_the_log_lacks_is_left_out():
    layout = layout_of(config_with(columns__stage=""))
    assert "stage" not in layout.columns
    assert layout.stages == {}
    assert layout.history_length == 20
    assert [feature.name for feature in layout.of("item", kind="dense")] == ["duration", "quality"]
