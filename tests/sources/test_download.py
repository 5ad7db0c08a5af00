import functools
import hashlib
import http.server
import threading
import zipfile

import pytest

from kd_ranker.errors import UserError
from kd_ranker.sources.download import Archive, fetch


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A small archive on a server of this machine, and its right description."""
    folder = tmp_path_factory.mktemp("served")
    with zipfile.ZipFile(folder / "set.zip", "w") as archive:
        archive.writestr("set/u.data", "1\t2\t3\t4\n")
    (folder / "note.txt").write_text("moved")
    content = (folder / "set.zip").read_bytes()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Archive(
        url=f"http://127.0.0.1:{server.server_port}/set.zip",
        sha256=hashlib.sha256(content).hexdigest(),
        folder="set",
    )
    server.shutdown()


def test_an_archive_is_fetched_once_and_unpacked(served, tmp_path):
    folder = fetch(served, str(tmp_path))
    assert (folder / "u.data").read_text() == "1\t2\t3\t4\n"
    gone = served._replace(url="http://127.0.0.1:9/gone.zip")
    assert fetch(gone, str(tmp_path)) == folder


def test_an_archive_with_another_checksum_is_refused(served, tmp_path):
    with pytest.raises(UserError, match=r"set data\.path to its folder"):
        fetch(served._replace(sha256="0" * 64), str(tmp_path))
    assert not list((tmp_path / "downloads").iterdir())


def test_what_is_no_archive_leaves_nothing_behind(served, tmp_path):
    url = served.url.rsplit("/", 1)[0] + "/note.txt"
    note = served._replace(url=url, sha256=hashlib.sha256(b"moved").hexdigest())
    with pytest.raises(UserError, match=r"could not fetch .*note\.txt"):
        fetch(note, str(tmp_path))
    assert not list((tmp_path / "downloads").iterdir())


def test_a_server_that_does_not_answer_is_one_line(tmp_path):
    absent = Archive("http://127.0.0.1:9/set.zip", "0" * 64, "set")
    with pytest.raises(UserError, match=r"could not fetch http://127.0.0.1:9/set.zip") as caught:
        fetch(absent, str(tmp_path))
    assert "\n" not in str(caught.value)
