#!/usr/bin/env bash
# Train the cohorts of a sweep on several machines with Ray, from one of them:
#
#   examples/launch/ray.sh --config=configs/sweeps/cascade.py --workdir=/shared/runs/weights \
#       --config.sweep.cohort_size=4 --config.ray.gpus=1 -- machine-2 machine-3
#
# The flags before -- are those of experiments.sweep; the names after it are the other machines, which ssh
# reaches without a password. All machines need the checkout, its environment with the extra `ray`, the
# datasets and the workdir under the same paths. If one is lost, another takes over its cohort, and
# resumes from the last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

flags=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  flags+=("$1")
  shift
done
machines=("${@:2}")
if [ ! -x .venv/bin/ray ]; then
  echo "ray.sh: there is no .venv/bin/ray in $PWD; after ./scripts/setup.sh: .venv/bin/uv pip install" \
    "--python .venv/bin/python -c constraints.txt -c constraints-cluster.txt -e '.[ray]'" >&2
  exit 2
fi

stop() {
  for machine in "${machines[@]}"; do
    ssh "$machine" "$PWD/.venv/bin/ray stop" || true
  done
  .venv/bin/ray stop
}
trap stop EXIT

address=$(hostname -i | cut -d' ' -f1):6379
.venv/bin/ray start --head --port=6379
for machine in "${machines[@]}"; do
  ssh "$machine" "$PWD/.venv/bin/ray start --address=$address"
done
.venv/bin/python -m experiments.sweep "${flags[@]}" --config.launcher=ray --config.ray.address="$address"
