#!/usr/bin/env bash
# Tests the longer forms that the suite leaves out, such as further meshes of devices and kills in a
# sweep. Arguments go to pytest:
#
#   ./scripts/test_long.sh
#   ./scripts/test_long.sh -k mapping
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh

export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
# scripts/test_processes.sh runs those of several processes.
exec .venv/bin/python -m pytest -n 2 --dist worksteal -m long --ignore=tests/training/test_processes.py "$@"
