"""`report.html`: everything of a report in one file that needs no network."""

from collections.abc import Sequence
from typing import NamedTuple

import vl_convert
from markupsafe import Markup

from kd_ranker.report.answer import Answer
from kd_ranker.report.charts import page_panels
from kd_ranker.report.figures import Figure
from kd_ranker.report.study import Study
from kd_ranker.report.tables import Table
from kd_ranker.requests.templates import templates_of

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
    panels = {
        (section.study.dataset, figure.name): [Markup(panel) for panel in page_panels(figure)]
        for section in sections
        for figure in section.figures
        if len(figure.data)
    }
    template = templates_of("kd_ranker.report").get_template("page.html")
    return template.render(
        sections=sections, panels=panels, vega=Markup(vl_convert.javascript_bundle(_GLOBALS))
    )
