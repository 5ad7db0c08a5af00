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
python=${PYTHON:-python3.11}
if [ ! -d "$venv" ] && ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
  echo "test_compilers: '$python' is no Python 3.11; name one: PYTHON=/path/to/python $0" >&2
  exit 1
fi
. scripts/venv.sh
make_venv "$venv" "$python" constraints-compilers.txt dev -r constraints-compilers.txt

if [ "${1:-}" = --setup ]; then
  exit 0
fi

export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
exec "$venv/bin/python" -m pytest -n 0 tests/compilers "$@"
