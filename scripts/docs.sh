#!/usr/bin/env bash
# Builds the docs site into site/, which opens from disk; a warning is an error. Arguments go to
# mkdocs, whose command is `build` without any:
#
#   ./scripts/docs.sh
#   ./scripts/docs.sh serve
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/venv.sh
make_venv .venv-docs "${PYTHON:-python3}" constraints-docs.txt docs

[ $# -gt 0 ] || set -- build --quiet
export NO_MKDOCS_2_WARNING=1
PATH=$PWD/.venv-docs/bin:$PATH .venv-docs/bin/mkdocs "$@"
if [ "$1" = build ]; then
  echo "docs: site/index.html" >&2
fi
