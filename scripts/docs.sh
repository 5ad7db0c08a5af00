#!/usr/bin/env bash
# Builds the docs site into site/, which opens from disk; a warning is an error. Arguments go to
# mkdocs, whose command is `build` without any:
#
#   ./scripts/docs.sh
#   ./scripts/docs.sh serve
#
# The examples are executed, which takes minutes, where they or the package have changed since the
# last time; with DOCS_EXECUTE=false they are shown without what they print and draw.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

. scripts/venv.sh
make_venv .venv-docs "${PYTHON:-python3}" constraints-docs.txt docs

# mkdocs keeps what an example printed for as long as its own text is the same.
export DOCS_EXAMPLES=$root/.cache/examples
want=$(find kd_ranker -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 cat constraints.txt | cksum)
if [ "$(cat "$DOCS_EXAMPLES/made-of" 2>/dev/null)" != "$want" ]; then
  rm -rf "$DOCS_EXAMPLES"
  mkdir -p "$DOCS_EXAMPLES"
  echo "$want" >"$DOCS_EXAMPLES/made-of"
fi

# In a folder of their own, with a kernel as it is where nobody has configured one.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export IPYTHONDIR=$work/.ipython
mkdir -p "$IPYTHONDIR/profile_default"
# Its warning is of connections without encryption, which do not leave the machine.
echo 'c.IPKernelApp.log_level = "ERROR"' >"$IPYTHONDIR/profile_default/ipython_kernel_config.py"
export PYTHONWARNINGS='ignore:IProgress not found' # progress bars are texts here
export NO_MKDOCS_2_WARNING=1
[ $# -gt 0 ] || set -- build --quiet
command=$1
shift
(cd "$work" && PATH=$root/.venv-docs/bin:$PATH mkdocs "$command" -f "$root/mkdocs.yml" "$@")
if [ "$command" = build ]; then
  echo "docs: site/index.html" >&2
fi
