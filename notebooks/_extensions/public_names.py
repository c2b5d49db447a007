"""The reference, made from the public names: those of ``resnet_paths/__init__.pyi``, and ``__all__`` of a module."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

_PACKAGE = "resnet_paths"
_LOGGER = logging.getLogger(__name__)


def names_by_module(source: str) -> dict[str, list[str]]:
    """The names that a file imports, by the module that defines them; modules beside the file under ``""``."""
    found: dict[str, list[str]] = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.ImportFrom):
            found.setdefault(statement.module or "", []).extend(alias.name for alias in statement.names)
    return found


def _stub() -> Path:
    return Path(importlib.import_module(_PACKAGE).__file__ or "").with_suffix(".pyi")


class PublicNames(SphinxDirective):
    """Table and documentation of the public names that modules define.

    The arguments are modules whose names are public at top level, such as ``core.edits``, or ``module:NAME`` for a
    module that is public itself: what ``__all__`` has beyond the names at top level is then documented under it.
    """

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Table and descriptions."""
        self.env.note_dependency(str(_stub()))
        by_module = names_by_module(_stub().read_text(encoding="utf-8"))
        top = {name for names in by_module.values() for name in names}
        full: list[str] = []
        shown = self.env.__dict__.setdefault("public_names_shown", {}).setdefault(self.env.docname, set())
        for argument in self.arguments[0].split():
            kind, _, module = argument.rpartition(":")
            if kind:
                names = importlib.import_module(f"{_PACKAGE}.{module}").__all__
                full += [f"{_PACKAGE}.{module}.{name}" for name in names if name not in top]
                shown.add(module.rpartition(".")[2])
            elif module not in by_module:
                _LOGGER.warning("no public name is defined in %s", module, location=self.get_location())
            else:
                full += [f"{_PACKAGE}.{name}" for name in by_module[module]]
                shown.update(by_module[module])
        lines = [".. list-table::", "   :widths: auto", ""]
        for name in full:
            lines += [f"   * - `~{_documented(name)}`", f"     - {_first_line(name)}"]
        lines.append("")
        for name in full:
            lines += [f".. {_directive_of(name)}:: {_documented(name)}", *_options_of(name), ""]
        return self.parse_text_to_nodes("\n".join(lines))


def _object_of(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _directive_of(name: str) -> str:
    value = _object_of(name)
    if inspect.isclass(value):
        return "autoexception" if issubclass(value, BaseException) else "autoclass"
    return "autofunction" if callable(value) else "autodata"


def _first_line(name: str) -> str:
    if _directive_of(name) == "autodata":
        return "Constant."
    return (inspect.getdoc(_object_of(name)) or "").partition("\n")[0]


def _options_of(name: str) -> list[str]:
    kind = _directive_of(name)
    return {"autoclass": ["   :members:"], "autodata": ["   :no-value:"]}.get(kind, [])


def _documented(name: str) -> str:
    """The name under which autodoc finds the documentation of a constant: that of the module that assigns it."""
    module, _, attribute = name.rpartition(".")
    if _directive_of(name) != "autodata":
        return name
    origins = names_by_module(inspect.getsource(importlib.import_module(module)))
    return next((f"{origin}.{attribute}" for origin, names in origins.items() if attribute in names), name)


def _all_are_shown(app: Sphinx, env: BuildEnvironment) -> None:
    public = {name for names in names_by_module(_stub().read_text(encoding="utf-8")).values() for name in names}
    shown = {name for names in env.__dict__.get("public_names_shown", {}).values() for name in names}
    for name in sorted(public - shown):
        _LOGGER.warning("the public name %r is on no page of the reference: add its module to one", name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive and the check that no public name is missing."""
    app.add_directive("public-names", PublicNames)
    app.connect("env-check-consistency", _all_are_shown)
    return {}
