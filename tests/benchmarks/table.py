"""The rows that all parts make, and what is made of them: CSV, text, Markdown and a figure."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from resnet_paths._utils.files import write_then_rename

ROOT = Path(__file__).parents[2]
CSV = ROOT / "data" / "benchmarks.csv"
COLUMNS = [
    "part",
    "task",
    "contender",
    "quantity",
    "value",
    "low",
    "high",
    "ratio",
    "ratio_low",
    "ratio_high",
    "peak_memory_mib",
    "note",
    "machine",
    "features",
    "versions",
    "date",
]
"""`value` is a median, `low` and `high` the extremes of the repeats, or one standard error about a fit; `ratio` is the
median over repeats of the contender's time over this project's in the same repeat; `features` are the processor's."""
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
"""Names in the flags of /proc/cpuinfo that decide which kernels PyTorch and oneDNN take, of x86 and then of Arm."""


def row(
    part: str,
    task: str,
    contender: str,
    quantity: str,
    values: Sequence[float] | float = (),
    ratios: Sequence[float] = (),
    *,
    note: str = "",
    memory: float | None = None,
) -> dict[str, Any]:
    """One row; without values it says in `note` why there are none."""
    value, low, high = middle(np.atleast_1d(values))
    ratio, ratio_low, ratio_high = middle(ratios)
    return {
        "part": part,
        "task": task,
        "contender": contender,
        "quantity": quantity,
        "value": value,
        "low": low,
        "high": high,
        "ratio": ratio,
        "ratio_low": ratio_low,
        "ratio_high": ratio_high,
        "peak_memory_mib": memory,
        "note": note,
    }


