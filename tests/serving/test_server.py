"""The server of `examples/serve`, over HTTP."""

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from kd_ranker import api
from kd_ranker.batch import IN_BATCH
from kd_ranker.pipeline import exporting
from kd_ranker.serving import check
from kd_ranker.training import workdir as workdirs
from tests import small
from tests.pipeline.test_exporting import ABOUT, evaluated, request_of_readme
from tests.serving.test_programs import batch_of, trained_ranker

for _name in ("fastapi", "httpx", "jax2onnx", "onnxruntime", "uvicorn"):
    pytest.importorskip(_name, reason="see scripts/test_onnx.sh")
import httpx  # noqa: E402

SERVE = small.ROOT / "examples" / "serve"
# A request for the small cascade's student.
GOOD = {
    "user_id": 7,
    "user_features": [0.5] * 28,
    "context": [0] * 8,
    "item_id": [3, 299],
    "candidate_features": [[0.5], [1]],
}


@pytest.fixture(scope="module")
def trained(world):
    return world.student("aux")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "student"
    api.export(trained, folder, serve="blend", formats=("onnx",))
    return folder


@contextlib.contextmanager
def serving(export, *flags):
    """The address of a server in a process of its own, which runs elsewhere."""
    port = small.free_port()
    program = [sys.executable, str(SERVE / "server.py"), str(export), f"--port={port}", *flags]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(program, cwd="/", stderr=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(6000):
                assert process.poll() is None, process.stderr.read()
                with contextlib.suppress(httpx.TransportError):
                    httpx.get(f"{url}/health")
                    break
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.communicate()


@pytest.fixture(scope="module")
def server(exported):
    with serving(exported) as url:
        yield url


def requests_of(arrays, masks):
    """The requests of a batch as JSON would say them, without the candidates that are not there."""
    of_candidate = {field.name for field in IN_BATCH if field.of == "candidate"}
    return [
        {
            name: (array[row][mask] if name in of_candidate else array[row]).tolist()
            for name, array in arrays.items()
        }
        for row, mask in enumerate(masks)
    ]


def example_of(export):
    with np.load(export / "example.npz") as example:
        results = example["out.probability"], example["out.value"]
        arrays = {}
        for name, array in example.items():
            if name.startswith("in.") and not name.startswith("in.item."):
                arrays[name.removeprefix("in.")] = array
    return arrays, results


def assert_ranked(answer, items, probability, value):
    """The answer has each candidate with its probabilities, by falling value."""
    assert sorted(answer["item_id"]) == sorted(items)
    assert (np.diff(answer["value"]) <= 0).all()
    found = np.stack([*answer["probability"].values()], axis=-1)
    # An item may be a candidate more than once: the values tell which is which.
    order = np.lexsort((-value, items))
    order_of_answer = np.lexsort((-np.array(answer["value"]), answer["item_id"]))
    np.testing.assert_allclose(np.array(answer["value"])[order_of_answer], value[order], atol=1e-5)
    np.testing.assert_allclose(found[order_of_answer], probability[order], atol=1e-5)


async def post_all(url, requests):
    """The answers of requests that are all sent at once."""
    async with httpx.AsyncClient(base_url=url, timeout=900) as session:
        answers = await asyncio.gather(*(session.post("/rank", json=each) for each in requests))
    assert [answer.status_code for answer in answers] == [200] * len(requests)
    return [answer.json() for answer in answers]


def test_concurrent_requests_are_answered_as_evaluated(exported, trained):
    batch, expected = evaluated(trained, "blend")
    config = workdirs.read_config(trained)
    mask = np.asarray(batch.candidate_mask).copy()
    mask[1, 1:], mask[2, 7:] = False, False  # one candidate, and a few
    with serving(exported, "--workers=2") as url:
        fields = httpx.get(f"{url}/health").json()["fields"]
        arrays = {name: np.asarray(getattr(batch, name)) for name in fields}
        answers = asyncio.run(post_all(url, requests_of(arrays, mask)))
    value = expected @ np.array(config.value_weights, np.float32)
    for row, answer in enumerate(answers):
        there = mask[row]
        items = arrays["item_id"][row, there]
        assert_ranked(answer, items, expected[row, there], value[row, there])
        assert list(answer["probability"]) == list(config.tasks)


@pytest.mark.parametrize("user_rows", [0, 7])
def test_unknown_inputs_are_served_as_in_the_example(tmp_path, user_rows):
    changes = {"history": "mean", "user_rows": user_rows}
    trained = trained_ranker("multi_interest", changes, "categories")
    batch = batch_of(trained, beyond=False)
    batch.user_id[0], batch.item_id[0, 0], batch.history_id[0, 0] = -1, -1, -1
    about = ABOUT | {"formats": ["onnx"]}
    exporting.write_export(trained, batch, about, tmp_path, tmp_path / "out")
    arrays, (probability, value) = example_of(tmp_path / "out")
    assert {"history_mask", "request_category", "candidate_category"} <= set(arrays)
    requests = requests_of(arrays, np.ones_like(batch.item_id, bool))
    with serving(tmp_path / "out") as url:
        answers = asyncio.run(post_all(url, requests))
    for answer, items, *expected in zip(answers, batch.item_id, probability, value, strict=True):
        assert_ranked(answer, items, *expected)


def test_an_item_that_came_after_the_export_is_ranked(exported, tmp_path):
    shutil.copytree(exported, grown := tmp_path / "grown")
    held = check.read_tables(exported)
    embedding = held["item_embedding"]
    embedding = np.insert(embedding, len(embedding) - 1, embedding[4], axis=0)
    save_file(held | {"item_embedding": embedding}, grown / "tables.safetensors")
    with serving(grown) as url:
        known, unknown = (
            httpx.post(
                f"{url}/rank", json=GOOD | {"item_id": ids, "candidate_features": [[0], [0]]}
            )
            for ids in ([4, 300], [4, 301])
        )
    assert known.json()["item_id"] == [4, 300]
    assert len({*known.json()["value"]}) == 1
    assert unknown.json() == {"detail": "item_id: ids from -1 to 300 expected"}


def test_only_as_many_as_are_to_pass_are_answered(server, exported):
    arrays, _ = example_of(exported)
    (request, *_) = requests_of(arrays, np.ones_like(arrays["item_id"], bool))
    whole, best = (
        httpx.post(f"{server}/rank", json=request, params=params).json()
        for params in ({}, {"passed": 3})
    )
    assert best["item_id"] == whole["item_id"][:3]
    assert best["probability"]["like"] == whole["probability"]["like"][:3]


def test_the_request_in_the_readme_is_answered(server):
    request = request_of_readme()
    answer = httpx.post(f"{server}/rank", json=request, params={"passed": 2})
    assert answer.status_code == 200, answer.text
    assert len(set(answer.json()["item_id"]) & set(request["item_id"])) == 2


CANDIDATES = "item_id: a list of 1 to 2000 candidates expected"
FINITE = "candidate_features: finite numbers expected"
ITEMS = "item_id: ids from -1 to 299 expected"
# What is changed in a good request, None for a field left out, and what is said of it.
BAD = {
    "missing": ({"context": None, "item_id": None}, "missing: context, item_id"),
    "a row too many": (
        {"candidate_features": [[0]] * 3},
        "candidate_features: shape [2, 1] expected, found [3, 1]",
    ),
    "ragged": (
        {"candidate_features": [[0], []]},
        "candidate_features: lists of different lengths",
    ),
    "a fraction": ({"item_id": [1, 1.5]}, "item_id: something in it is no int32"),
    "NaN": ({"candidate_features": [[0], [float("nan")]]}, FINITE),
    "beyond float32": ({"candidate_features": [[0], [1e39]]}, FINITE),
    "a user outside": ({"user_id": 50}, "user_id: ids from -1 to 49 expected"),
    "an item below": ({"item_id": [0, -2]}, ITEMS),
    "beyond int32": ({"item_id": [0, 2**40]}, ITEMS),
    "no candidates": ({"item_id": []}, CANDIDATES),
    "too many candidates": ({"item_id": [0] * 2001}, CANDIDATES),
}


def post(server, content):
    headers = {"content-type": "application/json"}
    return httpx.post(f"{server}/rank", content=content, headers=headers)


def test_bad_requests_are_lines(server):
    for change, message in BAD.values():
        fields = GOOD | change
        bad = {name: value for name, value in fields.items() if value is not None}
        answer = post(server, json.dumps(bad))
        assert answer.status_code == 422
        assert answer.json() == {"detail": message}
    for body in ("{", "[1]", "", "NaN"):
        answer = post(server, body)
        assert answer.status_code == 422
        assert re.fullmatch(r"body[^\n]*: [^\n]+", answer.json()["detail"])
    assert post(server, b" " * ((16 << 20) + 1)).status_code == 413
    assert post(server, json.dumps(GOOD)).status_code == 200


def test_the_load_test_counts_answers(server, exported):
    program = [sys.executable, str(SERVE / "load_test.py"), str(exported), f"--url={server}"]
    for flags, loop in (([], "closed"), (["--rate=200"], "open")):
        flags = [*flags, "--requests=40", "--seconds=600", "--clients=3"]
        finished = subprocess.run([*program, *flags], capture_output=True, text=True, timeout=900)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        numbers = r"p50 [\d.]+ ms, p99 [\d.]+ ms, [\d.]+ requests a second"
        line = rf"{loop}-loop, 3 clients: {numbers}, 0 errors of 40 requests\n"
        assert re.fullmatch(line, finished.stdout)


_ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
import server
server.open_ranker(server.Path(sys.argv[2]))
assert not [name for name in sys.modules if name.startswith(("kd_ranker", "jax", "flax"))]
"""


def test_the_server_needs_nothing_of_this_project(exported, tmp_path):
    program = [sys.executable, "-c", _ALONE, str(SERVE), str(exported)]
    finished = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr
