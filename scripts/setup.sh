#!/usr/bin/env bash
# Makes .venv with the pinned dependencies; does nothing where it is up to date.
#
#   ./scripts/setup.sh                      # for the CPU
#   EXTRAS=cuda ./scripts/setup.sh          # with an accelerator's packages: cuda, cuda13 or tpu
#   PYTHON=python3.13 ./scripts/setup.sh    # with another Python than python3
#
# A later call that names no EXTRAS and no PYTHON keeps those of the environment that is there.
# A .venv that this script did not make is replaced.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/venv.sh

fail() {
  say "$*"
  exit 1
}

recorded() {
  if [ -f "$1" ]; then cat "$1"; fi
}

venv=.venv
stamp=$venv/.setup-stamp        # checksum of what was installed; there only after a success
extras_file=$venv/.setup-extras # the extras that were asked for
made_for=$venv/.setup-made-for  # "version folder": its Python, and where it was made

extras=${1:-${EXTRAS:-$(recorded "$extras_file")}}
# pip only warns of an extra that does not exist.
case $extras in
  "" | cuda | cuda13 | tpu) ;;
  *) fail "EXTRAS is '$extras'; it can be cuda, cuda13 or tpu" ;;
esac

python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ "$(recorded "$made_for" | cut -d' ' -f2-)" = "$PWD" ] &&
  "$venv/bin/python" -c '' 2>/dev/null; then
  python=$venv/bin/python
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
  fail "cannot run '$python'; name a Python 3.11 or newer: PYTHON=/path/to/python $0"

# A change in any of this means another installation.
want=$({ printf '%s\n' "$PWD" "$version" "$extras" && cat pyproject.toml constraints.txt; } | cksum)
if [ "$(recorded "$stamp")" = "$want" ]; then
  exit 0
fi
case $version in
  2.* | 3.[0-9] | 3.10)
    fail "'$python' is Python $version; 3.11 or newer is needed: PYTHON=/path/to/python $0" ;;
esac

rm -f "$stamp"
# An environment of another Python does not fit, and one that was moved or copied does not work.
if [ "$(recorded "$made_for")" != "$version $PWD" ]; then
  say "making $venv with Python $version"
  rm -rf "$venv"
  "$python" -m venv "$venv" || fail "could not make $venv with '$python'"
  printf '%s\n' "$version $PWD" >"$made_for"
fi

packages=dev${extras:+,$extras}
say "installing .[$packages] into $venv"
install_packages "$venv/bin/python" constraints.txt --editable ".[$packages]" ||
  fail "the installation failed; what is printed above says why"

printf '%s\n' "$extras" >"$extras_file"
printf '%s\n' "$want" >"$stamp"
say "$venv is ready, after $SECONDS s"
