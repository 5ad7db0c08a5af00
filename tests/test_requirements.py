"""The ranges of pyproject.toml, and the pins of constraints.txt."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]
RANGES = {requirement.name: requirement.specifier for requirement in REQUIREMENTS}

NEXT = ["altair 7.0", "duckdb 3.0", "flax 0.13", "grain 0.3", "jax 0.13", "orbax-checkpoint 1.0"]


@pytest.mark.parametrize("release", NEXT)
def test_a_release_that_may_break_the_code_is_out_of_range(release):
    name, version = release.split()
    assert not RANGES[name].contains(f"{version}.0")


def test_every_pin_is_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    of_ranges = [pin for pin in pins if pin.name in RANGES]
    assert len(of_ranges) > 20
    for pin in of_ranges:
        (exact,) = pin.specifier
        assert RANGES[pin.name].contains(exact.version), pin
