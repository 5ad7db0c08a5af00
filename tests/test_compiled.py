"""Compiled programs on disk. Each test has processes of its own, as JAX opens one folder."""

import os
import subprocess
import sys

from kd_ranker.compiled import keep_programs
from tests.faults import fault_of

# Prints how many programs were found on disk and how many were compiled.
COMPILE = """
import sys
import jax
from jax import monitoring
from kd_ranker.compiled import keep_programs

events = []
monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/", 1)[1]))
keep_programs(sys.argv[1])
jax.jit(lambda x: x * 2 + 1)(3.0)
print(events.count("cache_hits"), events.count("cache_misses"))
"""


def compile_in_a_process(folder, **variables):
    environment = dict(os.environ)
    del environment["JAX_COMPILATION_CACHE_DIR"]  # of the tests
    environment |= variables
    command = [sys.executable, "-c", COMPILE, str(folder)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    hits, misses = map(int, finished.stdout.split())
    return hits, misses, finished.stderr


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    first = compile_in_a_process(tmp_path)
    second = compile_in_a_process(tmp_path)

    assert first[0] == 0 < first[1]
    assert second[:2] == (first[1], 0)


def test_auto_keeps_programs_in_the_cache_folder_of_the_user(tmp_path):
    compile_in_a_process("auto", XDG_CACHE_HOME=str(tmp_path))
    assert any((tmp_path / "kd_ranker/programs").iterdir())


def test_auto_leaves_the_folder_that_jax_was_given(tmp_path):
    given = tmp_path / "given"
    compile_in_a_process("auto", XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(given))
    assert not (tmp_path / "kd_ranker").exists()


def test_without_a_folder_for_caches_auto_compiles_with_a_warning(tmp_path):
    file = tmp_path / "file"
    file.touch()
    hits, misses, warning = compile_in_a_process("auto", XDG_CACHE_HOME=str(file))
    assert hits == misses == 0
    assert "or each process compiles its programs again" in warning


def test_a_named_folder_that_cannot_be_written_is_one_line(tmp_path):
    file = tmp_path / "file"
    file.touch()
    line = fault_of(lambda: keep_programs(str(file / "programs")))
    assert line.startswith(f"the folder of compiled programs, {file}/programs, cannot be written: ")
    assert line.endswith("name another in compilation_cache")
