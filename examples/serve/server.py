"""Serves an export over HTTP: a folder that `experiments.export` wrote, by ONNX Runtime.

    python server.py exported/student --port 8000 --workers 2

`POST /rank` takes a request as JSON, with the fields that `GET /health` names, and answers with its
candidates, the best first. All that is needed is in the folder; kd_ranker is not.
"""

import argparse
import gc
import json
import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel

MOST_CANDIDATES = 2000
MOST_BYTES = 16 << 20
UNKNOWN = -1  # the id of a user or an item that training has not met, and of no category

NUMPY_TYPES = {"F32": np.float32, "I32": np.int32}
# Of what JSON knows, what a type can hold, in NumPy's letters.
KINDS = {"float32": "iuf", "int32": "iu", "bool": "b"}


Tables = dict[str, onnxruntime.OrtValue]


class Ranker(NamedTuple):
    """The programs of an export, and what they take.

    Attributes:
      described: what `export.json` says.
      sessions: the programs of a request, in their order.
      tables: the arrays that lie in the folder.
      fields: shape and dtype of those that a request brings.
      sizes: field of ids -> the number of ids that there are.
    """

    described: dict[str, Any]
    sessions: list[onnxruntime.InferenceSession]
    tables: Tables
    fields: dict[str, Any]
    sizes: dict[str, int]


class Ranked(BaseModel):
    """The answer: columns with an entry a candidate, the best first."""

    item_id: list[int]
    value: list[float]
    probability: dict[str, list[float]]


def open_ranker(folder: Path) -> Ranker:
    """Opens an export; raises OSError, or ValueError if it holds no ONNX."""
    described = json.loads((folder / "export.json").read_text())
    if "onnx" not in described["formats"]:
        raise ValueError(f"{folder} holds no ONNX; export with --formats=onnx")
    tables = read_tables(folder / "tables.safetensors")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # a process a core does more than threads over so little work
    sessions = []
    fields = {}
    known = set(tables)  # and the results of the programs so far
    for name, program in described["programs"].items():
        if name == "item":
            continue
        sessions.append(onnxruntime.InferenceSession(folder / f"{name}.onnx", options))
        fields |= {field: entry for field, entry in program["inputs"].items() if field not in known}
        known |= set(program["outputs"])
    return Ranker(described, sessions, tables, fields, sizes_of(described, tables))


def read_tables(path: Path) -> Tables:
    """Map the tables by name; they stay in the file, so all processes share what was read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    content = np.memmap(path, mode="r", offset=8 + length)

    tables = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        array = content[start:stop].view(NUMPY_TYPES[entry["dtype"]]).reshape(entry["shape"])
        tables[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return tables


def sizes_of(described: dict[str, Any], tables: Tables) -> dict[str, int]:
    """Return the number of ids of each field of ids, without those of hashed tables."""
    features = described["features"]
    items = features["num_items"]
    if "item_embedding" in tables:  # with new items, maybe; its last row is that of unknown ones
        items = tables["item_embedding"].shape()[0] - 1
    categories = sum(category["size"] for category in features["categories"])
    sizes = {
        "user_id": ("user_table", features["num_users"]),
        "item_id": ("item_table", items),
        "history_id": ("item_table", items),
        "request_category": ("category_table", categories),
        "candidate_category": ("category_table", categories),
    }
    hashed = described["hashed_tables"]
    return {field: size for field, (table, size) in sizes.items() if table not in hashed}


def read_request(ranker: Ranker, request: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the fields of a request as arrays; HTTPException has a line that names the fault."""
    if missing := [name for name in ranker.fields if name not in request]:
        raise HTTPException(422, f"missing: {', '.join(missing)}")
    candidates = len(request["item_id"]) if isinstance(request["item_id"], list) else 0
    if not 1 <= candidates <= MOST_CANDIDATES:
        raise HTTPException(422, f"item_id: a list of 1 to {MOST_CANDIDATES} candidates expected")
    arrays = {}
    for name, field in ranker.fields.items():
        shape = [candidates if size == "candidates" else size for size in field["shape"][1:]]
        try:
            arrays[name] = read_field(request[name], shape, field["dtype"], ranker.sizes.get(name))
        except ValueError as error:
            raise HTTPException(422, f"{name}: {error}") from error
    return arrays


def read_field(value: Any, shape: list[int], dtype: str, size: int | None) -> np.ndarray:
    """Return a field as an array with an axis of one request; ValueError if it cannot be one."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError("lists of different lengths") from error
    if array.dtype.kind not in KINDS[dtype]:
        raise ValueError(f"something in it is no {dtype}")
    if list(array.shape) != shape:
        raise ValueError(f"shape {shape} expected, found {list(array.shape)}")
    if dtype == "int32":
        low = UNKNOWN
        high = (size or 2**31) - 1
        if not low <= array.min() <= array.max() <= high:
            raise ValueError(f"ids from {low} to {high} expected")
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    if not np.isfinite(array).all():
        raise ValueError("finite numbers expected")
    return array[None]


def rank(ranker: Ranker, fields: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities [N, T] and values [N] of the candidates of a request."""
    arrays = dict(ranker.tables)
    for name, array in fields.items():
        arrays[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    for session in ranker.sessions:
        inputs = {entry.name: arrays[entry.name] for entry in session.get_inputs()}
        outputs = [entry.name for entry in session.get_outputs()]
        arrays |= zip(outputs, session.run_with_ort_values(outputs, inputs), strict=True)
    return arrays["probability"].numpy()[0], arrays["value"].numpy()[0]


def make_app() -> FastAPI:
    """Build the application that serves the export at `EXPORT`."""
    ranker = open_ranker(Path(os.environ["EXPORT"]))
    tasks = ranker.described["tasks"]
    gc.freeze()  # the collections after each request's lists skip the objects made so far
    app = FastAPI(title="kd_ranker", max_body_size=MOST_BYTES)

    @app.exception_handler(RequestValidationError)
    async def in_a_line(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return JSONResponse({"detail": f"{place}: {first['msg']}"}, status_code=422)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        about = {name: ranker.described[name] for name in ("role", "run", "serve")}
        fields = {
            name: {"shape": field["shape"][1:], "dtype": field["dtype"]}
            for name, field in ranker.fields.items()
        }
        return {"status": "ok", **about, "tasks": tasks, "fields": fields}

    # Not in a thread: there is a process a core, and each has a core's work in one request.
    @app.post("/rank")
    async def rank_candidates(
        request: dict[str, Any], passed: Annotated[int, Query(ge=1)] = MOST_CANDIDATES
    ) -> Ranked:
        fields = read_request(ranker, request)
        probability, value = rank(ranker, fields)
        best = np.argsort(-value, kind="stable")[:passed]
        columns = probability[best].T.tolist()
        return Ranked(
            item_id=fields["item_id"][0, best].tolist(),
            value=value[best].tolist(),
            probability=dict(zip(tasks, columns, strict=True)),
        )

    return app


def main() -> None:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, help="a folder that experiments.export wrote")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--workers", type=int, default=1, help="processes, as many as cores at best"
    )
    arguments = parser.parse_args()
    try:
        open_ranker(arguments.export)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    os.environ["EXPORT"] = str(arguments.export)
    uvicorn.run(
        "server:make_app",
        factory=True,
        app_dir=str(Path(__file__).parent),
        host=arguments.host,
        port=arguments.port,
        workers=arguments.workers,
        access_log=False,
    )


if __name__ == "__main__":
    main()
