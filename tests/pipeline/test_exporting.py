"""Exports of the small cascade's rankers, used by a process that does not know this project."""

import dataclasses
import datetime
import io
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.export
import jaxlib
import numpy as np
import pytest

from kd_ranker import api, manifest
from kd_ranker.batch import IN_BATCH
from kd_ranker.batches.cutting import evaluation_batches
from kd_ranker.configs import cascade
from kd_ranker.models.student import STUDENTS
from kd_ranker.pipeline import exporting
from kd_ranker.pipeline.cluster import register
from kd_ranker.pipeline.trained import config_of, open_ranker
from kd_ranker.serving import check, programs
from tests import small
from tests.faults import fault_of
from tests.serving.test_programs import batch_of, trained_ranker

SERVE = "blend"
ABOUT = {
    "role": "student",
    "run": "shared-seed0",
    "mode": "shared",
    "serve": "user",
    "provenance": {"config": "456"},
    "formats": ["jax"],
}


@pytest.fixture(scope="module")
def trained(world):
    return world.student("aux")


def written(folder, workdir, **options):
    """An export in all formats that can be written here."""
    there = tuple(programs.FORMATS)
    try:
        import jax2onnx  # noqa: F401
    except ImportError:
        there = ("jax",)
    api.export(workdir, folder, formats=there, **options)
    return folder


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    return written(tmp_path_factory.mktemp("exported") / "student", trained, serve=SERVE)


MY_STUDENT = """
from kd_ranker.models.student import STUDENTS, TwoTower

STUDENTS["of_mine"] = TwoTower
"""


def test_a_runs_config_file_is_executed_only_if_trusted(world, tmp_path, monkeypatch):
    monkeypatch.setitem(STUDENTS, "of_mine", None)  # removed when the test ends

    def forget():
        """As in a later command, which has not read that config file."""
        STUDENTS.pop("of_mine", None)
        register.cache_clear()

    file = tmp_path / "mine.py"
    marks = tmp_path / "marks"
    file.write_text(f"{MY_STUDENT}\nwith open({str(marks)!r}, 'a') as file: file.write('run ')")
    register(str(file))
    changes = {"student__name": "of_mine", "registered_by": str(file), "train__steps": 2}
    config = world.config(distill__mode="none", **changes)
    run = tmp_path / "run"
    api.train(config, run)
    forget()
    marks.unlink()

    message = rf"the run at {run} needs {file}, .*'of_mine'.* add --trust"
    assert re.match(message, fault_of(open_ranker, run))
    assert re.match(message, fault_of(api.export, run, tmp_path / "out", formats=("jax",)))
    assert re.match(message, fault_of(api.score, run, tmp_path / "log"))
    assert not marks.exists()
    assert not (tmp_path / "out").exists()
    assert config_of(run, trust=True).student.name == "of_mine"
    assert marks.read_text() == "run "
    # Once everything that the run names is known, the file is not needed.
    file.unlink()
    for trust in (False, True):
        assert open_ranker(run, config=config_of(run, trust)).config.student.name == "of_mine"


_SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from pathlib import Path
import check
folder, runtime = Path(sys.argv[1]), sys.argv[2]
fields = dict(np.load(sys.argv[3]))
programs, tables = check.open_programs(folder, runtime), check.read_tables(folder)
answers = []
for start in range(0, len(fields["user_id"]), 4):
    few = {name: array[start : start + 4] for name, array in fields.items()}
    answers.append(check.rank(programs, tables | few))
