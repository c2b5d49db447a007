"""What kill -9 leaves behind: ``python -m tests.benchmarks.kills [--short]``.

Studies, Dask workers, training, publishing and reproducing are killed in the middle and started again. A kill is
counted as good if all files with their final name are complete, no finished part was computed again, and the results
in the end are those of a run that nothing stopped. The table has the number of good kills of each kind; the exit status
is 1 unless all are. With ``--short`` there are fewer kills, as in the tests.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.lesions.killed_studies import kill_dask_workers, kill_drivers
from tests.reproduce.small_runs import kill_publishing, kill_reproducing, kill_training


class Kind(NamedTuple):
    """What is killed, how often, and how often in the short form."""

    kill: Callable[[int, Path], int]
    times: int
    times_in_short: int


KINDS = {
    "driver of a study with a store": Kind(kill_drivers, 20, 5),
    "Dask worker of a study": Kind(kill_dask_workers, 10, 1),
    "training": Kind(kill_training, 15, 8),
    "publish": Kind(kill_publishing, 10, 2),
    "reproduce": Kind(kill_reproducing, 10, 2),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer kills of each kind")
    parser.add_argument("--only", choices=KINDS, action="append", help="these kinds; all by default")
    options = parser.parse_args()
    print("| killed | kills | identical results | seconds |")
    print("| --- | ---: | ---: | ---: |")
    failed = 0
    for name in options.only or KINDS:
        kill, *numbers = KINDS[name]
        times, start = numbers[options.short], time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            try:
                good = kill(times, Path(scratch))
            except Exception:
                traceback.print_exc()
                good = 0
        failed += good != times
        print(f"| {name} | {times} | {good} of {times} | {time.perf_counter() - start:.0f} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
