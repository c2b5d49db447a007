"""Gallery: an HTML page with every figure in a folder, its caption and its data.

All contents are read from the folder: captions are the Markdown cells above each figure in the notebooks, claims and
their values are those stored in the executed notebooks, and the origin of a figure is read from its metadata.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import re
import urllib.parse
from pathlib import Path

import pandas as pd
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image

from resnet_paths._utils.errors import requires_extra
from resnet_paths._utils.files import write_then_rename
from resnet_paths.reproduce.claims import claims_of

with requires_extra("notebooks"):
    import mistune
    import nbformat
    from nbformat import NotebookNode
    from PIL import Image

__all__ = ["figures_of", "write_gallery"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1rem; }
h3 { font-size: 1.05rem; margin: 0 0 .3rem; }
figure { margin: 2rem 0; } figure img.plot { max-width: 100%; height: auto; background: white; }
table { border-collapse: collapse; font-size: .85rem; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .15rem .6rem .15rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
code { font-size: .85em; background: #f4f4f4; padding: 0 .2em; }
.files a { margin-right: .8rem; } .source { color: #555; font-size: .8rem; }
.failed { color: #a00000; font-weight: bold; } .failure { background: #fbeaea; padding: .5rem .8rem; }
"""
_ROWS_SHOWN = 12
_MATH_POINTS = 12.0  # 16 px, the size of the text