whole = {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}
np.savez(sys.argv[4], **whole)
assert not [name for name in sys.modules if name.startswith(("kd_ranker", "flax"))]
"""


def served(folder, runtime, fields, tmp_path):
    np.savez(tmp_path / "fields.npz", **fields)
    files = [str(tmp_path / name) for name in ("fields.npz", "answers.npz")]
    program = [sys.executable, "-c", _SERVER, str(folder), runtime, *files]
    finished = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
    assert finished.returncode == 0, finished.stderr
    with np.load(tmp_path / "answers.npz") as answers:
        return answers["probability"], answers["value"]


def evaluated(workdir, serve="user"):
    """All requests of the test split as a batch, and the probabilities that are measured."""
    opened = open_ranker(workdir)
    ranker = opened.ranker
    batches = []
    probabilities = []
    for few in evaluation_batches(opened.dataset, "test", requests=4, candidates=100):
        served = ranker.serve(ranker.parameters, few.batch, opened.dataset.items)
        batches.append(few.batch)
        probabilities.append(served.probability[serve])
    batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
    return batch, np.concatenate(probabilities)


def assert_same(answers, batch, expected, value_weights):
    probability, value = answers
    mask = np.asarray(batch.candidate_mask)
    np.testing.assert_allclose(probability[mask], expected[mask], atol=1e-5)
    # The order is the same, up to candidates that are as good as tied.
    expected_value = expected @ np.array(value_weights, np.float32)
    for request, is_candidate in enumerate(mask):
        order = np.argsort(-value[request, is_candidate], kind="stable")
        in_order = expected_value[request, is_candidate][order]
        assert (np.diff(in_order) < 1e-5).all()
        assert np.ptp(in_order) > 1e-3


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_ranker_is_served_as_it_was_evaluated(world, exported, trained, tmp_path, role):
    """A server has the folder and the fields of requests, and nothing of this project."""
    workdir, folder, serve = trained, exported, SERVE
    if role == "teacher":
        workdir, serve = world.teacher, "user"
        folder = written(tmp_path / "export", workdir)
    batch, expected = evaluated(workdir, serve)
    fields = {field.name: np.asarray(getattr(batch, field.name)) for field in IN_BATCH}
    for runtime in json.loads((folder / "export.json").read_text())["formats"]:
        answers = served(folder, runtime, fields, tmp_path)
        assert_same(answers, batch, expected, world.config().value_weights)


def run_check(folder, *arguments):
    """From elsewhere, as a user would."""
    program = [sys.executable, str(folder / "check.py"), *arguments]
    return subprocess.run(program, cwd="/", capture_output=True, text=True, timeout=1500)


def changed_copy(exported, tmp_path, name, change):
    """A copy of an export, of which `change` made a file other bytes before the digests."""
    shutil.copytree(exported, folder := tmp_path / "export")
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    manifest.write(folder, {})
    return folder


def test_the_check_finds_a_number_that_is_wrong(exported, tmp_path):
    def change(content):
        with np.load(io.BytesIO(content)) as example:
            arrays = dict(example)
        arrays["out.value"][0, 0] += 1e-3
        np.savez(changed := io.BytesIO(), **arrays)
        return changed.getvalue()

    assert run_check(exported, "jax").returncode == 0
    finished = run_check(changed_copy(exported, tmp_path, "example.npz", change), "jax")
    assert finished.returncode == 1
    assert "jax value: largest difference 1.0e-03, WRONG" in finished.stdout
    assert "jax probability: largest difference 0.0e+00, ok" in finished.stdout


def test_the_check_finds_a_byte_that_the_example_does_not_read(exported, tmp_path):
    shutil.copytree(exported, folder := tmp_path / "export")
    tables = bytearray((folder / "tables.safetensors").read_bytes())
    tables[-5] ^= 1
    (folder / "tables.safetensors").write_bytes(tables)
    finished = run_check(folder, "jax")
    assert finished.returncode == 1
    line = "tables.safetensors: missing, or changed since it was exported, WRONG\n"
    assert finished.stdout == line


def test_the_check_names_a_manifest_that_is_missing(exported, tmp_path):
    shutil.copytree(exported, folder := tmp_path / "export")
    (folder / "manifest.json").unlink()
    finished = run_check(folder)
    assert finished.returncode == 2
    assert finished.stderr.endswith("missing or damaged; copy the whole export again\n")


RUNTIMES = [
    ({"jax"}, [], ["jax"]),
    ({"onnxruntime"}, [], ["onnx"]),
    ({"jax", "onnxruntime"}, [], ["jax", "onnx"]),
    ({"jax", "onnxruntime"}, ["onnx"], ["onnx"]),
    (set(), [], "jax or onnxruntime is not installed; install it to run the programs"),
    ({"jax"}, ["onnx"], "onnxruntime is not installed; it runs the format onnx"),
    ({"jax"}, ["tflite"], "this export has no 'tflite'; choose from: jax, onnx"),
]


@pytest.mark.parametrize(("installed", "named", "expected"), RUNTIMES)
def test_the_check_uses_the_runtimes_that_are_installed(installed, named, expected, monkeypatch):
    found = {name: object() for name in installed}
    monkeypatch.setattr(check.importlib.util, "find_spec", found.get)
    if isinstance(expected, str):
        with pytest.raises(check.ExportError, match=f"^{re.escape(expected)}$"):
            check.choose_runtimes(["jax", "onnx"], named)
    else:
        assert check.choose_runtimes(["jax", "onnx"], named) == expected


def test_the_check_without_a_runtime_is_one_line(exported):
    program = """
import runpy, sys
sys.modules["jax"] = sys.modules["onnxruntime"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    arguments = [sys.executable, "-c", program, str(exported / "check.py")]
    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=1500)
    assert finished.returncode == 2
    assert re.fullmatch("error: [^\n]* is not installed; [^\n]*\n", finished.stderr)


