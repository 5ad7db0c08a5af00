"""How the scripts install: by uv, or by pip where uv cannot be had or must not be used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A Python that writes down how it is called and installs nothing. $FAILS holds what fails, as the
# beginning of the arguments; the settings of pip are the real ones.
PYTHON = f"""#!/usr/bin/env bash
if [ "$*" = "-m pip config list" ]; then
  exec {sys.executable} -m pip config list
fi
echo "$*" >>"$CALLS"
[ -z "$FAILS" ] || [[ "$*" != $FAILS ]]
"""
UV = "-m pip install --quiet --disable-pip-version-check --constraint pins.txt uv"
BY_UV = "-m uv pip install --python {python} --constraint pins.txt --editable .[dev]"
BY_PIP = "-m pip install --disable-pip-version-check --constraint pins.txt --editable .[dev]"


@pytest.fixture
def install(tmp_path):
    """Calls `install_packages`: its exit code, what it called, and what it printed."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def call(fails="", settings="", **variables):
        calls = tmp_path / "calls"
        calls.write_text("")
        config = tmp_path / "pip.conf"
        config.write_text(settings)
        # Without the settings of this machine.
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PIP_")
        }
        environment |= {"CALLS": str(calls), "FAILS": fails, "PIP_CONFIG_FILE": str(config)}
        script = f". scripts/venv.sh; install_packages {python} pins.txt --editable '.[dev]'"
        finished = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=ROOT,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=600,
        )
        called = calls.read_text().replace(str(python), "{python}").splitlines()
        if "-m uv --version" in called:
            called.remove("-m uv --version")
        return finished.returncode, called, finished.stderr

    return call


def test_uv_installs_with_the_pins(install):
    code, called, printed = install()
    assert (code, called) == (0, [UV, BY_UV])
    assert "installs" in printed


def test_pip_installs_where_uv_cannot_be_had(install):
    code, called, printed = install(fails="*constraint pins.txt uv")
    assert (code, called) == (0, [UV, BY_PIP])
    assert "because uv cannot be installed; this takes minutes" in printed


def test_pip_installs_where_uv_fails(install):
    code, called, printed = install(fails="-m uv pip*")
    assert (code, called) == (0, [UV, BY_UV, BY_PIP])
    assert "because uv failed" in printed


def test_a_failure_of_pip_is_one_of_the_script(install):
    code, called, _ = install(fails="*install*")
    assert code != 0
    assert called == [UV, BY_PIP]


SOURCES = [
    {"PIP_INDEX_URL": "https://packages.example/simple"},
    {"PIP_EXTRA_INDEX_URL": "https://packages.example/simple"},
    {"PIP_NO_INDEX": "1"},
    {"PIP_PROXY": "http://proxy.example:3128"},
    {"settings": "[global]\nindex-url = https://packages.example/simple\n"},
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: next(iter(source)))
def test_an_index_or_a_proxy_of_pip_is_used_and_uv_is_not(install, source):
    code, called, printed = install(**source)
    assert (code, called) == (0, [BY_PIP])
    assert "its settings name an index or a proxy" in printed


def test_further_places_of_pip_do_not_keep_uv_from_installing(install):
    assert install(PIP_FIND_LINKS="/wheels")[1] == [UV, BY_UV]
