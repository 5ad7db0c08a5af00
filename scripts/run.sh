#!/usr/bin/env bash
# The main job: the dataset, a teacher if the log has no scores, a sweep of students, the report.
#
#   ./scripts/run.sh
#   ./scripts/run.sh --config=configs/sweeps/movielens.py --workdir=/data/runs/movielens
#   ./scripts/run.sh --config.train.steps=500
#
# Other arguments are passed on to experiments/run.py. Running it again goes on where it stopped.
# Relative paths are taken from the repository's root.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

config=configs/sweeps/cascade.py
workdir=
passed_on=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      sed -n '2,/^set /{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --config | --workdir)
      if [ $# -lt 2 ]; then
        echo "run: $1 needs a value" >&2
        exit 2
      fi
      set -- "$1=$2" "${@:3}"
      continue
      ;;
    --config=*) config=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    *) passed_on+=("$1") ;;
  esac
  shift
done

if [ -z "$workdir" ]; then
  # configs/sweeps/cascade.py -> runs/cascade; configs/cascade.py:small -> runs/cascade-small
  name=$(basename "${config%%:*}" .py)
  case $config in *:*) name=$name-${config#*:} ;; esac
  workdir=runs/${name//[^A-Za-z0-9._-]/_}
fi
case $workdir in /* | *://*) ;; *) workdir=$root/$workdir ;; esac

./scripts/setup.sh
# Memory in pages of 2 MiB, where glibc allocates it: large tables' rows are found faster.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
exec .venv/bin/python -m experiments.run --config="$config" --workdir="$workdir" \
  ${passed_on[@]+"${passed_on[@]}"}