def test_an_export_names_the_release_of_jax_that_wrote_it(exported):
    described = json.loads((exported / "export.json").read_text())["jax"]
    assert described["jax"] == jax.__version__
    assert described["jaxlib"] == jaxlib.__version__
    program = jax.export.deserialize(bytearray((exported / "user.jax").read_bytes()))
    assert described["calling_convention_version"] == program.calling_convention_version
    text = (exported / "README.md").read_text()
    assert f"jax {jax.__version__} with jaxlib {jaxlib.__version__}" in text
    assert programs.READABLE_BY in text


def test_an_export_says_until_when_jax_guarantees_to_read_it(exported):
    described = json.loads((exported / "export.json").read_text())["jax"]
    date = datetime.date.fromisoformat(described["exported"])
    now = datetime.datetime.now(datetime.UTC).date()
    assert datetime.timedelta() <= now - date <= datetime.timedelta(days=1)
    until = datetime.date.fromisoformat(described["readable_until"])
    assert 181 <= (until - date).days <= 184
    text = (exported / "README.md").read_text()
    assert f"written on {date} by jax" in text
    assert f"after\n{until} need not read them" in text


MONTHS = [
    ("2026-01-15", 6, "2026-07-15"),
    ("2026-08-31", 6, "2027-02-28"),
    ("2027-08-31", 6, "2028-02-29"),
    ("2026-06-30", 6, "2026-12-30"),
]


@pytest.mark.parametrize(("date", "months", "expected"), MONTHS)
def test_months_later_is_a_day_of_that_month(date, months, expected):
    later = programs.months_later(datetime.date.fromisoformat(date), months)
    assert later.isoformat() == expected


WRITER = {
    "jax": "0.11.2",
    "jaxlib": "0.11.2",
    "exported": "2026-08-31",
    "readable_until": "2027-02-28",
}
AN_OLDER_JAX = (
    "this is jax 0.11.2 with jaxlib 0.11.1, older than jax 0.11.2 with jaxlib 0.11.2, which wrote "
    "the .jax files; JAX guarantees to read them only if this jaxlib was built at most 3 weeks "
    "before that one; install jax==0.11.2"
)
DATE_HAS_PASSED = (
    "the .jax files were written on 2026-08-31 by jax 0.11.2 with jaxlib 0.11.2, and JAX does not "
    "guarantee that a jaxlib built after 2027-02-28 reads them; export the ranker again, or keep "
    "jax==0.11.2"
)
# The releases of jax and jaxlib here, the date, and the warnings.
READERS = [
    ("0.11.2", "0.11.2", "2027-02-28", []),
    ("0.12.0.1", "0.12.0.1", "2027-02-28", []),
    ("0.11.10", "0.11.10.dev3", "2027-02-28", []),
    ("0.11.2", "0.11.1", "2027-02-28", [AN_OLDER_JAX]),
    ("0.11.2", "0.11.2", "2027-03-01", [DATE_HAS_PASSED]),
    ("0.11.2", "0.11.1", "2027-03-01", [AN_OLDER_JAX, DATE_HAS_PASSED]),
]


@pytest.mark.parametrize(("jax_here", "jaxlib_here", "today", "expected"), READERS)
def test_the_check_warns_where_jax_guarantees_nothing(jax_here, jaxlib_here, today, expected):
    installed = {"jax": jax_here, "jaxlib": jaxlib_here}
    today = datetime.date.fromisoformat(today)
    assert check.warnings_of_jax(WRITER, installed, today) == expected


def test_an_export_without_dates_gives_no_warning():
    writer = {name: WRITER[name] for name in ("jax", "jaxlib")}
    assert check.warnings_of_jax(writer, writer, datetime.date(2040, 1, 1)) == []


def test_the_check_of_an_export_that_is_too_old_warns_and_runs(exported, tmp_path):
    def change(content):
        described = json.loads(content)
        described["jax"] |= {"exported": "2020-01-31", "readable_until": "2020-07-31"}
        return json.dumps(described).encode()

    assert "warning" not in run_check(exported, "jax").stderr
    finished = run_check(changed_copy(exported, tmp_path, "export.json", change), "jax")
    assert finished.returncode == 0
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("warning: ")]
    assert "written on 2020-01-31" in line
    assert "a jaxlib built after 2020-07-31" in line
    assert "jax value: largest difference 0.0e+00, ok" in finished.stdout


def test_a_program_that_this_jax_cannot_read_is_one_line(exported, tmp_path):
    def change(content):
        program = jax.export.deserialize(bytearray(content))
        newer = dataclasses.replace(program, mlir_module_serialized=b"of a later release")
        return bytes(newer.serialize())

    folder = changed_copy(exported, tmp_path, "user.jax", change)
    described = json.loads((folder / "export.json").read_text())
    described["jax"]["jax"] = "99.1.2"
    (folder / "export.json").write_text(json.dumps(described))
    manifest.write(folder, {})
    finished = run_check(folder, "jax")
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1] == (
        "error: user.jax was written by jax 99.1.2, and this is jax "
        f"{jax.__version__}, which cannot read it; install the release that wrote it: jax==99.1.2"
    )


