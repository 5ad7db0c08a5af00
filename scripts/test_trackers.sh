#!/usr/bin/env bash
# Tests what MLflow and Weights & Biases keep of a run, MLflow in a file and W&B offline. They come into
# .venv-trackers, beside the pinned dependencies. 1.5 GB. Arguments go to pytest:
#
#   ./scripts/test_trackers.sh
#   ./scripts/test_trackers.sh -k mlflow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/venv.sh
make_venv .venv-trackers "${PYTHON:-python3}" constraints-trackers.txt dev,mlflow,wandb

export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
exec .venv-trackers/bin/python -m pytest -n 0 tests/tracking "$@"
