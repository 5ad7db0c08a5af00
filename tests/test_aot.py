"""Compiling ahead of time, on the CPU in place of devices that are not here.

`tests/compilers` has the compilers of TPU and GPU.
"""

import jax
import pytest

from kd_ranker.configs import cascade
from kd_ranker.embedding.row_sharding import RARELY
from kd_ranker.errors import UserError
from scripts.aot import compiled, programs, topologies
from tests import small


def host(devices: int, memory: int = 10**9) -> topologies.Topology:
    return topologies.Topology("host", memory, tuple(jax.devices("cpu")[:devices]), {})


def config_of(tmp_path, **changes):
    config = cascade("small")
    config.data.dir = str(tmp_path / "none")
    config.update_from_flattened_dict({"teacher.source": "logged", **changes})
    return config


@pytest.mark.parametrize("mapping", ["pmap", "shard_map"])
def test_a_program_is_compiled_for_shapes_alone(tmp_path, mapping):
    config = config_of(tmp_path, **{"parallel.mapping": mapping, "student.width": 5})
    sample = programs.sample_of(config, users=1000, items=50_000)
    found = programs.compile_program("train", config, sample, host(2))
    # With Adam, 5 numbers, their 10 slots and the count; a row more for what is unknown, in eights.
    assert found.tables == 4 * 16 * (1008 + 50_008)
    assert found.fits
    assert found.compiled.total > found.tables
    assert 0 < found.compiled.exchanged < found.tables
    tight = programs.compile_program("train", config, sample, host(2, memory=10**6))
    assert not tight.fits
    assert " NO " in programs.findings_table([tight])


@pytest.mark.parametrize("program", ["train", "sweep"])
def test_a_live_teacher_has_the_shapes_of_its_config(tmp_path, program):
    found = {}
    for source in ("logged", "live"):
        config = config_of(tmp_path, **{"teacher.source": source, "sweep.modes": ("shared",)})
        sample = programs.sample_of(config, users=1000, items=50_000)
        found[source] = programs.compile_program(program, config, sample, host(2))
    # A student's rows hold 32 numbers, their 64 slots and the count; the teacher needs no slots.
    rows = {"logged": 97, "live": 97 + 33}
    found_rows = {source: program.tables // (4 * 51_016) for source, program in found.items()}
    assert found_rows == rows


def test_sharded_tables_take_a_share_of_the_memory(tmp_path):
    found = {}
    for tables in ("replicated", "sharded"):
        config = config_of(tmp_path, **{"parallel.tables": tables, "parallel.mapping": "shard_map"})
        sample = programs.sample_of(config, items=100_000)
        found[tables] = programs.compile_program("train", config, sample, host(4))
    whole, share = found["replicated"], found["sharded"]
    assert share.tables < 0.26 * whole.tables
    # Of what the compiler counts, nothing but a share is the table's: none is copied.
    assert share.compiled.total < 0.3 * whole.compiled.total
    assert not share.compiled.copies


def test_what_does_not_exist_is_named_with_what_does():
    flags = ["--config=configs/cascade.py", "--topology=v5e:3x3"]
    finished = small.run("-m", "scripts.compile_for", *flags)
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert "v5e:3x3" in line
    assert "v5e:4x4" in line
    assert "h100:8" in line


def test_a_dataset_that_is_not_there_is_asked_for(tmp_path):
    config = config_of(tmp_path)
    config.data.name = "movielens_1m"
    with pytest.raises(UserError, match="make it with: kd-ranker prepare"):
        programs.sample_of(config)


def test_cycles_count_as_often_as_a_loop_turns():
    text = """
%body (t: (s32[])) -> (s32[]) {
  %g = f32[4] fusion(%t), metadata={op_name="jit(f)/while/body/gather"}, x={"estimated_cycles":"10"}
}

%until (t: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(16)
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[]) while(%p), condition=%until, body=%body, metadata={op_name="jit(f)/while"}
  %r = (s32[]) while(%w), condition=%until, body=%body, metadata={op_name="jit(f)/RARELY/while"}
  %d = f32[4] fusion(%r), metadata={op_name="jit(f)/dot_general"}, x={"estimated_cycles":"7"}
}
"""
    text = text.replace("RARELY", RARELY)
    assert compiled.cycles_of(text) == 16 * 10 + 7
    assert compiled.loops_of(text) == ()
    scattered = text.replace(f"{RARELY}/while", "scatter")
    assert compiled.loops_of(scattered) == ("jit(f)/scatter",)
