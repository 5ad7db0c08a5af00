"""Logs in a server of S3 and behind a web server, without an extension of the engine."""

import functools
import http.server
import threading
from pathlib import Path

import pytest

from tests.sources import faulty_logs
from tests.sources import planted_logs as logs
from tests.sources.faulty_logs import make_rows, same, write_log
from tests.sources.logs.test_infer import infer

for _name in ("s3fs", "aiohttp"):
    pytest.importorskip(_name, reason=f"{_name} is missing; scripts/test_cluster.sh installs it")


class WholeFiles(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, each file as a whole."""

    def log_message(self, *of):
        pass


class Ranges(WholeFiles):
    """Serves the bytes that a request asks for."""

    def do_GET(self):
        if "Range" not in self.headers:
            return super().do_GET()
        content = Path(self.translate_path(self.path)).read_bytes()
        start, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = content[int(start) : int(end) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return self.wfile.write(part)

    def do_HEAD(self):
        size = Path(self.translate_path(self.path)).stat().st_size
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(size))
        self.end_headers()


@pytest.fixture
def web(tmp_path):
    """Starts a server of `tmp_path` with a handler, and returns its URL."""
    servers = []

    def start(handler):
        handler = functools.partial(handler, directory=str(tmp_path))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return "http://{}:{}".format(*servers[-1].server_address)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def requests_of(url, directory):
    source = faulty_logs.open_source(faulty_logs.config(url, directory))
    try:
        return faulty_logs.all_requests(source)
    finally:
        source.close()


def test_a_log_in_s3_is_read_like_one_on_disk(store, tmp_path):
    log = write_log(tmp_path / "log", make_rows(28), files=3)
    store.put(f"{log}/", "bucket/feed/day=1/", recursive=True)
    expected = requests_of(log, tmp_path / "local")
    for url in ("s3://bucket/feed", "s3://bucket/feed/*/*.parquet"):
        assert same(requests_of(url, tmp_path / "remote"), expected)


def test_a_first_config_of_a_log_in_s3(store, tmp_path):
    log = logs.write(logs.table_of(logs.make_columns()), tmp_path / "feed")
    store.put(f"{log}/", "bucket/feed/", recursive=True)
    _, config = infer(tmp_path, "s3://bucket/feed")
    assert config.data.path == "s3://bucket/feed"
    assert config.data.labels.to_dict() == {"click": "click", "like": "like"}


def test_a_log_behind_a_web_server_is_read_like_one_on_disk(web, tmp_path):
    log = write_log(tmp_path / "log", make_rows(28), files=3)
    expected = requests_of(log, tmp_path / "local")
    url = f"{web(Ranges)}/log"
    urls = ",".join(f"{url}/{path.name}" for path in log.iterdir())
    assert same(requests_of(urls, tmp_path / "remote"), expected)


def test_without_range_requests_a_small_log_is_read_whole(web, tmp_path):
    log = write_log(tmp_path / "log", make_rows(28))
    (path,) = log.iterdir()
    found = requests_of(f"{web(WholeFiles)}/log/{path.name}", tmp_path / "remote")
    assert same(found, requests_of(log, tmp_path / "local"))
