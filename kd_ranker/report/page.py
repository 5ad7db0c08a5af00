"""`report.html`: everything of a report in one file that needs no network."""

from collections.abc import Sequence
from typing import NamedTuple

import jinja2
import vl_convert
from markupsafe import Markup

from kd_ranker.report.answer import Answer
from kd_ranker.report.charts import page_panels
from kd_ranker.report.figures import Figure
from kd_ranker.report.study import Study
from kd_ranker.report.tables import Table

# What page.js needs of the bundle.
_GLOBALS = "window.vegaEmbed = vegaEmbed;"


class Section(NamedTuple):
    """The part of the page about one dataset."""

    study: Study
    answer: Answer
    figures: list[Figure]
    claims: Table
    tables: list[Table]


def page(sections: Sequence[Section]) -> str:
    """The page's HTML: Vega once, the figures' data, styles and scripts all within."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("kd_ranker.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    panels = {
        (section.study.dataset, figure.name): [Markup(panel) for panel in page_panels(figure)]
        for section in sections
        for figure in section.figures
        if len(figure.data)
    }
    return templates.get_template("page.html").render(
        sections=sections, panels=panels, vega=Markup(vl_convert.javascript_bundle(_GLOBALS))
    )
