#!/usr/bin/env bash
# Has the compilers of TPU and H100 go over the project's programs, on any Linux machine. They come
# into .venv-compilers, beside the pinned dependencies, for Python 3.11: what a compiler says depends
# on its release, so there is one of each. 2.5 GB. Arguments go to pytest:
#
#   ./scripts/test_compilers.sh
#   ./scripts/test_compilers.sh -k v5e
#   ./scripts/test_compilers.sh --setup     # only install, for scripts/compile_for.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-compilers
stamp=$venv/.setup-stamp # checksum of what was installed; there only after a success
want=$({ printf '%s\n' "$PWD" && cat pyproject.toml constraints.txt constraints-compilers.txt; } | cksum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
  python=${PYTHON:-python3.11}
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || {
    echo "test_compilers: '$python' is no Python 3.11; name one: PYTHON=/path/to/python $0" >&2
    exit 1
  }
  echo "test_compilers: installing into $venv" >&2
  rm -rf "$venv"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -c constraints.txt -r constraints-compilers.txt -e '.[dev]'
  echo "$want" >"$stamp"
fi
if [ "${1:-}" = --setup ]; then
  exit 0
fi

export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
exec "$venv/bin/python" -m pytest -n 0 tests/compilers "$@"
