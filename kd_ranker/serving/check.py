"""Compare the files of this folder with their digests, and run its programs on `example.npz`.

    python check.py [onnx|jax]

It needs NumPy, safetensors, and ONNX Runtime or JAX. Without an argument it uses those of the two
that are installed. `read_tables`, `open_programs` and `rank` are a minimal server. A warning says
where JAX does not guarantee that this release reads the programs. The exit code is 1 if a file has
changed or a number differs by more than the tolerance, and 2 if the programs cannot be run.
"""

import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Arrays = dict[str, Any]
Programs = Mapping[str, Callable[[Arrays], Arrays]]

TOLERANCE = 1e-5
PACKAGES = {"onnx": "onnxruntime", "jax": "jax"}
"""The package that runs the programs, by their format."""


class ExportError(ValueError):
    """The programs cannot be run. The message is one line that names the fault and the remedy."""


def read_tables(folder: Path) -> Arrays:
    """Read the tables by name."""
    return load_file(folder / "tables.safetensors")


def open_programs(folder: Path, runtime: str) -> Programs:
    """Open the programs of an export by name, for the runtime "onnx" or "jax".

    Each maps arrays by name to arrays by name, and ignores those that `export.json` does not list.

    Raises:
      ExportError: this release of JAX cannot read a program.
    """
    export = json.loads((folder / "export.json").read_text())
    open_program = {"onnx": _open_onnx, "jax": _open_jax}[runtime]
    programs = {}
    for name, described in export["programs"].items():
        path = folder / f"{name}.{runtime}"
        programs[name] = open_program(path, described, export.get("jax", {}))
    return programs


def _open_onnx(
    path: Path, described: Mapping[str, Any], writer: Mapping[str, Any]
) -> Callable[[Arrays], Arrays]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    # The converter leaves out inputs without effect.
    input_names = [entry.name for entry in session.get_inputs()]
    output_names = list(described["outputs"])

    def run(arrays: Arrays) -> Arrays:
        inputs = {name: np.asarray(arrays[name]) for name in input_names}
        results = session.run(output_names, inputs)
        return dict(zip(output_names, results, strict=True))

    return run


def _open_jax(
    path: Path, described: Mapping[str, Any], writer: Mapping[str, Any]
) -> Callable[[Arrays], Arrays]:
    import jax
    import jax.export

    try:
        exported = jax.export.deserialize(bytearray(path.read_bytes()))
        exported.mlir_module()  # the first call would read it otherwise
    # JAX raises several types.
    except Exception as error:
        release = writer.get("jax", "")
        remedy = f"the release that wrote it: jax=={release}" if release else "a later release"
        raise ExportError(
            f"{path.name} was written by jax {release or 'of an unknown release'}, and this is jax "
            f"{jax.__version__}, which cannot read it; install {remedy}"
        ) from error
    call = jax.jit(exported.call)

    def run(arrays: Arrays) -> Arrays:
        inputs = {name: np.asarray(arrays[name]) for name in described["inputs"]}
        return {name: np.asarray(result) for name, result in call(inputs).items()}

    return run


def warnings_of_jax(
    writer: Mapping[str, Any], installed: Mapping[str, str], today: datetime.date
) -> list[str]:
    """Return a line for each reason why JAX does not guarantee that it reads the programs.

    Args:
      writer: the entry "jax" of `export.json`; without dates in an older export.
      installed: the releases of "jax" and "jaxlib" here.
      today: the date here.
    """
    lines = []
    wrote = _named(writer)
    older = [name for name in installed if _numbers(installed[name]) < _numbers(writer[name])]
    if older:
        lines.append(
            f"this is {_named(installed)}, older than {wrote}, which wrote the .jax files; JAX "
            "guarantees to read them only if this jaxlib was built at most 3 weeks before that "
            f"one; install jax=={writer['jax']}"
        )
    until = writer.get("readable_until", "")
    if until and today > datetime.date.fromisoformat(until):
        lines.append(
            f"the .jax files were written on {writer['exported']} by {wrote}, and JAX does not "
            f"guarantee that a jaxlib built after {until} reads them; export the ranker again, "
            f"or keep jax=={writer['jax']}"
        )
    return lines


