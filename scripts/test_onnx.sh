#!/usr/bin/env bash
# Tests exports as ONNX, in ONNX Runtime, and the server in examples/serve. What they need comes into
# .venv-onnx, beside the pinned dependencies. 2 GB. Arguments go to pytest:
#
#   ./scripts/test_onnx.sh
#   PYTHON=python3.13 ./scripts/test_onnx.sh -k student
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/venv.sh
make_venv .venv-onnx "${PYTHON:-python3}" constraints-onnx.txt dev,onnx,serve

export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
exec .venv-onnx/bin/python -m pytest -n 0 tests/serving tests/pipeline/test_exporting.py "$@"
