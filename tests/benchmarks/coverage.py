"""How often the 95 % intervals of estimates over paths hold the truth: ``python -m tests.benchmarks.coverage``.

Random chains of at most ten blocks are compared with enumeration. On a ResNet-110 each run of populations is compared
with the mean of the others, and runs of other methods with the mean of all runs of populations; where all examples
take the same paths, which gives other numbers, with the mean of the others. From the same runs follows what an estimate
takes to a true error of 10 %. ``--write`` makes the page ``notebooks/tables/coverage.md``. An hour or more on
one core; with ``--keep FOLDER`` runs are kept there, and a later call resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import resnet_paths as rp
from resnet_paths._utils.files import write_then_rename
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.paths import enumerate_paths, path_length
from resnet_paths.gradients.points import Place
from resnet_paths.zoo import load_network
from tests.benchmarks.lesions import fashion_images
from tests.gradients.gradient_reference import batch, build
from tests.gradients.test_weighted_paths import random_recipe

PAGE = Path(__file__).parents[2] / "notebooks" / "tables" / "coverage.md"
ERROR, WORTH, Z, LONGEST, NOMINAL = 0.1, 1e-3, 1.96, 20, 0.95
POWERS = {"mean_path_gradient_norm": 1, "rms_path_gradient_norm": 2}
POPULATIONS = "weighted paths, each example its own"
SAME = "weighted paths, the same for all examples"
METHODS = {
    POPULATIONS: {"method": "sampled"},
    SAME: {"method": "sampled", "per_example": False},
    "uniform paths": {"method": "sampled", "paths": "uniform", "num_draws": 40},
    "random signs": {"method": "energy", "paths": "signs"},
}
INTRO = """\
# Coverage of the intervals

`gradient_by_path_length` states standard errors of what it estimates and, for weighted paths, 95 % intervals; for
uniform paths and random signs the interval is taken as the estimate plus or minus 1.96 standard errors. The table shows
how often the intervals held the truth, at the lengths that hold at least a thousandth of the sum over lengths, without
those that are exact; and the true relative errors over the stated ones, each as a root mean square.

`.venv/bin/python -m tests.benchmarks.coverage --write` measures this and writes the page (an hour or more).

