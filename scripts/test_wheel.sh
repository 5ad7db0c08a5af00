#!/usr/bin/env bash
# Builds the sdist and from it the wheel, and tries that in an environment and a folder of its own,
# without the clone: what it holds, its commands, and the examples from beginning to end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
./scripts/setup.sh

.venv/bin/python -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || {
  cat "$work/build.log" >&2
  exit 1
}
built=("$work"/dist/*)
echo "test_wheel: built ${built[*]##*/}" >&2
"${PYTHON:-python3}" -m venv "$work/venv"
. scripts/venv.sh
install_packages "$work/venv/bin/python" constraints.txt "$work"/dist/*.whl

mkdir "$work/empty"
cd "$work/empty"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
PATH=$work/venv/bin:$PATH
python -c "import kd_ranker; assert kd_ranker.__file__.startswith('$work/venv'), kd_ranker.__file__"
kd-ranker prepare --config=sweeps/cascade:small
kd-ranker sweep --help --config=cascade >help.txt
grep -q -- --config.train.steps help.txt
# Each in a folder of its own, two at a time.
# shellcheck disable=SC2016 # the inner shell expands it
for example in "$root"/examples/*.py; do
  name=$(basename "$example" .py)
  mkdir "$name"
  echo "$name"
done | xargs -P 2 -I {} sh -c '
  cd {} && echo "test_wheel: examples/{}.py" >&2 && python "$0/examples/{}.py" >log.txt 2>&1 || {
    cat log.txt >&2
    exit 255
  }' "$root"
# What the texts of the examples say is what they print.
for example in quickstart own_log; do
  test -s "$example/runs/$example/report.html"
  grep -q "The final ranker's scores save [0-9]*% of the funnel's compute" "$example/log.txt"
done
echo "test_wheel: the wheel works without the clone" >&2
