#!/usr/bin/env bash
# Train on several nodes as one, with one process per node that uses all devices of the node:
#
#   sbatch --nodes=4 --gpus-per-node=8 examples/launch/slurm.sh sweep \
#       --config=configs/sweeps/cascade.py --workdir=/shared/runs/weights
#
# The first argument is train, train_teacher or sweep; the rest are its flags. All nodes need the
# checkout, its environment, the datasets and the workdir under the same paths. A job that is stopped
# and queued again resumes from its last checkpoint. A task of a job array trains the cohort of a
# sweep that has its number; slurm_array.sh submits such an array.
#SBATCH --job-name=kd_ranker
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
# Seconds before the end of its time, for a checkpoint.
#SBATCH --signal=TERM@120
set -euo pipefail

case ${1:-} in
  train | train_teacher | sweep) ;;
  *)
    echo "slurm.sh: the first argument is train, train_teacher or sweep, not '${1:-}'" >&2
    exit 2
    ;;
esac
# Slurm runs a copy of this file, in the folder from which it was submitted.
cd "${SLURM_SUBMIT_DIR:-.}"
if [ ! -x .venv/bin/python ]; then
  echo "slurm.sh: there is no .venv in $PWD; submit from the checkout, after ./scripts/setup.sh" >&2
  exit 2
fi
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
# A process that fails ends the others, which would wait for it.
exec srun --kill-on-bad-exit=1 .venv/bin/python -m "experiments.$1" "${@:2}" \
  --config.parallel.processes=True ${SLURM_ARRAY_TASK_ID:+"--config.sweep.part=$SLURM_ARRAY_TASK_ID"}
