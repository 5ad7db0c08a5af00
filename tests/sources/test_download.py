import functools
import hashlib
import http.server
import threading
import zipfile

import pytest

from kd_ranker.errors import UserError
from kd_ranker.sources.converted import fetch


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The URL of an archive and of a text on a server of this machine, each with its SHA-256."""
    folder = tmp_path_factory.mktemp("served")
    with zipfile.ZipFile(folder / "set.zip", "w") as archive:
        archive.writestr("set/u.data", "1\t2\t3\t4\n")
    (folder / "note.txt").write_text("moved")
    (folder / "note.zip").write_text("moved")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        file.name: (
            f"http://127.0.0.1:{server.server_port}/{file.name}",
            hashlib.sha256(file.read_bytes()).hexdigest(),
        )
        for file in folder.iterdir()
    }
    server.shutdown()


def test_a_file_is_fetched_once_and_an_archive_unpacked(served, tmp_path):
    url, sha256 = served["set.zip"]
    folder = fetch(url, sha256, str(tmp_path))
    assert (folder / "set" / "u.data").read_text() == "1\t2\t3\t4\n"
    assert [*(tmp_path / "downloads").iterdir()] == [folder]
    assert fetch("http://127.0.0.1:9/gone.zip", sha256, str(tmp_path)) == folder
    url, sha256 = served["note.txt"]
    file = fetch(url, sha256, str(tmp_path))
    assert file.read_text() == "moved"
    assert fetch("http://127.0.0.1:9/note.txt", sha256, str(tmp_path)) == file


def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(served, tmp_path):
    (tmp_path / "downloads").mkdir()
    absent = "http://127.0.0.1:9/set.zip"
    for url, sha256 in ((served["set.zip"][0], "0" * 64), served["note.zip"], (absent, "0" * 64)):
        with pytest.raises(UserError, match=rf"could not fetch {url} .*set data\.path") as caught:
            fetch(url, sha256, str(tmp_path))
        assert "\n" not in str(caught.value)
        assert not [*(tmp_path / "downloads").glob("*.part"), *(tmp_path / "downloads").glob("0*")]
