"""What starting costs: importing the package beyond importing torch, and the command line's help."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.table import ROOT, row

PART = "startup"
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import torch, resnet_paths": ["-c", "import torch, resnet_paths"],
    "import all that a study needs": ["-c", "import resnet_paths as rp; rp.unravel, rp.lesion_study, rp.load_network"],
    "resnet-paths --help": ["--help"],
}
MOST = {"import torch, resnet_paths": 0.3, "resnet-paths --help": 0.5}
"""Seconds allowed; for the import, beyond that of torch."""


def seconds_of(command: list[str]) -> float:
    """Of a fresh process."""
    program = Path(sys.executable).with_name("resnet-paths") if command == ["--help"] else sys.executable
    start = time.perf_counter()
    subprocess.run([program, *command], capture_output=True, check=True, cwd=ROOT)
    return time.perf_counter() - start


def run(options: Any) -> list[dict[str, Any]]:
    """Rows of all commands, in turns; the first round, which fills the file cache, is left out."""
    repeats = 2 if options.quick else 8
    rounds = [{name: seconds_of(command) for name, command in COMMANDS.items()} for _ in range(repeats + 1)][1:]
    rows = []
    for name in COMMANDS:
        seconds = [one[name] for one in rounds]
        if "torch," in name or "study" in name:
            seconds = [one[name] - one["import torch"] for one in rounds]
        task, note = "seconds of a fresh process", ""
        if name in MOST:
            note = f"{'within' if statistics.median(seconds) <= MOST[name] else 'over'} {MOST[name]} s"
        shown = name if name in ("import torch", "resnet-paths --help") else f"{name}, beyond torch"
        rows.append(row(PART, task, shown, "seconds", seconds, note=note))
    return rows
