# shellcheck shell=bash
# Sourced by scripts that test in an environment of their own.

# make_venv FOLDER PYTHON CONSTRAINTS EXTRAS [PIP_ARGUMENT ...]: makes the environment with the pinned
# dependencies and those of a further file of constraints, which decides where both pin a package; does
# nothing where it is up to date.
make_venv() {
  local venv=$1 python=$2 constraints=$3 extras=$4
  shift 4
  local stamp=$venv/.setup-stamp # checksum of what was installed; there only after a success
  local want
  want=$({ printf '%s\n' "$PWD" && cat pyproject.toml constraints.txt "$constraints"; } | cksum)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
    return
  fi
  echo "${0##*/}: installing into $venv" >&2
  rm -rf "$venv"
  "$python" -m venv "$venv"
  awk -F== 'NR == FNR { own[$1] } NR == FNR || !($1 in own)' "$constraints" constraints.txt \
    >"$venv/constraints.txt"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -c "$venv/constraints.txt" "$@" -e ".[$extras]"
  echo "$want" >"$stamp"
}
