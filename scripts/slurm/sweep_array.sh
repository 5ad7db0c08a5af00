#!/usr/bin/env bash
# Trains each cohort of a sweep in a task of its own of a job array, and joins them in a job after it:
#
#   scripts/slurm/sweep_array.sh --config=configs/sweeps/cascade.py --workdir=/shared/runs/weights \
#       --config.sweep.group_size=4 -- --gpus-per-node=1 --time=4:00:00
#
# The flags before -- are those of experiments.sweep; what follows goes to sbatch, for the tasks and
# for the join. This machine settles which members each cohort has, from sweep.group_size, and so how
# many tasks there are; it needs no accelerator. A task that is queued again, be it on another node, goes
# on from its own last checkpoint. If one has failed, the join names its cohort and changes nothing:
# call this again, with the same flags; what is done is left alone.
set -euo pipefail

job=$(dirname "${BASH_SOURCE[0]}")/train.sh
flags=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  flags+=("$1")
  shift
done
resources=("${@:2}")
for tool in sbatch .venv/bin/python; do
  if ! command -v "$tool" >/dev/null; then
    echo "sweep_array.sh: there is no $tool in $PWD; call this in the checkout, after" \
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
