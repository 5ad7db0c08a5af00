import json

import pytest

from kd_ranker import manifest
from kd_ranker.serving import check, programs, write
from tests.serving.test_programs import batch_of, trained_ranker

ABOUT = {
    "role": "student",
    "member": "shared-seed0",
    "mode": "shared",
    "serve": "user",
    "dataset": "log/123",
    "run": {"config": "456"},
    "versions": {"jax": "1"},
    "results": {"validation": {"regret": 0.5}, "test": {"regret": 0.25, "survival@3": 1.0}},
    "difference": 1e-7,
    "formats": ["jax"],
}


def write_one(folder, beside):
    changes = {"history": "mean", "user_rows": 7}
    trained = trained_ranker("multi_interest", changes, "categories")
    exported = programs.make_programs(trained)
    write.write_export(exported, trained, batch_of(trained), ABOUT, beside, folder)
    return folder


@pytest.mark.parametrize("of_a_log", [True, False])
def test_the_readme_describes_the_folder(tmp_path, of_a_log):
    beside = tmp_path / "dataset"
    beside.mkdir()
    if of_a_log:
        (beside / "vocabularies").mkdir()
        (beside / "vocabularies" / "user.parquet").write_bytes(b"ids")
        (beside / "transforms.json").write_text("{}")
    folder = write_one(tmp_path / "out", beside)
    text = (folder / "README.md").read_text()
    assert text.startswith("# A student: shared-seed0\n")
    assert "1.0 · watch + 2.0 · like + 4.0 · share" in text
    assert "`user_table`: any id has a row, which the programs find by a hash" in text
    # The category ids of a feature start behind those of the ones before it.
    assert "| reasons | candidate | 16 | 5 | 3 |" in text
    assert "| regret | 0.5 | 0.25 |" in text
    assert "| survival@3 |  | 1 |" in text
    assert ("`vocabularies/`" in text) == of_a_log == (folder / "vocabularies").exists()
    assert (
        ("`transforms.json` describes" in text) == of_a_log == (folder / "transforms.json").exists()
    )
    assert "None" not in text
    # No paragraph or table runs into another.
    assert "\n\n\n\n" not in text
    described = json.loads((folder / "export.json").read_text())
    assert described["programs"]["score"]["inputs"]["item_embedding"]["shape"] == ["rows", 8]
    assert max(check.largest_differences(folder, "jax").values()) <= check.TOLERANCE
    manifest.check(folder, "", ABOUT["run"])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
