#!/usr/bin/env bash
# Train with several processes on this machine as one: a rehearsal of several hosts.
#
#   examples/launch/processes.sh 2 sweep --config=configs/sweeps/cascade.py:small --workdir=runs/weights
#
# The first argument is the number of processes, the second is train, train_teacher or sweep, and the
# rest are its flags. With NVIDIA GPUs, each process has the GPU of its number. Without processes,
# one command already uses all GPUs. SIGTERM goes to all of them: they save a checkpoint, and the same
# call resumes from it, with any number of processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

number=${1:-}
command=${2:-}
if ! [[ $number =~ ^[1-9][0-9]*$ ]]; then
  echo "processes.sh: the first argument is the number of processes, not '$number'" >&2
  exit 2
fi
case $command in
  train | train_teacher | sweep) ;;
  *)
    echo "processes.sh: the second argument is train, train_teacher or sweep, not '$command'" >&2
    exit 2
    ;;
esac

python=${PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  echo "processes.sh: there is no $python in $PWD; run ./scripts/setup.sh first" >&2
  exit 2
fi

export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-8476} JAX_NUM_PROCESSES=$number
started=()
for ((index = 0; index < number; index++)); do
  CUDA_VISIBLE_DEVICES=$index JAX_PROCESS_ID=$index \
    "$python" -m "experiments.$command" "${@:3}" --config.parallel.processes=True &
  started+=($!)
done
trap 'kill -TERM "${started[@]}" 2>/dev/null || true' TERM INT HUP

# A process that fails ends the others, which would wait for it.
status=0
for process in "${started[@]}"; do
  code=0
  # A signal ends `wait` before the process has ended.
  while wait "$process" || code=$?; kill -0 "$process" 2>/dev/null; do code=0; done
  if [ "$code" != 0 ]; then
    status=$code
    kill -TERM "${started[@]}" 2>/dev/null || true
  fi
done
exit "$status"
