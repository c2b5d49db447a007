"""Notebooks with their outputs: the copies that ``resnet-paths reproduce`` has executed, where there are any."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_NOT_EXECUTED = {
    "cell_type": "markdown",
    "id": "not-executed",
    "metadata": {},
    "source": "> Outputs are shown here if `resnet-paths reproduce` is run before the documentation is built.",
}
# Cells that `resnet-paths reproduce` adds: parameters, of this machine; claims, of which the values are shown.
_HIDDEN = {"# Set by resnet-paths reproduce": "remove-cell", "# Added by resnet-paths reproduce": "remove-input"}


def _show_executed(app: Sphinx, name: str, source: list[str]) -> None:
    """Replace the source of a notebook by its executed copy; without one, say so above it."""
    if Path(app.env.doc2path(name)).suffix != ".ipynb":
        return
    executed = _executed_copy(app, name)
    app.env.note_dependency(str(executed))
    notebook = json.loads(executed.read_text(encoding="utf-8") if executed.is_file() else source[0])
    if executed.is_file():
        for cell in notebook["cells"]:
            hidden = next((tag for start, tag in _HIDDEN.items() if "".join(cell["source"]).startswith(start)), None)
            cell["metadata"].setdefault("tags", []).extend([hidden] if hidden else [])
    else:
        notebook["cells"].insert(1, _NOT_EXECUTED)
    source[0] = json.dumps(notebook)


def _executed_copy(app: Sphinx, name: str) -> Path:
    return Path(app.confdir).parent / "figures" / "notebooks" / f"{name}.ipynb"


class NotebookGallery(SphinxDirective):
    """One card per notebook: its first figure, if `resnet-paths reproduce` has been run, and its question."""

    def run(self) -> list[nodes.Node]:
        """The cards as HTML."""
        folder = Path(self.env.app.confdir)
        cards = [self._card(path) for path in sorted(folder.glob("*.ipynb"))]
        return [nodes.raw("", f'<div class="cards">{"".join(cards)}</div>', format="html")]

    def _card(self, path: Path) -> str:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        question = "".join(cells[0]["source"]).splitlines()[0].lstrip("# ")
        figures = sorted((path.parents[1] / "figures").glob(f"{path.stem[:3]}*.png"))
        picture = ""
        if figures:
            copies = Path(self.env.app.outdir) / "_images" / "gallery"
            copies.mkdir(parents=True, exist_ok=True)
            chosen = next((figure for figure in figures if figure.stem == path.stem), figures[0])
            shutil.copyfile(chosen, copies / chosen.name)
            picture = f'<img src="_images/gallery/{chosen.name}" alt="" loading="lazy">'
        return f'<a class="card" href="{path.stem}.html">{picture}<b>{path.stem[:2]}</b> {html.escape(question)}</a>'


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the gallery and the replacement of notebooks."""
    app.add_directive("notebook-gallery", NotebookGallery)
    app.connect("source-read", _show_executed)
    return {"parallel_read_safe": True}
