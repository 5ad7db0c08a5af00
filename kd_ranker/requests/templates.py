"""The way in which files are written from templates."""

import jinja2


def templates_of(package: str) -> jinja2.Environment:
    """The Jinja templates in the folder `templates` of a package.

    What is filled into HTML is escaped, by the ending of the template's name. A line that holds a
    tag alone leaves nothing behind, and a name that is not given is an error.
    """
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=jinja2.select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
