#!/usr/bin/env bash
# Writes constraints.txt anew: the newest releases that pyproject.toml admits, for each Python named.
#
#   ./scripts/pin.sh                                  # python3.11 python3.12 python3.13
#   ./scripts/pin.sh python3.11 /opt/python3.13/bin/python
#
# Name every Python that the project supports: pins of one left out are dropped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pythons=("$@")
[ $# -gt 0 ] || pythons=(python3.11 python3.12 python3.13)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for python in "${pythons[@]}"; do
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  echo "pin: Python $version: a fresh environment" >&2
  "$python" -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install --quiet -e '.[dev]'
  "$work/venv/bin/python" -m pip freeze --exclude-editable >"$work/$version.txt"
  # The accelerators' packages are some GiB, so they are resolved and not installed.
  for extra in cuda cuda13 tpu; do
    "$work/venv/bin/python" -m pip install --quiet --dry-run --report "$work/report" \
      --constraint "$work/$version.txt" ".[$extra]"
    "$work/venv/bin/python" -c '
import json, sys
for package in json.load(open(sys.argv[1]))["install"]:
    if not package["is_direct"]:
        print("{name}=={version}".format(**package["metadata"]))
' "$work/report" >>"$work/$version.txt"
  done
  rm -rf "$work/venv"
done

"${pythons[0]}" - "$work" >"$work/constraints" <<'PYTHON'
"""One line a pin; where Pythons differ, one line for each run of Pythons that agree."""
import pathlib, re, sys

frozen = {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("3.*.txt"), key=lambda p: int(p.stem.split(".")[1])):
    pins = dict(line.split("==") for line in path.read_text().split())
    frozen[path.stem] = {re.sub(r"[-_.]+", "-", name).lower(): pin for name, pin in pins.items()}

pythons = list(frozen)
print("# The releases that the project is installed with, development tools and accelerators included.")
print(f"# Written by scripts/pin.sh for Python {', '.join(pythons)}; not edited by hand.")
for name in sorted(set().union(*frozen.values())):
    pins = [frozen[python].get(name) for python in pythons]
    # A package that only some Pythons need is constrained for all: that installs nothing.
    known = [pin for pin in pins if pin]
    if len(set(known)) == 1:
        print(f"{name}=={known[0]}")
        continue
    start = 0
    for stop in range(1, len(pythons) + 1):
        if stop < len(pythons) and pins[stop] == pins[start]:
            continue
        bounds = []
        if start > 0:
            bounds.append(f'python_version >= "{pythons[start]}"')
        if stop < len(pythons):
            bounds.append(f'python_version < "{pythons[stop]}"')
        if pins[start]:
            print(f"{name}=={pins[start]} ; {' and '.join(bounds)}")
        start = stop
PYTHON
mv "$work/constraints" constraints.txt
echo "pin: wrote constraints.txt with $(grep -c == constraints.txt) pins; now run ./scripts/test.sh with each Python" >&2
