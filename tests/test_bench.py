import json

from tests import small


def test_a_benchmark_writes_what_it_promises(tmp_path):
    """The shape of the JSON; whether a bar is met is measured by hand, on a quiet machine."""
    path = tmp_path / "layout.json"
    finished = small.run("-m", "scripts.bench", "layout", "--members=2", f"--json={path}")
    assert finished.returncode == 0, finished.stderr
    written = json.loads(path.read_text())
    assert json.loads(finished.stdout) == written
    assert {"name", "ratio", "bar", "passed", "floor", "device", "versions"} <= written.keys()
    assert written["passed"] == (written["ratio"] <= written["bar"])
