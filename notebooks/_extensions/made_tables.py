"""Pages that are made from the project's files: the table of architectures, and the options of the command line."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import typer.cli
import typer.main
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from resnet_paths.reproduce.cli import app as command_line

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_COLUMNS = ("architecture", "blocks", "paths", "skips", "max_difference", "seconds", "reason")
_MOST_DIGITS = 12  # a longer number of paths is written as a power of ten


class Architectures(SphinxDirective):
    """One table per library of ``data/architectures.csv``."""

    def run(self) -> list[nodes.Node]:
        """The content of the page."""
        path = Path(self.env.app.confdir).parent / "data" / "architectures.csv"
        self.env.note_dependency(str(path))
        with path.open(encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        text = []
        for library in dict.fromkeys(row["library"] for row in rows):
            text += [f"### {library}", "", f"| {' | '.join(_COLUMNS)} |".replace("_", " ")]
            text += [f"|{' --- |' * len(_COLUMNS)}"]
            text += [f"| {' | '.join(map(_cell, _values(row)))} |" for row in rows if row["library"] == library] + [""]
        return self.parse_text_to_nodes("\n".join(text), allow_section_headings=True)


def _values(row: dict[str, str]) -> list[str]:
    paths = row["paths"]
    if len(paths) > _MOST_DIGITS:
        paths = f"{paths[0]}.{paths[1]}e{len(paths) - 1}"
    return [row[name] if name != "paths" else paths for name in _COLUMNS]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_").split())


class CommandLine(SphinxDirective):
    """Commands, arguments and options, as ``resnet-paths COMMAND --help`` prints them."""

    def run(self) -> list[nodes.Node]:
        """The content of the page."""
        command = typer.main.get_command(command_line)
        context = typer.Context(command, info_name="resnet-paths")
        text = typer.cli.get_docs_for_click(obj=command, ctx=context, name="resnet-paths")
        return self.parse_text_to_nodes(text.split("\n", 1)[1], allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("architectures", Architectures)
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True}
