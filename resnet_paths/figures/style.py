"""The look and the files of a figure for a paper: column width, type, colours, formats.

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
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.files import write_then_rename
from resnet_paths._utils.fingerprint import fingerprint

__all__ = ["COLUMN_INCHES", "paper_style", "save_figure", "weights_hash"]

COLUMN_INCHES = {"single": 3.25, "double": 6.75}
"""Width of a column and of the whole text in the ICML style."""

_VERSIONS = f"resnet_paths {resnet_paths.__version__}, torch {torch.__version__}, matplotlib {mpl.__version__}"
# What each format calls the program that made the file. No date: it would change the bytes.
_METADATA: dict[str, dict[str, Any]] = {
    "pdf": {"Creator": _VERSIONS, "Producer": None, "CreationDate": None},
    "svg": {"Creator": _VERSIONS, "Date": None},
    "png": {"Software": _VERSIONS},
}
_FACTS_KEY = {"pdf": "Subject", "svg": "Description", "png": "Description"}
# TrueType in PDF, as publishers ask; SVG text as outlines, so that it looks the same where the font is not installed.
_EXPORT: dict[str, Any] = {
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "resnet_paths",
}


def paper_style(
    column: Literal["single", "double"] | float = "single", aspect: float = 0.62
) -> AbstractContextManager[None]:
    """Settings for figures that stand in a paper at their own size: nothing is scaled, 8 pt is 8 pt.

    Args:
        column: ``"single"`` (3.25 in, the column of the ICML style), ``"double"`` (6.75 in, its text width), or a width
            in inches.
        aspect: Height over width.

    Returns:
        A context manager that sets matplotlib's settings and restores them.

    Raises:
        ResnetPathsError: If `column` or `aspect` is not one of these, or not positive.

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
    assert width is not None  # held by _is_positive
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
        # The font that comes with matplotlib: the same figure, and the same bytes, on every machine.
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
    """Write a figure as PDF, SVG and PNG (300 dots an inch), and the frame behind it as CSV.

    The page is exactly as wide as the figure; PDF fonts are embedded as TrueType. The metadata say where the figure
    comes from: the versions of resnet_paths, torch and matplotlib, the weights of the networks, the seed. The same
    figure gives the same bytes: no date is written. All files take their places together once all are written; if one
    fails, what stood there before is still there.

    Args:
        fig: The figure.
        stem: Path without suffix; its folder is created.
        data: The frame that the figure shows, if it is to lie beside it.
        networks: The network, or several by name, whose `weights_hash` goes into the metadata.
        seed: Seed of the random numbers behind the figure, for the metadata.

    Returns:
        The paths written: ``.pdf``, ``.svg``, ``.png`` and, with `data`, ``.csv``.

    Raises:
        ResnetPathsError: If `fig` is not a figure, `data` not a frame, `networks` no networks, or `stem` has one of the
            suffixes or no name.
    """
    if not isinstance(fig, Figure):
        raise ResnetPathsError("fig", type(fig).__name__, "a matplotlib Figure", "Of Axes, pass ax.figure.")
    if data is not None and not isinstance(data, pd.DataFrame):
        raise ResnetPathsError("data", type(data).__name__, "a pandas DataFrame, or None")
    stem = Path(stem)
    suffixes = [f".{kind}" for kind in _METADATA] + [".csv"]
    if not stem.name or stem.name == ".." or stem.suffix.lower() in suffixes:
        raise ResnetPathsError(
            "stem",
            str(stem),
            f"a path that ends in a name without {', '.join(suffixes)}",
            "One file of each kind is written.",
        )
    facts = _facts(networks, seed)
    contents: dict[str, bytes] = {}
    # Also for figures that were not made in `paper_style`; its tight box would change the width of the page.
    export: Any = {**_EXPORT, "savefig.bbox": None}
    with mpl.rc_context(export), _laid_out(fig):
        for kind, metadata in _METADATA.items():
            buffer = io.BytesIO()
            fig.savefig(buffer, format=kind, dpi=300, metadata=metadata | ({_FACTS_KEY[kind]: facts} if facts else {}))
            contents[kind] = buffer.getvalue()
    if data is not None:
        contents["csv"] = data.to_csv(index=False, lineterminator="\n").encode()
    # Not with_suffix, which would take "fig1.5" for "fig1".
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in contents]
    with contextlib.ExitStack() as unfinished:
        for path, content in zip(paths, contents.values(), strict=True):
            unfinished.enter_context(write_then_rename(path)).write_bytes(content)
    return paths


def weights_hash(network: nn.Module) -> str:
    """A short name for the weights of a network: equal for a model, its chain, and both on another device.

    Args:
        network: A model or a chain.

    Returns:
        The first 16 hexadecimal digits of a SHA-256 over all parameters, whatever they are called and wherever they
        stand.

    Example:
        >>> same = nn.Linear(2, 2)
        >>> weights_hash(same) == weights_hash(nn.Sequential(same)) != weights_hash(nn.Linear(2, 2))
        True
    """
    # A set: a chain may name a tensor twice that the model shares.
    return fingerprint(*sorted({fingerprint(parameter.detach()) for parameter in network.parameters()}))[:16]


@contextlib.contextmanager
def _laid_out(fig: Figure) -> Iterator[None]:
    """Lay a figure out once for all formats, at positions free of the last digits that each layout moves anew."""
    engine = fig.get_layout_engine()
    if engine is None:
        yield
        return
    for _ in range(2):  # a colorbar takes its place in the second layout only
        fig.draw_without_rendering()
    fig.set_layout_engine("none")
    try:
        _round_positions(fig)
        yield
    finally:
        fig.set_layout_engine(engine)


def _round_positions(fig: Figure) -> None:
    for ax in fig.axes:
        in_layout = ax.get_in_layout()  # setting a position takes axes out
        left, bottom, width, height = (round(number, 6) for number in ax.get_position(original=True).bounds)
        ax.set_position((left, bottom, width, height))
        ax.set_in_layout(in_layout)


def _facts(networks: nn.Module | Mapping[str, nn.Module] | None, seed: int | None) -> str:
    """Weights and seed as one line."""
    named = {"weights": networks} if isinstance(networks, nn.Module) else networks
    if named is not None and not (
        isinstance(named, Mapping) and all(isinstance(network, nn.Module) for network in named.values())
    ):
        raise ResnetPathsError("networks", type(networks).__name__, "a network, or a mapping from names to networks")
    facts = [f"{name} sha256 {weights_hash(network)}" for name, network in (named or {}).items()]
    return "; ".join(facts if seed is None else [*facts, f"seed {seed}"])


def _is_positive(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < float("inf")
