"""What these pages need of Sphinx: tables and API pages from the library, and pictures that follow the theme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tables
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective


class FamilyTable(SphinxDirective):
    """``{families}``: the families. ``{parameters}``: which family a parameter has."""

    def run(self) -> list[nodes.Node]:
        table = {"families": tables.table_of_families, "parameters": tables.table_of_parameters}[self.name]
        return self.parse_text_to_nodes(table())


class InlinePictures(SphinxPostTransform):
    """Put an SVG into the page itself: as a file, it would follow the browser's theme and not the page's."""

    default_priority = 5  # before images are collected into _images
    formats = ("html",)

    def run(self, **_: Any) -> None:
        for image in list(self.document.findall(nodes.image)):
            if image["uri"].endswith(".svg"):
                picture = (Path(self.app.srcdir) / image["uri"]).read_text()
                html = f'<div class="picture" role="img" aria-label="{image["alt"]}">{picture}</div>'
                image.replace_self(nodes.raw("", html, format="html"))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("families", FamilyTable)
    app.add_directive("parameters", FamilyTable)
    app.add_post_transform(InlinePictures)
    app.connect("builder-inited", lambda _: tables.write_api())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