<!-- Made by python -m tests.benchmarks.coverage --write. -->
"""
COLUMNS = ["method", "quantity", "path_length", "error", "stated", "held"]
Judged = pd.DataFrame
"""One row for each interval: ``method``, ``quantity``, ``path_length``, ``error`` (of the quantity whose mean is
estimated, relative), ``stated`` (likewise) and ``held``."""


def judged(method: str, frame: pd.DataFrame, truth: dict[str, np.ndarray], spread: float = 1.0) -> Judged:
    """Every interval of one run at the lengths that hold a thousandth, unless it is exact.

    Args:
        method: Its name.
        frame: From `gradient_by_path_length`.
        truth: Of each quantity, or a reference.
        spread: By what the reference's own error makes the difference larger than the run's.

    Returns:
        The intervals.
    """
    rows = []
    for name, power in POWERS.items():
        if name not in frame or name not in truth:
            continue
        found, se, true = frame[name].to_numpy(), frame[f"{name}_se"].to_numpy(), truth[name]
        low = frame.get(f"{name}_low", frame[name] - Z * frame[f"{name}_se"]).to_numpy()
        high = frame.get(f"{name}_high", frame[name] + Z * frame[f"{name}_se"]).to_numpy()
        totals = power * np.log(true) + [math.log(count) for count in frame.num_paths]
        worth = totals >= np.logaddexp.reduce(totals) + math.log(WORTH)
        expected = found - (found - true) / spread
        for i in np.flatnonzero(worth & (abs(found / true - 1) > 1e-9)):
            # The mean square is what is estimated, and its root is what the frame shows.
            error = ((found[i] / true[i]) ** power - 1) / spread
            held = low[i] <= expected[i] <= high[i]
            rows.append((method, name, int(frame.path_length[i]), error, power * se[i] / found[i], bool(held)))
    return pd.DataFrame(rows, columns=COLUMNS)


def enumerated(chain: ResidualChain, *, per_example: bool) -> dict[str, np.ndarray]:
    """The quantities of a small chain from all of its paths."""
    (point,) = Place.of(chain, "input").points(*batch(), None, 2**31, 1)
    paths = list(enumerate_paths(chain))
    norms = point.norms(point.of_paths(paths))[0][:, 0]
    if not per_example:
        norms = np.sqrt((norms**2).sum(1, keepdims=True)) / norms.shape[1]
    lengths = np.array([path_length(path) for path in paths])
    return {
        name: np.array([(norms[lengths == k] ** power).mean() ** (1 / power) for k in sorted(set(lengths.tolist()))])
        for name, power in POWERS.items()
    }


def on_chains(seeds: Iterable[int], num_repeats: int) -> Judged:
    """Intervals on random chains; what is exact where the number of draws is left to the library is drawn here.

    A few chains with large errors can dominate a root mean square: each has several runs.
    """
    found = []
    for seed in seeds:
        chain = build(random_recipe(np.random.default_rng(seed)), seed=seed)
        for method, options in METHODS.items():
            truth = enumerated(chain, per_example=options.get("per_example", True))
            drawn = {POPULATIONS: {"num_draws": 64}, SAME: {"num_draws": 256}}.get(method, {})
            generator = torch.Generator().manual_seed(seed)
            for _ in range(num_repeats):
                frame = rp.gradient_by_path_length(chain, *batch(), **options | drawn, generator=generator)
                found.append(judged(method, frame, truth))
    return pd.concat(found, ignore_index=True) if found else Judged(columns=COLUMNS)


def runs_on_network(network: str, num_images: int, runs: dict[str, int], keep: Path | None) -> dict[str, list]:
    """Frames of independent runs of every method, with the block VJPs of each."""
    chain = rp.unravel(load_network(network).eval(), torch.zeros(2, 1, 28, 28))
    images, labels = fashion_images(0, num_images)
    longest = min(LONGEST, len(chain))
    found: dict[str, list] = {method: [] for method in METHODS}
    for seed in range(max(runs.values())):
        for number, (method, options) in enumerate(METHODS.items()):
            if seed >= runs[method]:
                continue
            path = None if keep is None else keep / f"{network}-{num_images}-{number}-{seed}.json"
            if path is None or not path.exists():
                generator = torch.Generator().manual_seed(1000 * number + seed)
                frame = rp.gradient_by_path_length(
                    chain, images, labels, **options, with_respect_to="stem", max_length=longest, generator=generator
                )
                print(f"{method}, run {seed}: {frame.attrs['num_block_vjps']:,} block VJPs", flush=True)
                if path is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    attrs = {name: frame.attrs[name] for name in ("num_block_vjps", "num_examples")}
                    with write_then_rename(path) as temporary:
                        temporary.write_text(json.dumps({"attrs": attrs, "columns": frame.to_dict("list")}))
            else:
                kept = json.loads(path.read_text())
                frame = pd.DataFrame(kept["columns"])
                frame.attrs |= kept["attrs"]
            found[method].append(frame)
    return found


def mean_of_runs(frames: list[pd.DataFrame]) -> dict[str, np.ndarray]:
    """The mean over runs, of squares for the root mean square."""
    return {
        name: np.mean([frame[name].to_numpy() ** power for frame in frames], 0) ** (1 / power)
        for name, power in POWERS.items()
    }


def on_network(runs: dict[str, list[pd.DataFrame]]) -> Judged:
    """Intervals of the runs of a network, about the mean of runs that do not count themselves."""
    found: list[Judged] = []
    for method, frames in runs.items():
        for own, frame in enumerate(frames):
            if method in (POPULATIONS, SAME):
                others = [other for i, other in enumerate(frames) if i != own]
                # The variance of the others' mean adds to that of the run.
                found.append(judged(method, frame, mean_of_runs(others), math.sqrt(1 + 1 / len(others))))
            else:
                found.append(judged(method, frame, mean_of_runs(runs[POPULATIONS])))
    return pd.concat(found, ignore_index=True) if found else Judged(columns=COLUMNS)


def needed(runs: dict[str, list[pd.DataFrame]], judged_runs: Judged) -> dict[tuple[str, str], tuple[float, float]]:
    """Block VJPs to a true error of 10 % at the worst length, for every method and quantity; and those of a run.

    The true error at a single length is known poorly from few runs. Its variance is taken as the mean of the stated
    ones times the ratio of true to stated variances over all lengths.
    """
    found = {}
    for (method, name), rows in judged_runs.groupby(["method", "quantity"]):
        squares = (rows.stated**2).groupby(rows.path_length).mean()
        vjps = float(np.mean([frame.attrs["num_block_vjps"] for frame in runs[method]]))
        found[method, name] = vjps * squares.max() * error_ratio(rows) ** 2 / ERROR**2, vjps
    return found


def error_ratio(rows: Judged) -> float:
    """True errors over stated ones, root mean square."""
    return math.sqrt((rows.error**2).mean() / (rows.stated**2).mean())


def table(chains: Judged, network: Judged) -> list[str]:
    """Coverage and the ratio of true errors to stated ones, as Markdown."""
    columns, places = "intervals | coverage | true error over stated", {"chains": chains, "ResNet-110": network}
    known = {name: found for name, found in places.items() if len(found)}
    lines = [
        f"| method | quantity | {' | '.join(f'{name}: {columns}' for name in known)} |",
        f"| --- | --- | {' | '.join(['---: | ---: | ---:'] * len(known))} |",
    ]
    for method in METHODS:
        for name in POWERS:
            cells = []
            for found in known.values():
                rows = found[(found.method == method) & (found.quantity == name)]
                if len(rows):
                    cells += [f"{len(rows):,}", f"{rows.held.mean():.1%}", f"{error_ratio(rows):.2f}"]
                else:
                    cells += ["-"] * 3
            if set(cells) != {"-"}:
                lines.append(f"| {method} | `{name}` | {' | '.join(cells)} |")
    return lines


def too_low(chains: Judged, network: Judged) -> str:
    """A sentence with what has a coverage below 95 %."""
    low = []
    for place, found in (("chains", chains), ("the ResNet-110", network)):
        for method in METHODS:
            for name in POWERS:
                rows = found[(found.method == method) & (found.quantity == name)]
                if len(rows) and rows.held.mean() < NOMINAL:
                    low.append(f"{rows.held.mean():.1%} on {place} for `{name}` ({method})")
    if not low:
        return "The coverage is at least 95 % in all cases."
    return f"The coverage is below 95 % in these cases: {'; '.join(low)}."


def page(chains: Judged, num_chains: int, num_repeats: int, runs: dict[str, list[pd.DataFrame]], network: str) -> str:
    """The page of the documentation."""
    of_network = on_network(runs)
    lines = [*INTRO.splitlines(), *table(chains, of_network), "", too_low(chains, of_network)]
    if len(chains):
        lines += f"""