def _named(releases: Mapping[str, Any]) -> str:
    return f"jax {releases['jax']} with jaxlib {releases['jaxlib']}"


def _numbers(release: str) -> list[int]:
    """Return the numbers of a release in their order: [0, 12, 0, 1] for "0.12.0.1"."""
    leading, *_ = re.split(r"[^\d.]", release)
    return [int(number) for number in leading.split(".") if number]


def rank(programs: Programs, arrays: Arrays) -> Arrays:
    """Compute the probabilities and values of candidates, from tables and fields of requests."""
    names = ["rank"] if "rank" in programs else ["user", "score"]
    for name in names:
        arrays = arrays | programs[name](arrays)
    return {name: arrays[name] for name in ("probability", "value")}


def largest_differences(folder: Path, runtime: str) -> dict[str, float]:
    """Return the largest difference from the expected value, by result of the example."""
    programs = open_programs(folder, runtime)
    tables = read_tables(folder)
    with np.load(folder / "example.npz") as example:
        inputs = _with_prefix("in.", example)
        expected = _with_prefix("out.", example)
    results = rank(programs, tables | inputs)
    if "item" in programs:
        results |= programs["item"](tables | _with_prefix("item.", inputs))
    return {name: float(np.abs(results[name] - expected[name]).max()) for name in expected}


def _with_prefix(prefix: str, arrays: Mapping[str, Any]) -> Arrays:
    """Return the arrays whose names start with a prefix, by the rest of the name."""
    return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def changed_files(folder: Path) -> list[str]:
    """Return the files that are missing or have another SHA-256 than in `manifest.json`."""
    path = folder / "manifest.json"
    try:
        listed = json.loads(path.read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"{path} is missing or damaged; copy the whole export again") from error
    return [name for name, (_, sha256) in listed.items() if _sha256(folder / name) != sha256]


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex digits; "" if there is no such file."""
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def choose_runtimes(formats: list[str], named: list[str]) -> list[str]:
    """Return the runtimes that are named, or without a name those that are installed."""
    for name in named:
        if name not in formats:
            raise ExportError(f"this export has no {name!r}; choose from: {', '.join(formats)}")
    installed = [name for name in formats if importlib.util.find_spec(PACKAGES[name])]
    for name in named:
        if name not in installed:
            raise ExportError(f"{PACKAGES[name]} is not installed; it runs the format {name}")
    if not installed:
        packages = " or ".join(PACKAGES[name] for name in formats)
        raise ExportError(f"{packages} is not installed; install it to run the programs")
    return named or installed


def check(folder: Path, named: list[str]) -> int:
    """Print a line per fault or result of an export; return 1 if one is wrong, else 0."""
    changed = changed_files(folder)
    for name in changed:
        sys.stdout.write(f"{name}: missing, or changed since it was exported, WRONG\n")
    if changed:
        return 1
    export = json.loads((folder / "export.json").read_text())
    formats = export["formats"]
    runtimes = choose_runtimes(formats, named)
    if "jax" in runtimes:
        installed = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
        today = datetime.datetime.now(datetime.UTC).date()
        for line in warnings_of_jax(export["jax"], installed, today):
            sys.stderr.write(f"warning: {line}\n")
    is_wrong = False
    for runtime in runtimes:
        for name, difference in largest_differences(folder, runtime).items():
            if difference <= TOLERANCE:
                verdict = "ok"
            else:
                verdict = "WRONG"
                is_wrong = True
            sys.stdout.write(f"{runtime} {name}: largest difference {difference:.1e}, {verdict}\n")
    for name in formats:
        if not named and name not in runtimes:
            sys.stdout.write(f"{name}: not run, because {PACKAGES[name]} is not installed\n")
    return 1 if is_wrong else 0


def main(arguments: list[str]) -> int:
    """Check the export in the folder of this file; return the exit code."""
    try:
        return check(Path(__file__).resolve().parent, arguments)
    except ExportError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
