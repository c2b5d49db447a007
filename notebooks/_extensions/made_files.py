"""Files for programs beside the pages: ``llms.txt``, a list of all pages, and ``status.json``, what unravels."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sphinx.util import logging

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_LOGGER = logging.getLogger(__name__)
_SUMMARY = (
    "Python library on PyTorch: unravels a trained residual network, such as a ResNet or a transformer, into its 2^n "
    "paths, deletes and reorders blocks, and splits gradient and prediction exactly by path length."
)


def _write_files(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    titles = {name: title.astext() for name, title in sorted(app.env.titles.items())}
    pages = [f"- [{title}]({name}.html)" for name, title in titles.items() if name != "index"]
    text = "\n".join([f"# {app.config.project}", "", f"> {_SUMMARY}", "", "## Pages", "", *pages, ""])
    Path(app.outdir, "llms.txt").write_text(text, encoding="utf-8")
    status = {"version": app.config.release, "networks": _networks(Path(app.confdir).parent / "data")}
    Path(app.outdir, "status.json").write_text(json.dumps(status, indent=1), encoding="utf-8")
    _LOGGER.info("wrote llms.txt and status.json")


def _networks(data: Path) -> list[dict[str, object]]:
    with (data / "architectures.csv").open(encoding="utf-8") as lines:
        return [
            {
                "library": row["library"],
                "architecture": row["architecture"],
                "unravels": not row["reason"],
                "blocks": int(float(row["blocks"])) if row["blocks"] else None,
                "paths": row["paths"] or None,
                "reason": row["reason"] or None,
            }
            for row in csv.DictReader(lines)
        ]


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the files after the pages."""
    app.connect("build-finished", _write_files)
    return {"parallel_read_safe": True}
