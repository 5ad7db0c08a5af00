#!/usr/bin/env bash
# Lint, then types beside tests, as one core would wait while the other checks them; fails if any
# does. Arguments go to pytest:
#
#   ./scripts/test.sh
#   ./scripts/test.sh -n 8                     # with more workers
#   ./scripts/test.sh -n 0 tests/test_batch.py -k masks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
# Tests start many processes, and each would compile all modules again.
unset PYTHONDONTWRITEBYTECODE
python=$PWD/.venv/bin/python

step() {
  echo "test: $*" >&2
  "$python" -m "$@"
}

step ruff format --check .
step ruff check .
echo "test: lint-imports" >&2
.venv/bin/lint-imports --no-logo
echo "test: mypy" >&2
"$python" -m mypy &
types=$!
trap 'kill "$types" 2>/dev/null || true' EXIT
# Each worker begins with one half of the tests, and takes over from the other at the end: the tests
# of a file, which share what its fixtures make, stay together.
step pytest -n 2 --dist worksteal "$@"
wait "$types"
