"""C++ functions: compiled once, and done without where that is impossible."""

import logging
from pathlib import Path

import jax
import pytest

from kd_ranker import native
from kd_ranker.embedding import cpu_rows
from kd_ranker.evaluation import cpu_curves

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="JAX computes on another device")
SOURCE = Path(cpu_curves.__file__).with_suffix(".cc")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The cache folder of a user who has no library yet."""
    monkeypatch.setattr(native.platformdirs, "user_cache_path", lambda _: tmp_path)
    return tmp_path / "native"


@pytest.mark.skipif(not cpu_rows.are_available(), reason="there is no C++ compiler")
def test_a_library_is_compiled_once_for_a_user(cache, monkeypatch):
    library = native.library(SOURCE)
    assert list(cache.iterdir()) == [library]
    monkeypatch.setattr(native, "_COMPILERS", ())
    assert native.library(SOURCE) == library


@on_cpu
def test_without_a_compiler_xla_does_it_after_a_warning(cache, monkeypatch, caplog):
    monkeypatch.setattr(native, "_COMPILERS", ("no-such-compiler",))
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert not native.is_available.__wrapped__(SOURCE)
    assert "none of no-such-compiler is installed" in caplog.text
    assert "XLA's slower version is used" in caplog.text


@on_cpu
def test_a_source_that_does_not_compile_leaves_nothing(cache, caplog, tmp_path):
    source = tmp_path / "broken.cc"
    source.write_text("no C++")
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert not native.is_available.__wrapped__(source)
    assert "broken.cc cannot be compiled" in caplog.text
    assert list(cache.iterdir()) == []
