#!/usr/bin/env bash
# Makes a release: builds the sdist and the wheel, tries the wheel with each Python in an environment of its own, and
# tags the commit. It publishes nothing.
#
#   ./scripts/release.sh                          # with python3.11, python3.12 and python3.13
#   PYTHONS="python3.11" ./scripts/release.sh     # with some of them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "release: $*" >&2
  exit 1
}

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
tag=v$version
[ -z "$(git status --porcelain)" ] || fail "there are changes that are not committed; commit or remove them"
grep -q "^## \[$version\]$" CHANGELOG.md || fail "CHANGELOG.md has no section [$version]; write one"
grep -q "^version: $version$" CITATION.cff || fail "CITATION.cff has another version than pyproject.toml, $version"
! git rev-parse --quiet --verify "refs/tags/$tag" >/dev/null || fail "the tag $tag exists; raise the version"
read -ra pythons <<<"${PYTHONS:-python3.11 python3.12 python3.13}"
for python in "${pythons[@]}"; do
  command -v "$python" >/dev/null || fail "there is no $python; install it, or name others in PYTHONS"
done

for python in "${pythons[@]}"; do
  echo "release: the wheel with $python" >&2
  PYTHON=$python ./scripts/test_wheel.sh
done
git tag --annotate "$tag" --message "kd_ranker $version"
echo "release: tagged $tag, tried with ${pythons[*]}; push the tag to publish it" >&2
