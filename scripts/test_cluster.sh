#!/usr/bin/env bash
# Tests what runs on several machines, here on several workers of one: Spark, which reads a log. It
# comes into .venv-cluster, beside the pinned dependencies; Java 17 has to be there (Debian's
# default-jre-headless, which this installs where it may). 2 GB. Arguments go to pytest:
#
#   ./scripts/test_cluster.sh
#   PYTHON=python3.13 ./scripts/test_cluster.sh -k duckdb
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v java >/dev/null; then
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || {
    echo "test_cluster: there is no Java; install version 17 or newer" >&2
    exit 1
  }
  apt-get install --quiet --yes default-jre-headless
fi

venv=.venv-cluster
stamp=$venv/.setup-stamp # checksum of what was installed; there only after a success
want=$({ printf '%s\n' "$PWD" && cat pyproject.toml constraints.txt constraints-cluster.txt; } | cksum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
  echo "test_cluster: installing into $venv" >&2
  rm -rf "$venv"
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -c constraints.txt -c constraints-cluster.txt -e '.[dev,spark]'
  echo "$want" >"$stamp"
fi

export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
exec "$venv/bin/python" -m pytest -n 0 tests/cluster "$@"
