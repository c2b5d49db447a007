"""The one command: ``python -m tests.benchmarks``.

Makes an environment for the other libraries (``.venv-benchmarks``), runs every part, prints ratios with their spread
over interleaved repeats, and writes ``data/benchmarks.csv`` and ``figures/benchmarks`` (PDF, SVG, PNG). Parts that were
not asked for keep their rows. About an hour on two cores that do nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import time
from pathlib import Path

import pandas as pd
import torch

import resnet_paths as rp
from tests.benchmarks import peers, table

PARTS = ("lesions", "studies", "tokens", "gradients", "scaling", "limit", "startup", "unraveling", "neighbour")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="these parts; all by default")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see whether it runs; no numbers to quote")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="without the other libraries")
    parser.add_argument("--network", help="a pre-activation ResNet of the project; preact-resnet-110 by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="the CSV file; data/benchmarks.csv, with --quick none")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the CSV file, and end")
    options = parser.parse_args()
    output = options.output or (None if options.quick else table.CSV)
    if options.markdown:
        print(table.markdown(pd.read_csv(options.output or table.CSV)))
        return
    options.network = options.network or ("preact-resnet-20" if options.quick else "preact-resnet-110")
    options.python = sys.executable
    torch.set_num_threads(options.threads)
    for name in options.only or PARTS:
        start = time.perf_counter()
        rows = importlib.import_module(f"tests.benchmarks.{name}").run(options)
        frame = table.stamped(rows, versions(options.peers and name == "lesions"), options.threads)
        print(table.text(frame))
        machine = "; ".join(frame[["machine", "features"]].iloc[0])
        print(f"\n{name} took {time.perf_counter() - start:.0f} s; {machine}", flush=True)
        if output is not None:  # after each part, so that nothing is lost if a later one fails
            old = pd.read_csv(output) if output.exists() else None
            table.write(table.merged(old, frame), output)
    if output is not None:
        draw(pd.read_csv(output))


def versions(with_peers: bool) -> dict[str, str]:
    """Of Python, torch and, where they were run, the peers."""
    found = {"Python": platform.python_version(), "torch": torch.__version__, "resnet_paths": rp.__version__}
    return found | (peers.install()[0] if with_peers else {})


def draw(frame: pd.DataFrame) -> None:
    shown = frame[frame["part"] == "lesions"]
    if shown["ratio"].notna().any():
        with rp.figures.paper_style("double", aspect=0.45):
            ax = table.plot_ratios(shown)
            rp.figures.save_figure(ax.figure, table.ROOT / "figures" / "benchmarks", shown)


if __name__ == "__main__":
    main()