def write_gallery(folder: Path) -> Path:
    """Write ``index.html`` from the figures and the executed notebooks of a folder.

    Args:
        folder: The output folder of `resnet-paths reproduce`, with executed notebooks in its folder ``notebooks``.

    Returns:
        Path of the page: HTML with embedded style, and relative links to the files of the folder.
    """
    notebooks = {path.stem: _read_notebook(path) for path in sorted((folder / "notebooks").glob("*.ipynb"))}
    stems = sorted(path.stem for path in folder.glob("*.png"))
    placed: set[str] = set()
    contents, sections = [], []
    for name, notebook in notebooks.items():
        captions = {stem: caption for stem, caption in figures_of(notebook).items() if stem in stems}
        placed |= set(captions)
        contents.append(_entry(name, notebook, len(captions)))
        sections.append(_section(folder, name, notebook, captions))
    others = [stem for stem in stems if stem not in placed]
    if others:
        sections.append("<h2>Other figures in this folder</h2>" + "".join(_figure(folder, stem, "") for stem in others))
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Figures of resnet_paths</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>\n'
        "<h1>Residual networks as ensembles of paths: the figures</h1>\n"
        f"<ul>\n{''.join(contents)}</ul>\n{''.join(sections)}</body></html>\n"
    )
    path = folder / "index.html"
    with write_then_rename(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _read_notebook(path: Path) -> NotebookNode:
    """A notebook; one that only says so where the file is not one."""
    try:
        notebook: NotebookNode = nbformat.read(path, as_version=4)
    except (ValueError, KeyError, AttributeError, TypeError, OSError, nbformat.ValidationError) as error:
        notebook = nbformat.v4.new_notebook()
        notebook.metadata["resnet_paths"] = {"error": f"not a notebook: {type(error).__name__}: {error}"}
    return notebook


def figures_of(notebook: NotebookNode) -> dict[str, str]:
    """Figures that a notebook saves into its figures folder, with the Markdown cell above each.

    Args:
        notebook: A notebook, executed or not.

    Returns:
        Mapping from file stems to Markdown.
    """
    captions: dict[str, str] = {}
    above = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            above = cell.source
        else:
            captions |= dict.fromkeys(re.findall(r"\{figures_folder\}/([^\"'{}]+)[\"']", cell.source), above)
    return captions


def _entry(name: str, notebook: NotebookNode, num_figures: int) -> str:
    """An entry of the table of contents."""
    run = notebook.metadata.get("resnet_paths", {})
    state = f"{len(claims_of(notebook))} claims verified"
    if run.get("error") or run.get("skipped"):
        state = '<span class="failed">failed</span>' if run.get("error") else "skipped"
    facts = f"{num_figures} figures, {state}, profile {html.escape(str(run.get('profile', 'unknown')))}"
    title = html.escape(f"{name[:2]} {_title(name, notebook)}")
    return f'<li><a href="#{_link(name)}">{title}</a> ({facts})</li>\n'


def _title(name: str, notebook: NotebookNode) -> str:
    first = notebook.cells[0].source.splitlines() if notebook.cells else []
    return first[0].lstrip("# ") if first else name


def _section(folder: Path, name: str, notebook: NotebookNode, captions: dict[str, str]) -> str:
    """Section of a notebook: its first cell, its error if it failed, its figures, its claims."""
    link = f'<p class="files"><a href="notebooks/{_link(name)}.ipynb">executed notebook</a></p>\n'
    first = notebook.cells[0].source if notebook.cells else f"# {name}"
    parts = [f'<h2 id="{html.escape(name)}">{html.escape(name[:2])} {html.escape(_title(name, notebook))}</h2>\n']
    run = notebook.metadata.get("resnet_paths", {})
    for state, why in (("Failed", run.get("error")), ("Skipped", run.get("skipped"))):
        if why:
            old = " The figures below may be from an earlier run." if captions else ""
            text = f"{html.escape(name)}, {html.escape(why.rstrip('.'))}.{old}"
            parts.append(f'<p class="failure"><b>{state}:</b> {text}</p>\n')
    parts += [_markdown("\n".join(first.splitlines()[1:])), link]
    parts += [_figure(folder, stem, caption) for stem, caption in captions.items()]
    claims = claims_of(notebook)
    if claims:
        rows = "".join(
            f"<tr><td>{html.escape(claim['numbers'])}</td><td><code>{html.escape(claim['claim'])}</code></td></tr>\n"
            for claim in claims
        )
        head = "<tr><th>measured in this run</th><th>asserted</th></tr>\n"
        parts.append(f"<h3>Claims</h3>\n<table>{head}{rows}</table>\n")
    return "".join(parts)


def _figure(folder: Path, stem: str, caption: str) -> str:
    """A figure at 1.5 times its printed size, with its caption, files, data and origin."""
    try:
        with Image.open(folder / f"{stem}.png") as image:
            facts, width = image.info, round(image.width / 300 * 96 * 1.5)
    except (OSError, ValueError, SyntaxError) as error:  # as Pillow refuses files
        return _unreadable(f"{stem}.png", error)
    links = "".join(
        f'<a href="{_link(stem)}.{kind}">{kind.upper()}</a>'
        for kind in ("pdf", "svg", "png", "csv")
        if (folder / f"{stem}.{kind}").is_file()
    )
    source = "; ".join(str(facts[key]) for key in ("Description", "Software") if facts.get(key))
    return (
        f'<figure id="{html.escape(stem)}">\n<figcaption>{_markdown(caption)}</figcaption>\n'
        f'<img class="plot" src="{_link(stem)}.png" width="{width}" alt="{html.escape(_heading(caption) or stem)}">\n'
        f'<p class="files"><b>{html.escape(stem)}</b> {links}</p>\n{_numbers(folder / f"{stem}.csv")}'
        f'<p class="source">{html.escape(source)}</p>\n</figure>\n'
    )


def _heading(caption: str) -> str:
    return next((line.lstrip("# ") for line in caption.splitlines() if line.startswith("#")), "")


def _numbers(path: Path) -> str:
    """The first rows of a figure's data, collapsed."""
    if not path.is_file():
        return ""
    try:
        frame = pd.read_csv(path)
    except pd.errors.EmptyDataError:
        return ""
    except (ValueError, OSError) as error:  # pandas' parser errors are among the former
        return _unreadable(path.name, error)
    first = f", the first {_ROWS_SHOWN} shown" if len(frame) > _ROWS_SHOWN else ""
    table = frame.head(_ROWS_SHOWN).to_html(index=False, border=0, float_format="{:.4g}".format, na_rep="")
    return f"<details><summary>numbers ({len(frame)} rows{first})</summary>{table}</details>\n"


def _unreadable(name: str, error: Exception) -> str:
    """A line in place of a file that cannot be read."""
    said = html.escape(f"{type(error).__name__}: {error}")
    return f'<p class="failure"><b>Cannot be read:</b> {html.escape(name)}, {said}</p>\n'


def _link(name: str) -> str:
    """A file name inside a link."""
    return html.escape(urllib.parse.quote(name))


class _Renderer(mistune.HTMLRenderer):
    """Renders headings one level below those of the page, and formulas as images."""

    def heading(self, text: str, level: int, **attrs: object) -> str:
        return f"<h3>{text}</h3>\n"

    def inline_math(self, text: str) -> str:
        return _formula(text)

    def block_math(self, text: str) -> str:
        return f"<p>{_formula(text)}</p>\n"


_TO_HTML = mistune.create_markdown(renderer=_Renderer(), plugins=["math", "table"])


def _markdown(text: str) -> str:
    return str(_TO_HTML(text))


@functools.cache
def _formula(text: str) -> str:
    """A formula as an embedded image, without scripts or network; the source if it cannot be rendered."""
    picture = io.BytesIO()
    try:
        depth = math_to_image(f"${text.strip()}$", picture, prop=FontProperties(size=_MATH_POINTS), format="svg")
    except (ValueError, RuntimeError):
        return f"<code>{html.escape(text)}</code>"
    data = base64.b64encode(picture.getvalue()).decode()
    return (
        f'<img alt="{html.escape(text)}" src="data:image/svg+xml;base64,{data}" '
        f'style="vertical-align: -{depth * 96 / 72:.1f}px">'
    )
