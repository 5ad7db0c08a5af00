#!/usr/bin/env bash
# Train on a TPU slice of spot machines, with gcloud. Never run: only its syntax and flags are tested.
#
#   export ZONE=us-west4-a REPOSITORY=https://example.com/kd_ranker.git NFS=10.0.0.2:/share
#   examples/launch/tpu.sh my-slice v5litepod-16 sweep \
#       --config=configs/sweeps/cascade.py --workdir=/shared/runs/weights
#
# The first argument names the slice, the second is its type, the third is train, train_teacher or
# sweep, and the rest are its flags. All hosts of a slice share the workdir and the datasets, on an NFS
# server that is mounted at /shared. On a slice of one host, such as v5litepod-8, leave NFS out and use a
# workdir at gs://. If the slice is preempted, call this again with the same arguments: it requests
# another slice, and the run resumes from its last checkpoint.
set -euo pipefail

name=${1:?the name of the slice is missing}
type=${2:?the type of the slice is missing, such as v5litepod-16}
command=${3:?the command is missing: train, train_teacher or sweep}
flags=("${@:4}")
: "${ZONE:?is the zone of the slice; export it}" "${REPOSITORY:?is a git repository with this project; export it}"
case $type in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  *)
    echo "tpu.sh: the type of the slice is v5litepod-N, v6e-N or v5p-N, not '$type'" >&2
    exit 2
    ;;
esac

on_hosts() { # which hosts (all or a number), and the command for them
  gcloud compute tpus tpu-vm ssh "$name" --zone="$ZONE" --worker="$1" --command="$2"
}

state() {
  gcloud compute tpus queued-resources describe "$name" --zone="$ZONE" --format="value(state.state)"
}

# The request of a preempted slice stays, and blocks its name.
gcloud compute tpus queued-resources delete "$name" --zone="$ZONE" --force --quiet || true
gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$ZONE" \
  --accelerator-type="$type" --runtime-version="$runtime" --spot
until [ "$(state)" = ACTIVE ]; do
  case $(state) in
    FAILED | SUSPENDED)
      echo "tpu.sh: the request of $name is $(state); call this again, or try another zone" >&2
      exit 1
      ;;
  esac
  sleep 60
done

on_hosts all "set -e
  if [ -n '${NFS:-}' ]; then
    sudo apt-get install --quiet --yes nfs-common
    sudo mkdir -p /shared
    sudo mount -t nfs '${NFS:-}' /shared
    sudo chmod a+w /shared
  fi
  sudo apt-get install --quiet --yes python3.11-venv
  git clone --quiet '$REPOSITORY' kd_ranker
  cd kd_ranker
  PYTHON=python3.11 EXTRAS=tpu ./scripts/setup.sh
  .venv/bin/uv pip install --python .venv/bin/python -c constraints.txt -c constraints-cluster.txt -e '.[remote]'"
if [ -n "${NFS:-}" ]; then flags+=(--config.data.dir=/shared/data); fi
of_data=()
for flag in "${flags[@]}"; do
  if [[ $flag == --config* ]]; then of_data+=("$flag"); fi
done
on_hosts 0 "cd kd_ranker && JAX_PLATFORMS=cpu .venv/bin/python -m experiments.prepare_data ${of_data[*]@Q}"
on_hosts all "cd kd_ranker && .venv/bin/python -m experiments.$command ${flags[*]@Q} --config.parallel.processes=True"
gcloud compute tpus queued-resources delete "$name" --zone="$ZONE" --force --quiet
