"""Notebooks with outputs: those of the copies that ``resnet-paths reproduce`` has executed, or those kept in them."""

from __future__ import annotations

import base64
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
    """Replace the source of a notebook by its executed copy; without one and without outputs, say so above it."""
    if Path(app.env.doc2path(name)).suffix != ".ipynb":
        return
    executed = _executed_copy(app, name)
    app.env.note_dependency(str(executed))
    notebook = json.loads(executed.read_text(encoding="utf-8") if executed.is_file() else source[0])
    is_executed = executed.is_file()
    if is_executed and notebook["metadata"].get("resnet_paths", {}).get("skipped"):
        notebook, is_executed = json.loads(source[0]), False
    if is_executed:
        for cell in notebook["cells"]:
            hidden = next((tag for start, tag in _HIDDEN.items() if "".join(cell["source"]).startswith(start)), None)
            cell["metadata"].setdefault("tags", []).extend([hidden] if hidden else [])
    elif not any(cell.get("outputs") for cell in notebook["cells"]):
        notebook["cells"].insert(1, _NOT_EXECUTED)
    source[0] = json.dumps(notebook)


def _executed_copy(app: Sphinx, name: str) -> Path:
    return Path(app.confdir).parent / "figures" / "notebooks" / f"{name}.ipynb"


class NotebookGallery(SphinxDirective):
    """One card per notebook: its question, and a figure of `resnet-paths reproduce` or the first one kept in it."""

    def run(self) -> list[nodes.Node]:
        """The cards as HTML."""
        folder = Path(self.env.app.confdir)
        cards = [self._card(path) for path in sorted(folder.glob("*.ipynb"))]
        return [nodes.raw("", f'<div class="cards">{"".join(cards)}</div>', format="html")]

    def _card(self, path: Path) -> str:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        question = "".join(cells[0]["source"]).splitlines()[0].lstrip("# ")
        figures = sorted((path.parents[1] / "figures").glob(f"{path.stem[:3]}*.png"))
        outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
        kept = next((data["image/png"] for data in outputs if "image/png" in data), None)
        picture = ""
        if figures or kept:
            copy = Path(self.env.app.outdir) / "_images" / "gallery" / f"{path.stem}.png"
            copy.parent.mkdir(parents=True, exist_ok=True)
            if figures:
                shutil.copyfile(next((figure for figure in figures if figure.stem == path.stem), figures[0]), copy)
            else:
                copy.write_bytes(base64.b64decode("".join(kept)))
            picture = f'<img src="_images/gallery/{copy.name}" alt="" loading="lazy">'
        return f'<a class="card" href="{path.stem}.html">{picture}<b>{path.stem[:2]}</b> {html.escape(question)}</a>'


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the gallery and the replacement of notebooks."""
    app.add_directive("notebook-gallery", NotebookGallery)
    app.connect("source-read", _show_executed)
    return {"parallel_read_safe": True}
