#!/usr/bin/env bash
# Tests what runs on several machines, here on one: Spark, which reads a log, Ray, which trains and scores, and a
# server of S3, which keeps workdirs and logs. They come into .venv-cluster, beside the pinned dependencies;
# Java 17 has to be there (Debian's default-jre-headless, which this installs where it may). 2 GB. Arguments go to
# pytest:
#
#   ./scripts/test_cluster.sh
#   PYTHON=python3.13 ./scripts/test_cluster.sh -k duckdb
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v java >/dev/null; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "test_cluster: there is no Java; install version 17 or newer" >&2
    exit 1
  fi
  apt-get install --quiet --yes default-jre-headless
fi

. scripts/venv.sh
make_venv .venv-cluster "${PYTHON:-python3}" constraints-cluster.txt dev,ray,remote,spark 'moto[s3,server]'

export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
exec .venv-cluster/bin/python -m pytest -n 0 tests/cluster "$@"
