"""`import kd_ranker as kd`: the names that outsiders use."""

import subprocess
import sys

import fsspec
import pytest

import kd_ranker as kd
from kd_ranker import api, configs
from kd_ranker.config.runs import sweep_runs
from kd_ranker.pipeline import sweeping
from tests.faults import fault_of
from tests.reporting import sweeps


@pytest.fixture
def students(world):
    return kd.Trained(world.sweep())


def test_all_names_are_there_and_no_others():
    assert {name for name in kd.__all__ if not hasattr(kd, name)} == set()
    assert {*kd.__all__} <= {*dir(kd)}
    with pytest.raises(AttributeError, match="has no attribute 'trane'"):
        kd.trane  # noqa: B018
    assert all(getattr(kd, name).__doc__ for name in kd.__all__)


def test_the_import_is_light_and_its_names_are_functions():
    program = """
import sys, kd_ranker as kd
assert not {"jax", "pandas"} & {*sys.modules}
import kd_ranker.reporting.write
assert callable(kd.sweep) and callable(kd.report), (kd.sweep, kd.report)
from kd_ranker import configs
assert kd.configs is configs
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("content", ["{}", '{"data": 5}', '{"data": {"name": "cascade"}}'])
def test_a_config_that_lacks_keys_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    fault = fault_of(kd.export, tmp_path, tmp_path / "served")
    assert fault.startswith(f"the run at {tmp_path}: the config lacks ")


def test_only_text_that_is_asked_for_reads_a_url(students, monkeypatch):
    """A debugger and a notebook show values unasked."""
    monkeypatch.setattr(fsspec, "open", None)
    monkeypatch.setattr(fsspec.core, "url_to_fs", None)
    at_url = kd.Trained("memory://bucket/sweep")
    report = kd.Report(("25% less",), "memory://bucket/report.html", students=at_url)
    assert "memory://bucket/sweep" in repr(at_url)
    assert "memory://bucket/report.html" in repr(report)
    assert report._repr_html_() is None


def test_a_result_that_is_gone_has_a_name(tmp_path):
    assert str(tmp_path / "gone") in repr(kd.Trained(tmp_path / "gone"))


def test_axes_of_a_sweep_replace_those_of_its_config(world, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(sweeping, "train_sweep", lambda config, *_: trained.append(config))
    config = world.config(teacher__workdir="")
    before = config.to_json()
    arguments = dict(
        teacher=world.teacher,
        runs=[{"distill.mode": "none"}, {"distill.mode": "aux", "distill.loss": "bce"}],
        weights=(0.3, 1),
        axes={"distill.loss": ["topk"]},
    )
    students = kd.sweep(config, f"{tmp_path}/sweep", **arguments)
    assert config.to_json() == before
    assert students.workdir == tmp_path / "sweep"
    runs = sweep_runs(*trained).values()
    settings = {(run.distill.mode, run.distill.weight) for run in runs}
    assert settings == {("none", 0.0), ("aux", 0.3), ("aux", 1.0)}
    assert {run.distill.loss for run in runs if run.distill.mode == "aux"} == {"topk"}
    assert {run.teacher.workdir for run in runs} == {str(world.teacher)}


def test_results_show_themselves_as_text_and_within_a_notebook(world, students, tmp_path):
    table = students.results
    assert {*table[table.role == "student"]["mode"]} == {"none", "aux"}
    assert str(students.workdir) in str(students)
    # Asked for, the saving of each method; shown unasked, means over seeds without draws.
    assert "saving" in str(students)
    assert all(mode in repr(students) for mode in ("none", "aux", "seeds"))
    prepared = kd.prepare(world.config())
    assert str(prepared).startswith(f"dataset: {prepared.directory}")
    assert any(line.startswith("epochs: ") for line in prepared.lines)
    with sweeps.without_pictures(with_charts=True):
        report = kd.report(students, output=tmp_path)
    assert report.page.parent == tmp_path
    assert report.answers[0] in str(report)
    shown = report._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    # Its own quotes and tags do not end the frame.
    assert (shown.count('"'), shown.count("<")) == (2 * 4, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modes": ("twice",)}, "twice"),
        ({"axes": {"train.stepz": (1,)}}, "train.stepz"),
        ({"axes": {"data.name": ("cascade",)}}, "data.name"),
        ({"teacher": "nowhere"}, "no run at nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(world, tmp_path, change, message):
    arguments = {"teacher": world.teacher, **change}
    with pytest.raises(kd.UserError, match=message):
        kd.sweep(world.config(), tmp_path / "sweep", **arguments)


def test_a_home_folder_is_meant_by_a_tilde_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = configs.parquet()
    config.teacher.source = "logged"
    paths = {"dir": "~/data", "path": "~/a.parquet, ~/b.parquet", "extends": "~/old"}
    config.data.update(paths)
    config.teacher.workdir = config.train.warm_start = "~/run"
    own = api._copied(config)
    assert (own.data.dir, own.data.extends) == ("/home/me/data", "/home/me/old")
    assert own.data.path == "/home/me/a.parquet,/home/me/b.parquet"
    assert own.teacher.workdir == own.train.warm_start == "/home/me/run"
    assert config.data.dir == "~/data"
