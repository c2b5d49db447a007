"""Outputs kept in the notebooks of a checkout: figures and tables of the quick profile, where notebooks are only read.

`resnet-paths reproduce --update` writes them, without what differs from run to run or from machine to machine, together
with a hash of what they were made from, by which outputs of other code or data are found.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_paths._utils.errors import ResnetPathsError, requires_extra
from resnet_paths._utils.files import shipped_folder, write_then_rename

with requires_extra("notebooks"):
    import nbformat
    from PIL import Image

if TYPE_CHECKING:
    from nbformat import NotebookNode

__all__ = ["ADDED", "keep_outputs", "stale_reason"]

ADDED = ("# Set by resnet-paths reproduce", "# Added by resnet-paths reproduce")
"""First lines of the code cells that `resnet-paths reproduce` adds to its copy of a notebook."""

_WIDGET = "application/vnd.jupyter.widget-view+json"
_TEXTS = ("text/html", "text/plain")
_COLORS = 256


def keep_outputs(path: Path, executed: Path) -> int:
    """Replace the outputs in a notebook by those of its executed copy.

    Not kept are standard error with its progress bars, explorers, which need a kernel, execution counts, addresses in
    memory, random names of styled tables and the folder of the figures. Figures have 256 colors.

    Args:
        path: The notebook.
        executed: Its copy, executed in the quick profile by `resnet-paths reproduce`.

    Returns:
        Number of code cells whose outputs differ from those that were kept before.

    Raises:
        ResnetPathsError: If the copy is of other code cells or of another profile, or was not executed to its end.
    """
    notebook, run = nbformat.read(path, as_version=4), nbformat.read(executed, as_version=4)
    facts = run.metadata.get("resnet_paths", {})
    cells, sources = _code_cells(notebook), _code_cells(run)
    ended = facts.get("error", "") is None and facts.get("skipped") is None
    if not ended or facts.get("profile") != "quick" or not _same_code(cells, sources):
        raise ResnetPathsError(
            "executed", str(executed), f"a copy of {path.name}, executed to its end in the quick profile"
        )
    num_changed = 0
    for cell, source in zip(cells, sources, strict=True):
        text_of = functools.partial(_without_what_varies, cell_id=cell.id, folder=facts["figures_folder"])
        outputs = [kept for output in source.outputs if (kept := _kept(output, text_of)) is not None]
        num_changed += cell.outputs != outputs
        cell.outputs, cell.execution_count = outputs, None
    made_from = {"code": _hash_of_code(notebook), "data": _hash_of_data(shipped_folder("data"))}
    notebook.metadata["resnet_paths"] = {"outputs_of": made_from}
    with write_then_rename(path) as temporary:
        nbformat.write(notebook, temporary)
    return num_changed


def stale_reason(path: Path) -> str | None:
    """What has changed since the outputs of a notebook were kept: ``"code"``, ``"data"``, or None.

    Args:
        path: The notebook.

    Returns:
        ``"code"`` if a code cell or a parameter has changed, or the outputs are not those of `keep_outputs`; ``"data"``
        if the trained networks or the data sets have; None if neither has, or no outputs are kept.
    """
    notebook = nbformat.read(path, as_version=4)
    made_from = notebook.metadata.get("resnet_paths", {}).get("outputs_of")
    if made_from is None:
        return "code" if any(cell.outputs for cell in _code_cells(notebook)) else None
    if made_from["code"] != _hash_of_code(notebook):
        return "code"
    return None if made_from["data"] == _hash_of_data(shipped_folder("data")) else "data"


def _code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Code cells, without those that were added."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and not cell.source.startswith(ADDED)]


def _same_code(cells: list[NotebookNode], others: list[NotebookNode]) -> bool:
    return [cell.source for cell in cells] == [cell.source for cell in others]


def _without_what_varies(text: str, *, cell_id: str, folder: str) -> str:
    """A text without the folder of the figures, addresses, and the random names of tables that pandas has styled."""
    text = re.sub(r"\b0x[0-9a-f]{6,}\b", "0x...", text.replace(folder, "figures"))
    text = re.sub(r' id="T_[0-9a-f]{5}_\w*"', "", text)  # of table cells, which have no style of their own
    return re.sub(r"\bT_[0-9a-f]{5}(?![0-9a-z])", f"T_{cell_id}", text)


def _kept(output: NotebookNode, text_of: Callable[[str], str]) -> NotebookNode | None:
    """An output without what varies; None if it is not kept."""
    if output.output_type == "stream":
        kept = nbformat.v4.new_output("stream", name="stdout", text=text_of(output.text))
        return kept if output.name == "stdout" else None
    data = output.get("data", {})
    if "image/png" in data:
        kept_data = {"image/png": _with_few_colors(data["image/png"])}
    else:
        kept_data = {mime: text_of(data[mime]) for mime in _TEXTS if mime in data and _WIDGET not in data}
    return nbformat.v4.new_output(output.output_type, data=kept_data) if kept_data else None


def _with_few_colors(picture: str) -> str:
    """A PNG in base64 with a palette and without metadata, such as the version of matplotlib."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    buffer = io.BytesIO()
    opaque.quantize(_COLORS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _hash_of_code(notebook: NotebookNode) -> str:
    """SHA-256 of the code cells, the parameters among them."""
    return hashlib.sha256(json.dumps([cell.source for cell in _code_cells(notebook)]).encode()).hexdigest()


@functools.cache
def _hash_of_data(data: Path) -> str:
    """SHA-256 of all shipped files that notebooks compute from."""
    digest = hashlib.sha256()
    folders = [path for path in data.iterdir() if path.is_dir() and path.name != "readme"]
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(data).as_posix().encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