def middle(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Median, lowest and highest; NaN where there is nothing."""
    if not len(values):
        return (float("nan"),) * 3
    return float(np.median(values)), float(np.min(values)), float(np.max(values))


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """Its name."""
    return next(iter(_lines(info, "model name")), platform.machine())


def features(info: Path = Path("/proc/cpuinfo")) -> str:
    """Vector instructions that PyTorch's kernels use, and which of `FEATURES` oneDNN finds in the processor.

    bfloat16 is much faster than float32 with ``amx_bf16``, up to twice as fast with ``avx512_bf16``, and not faster
    with neither. Where the system has no list of flags, what PyTorch uses is all that is known.
    """
    found = _known_flags(info)
    used = f"PyTorch uses {torch.backends.cpu.get_cpu_capability()}"
    return f"{used}; {' '.join(found)}" if found else used


def bfloat16_support(info: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor has for bfloat16, for the notes of rows in that precision."""
    found = _known_flags(info)
    for flag, what in (
        ("amx_bf16", "matrix units for bfloat16 (amx_bf16)"),
        ("avx512_bf16", "vector instructions for bfloat16 (avx512_bf16), no matrix units"),
        ("bf16", "instructions for bfloat16 (bf16)"),
    ):
        if flag in found:
            return what
    return "a processor without instructions for bfloat16" if found else "unknown what the processor has for bfloat16"


def _known_flags(info: Path) -> list[str]:
    """Which of `FEATURES` the processor has."""
    flags = {flag for name in ("flags", "Features") for line in _lines(info, name) for flag in line.split()}
    return [flag for flag in FEATURES if flag in flags]


def _lines(info: Path, name: str) -> list[str]:
    """Values of this name, one for each core."""
    text = info.read_text() if info.exists() else ""
    parts = (line.partition(":") for line in text.splitlines())
    return [value.strip() for key, _, value in parts if key.strip() == name]


def stamped(rows: list[dict[str, Any]], versions: dict[str, str], threads: int) -> pd.DataFrame:
    """Rows with the machine, its processor's features, the versions and the date of the measurement."""
    told = {
        "machine": f"{processor()}, {threads} threads",
        "features": features(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    return pd.DataFrame([made | told for made in rows], columns=COLUMNS)


def merged(old: pd.DataFrame | None, new: pd.DataFrame) -> pd.DataFrame:
    """New rows in place of the old ones of the same parts."""
    if old is None or old.empty:
        return new
    kept = old[~old["part"].isin(new["part"].unique())]
    # Rows of earlier versions have no features.
    return pd.concat([kept, new], ignore_index=True).reindex(columns=COLUMNS) if len(kept) else new


def write(frame: pd.DataFrame, path: Path) -> None:
    """The frame as CSV, whole or not at all."""
    with write_then_rename(path) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.5g")


def text(frame: pd.DataFrame) -> str:
    """What is printed: a line a row."""
    lines = []
    for (part, task), rows in frame.groupby(["part", "task"], sort=False):
        lines.append(f"\n{part}: {task}")
        for r in rows.itertuples():
            spread = f" ({r.low:.4g} to {r.high:.4g})" if r.low != r.high else ""
            shown = f"{r.value:.4g}{spread} {r.quantity}" if pd.notna(r.value) else "-"
            ratio = f"{r.ratio:.2f}x ({r.ratio_low:.2f} to {r.ratio_high:.2f})" if pd.notna(r.ratio) else ""
            memory = f"{r.peak_memory_mib:.0f} MiB" if pd.notna(r.peak_memory_mib) else ""
            lines.append(f"  {r.contender:58} {shown:44} {ratio:26} {memory:10} {r.note}".rstrip())
    return "\n".join(lines)


def markdown(frame: pd.DataFrame) -> str:
    """The tables of the documentation: ratios of lesions and gradients, one a task, and folded below them all else."""
    known = frame["ratio"].notna() | frame["value"].isna()
    lines = []
    shown = pd.concat([frame[frame["part"].eq(part) & known] for part in ("lesions", "gradients")])
    for task, rows in shown.groupby("task", sort=False):
        lines += _heading(task)
        lines += ["| by | time over this project's | peak memory | notes |", "| --- | ---: | ---: | --- |"]
        for r in rows.itertuples():
            ratio = f"{r.ratio:.3g} ({r.ratio_low:.3g} to {r.ratio_high:.3g})" if pd.notna(r.ratio) else "-"
            memory = f"{r.peak_memory_mib:.0f} MiB" if pd.notna(r.peak_memory_mib) else "-"
            lines.append(f"| {r.contender} | {ratio} | {memory} | {_note(r)} |")
        lines.append("")
    rest = _exponents(frame[frame["quantity"] == "exponent"])
    rest += _values(frame[frame["task"].isin(_shown_as_values(frame))])
    if rest:
        title = "Growth of time and memory, limits of the machine, start-up time"
        lines += ["<details>", f"<summary>{title}</summary>", "", *rest, "</details>", ""]
    where = frame.reindex(columns=["machine", "features", "versions", "date"]).astype(object).fillna("")
    told = frame["part"].groupby([where[name] for name in where], sort=False).unique()
    lines += [f"{', '.join(parts)}: {'; '.join(filter(None, keys))}.  " for keys, parts in told.items()]
    return "\n".join(lines).rstrip()


def _heading(task: object) -> list[str]:
    return [f"**{str(task)[0].upper()}{str(task)[1:]}**", ""]


def _note(r: Any) -> str:
    return "" if pd.isna(r.note) else str(r.note).replace("|", "\\|")


def _exponents(rows: pd.DataFrame) -> list[str]:
    """One table of all curves."""
    head = "| exponent, one standard error (between the last two points) | of time | of peak memory |"
    lines = [head, "| --- | --- | --- |"]
    for task, of_task in rows.groupby("task", sort=False):
        told = {}
        for r in of_task.itertuples():
            spread = f" ± {r.high - r.value:.2f}" if pd.notna(r.high) else ""
            told[r.contender] = f"{r.value:.2f}{spread} ({str(r.note).rpartition(' ')[2]})"
        of_time, of_memory = (told.get(f"exponent of {quantity}", "-") for quantity in ("time", "peak memory"))
        lines.append(f"| {task} | {of_time} | {of_memory} |")
    return [*lines, ""] if len(rows) else []


def _shown_as_values(frame: pd.DataFrame) -> list[str]:
    """Tasks of which each row is shown with its value."""
    tasks = frame.loc[
        frame["part"].isin(["scaling", "limit", "startup", "studies", "tokens", "unraveling", "neighbour"]), "task"
    ].unique()
    curves = frame.loc[frame["part"].eq("scaling") & frame["quantity"].eq("seconds"), "task"].unique()
    return [task for task in tasks if task not in curves]


def _values(rows: pd.DataFrame) -> list[str]:
    lines = []
    for task, of_task in rows.groupby("task", sort=False):
        lines += [*_heading(task), "| | | notes |", "| --- | ---: | --- |"]
        for r in of_task.itertuples():
            spread = f" ({r.low:.3g} to {r.high:.3g})" if r.low != r.high else ""
            value = f"{r.value:.3g}{spread} {r.quantity}" if pd.notna(r.value) else "-"
            note = [_note(r)] if _note(r) else []
            note += [f"ratio {r.ratio:.3g} ({r.ratio_low:.3g} to {r.ratio_high:.3g})"] if pd.notna(r.ratio) else []
            lines.append(f"| {r.contender} | {value} | {'; '.join(note)} |")
        lines.append("")
    return lines


def plot_ratios(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How long each contender takes, as a multiple of this project's time, with the spread of the repeats."""
    ax = ax or plt.subplots()[1]
    shown = frame[frame["ratio"].notna()].reset_index(drop=True)
    y = np.arange(len(shown))[::-1]
    ours = shown["contender"].str.startswith("this project")
    for mask, label, marker in ((ours, "this project", "o"), (~ours, "others", "s")):
        part, at = shown[mask], y[mask]
        spread = [part["ratio"] - part["ratio_low"], part["ratio_high"] - part["ratio"]]
        ax.errorbar(part["ratio"], at, xerr=spread, fmt=marker, linestyle="none", label=label)
    ax.axvline(1, color="0.75", zorder=0)
    ax.set_yticks(y, shown["contender"])
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("time over that of this project in float32")
    ax.legend(frameon=False)
    return ax
