#!/usr/bin/env bash
# Tests several processes that train as one, on this machine: 2 and 4 of them, which are killed and
# resumed by others. The suite has the shortest of these tests. Arguments go to pytest:
#
#   ./scripts/test_processes.sh
#   ./scripts/test_processes.sh -k sweep
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh

export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
exec .venv/bin/python -m pytest -n 0 -m "" tests/training/test_processes.py "$@"
