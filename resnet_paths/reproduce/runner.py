"""Execution of the notebooks, which writes all figures.

Each notebook has a cell tagged ``parameters``; a cell with other values is inserted after it, as papermill does. A cell
that records the claims with their values is appended. (papermill itself is not used: it would replace the insertion
only.) If a notebook fails, its cell and error are reported, and the other notebooks are still executed. One that needs
an extra that is not installed is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm

from resnet_paths._utils.devices import choose_device
from resnet_paths._utils.errors import MissingExtraError, ResnetPathsError, requires_extra
from resnet_paths._utils.files import shipped_folder, write_then_rename
from resnet_paths.reproduce.datasets import DATASETS
from resnet_paths.reproduce.gallery import write_gallery
from resnet_paths.reproduce.kept_outputs import ADDED, keep_outputs, stale_reason
from resnet_paths.reproduce.kernels import kernel_environment

with requires_extra("notebooks"):
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from nbformat import NotebookNode

__all__ = ["NotebookResult", "find_notebooks", "reproduce", "run_notebook"]

PROFILES = ("quick", "full")

_SET, _RECORD = ADDED
_RECORD += """: the claims above and their values, for the gallery and the tests
from resnet_paths.reproduce.claims import show_claims

show_claims(In[-2], globals())"""


@dataclass(frozen=True)
class NotebookResult:
    """Result of executing a notebook.

    Attributes:
        name: File name without suffix.
        error: None if it succeeded, otherwise a description of the cell and the error.
        num_updated: Number of code cells whose kept outputs were replaced by others; None without ``update=True``.
        stale: ``"code"`` or ``"data"`` if outputs are kept in the notebook that were made from others; None otherwise.
        skipped: Which extra it needs, if that is not installed; None otherwise.
    """

    name: str
    error: str | None
    num_updated: int | None = None
    stale: str | None = None
    skipped: str | None = None


def find_notebooks(only: Sequence[str] = (), folder: Path | None = None) -> list[Path]:
    """Find the notebooks, in order.

    Args:
        only: Prefixes of names, such as ``"02"``; all notebooks if empty.
        folder: Folder of the notebooks; the shipped ones by default.

    Returns:
        Paths, sorted by name.

    Raises:
        ResnetPathsError: If a prefix matches no notebook.
    """
    folder = folder or shipped_folder("notebooks")
    paths = sorted(folder.glob("*.ipynb"))
    for start in only:
        if not any(path.stem.startswith(start) for path in paths):
            names = ", ".join(path.stem for path in paths)
            raise ResnetPathsError("only", start, f"a prefix of one of {names or f'no notebooks in {folder}'}")
    return [path for path in paths if not only or path.stem.startswith(tuple(only))]


def run_notebook(
    path: Path,
    parameters: Mapping[str, object],
    output: Path,
    *,
    on_cell: Callable[[], None] = lambda: None,
    timeout: float = 3600,
) -> NotebookResult:
    """Execute a notebook in a new kernel and save the executed copy, also if it fails.

    Args:
        path: The notebook.
        parameters: Values that replace those of its cell tagged ``parameters``.
        output: Path of the executed copy.
        on_cell: Called after each code cell.
        timeout: Maximum seconds per cell.

    Returns:
        The result, which is also stored, with the parameters, in the metadata of the copy under ``resnet_paths``.
    """
    skipped: str | None = None
    try:
        notebook = nbformat.read(path, as_version=4)
    except (ValueError, KeyError, AttributeError, OSError) as failure:
        notebook = nbformat.v4.new_notebook()
        error: str | None = f"not a notebook: {type(failure).__name__}: {failure}"
    else:
        error, skipped = _execute(notebook, parameters, output.parent, on_cell, timeout)
    notebook.metadata["resnet_paths"] = {**parameters, "error": error, "skipped": skipped}
    with write_then_rename(output) as temporary:
        nbformat.write(notebook, temporary)
    return NotebookResult(path.stem, error, skipped=skipped)


def _execute(
    notebook: NotebookNode, parameters: Mapping[str, object], folder: Path, on_cell: Callable[[], None], timeout: float
) -> tuple[str | None, str | None]:
    """Execute a notebook in place, from `folder`; returns a description of the error, and which extra is missing."""
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    if not tagged:
        return "no cell tagged 'parameters'", None
    for cell in notebook.cells:
        if cell.cell_type == "code":  # outputs that are kept in the notebook
            cell.outputs, cell.execution_count = [], None
    lines = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell(f"{_SET}\n{lines}"))
    notebook.cells.append(nbformat.v4.new_code_cell(_RECORD))
    started = [0]
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # its warnings would interrupt the progress bar
        resources={"metadata": {"path": str(folder)}},
        on_cell_start=lambda cell_index, **_: started.append(cell_index + 1),
        on_cell_executed=lambda **_: on_cell(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        client.execute(env=kernel_environment())
    except CellExecutionError as failure:
        if failure.ename == MissingExtraError.__name__:
            return None, failure.evalue
        return f"cell {_failed_cell(notebook)}: {failure.ename}: {failure.evalue}", None
    except (CellTimeoutError, DeadKernelError) as failure:
        return f"cell {started[-1]}: {type(failure).__name__}: {str(failure).strip().splitlines()[0]}", None
    return None, None


def reproduce(
    output: Path,
    *,
    profile: str = "quick",
    only: Sequence[str] = (),
    device: str = "auto",
    dataset: str | None = None,
    update: bool = False,
    folder: Path | None = None,
    progress: bool = True,
) -> list[NotebookResult]:
    """Execute the notebooks and write every figure as PDF, SVG, PNG and CSV, and the gallery.

    Args:
        output: Folder for the figures and the gallery, ``index.html``, which includes figures of earlier runs in this
            folder; executed notebooks are written to its folder ``notebooks``.
        profile: ``"quick"`` (minutes on a laptop) or ``"full"`` (the sizes stated in each notebook).
        only: Prefixes of the names of notebooks to execute; all if empty.
        device: Device of the networks: ``"auto"``, the accelerator if one is available, or a torch device.
        dataset: Name of a data set of images; that of each notebook by default. Notebooks without this parameter are
            not executed.
        update: Whether to replace the outputs that are kept in the notebooks, of those that succeed; with the quick
            profile and without `dataset` only.
        folder: Folder of the notebooks; the shipped ones by default.
        progress: Whether to show a progress bar over cells.

    Returns:
        The results, in order.

    Raises:
        ResnetPathsError: If the profile or the data set is unknown, or not the default with `update`, if no notebook is
            left, or the device is invalid.
    """
    if profile not in PROFILES:
        raise ResnetPathsError("profile", profile, " or ".join(map(repr, PROFILES)))
    if update and profile != "quick":
        raise ResnetPathsError("profile", profile, "'quick' with update")
    if update and dataset is not None:
        raise ResnetPathsError("dataset", dataset, "None with update")
    paths = find_notebooks(only, folder)
    choose_device(device)
    output = output.resolve()
    parameters = {"profile": profile, "figures_folder": str(output), "device": device}
    if dataset is not None:
        if dataset not in DATASETS:
            raise ResnetPathsError("dataset", dataset, f"None or one of {', '.join(map(repr, DATASETS))}")
        paths = [path for path in paths if _has_parameter(path, "dataset")]
        if not paths:
            raise ResnetPathsError("only", list(only), "a notebook with the parameter 'dataset'")
        parameters["dataset"] = dataset
    num_cells = {path: path.read_text(encoding="utf-8").count('"cell_type": "code"') + 2 for path in paths}
    results = []
    with tqdm(total=sum(num_cells.values()), unit="cell", disable=not progress) as bar:
        done = 0
        for path in paths:
            bar.set_description(path.stem)
            executed = output / "notebooks" / path.name
            result = run_notebook(path, parameters, executed, on_cell=lambda: bar.update() and None)
            results.append(_with_kept_outputs(result, path, executed, update))
            write_gallery(output)
            done += num_cells[path]
            bar.update(done - bar.n)
    return results


def _has_parameter(path: Path, name: str) -> bool:
    """Whether a notebook has a parameter; false of a file that is not a notebook."""
    try:
        cells = nbformat.read(path, as_version=4).cells
    except (ValueError, KeyError, AttributeError, OSError):
        return False
    return any(
        re.search(rf"^{name} = ", cell.source, re.MULTILINE)
        for cell in cells
        if "parameters" in cell.metadata.get("tags", [])
    )


def _with_kept_outputs(result: NotebookResult, path: Path, executed: Path, update: bool) -> NotebookResult:
    """Update the outputs that are kept in a notebook, or say whether they are stale."""
    if result.error is not None or result.skipped is not None:
        return result
    num_updated = keep_outputs(path, executed) if update else None
    return replace(result, num_updated=num_updated, stale=stale_reason(path))


def _failed_cell(notebook: NotebookNode) -> str:
    """Number of the cell that raised, counted from 1, and its first line."""
    for number, cell in enumerate(notebook.cells, start=1):
        if any(output.output_type == "error" for output in cell.get("outputs", [])):
            first = next((line for line in cell.source.splitlines() if line.strip()), "")
            return f"{number} ({first!r})"
    return "unknown"
