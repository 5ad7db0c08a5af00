"""The Jinja environment for files that are written from templates."""

import functools

import jinja2


@functools.cache
def templates_of(package: str, comment: str | None = None) -> jinja2.Environment:
    """Return the Jinja templates in the folder `templates` of a package; each is compiled once.

    Values are escaped in HTML templates, by the suffix of the template's name. A line that contains
    only a tag leaves no output, nor does what follows `comment` in a line. An undefined name is an
    error.
    """
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=jinja2.select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        line_comment_prefix=comment,
        undefined=jinja2.StrictUndefined,
    )
