"""Run the programs of this folder on `example.npz` and compare with its expected results.

    python check.py [onnx|jax]

It needs NumPy, safetensors, and ONNX Runtime or JAX. `read_tables`, `open_programs` and `rank` are
a minimal server. The exit code is 1 if a number differs by more than the tolerance.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Arrays = dict[str, Any]
Programs = Mapping[str, Callable[[Arrays], Arrays]]

TOLERANCE = 1e-5


def read_tables(folder: Path) -> Arrays:
    """Read the tables by name."""
    return load_file(folder / "tables.safetensors")


def open_programs(folder: Path, runtime: str) -> Programs:
    """Open the programs of an export by name, for the runtime "onnx" or "jax".

    Each maps arrays by name to arrays by name, and ignores those that `export.json` does not list.
    """
    described = json.loads((folder / "export.json").read_text())["programs"]
    open_program = {"onnx": _open_onnx, "jax": _open_jax}[runtime]
    return {name: open_program(folder / f"{name}.{runtime}", of) for name, of in described.items()}


def _open_onnx(path: Path, described: Mapping[str, Any]) -> Callable[[Arrays], Arrays]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    # The inputs that the converter has kept.
    inputs, outputs = [of.name for of in session.get_inputs()], list(described["outputs"])

    def run(arrays: Arrays) -> Arrays:
        results = session.run(outputs, {name: np.asarray(arrays[name]) for name in inputs})
        return dict(zip(outputs, results, strict=True))

    return run


def _open_jax(path: Path, described: Mapping[str, Any]) -> Callable[[Arrays], Arrays]:
    import jax

    call = jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)

    def run(arrays: Arrays) -> Arrays:
        inputs = {name: np.asarray(arrays[name]) for name in described["inputs"]}
        return {name: np.asarray(of) for name, of in call(inputs).items()}

    return run


def rank(programs: Programs, arrays: Arrays) -> Arrays:
    """Compute the probabilities and values of the candidates, from tables and fields of requests.

    If the export has a policy, `k` is how many of each request to pass.
    """
    for name in ("rank",) if "rank" in programs else ("user", "score"):
        arrays = arrays | programs[name](arrays)
    return {name: arrays[name] for name in ("probability", "value", "k") if name in arrays}


def largest_differences(folder: Path, runtime: str) -> dict[str, float]:
    """Return the largest difference from the expected value, by result of the example."""
    programs, tables = open_programs(folder, runtime), read_tables(folder)
    with np.load(folder / "example.npz") as example:
        inputs = {name[3:]: example[name] for name in example if name.startswith("in.")}
        expected = {name[4:]: example[name] for name in example if name.startswith("out.")}
    found = rank(programs, tables | inputs)
    if "item" in programs:
        items = {name[5:]: array for name, array in inputs.items() if name.startswith("item.")}
        found |= programs["item"](tables | items)
    return {name: float(np.abs(found[name] - of).max()) for name, of in expected.items()}


def main(arguments: list[str]) -> int:
    """Check the export in the folder of this file; return the exit code."""
    folder = Path(__file__).resolve().parent
    wrong = 0
    for runtime in arguments or json.loads((folder / "export.json").read_text())["formats"]:
        for name, difference in largest_differences(folder, runtime).items():
            verdict = "ok" if difference <= TOLERANCE else "WRONG"
            wrong += verdict != "ok"
            sys.stdout.write(f"{runtime} {name}: largest difference {difference:.1e}, {verdict}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
