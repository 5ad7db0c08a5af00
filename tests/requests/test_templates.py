import jinja2
import pytest

from kd_ranker.requests.templates import templates_of


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a template as a page and as plain text."""
    (tmp_path / "filled" / "templates").mkdir(parents=True)
    (tmp_path / "filled" / "__init__.py").touch()
    for name in ("page.html", "README.md"):
        text = "{% for row in rows %}\n  {{ row }}\n{% endfor %}\n"
        (tmp_path / "filled" / "templates" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return "filled"


def test_what_is_filled_into_a_page_alone_is_escaped(package):
    templates = templates_of(package)
    rows = ["a < b", "c"]
    assert templates.get_template("page.html").render(rows=rows) == "  a &lt; b\n  c\n"
    assert templates.get_template("README.md").render(rows=rows) == "  a < b\n  c\n"


def test_a_name_that_is_not_given_is_an_error(package):
    with pytest.raises(jinja2.UndefinedError, match="rows"):
        templates_of(package).get_template("README.md").render()
