"""The docs hold: their Python runs, and what they point at exists."""

import importlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from kd_ranker import main
from kd_ranker.batches.samplers import SAMPLERS
from kd_ranker.config import checks, schema
from kd_ranker.config.keys import DATA_KEYS
from kd_ranker.distillation.losses import LOSSES
from kd_ranker.distillation.modes import MODES
from kd_ranker.evaluation.metrics import registry
from kd_ranker.evaluation.metrics.registry import METRICS
from kd_ranker.models.student import STUDENTS
from kd_ranker.models.teacher import TEACHERS
from kd_ranker.sources.registry import SOURCES
from kd_ranker.tracking.registry import TRACKERS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

over_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """(line number, text) of each Python block that is to run, in their order."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start(1)), match[1])
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        if not match[1].startswith("# not run")
    ]


def config_keys() -> tuple[set[str], set[str]]:
    """The keys and sections of all configs, and those of them that hold names of users' own."""
    keys = dict(schema.keys_of(""))
    for source_keys in DATA_KEYS.values():
        keys |= source_keys
    known = set()
    for name in keys:
        parts = name.split(".")
        known |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return known, {name for name, key in keys.items() if key.type is ConfigDict}


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links, as GitHub does it."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def registries() -> Iterator[None]:
    """Takes back what an example has registered, which other tests would meet."""
    with (
        mock.patch.dict(MODES),
        mock.patch.dict(LOSSES),
        mock.patch.dict(SAMPLERS),
        mock.patch.dict(STUDENTS),
        mock.patch.dict(TEACHERS),
        mock.patch.dict(SOURCES),
        mock.patch.dict(METRICS),
        mock.patch.dict(TRACKERS),
        mock.patch.object(registry, "MAIN", [*registry.MAIN]),
        mock.patch.dict(DATA_KEYS),
    ):
        yield


def test_the_parts_that_derive_from_the_code_are_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    for path, text in importlib.import_module("make_docs").pages().items():
        assert path.read_text() == text, "run scripts/make_docs.py"


GENERATED = {"config.md", "columns.md"}


def test_the_front_door_is_short():
    """A reader of the README decides in two screens; a page is one sitting."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    assert len((ROOT / "CHANGELOG.md").read_text().splitlines()) <= 120
    written = [page for page in PAGES[1:] if page.name not in GENERATED]
    texts = {page.name: page.read_text() for page in written}
    without_graphs = [
        re.sub(r"```mermaid.*?```", "", text, flags=re.DOTALL) for text in texts.values()
    ]
    assert sum(len(text.split()) for text in without_graphs) <= 35_000
    # Without the programs of examples, which a formatter spreads over lines.
    prose = {
        name: re.sub(r"^```python.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        for name, text in texts.items()
    }
    assert {name for name, text in prose.items() if text.count("\n") > 250} == set()


def test_extending_and_data_formats_have_blocks_to_run():
    assert {page.name for page in PAGES if python_blocks(page)} >= {
        "extending.md",
        "data_formats.md",
    }


@pytest.mark.parametrize(
    "page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name
)
def test_python_blocks_run_in_order(page, registries, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for line, block in python_blocks(page):
        # The empty lines make a traceback name the line of the page.
        exec(compile("\n" * line + block, str(page), "exec"), names)


def test_the_config_file_that_registers_a_loss_is_one(registries, tmp_path):
    text = (ROOT / "docs/extending.md").read_text()
    file = tmp_path / "my_loss.py"
    file.write_text(
        textwrap.dedent(re.search(r"^( {4}import jax.*?)^[^ \n]", text, re.M | re.S)[1])
    )
    config = main.read_config(f"{file}:small")
    checks.validate(config)
    assert config.distill.loss in LOSSES
    logits = probability = jnp.full((1, 2, 1), 0.5)
    weight = jnp.ones((1, 2, 1))
    assert LOSSES[config.distill.loss].function(logits, probability, weight)[1] == 0


@over_pages
def test_relative_links_and_images_exist(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)|\b(?:src|href)=\"([^\"]+)\"", text)
    missing = []
    for target in map("".join, targets):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            missing.append(target)
    assert not missing


@over_pages
def test_config_keys_exist(page):
    text = page.read_text()
    known, free = config_keys()
    keys = set(re.findall(r"--config\.([a-z_]\w*(?:\.\w+)*)", text))
    # In running text they stand without the flag: `batch.requests`, `teacher.source=live`.
    for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", text):
        if key.split(".")[0] in known and not key.endswith((".py", ".sh")):
            keys.add(key)
    free_prefixes = tuple(f"{name}." for name in free)
    assert not {key for key in keys - known if not key.startswith(free_prefixes)}


@over_pages
def test_commands_and_paths_exist(page):
    text = page.read_text()
    modules = re.findall(r"python -m ([\w.]+)", text)
    paths = [f"{module.replace('.', '/')}.py" for module in modules]
    paths += re.findall(r"\b(?:configs|scripts|kd_ranker|experiments)/[\w/]*\w\.(?:py|sh)", text)
    assert not [path for path in paths if not (ROOT / path).exists()]
