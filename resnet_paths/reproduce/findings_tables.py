"""Tables of findings: collected from executed notebooks into ``data/findings.csv``, written into the documentation."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from resnet_paths._utils.errors import ResnetPathsError, requires_extra
from resnet_paths._utils.files import shipped_folder, write_then_rename
from resnet_paths.reproduce.claims import claims_of
from resnet_paths.reproduce.findings import interval_text, measured_text

with requires_extra("notebooks"):
    import nbformat

__all__ = ["collect_findings", "findings_table", "read_findings", "replace_tables", "update_findings"]

FILE = "findings.csv"
PAGES = ("tables/findings.md", "gallery.md", "explanation/three_findings.md")
COLUMNS = (
    *("notebook", "profile", "quantity", "estimate", "unit", "low", "high", "exact", "over", "at_least", "at_most"),
    *("prediction", "verdict", "expected", "refuted_by", "networks", "seeds", "images", "example", "dataset"),
    *("source", "larger_run", "headline"),
)
_MOST_IN_A_CELL = 6
_TEXT = (
    "profile",
    "unit",
    "over",
    "prediction",
    "verdict",
    "expected",
    "refuted_by",
    "networks",
    "source",
    "larger_run",
)


def collect_findings(folder: Path) -> pd.DataFrame:
    """Findings of the executed notebooks of a folder.

    Args:
        folder: Output folder of `resnet-paths reproduce`.

    Returns:
        One row per finding, with the columns of ``data/findings.csv``.

    Raises:
        ResnetPathsError: If no notebook of the folder has findings.
    """
    rows = []
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        notebook: Any = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
        run = notebook.metadata.get("resnet_paths", {})
        found = [claim["finding"] for claim in claims_of(notebook) if "finding" in claim]
        if run.get("error") is None:
            rows += [{"notebook": path.stem, "profile": run.get("profile", "")} | finding for finding in found]
    if not rows:
        raise ResnetPathsError(
            "folder", str(folder), "a folder with executed notebooks that have findings", "Run resnet-paths reproduce."
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def read_findings(path: Path | None = None) -> pd.DataFrame:
    """The findings that come with the project.

    Args:
        path: A file of findings; ``data/findings.csv`` by default.

    Returns:
        One row per finding; absent text is empty.
    """
    frame = pd.read_csv(path or shipped_folder("data") / FILE)
    return frame.fillna(dict.fromkeys(_TEXT, ""))


def findings_table(frame: pd.DataFrame) -> str:
    """The findings as text, one line each.

    Args:
        frame: From `collect_findings` or `read_findings`.

    Returns:
        Notebook, quantity, estimate with interval, and verdict.
    """
    lines = []
    for row in _rows(frame):
        predicted = f"; predicted {row.prediction}: {row.verdict}" if row.verdict else ""
        lines.append(f"{row.notebook[:2]}  {row.quantity}: {_measured(row)} ({_interval(row)}){predicted}")
    return "\n".join(lines)


def update_findings(folder: Path, data: Path | None = None, pages: Path | None = None) -> list[Path]:
    """Replace the rows of the notebooks that were executed, and write the tables of all findings again.

    Args:
        folder: Output folder of `resnet-paths reproduce`.
        data: Folder of ``findings.csv``; ``data`` by default.
        pages: Folder of the pages; ``notebooks`` by default.

    Returns:
        Paths of the files that were written.

    Raises:
        ResnetPathsError: If no notebook of the folder has findings, or one was executed on another data set.
    """
    for executed in sorted((folder / "notebooks").glob("*.ipynb")):
        notebook: Any = nbformat.read(executed, as_version=4)  # type: ignore[no-untyped-call]
        dataset = notebook.metadata.get("resnet_paths", {}).get("dataset")
        if dataset is not None:
            raise ResnetPathsError(
                "folder", str(folder), f"notebooks executed without --dataset; {executed.stem} was on {dataset!r}"
            )
    new = collect_findings(folder)
    path = (data or shipped_folder("data")) / FILE
    if path.is_file():
        old = read_findings(path)
        new = pd.concat([old[~old["notebook"].isin(new["notebook"])], new])
    new = new.sort_values("notebook", kind="stable")
    with write_then_rename(path) as temporary:
        new.to_csv(temporary, index=False, float_format="%.10g")
    frame, written = read_findings(path), [path]
    pages = pages or shipped_folder("notebooks")
    for name in PAGES:
        page = pages / name
        text = replace_tables(page.read_text(encoding="utf-8"), frame, name)
        with write_then_rename(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written.append(page)
    return written


def replace_tables(text: str, frame: pd.DataFrame, page: str) -> str:
    """A page with its tables of findings made again.

    Args:
        text: Markdown, with ``<!-- findings: NAME -->`` before each table and ``<!-- end of findings -->`` after it;
            names are ``all``, ``agreement``, prefixes of notebooks, such as ``02``, whose first main findings are one
            cell of a table, and these with words, such as ``table:02:stage_start``, for a table of the findings of a
            notebook whose quantity has them.
        frame: From `read_findings`.
        page: Path of the page in the folder of pages, from which the page of all findings is linked.

    Returns:
        The page.
    """

    def table(match: re.Match[str]) -> str:
        name = match[2]
        made = {"all": _all_findings, "agreement": _agreement}.get(name)
        if name.startswith("table:"):
            _, prefix, words = name.split(":")
            content = f"\n{_some_findings(frame, prefix, words.replace('_', ' '))}\n"
        else:
            content = f"\n{made(frame)}\n" if made else f" {_of_notebook(frame, name, page)} "
        return f"{match[1]}{content}{match[3]}"

    return re.sub(r"(<!-- findings: (\S+) -->).*?(<!-- end of findings -->)", table, text, flags=re.DOTALL)


def _all_findings(frame: pd.DataFrame) -> str:
    """Every finding with its interval and what would refute it."""
    rows = [
        (
            f"[{row.notebook[:2]}](../{row.notebook}.ipynb)",
            row.quantity,
            row.networks,
            row.seeds or "-",
            _counted(row.images, row.example) if row.images else "-",
            row.dataset,
            _measured(row),
            _interval(row),
            row.prediction or "none",
            row.refuted_by or "-",
            row.verdict or "measured",
            row.profile,
        )
        for row in _rows(frame)
    ]
    head = (
        *("notebook", "finding", "networks", "seeds", "examples", "data set", "estimate", "95 % interval, over"),
        *("predicted", "refuted by", "verdict", "profile"),
    )
    return _markdown(head, rows)


def _agreement(frame: pd.DataFrame) -> str:
    """Published figures beside what was measured here."""
    rows = [
        (
            row.source,
            row.quantity,
            row.prediction,
            f"{_measured(row)} ({_interval(row)})",
            f"**{row.verdict}**",
            "; ".join((
                row.networks,
                *([row.dataset] if row.dataset != "-" else []),
                *([_counted(row.seeds, "seed")] if row.seeds else []),
                *([_counted(row.images, row.example)] if row.images else []),
            )),
            row.larger_run or "-",
            f"[{row.notebook[:2]}](../{row.notebook}.ipynb)",
        )
        for row in _rows(frame[frame["source"] != ""].sort_values("source", kind="stable"))
    ]
    head = (
        *("source", "quantity", "there", "here (95 % interval)", "verdict", "measured on", "a larger run needs"),
        "notebook",
    )
    return _markdown(head, rows)


def _some_findings(frame: pd.DataFrame, prefix: str, words: str) -> str:
    """Findings of a notebook whose quantity has certain words."""
    chosen = frame["notebook"].str.startswith(f"{prefix}_") & frame["quantity"].str.contains(words, regex=False)
    rows = [
        (
            row.quantity,
            row.seeds or "-",
            _counted(row.images, row.example) if row.images else "-",
            _measured(row),
            _interval(row),
            row.prediction or "none",
            row.verdict,
        )
        for row in _rows(frame[chosen])
    ]
    return _markdown(("finding", "seeds", "examples", "estimate", "95 % interval, over", "predicted", "verdict"), rows)


def _of_notebook(frame: pd.DataFrame, prefix: str, page: str) -> str:
    """The first main findings of a notebook in a sentence, with a link to all if there are more, and the profile."""
    found = frame[frame["notebook"].str.startswith(f"{prefix}_")]
    shown = found[found["headline"]].head(_MOST_IN_A_CELL)
    if shown.empty:
        return ""
    said = [f"{row.quantity} {_measured(row)}" + ("" if row.exact else f" ({_interval(row)})") for row in _rows(shown)]
    if len(shown) < len(found):
        said.append(f"[all]({posixpath.relpath(PAGES[0], posixpath.dirname(page) or '.')})")
    profiles = sorted({profile for profile in shown["profile"] if profile})
    ran = f" ({' and '.join(profiles)} profile{'' if len(profiles) == 1 else 's'})" if profiles else ""
    return f"{'; '.join(said)}{ran}.".replace("|", "\\|")


def _rows(frame: pd.DataFrame) -> list[Any]:
    return list(frame.itertuples())


def _measured(row: Any) -> str:
    return measured_text(row.estimate, row.unit)


def _interval(row: Any) -> str:
    if row.exact:
        return "exact"
    return ", ".join(filter(None, (interval_text(row.low, row.high), row.over)))


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
