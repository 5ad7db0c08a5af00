# shellcheck shell=bash
# Sourced by scripts that make an environment.

# say TEXT ...: prints a line that begins with the name of the script.
say() {
  echo "$(basename "$0" .sh): $*" >&2
}

# install_packages PYTHON CONSTRAINTS ARGUMENT ...: installs into the environment of a Python, with the arguments of
# `pip install`. uv does it in seconds; pip does it where uv cannot be installed or fails.
#
# uv does not read the settings of pip. Where these name an index or a proxy, only pip installs: uv would
# look for private packages in the public index. Other settings, such as find-links, only add to the
# public index, which has the pinned releases.
install_packages() {
  local python=$1 constraints=$2
  shift 2
  local settings
  settings=$("$python" -m pip config list)
  if [[ $settings =~ \.(index-url|extra-index-url|no-index|proxy)= ]]; then
    say "pip installs, because its settings name an index or a proxy, which uv does not read; this takes minutes"
  elif ! "$python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" uv; then
    say "pip installs, because uv cannot be installed; this takes minutes"
  else
    say "$("$python" -m uv --version) installs"
    # Without the list of all packages at the end.
    if "$python" -m uv pip install --python "$python" --constraint "$constraints" "$@" 2>&1 |
      { grep --line-buffered -v '^ [-+~] ' || true; } >&2; then
      return 0
    fi
    say "pip installs, because uv failed; this takes minutes"
  fi
  # A line for each package, as soon as pip looks at it.
  "$python" -m pip install --disable-pip-version-check --constraint "$constraints" "$@" |
    { grep --line-buffered -E '^(Collecting|Building|Installing) ' || true; } >&2
}

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
  say "making $venv with '$python', for .[$extras]"
  rm -rf "$venv"
  "$python" -m venv "$venv"
  awk -F== 'NR == FNR { own[$1] } NR == FNR || !($1 in own)' "$constraints" constraints.txt \
    >"$venv/constraints.txt"
  install_packages "$venv/bin/python" "$venv/constraints.txt" "$@" -e ".[$extras]"
  echo "$want" >"$stamp"
}