def test_a_run_of_a_sweep_is_exported_by_its_name(world, tmp_path):
    swept = world.sweep()
    name = "aux-weight1.0-seed1"
    api.export(swept, tmp_path / "out", name, "teacher", formats=("jax",))
    described = json.loads((tmp_path / "out" / "export.json").read_text())
    assert described["difference"] < 1e-5
    assert (described["run"], described["serve"]) == (name, "teacher")


def request_of_readme():
    """The request in the README of the server, whose answer has at most two candidates."""
    text = (small.ROOT / "examples" / "serve" / "README.md").read_text()
    return json.loads(re.search(r"rank\?passed=2' .* -d '(\{.*?\})'", text, re.DOTALL)[1])


def test_the_request_in_the_readme_of_the_server_fits_an_export(exported):
    described = json.loads((exported / "export.json").read_text())
    user, score = described["programs"]["user"], described["programs"]["score"]
    of_server = {*described["tables"], *user["outputs"]}
    expected = {
        name: [3 if size == "candidates" else size for size in field["shape"][1:]]
        for name, field in (user["inputs"] | score["inputs"]).items()
        if name not in of_server
    }
    found = {name: list(np.shape(value)) for name, value in request_of_readme().items()}
    assert found == expected


REFUSED = [
    ({"ranker": "nowhere"}, "no run at nowhere: it holds no config.json"),
    ({"run": "aux"}, "and --run=aux is for a sweep; leave it out"),
    ({"serve": "best"}, "--serve='best' does not exist; choose one of: blend, teac"),
    ({"formats": ("tflite",)}, "--formats='tflite' does not exist; choose one of: jax, on"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_bad_input_gives_one_line_and_leaves_nothing(trained, tmp_path, changes, message):
    arguments = {"ranker": trained, "output": tmp_path / "out", "formats": ("jax",)} | changes
    assert message in fault_of(api.export, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_or_a_type_that_cannot_be_exported_is_one_line(trained, tmp_path):
    out, finished = tmp_path / "out", open_ranker(trained)
    finished.config.student.compute_dtype = "bfloat16"
    fault = fault_of(exporting.export_ranker, finished, out, ("jax", "onnx"))
    assert "compute_dtype='bfloat16': the converter to ONNX" in fault
    out.mkdir()
    assert "out exists; give a folder that does not" in fault_of(api.export, trained, out)
    shutil.copytree(trained, unfinished := tmp_path / "unfinished")
    (unfinished / manifest.FILE).unlink()
    fault = fault_of(api.export, unfinished, tmp_path / "other")
    assert "is not finished; finish it with: kd-ranker train" in fault
    assert not (tmp_path / "other").exists()


def test_a_run_with_a_key_that_is_gone_is_named_with_the_key(tmp_path):
    config = cascade("small")
    config.funnel.policies = ("uniform",)
    (tmp_path / "config.json").write_text(config.to_json())
    assert fault_of(config_of, tmp_path) == (
        f"the run at {tmp_path}: config key 'funnel.policies' does not exist; docs/config.md lists "
        "the keys"
    )


def test_a_dataset_of_other_content_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "digest", lambda *_: "000000000000")
    fault = fault_of(api.export, trained, tmp_path / "out")
    assert "/000000000000, which has other" in fault


def test_the_readme_describes_the_folder(tmp_path):
    beside, folder = tmp_path / "dataset", tmp_path / "out"
    vocabularies = beside / "vocabularies"
    vocabularies.mkdir(parents=True)
    (vocabularies / "user.parquet").write_bytes(b"ids")
    (beside / "transforms.json").write_text("{}")
    trained = trained_ranker("multi_interest", {"history": "mean", "user_rows": 7}, "categories")
    exporting.write_export(trained, batch_of(trained), ABOUT, beside, folder)
    text = (folder / "README.md").read_text()
    assert text.startswith("# A student: shared-seed0\n")
    assert "1.0 · watch + 2.0 · like + 4.0 · share" in text
    assert "`user_table`: any id has a row, which the programs find by a hash" in text
    # The category ids of a feature start behind those of the ones before it.
    assert "| reasons | candidate | 16 | 5 | 3 |" in text
    assert "`vocabularies/`" in text
    assert (folder / "vocabularies" / "user.parquet").read_bytes() == b"ids"
    assert "`transforms.json` describes" in text
    assert (folder / "transforms.json").exists()
    described = json.loads((folder / "export.json").read_text())
    assert described["programs"]["score"]["inputs"]["item_embedding"]["shape"] == ["rows", 8]
    assert max(check.largest_differences(folder, "jax").values()) <= check.TOLERANCE
    assert 0 <= described["difference"] < 1e-5
    manifest.check(folder, "", ABOUT["provenance"])
