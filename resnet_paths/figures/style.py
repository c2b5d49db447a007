"""Style and files of figures for papers: column width, fonts, colours, formats.

Used through `resnet_paths.figures`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from torch import nn

import resnet_paths
from resnet_paths._utils.arguments import require_int, require_module, require_path
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.files import write_then_rename
from resnet_paths._utils.fingerprint import fingerprint
from resnet_paths.core.polynomials import with_counts_as_text

__all__ = ["COLUMN_INCHES", "paper_style", "save_figure", "weights_hash"]

COLUMN_INCHES = {"single": 3.25, "double": 6.75}
"""Widths of a column and of the text block in the ICML style, in inches."""

_VERSIONS = f"resnet_paths {resnet_paths.__version__}, torch {torch.__version__}, matplotlib {mpl.__version__}"
# Metadata keys of the program that wrote the file. There is no date, so that equal figures give equal bytes.
_METADATA: dict[str, dict[str, str | None]] = {
    "pdf": {"Creator": _VERSIONS, "Producer": None, "CreationDate": None},
    "svg": {"Creator": _VERSIONS, "Date": None},
    "png": {"Software": _VERSIONS},
}
_FACTS_KEY = {"pdf": "Subject", "svg": "Description", "png": "Description"}
# TrueType fonts in PDF, as publishers require; outlines in SVG, which do not depend on installed fonts.
_EXPORT: dict[str, Any] = {
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "resnet_paths",
}


def paper_style(
    column: Literal["single", "double"] | float = "single", aspect: float = 0.62
) -> AbstractContextManager[None]:
    """Settings for figures that are included in a paper without scaling, so that 8 pt remain 8 pt.

    Args:
        column: ``"single"`` (3.25 in, a column of the ICML style), ``"double"`` (6.75 in, its text width), or a width
            in inches.
        aspect: Ratio of height to width.

    Returns:
        A context manager that sets matplotlib's settings and restores them.

    Raises:
        ResnetPathsError: If `column` or `aspect` is invalid.

    Example:
        >>> with paper_style("single"):
        ...     [round(float(inches), 3) for inches in mpl.rcParams["figure.figsize"]]
        [3.25, 2.015]
    """
    width = COLUMN_INCHES.get(column) if isinstance(column, str) else column
    if not _is_positive(width):
        raise ResnetPathsError("column", column, "'single', 'double', or a width in inches above 0")
    if not _is_positive(aspect):
        raise ResnetPathsError("aspect", aspect, "a ratio of height to width above 0")
    assert width is not None  # checked by _is_positive
    small = dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize", "legend.title_fontsize"), 7.0)
    large = dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize", "figure.titlesize"), 8.0)
    settings: Any = {
        **sns.axes_style("ticks", rc={"axes.spines.top": False, "axes.spines.right": False}),
        **sns.plotting_context("paper", rc=small | large),
        **_EXPORT,
        "axes.linewidth": 0.6,
        "axes.prop_cycle": cycler(color=sns.color_palette("colorblind")),
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.h_pad": 0.02,
        "figure.constrained_layout.w_pad": 0.02,
        "figure.dpi": 150,
        "figure.figsize": (float(width), float(width) * aspect),
        # The font that is included in matplotlib: equal figures and equal bytes on every machine.
        "font.family": "DejaVu Sans",
        "legend.frameon": False,
        "lines.linewidth": 1.0,
        "lines.markersize": 3.0,
        "savefig.bbox": None,
        "savefig.dpi": 300,
        **{f"{axis}tick.major.{key}": n for axis in "xy" for key, n in (("width", 0.6), ("size", 2.5), ("pad", 2))},
    }
    return mpl.rc_context(settings)


def save_figure(
    fig: Figure,
    stem: str | Path,
    data: pd.DataFrame | None = None,
    *,
    networks: nn.Module | Mapping[str, nn.Module] | None = None,
    seed: int | None = None,
) -> list[Path]:
    """Save a figure as PDF, SVG and PNG (300 dots per inch), and its data as CSV.

    The page has the width of the figure; PDF fonts are embedded as TrueType. The metadata contain the versions of
    resnet_paths, torch and matplotlib, the weights of the networks, and the seed. Equal figures give equal bytes, since
    no date is written. The files are replaced only after all of them have been written; if one fails, the previous
    files are kept.

    Args:
        fig: The figure.
        stem: Path without suffix; its folder is created.
        data: The frame that the figure shows, to be saved as CSV.
        networks: The network, or networks by name, whose `weights_hash` is written to the metadata.
        seed: Random seed of the figure's data, for the metadata.

    Returns:
        The paths written: ``.pdf``, ``.svg``, ``.png`` and, with `data`, ``.csv``.

    Raises:
        ResnetPathsError: If `fig` is not a figure, `data` is not a frame, `networks` are not networks, or `stem` is
            no path, is empty or has one of the suffixes.
    """
    if not isinstance(fig, Figure):
        raise ResnetPathsError("fig", type(fig).__name__, "a matplotlib Figure", "For Axes, pass ax.figure.")
    if data is not None and not isinstance(data, pd.DataFrame):
        raise ResnetPathsError("data", type(data).__name__, "a pandas DataFrame, or None")
    stem = require_path("stem", stem)
    seed = None if seed is None else require_int("seed", seed)
    suffixes = [f".{kind}" for kind in _METADATA] + [".csv"]
    if not stem.name or stem.name == ".." or stem.suffix.lower() in suffixes:
        raise ResnetPathsError(
            "stem",
            str(stem),
            f"a path that ends in a name without {', '.join(suffixes)}",
            "One file per format is written.",
        )
    facts = _facts(networks, seed)
    contents: dict[str, bytes] = {}
    # Also for figures created outside `paper_style`; a tight bounding box would change the width of the page.
    export: Any = {**_EXPORT, "savefig.bbox": None}
    with mpl.rc_context(export), _laid_out(fig):
        for kind, metadata in _METADATA.items():
            buffer = io.BytesIO()
            fig.savefig(buffer, format=kind, dpi=300, metadata=metadata | ({_FACTS_KEY[kind]: facts} if facts else {}))
            contents[kind] = buffer.getvalue()
    if data is not None:
        contents["csv"] = with_counts_as_text(data).to_csv(index=False, lineterminator="\n").encode()
    # Not with_suffix, which would change "fig1.5" to "fig1".
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in contents]
    with contextlib.ExitStack() as unfinished:
        for path, content in zip(paths, contents.values(), strict=True):
            unfinished.enter_context(write_then_rename(path)).write_bytes(content)
    return paths


def weights_hash(network: nn.Module) -> str:
    """A short hash of the weights of a network, equal for a model and its chain, on any device.

    Args:
        network: A model or a chain.

    Returns:
        The first 16 hexadecimal digits of a SHA-256 over all parameters, independent of their names and order.

    Raises:
        ResnetPathsError: If it is not a module.

    Example:
        >>> same = nn.Linear(2, 2)
        >>> weights_hash(same) == weights_hash(nn.Sequential(same)) != weights_hash(nn.Linear(2, 2))
        True
    """
    require_module("network", network)
    # A set, since a chain may contain a shared tensor twice.
    return fingerprint(*sorted({fingerprint(parameter.detach()) for parameter in network.parameters()}))[:16]


@contextlib.contextmanager
def _laid_out(fig: Figure) -> Iterator[None]:
    """Run the layout once for all formats and round positions, since each layout changes their last digits."""
    engine = fig.get_layout_engine()
    if engine is None:
        yield
        return
    for _ in range(2):  # a colorbar gets its position in the second layout only
        fig.draw_without_rendering()
    fig.set_layout_engine("none")
    try:
        _round_positions(fig)
        yield
    finally:
        fig.set_layout_engine(engine)


def _round_positions(fig: Figure) -> None:
    for ax in fig.axes:
        in_layout = ax.get_in_layout()  # setting a position removes axes from the layout
        left, bottom, width, height = (round(number, 6) for number in ax.get_position(original=True).bounds)
        ax.set_position((left, bottom, width, height))
        ax.set_in_layout(in_layout)


def _facts(networks: nn.Module | Mapping[str, nn.Module] | None, seed: int | None) -> str:
    """Weights and seed in one line."""
    named = {"weights": networks} if isinstance(networks, nn.Module) else networks
    if named is not None and not (
        isinstance(named, Mapping) and all(isinstance(network, nn.Module) for network in named.values())
    ):
        raise ResnetPathsError("networks", type(networks).__name__, "a network, or a mapping from names to networks")
    facts = [f"{name} sha256 {weights_hash(network)}" for name, network in (named or {}).items()]
    return "; ".join(facts if seed is None else [*facts, f"seed {seed}"])


def _is_positive(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < float("inf")