Chains: {num_chains} random ones of 7 to 10 blocks, {num_repeats} independent runs on each, float64, three examples,
against enumeration of all paths; populations of 64 paths, 256 weighted paths of each length where all examples share
them, 40 uniform paths.""".splitlines()
    if not len(of_network):
        return "\n".join(lines) + "\n"
    ran = {method: len(frames) for method, frames in runs.items() if frames}
    numbers = ", ".join(f"{count} of {method}" for method, count in ran.items())
    num_examples = next(frames[0] for frames in runs.values() if frames).attrs["num_examples"]
    settings = "default settings" + (" except for 40 uniform paths" if "uniform paths" in ran else "")
    compared = "A run of weighted paths is compared with the mean of the others, whose own error is allowed for"
    if set(ran) - {POPULATIONS, SAME}:
        compared += f", and the other methods with the mean of all runs of {POPULATIONS}"
    percent = f"{100 * ERROR:.0f} %"
    lines += f"""
ResNet-110: `{network}`, {num_examples} images, paths of at most {LONGEST} blocks, with respect to the output of the
stem, {settings}. Independent runs: {numbers}.
{compared}.
Intervals of one run are correlated.

Cost until the true error at the worst of these lengths, of the mean norm and of the mean square, is {percent}:

| method | quantity | block VJPs of a run | block VJPs to a true error of {percent} |
| --- | --- | ---: | ---: |""".splitlines()
    for (method, name), (vjps, of_run) in needed(runs, of_network).items():
        lines.append(f"| {method} | `{name}` | {of_run:,.0f} | {vjps:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make the page of the documentation")
    parser.add_argument("--chains", type=int, default=60, help="0 for none")
    parser.add_argument("--repeats", type=int, default=10, help="runs on each chain")
    parser.add_argument("--network", default="preact-resnet-110")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--runs", type=int, nargs=4, default=[20, 20, 20, 20], help="of each method; 0 0 0 0 for none")
    parser.add_argument("--keep", type=Path, help="folder for runs of the network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "At path lengths")
    runs = runs_on_network(options.network, options.images, dict(zip(METHODS, options.runs, strict=True)), options.keep)
    chains = on_chains(range(options.chains), options.repeats)
    text = page(chains, options.chains, options.repeats, runs, options.network)
    if options.write:
        with write_then_rename(PAGE) as temporary:
            temporary.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
