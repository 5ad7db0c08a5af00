#!/usr/bin/env bash
# Train each cohort of a sweep in its own task of a job array, and join them in a job after it:
#
#   examples/launch/slurm_array.sh --config=configs/sweeps/cascade.py --workdir=/shared/runs/weights \
#       --config.sweep.cohort_size=4 -- --gpus-per-node=1 --time=4:00:00
#
# The flags before -- are those of experiments.sweep; the rest goes to sbatch, for the tasks and for
# the join. This machine assigns runs to cohorts of sweep.cohort_size, and so determines the number of
# tasks; it needs no accelerator. A task that is queued again, also on another node, resumes from its
# last checkpoint. If a task has failed, the join names its cohort and changes nothing: call this
# again with the same flags; finished cohorts are not trained again.
set -euo pipefail

job=$(dirname "${BASH_SOURCE[0]}")/slurm.sh
flags=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  flags+=("$1")
  shift
done
resources=("${@:2}")
for tool in sbatch .venv/bin/python; do
  if ! command -v "$tool" >/dev/null; then
    echo "slurm_array.sh: there is no $tool in $PWD; call this in the checkout, after" \
      "./scripts/setup.sh, where jobs are submitted" >&2
    exit 2
  fi
done

told=$(.venv/bin/python -m experiments.sweep "${flags[@]}" --config.sweep.part=plan)
printf '%s\n' "$told"
numbers=$(sed -n 's/^numbers: //p' <<<"$told")
array=$(sbatch --parsable --array="$numbers" "${resources[@]}" "$job" sweep "${flags[@]}")
join=$(sbatch --parsable --dependency="afterany:${array%%;*}" "${resources[@]}" "$job" sweep \
  "${flags[@]}" --config.sweep.part=join)
echo "submitted: array ${array%%;*} of cohorts $numbers, then join ${join%%;*}"
