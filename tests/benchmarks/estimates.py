"""How good the estimates over single paths are on a ResNet-110: ``python -m tests.benchmarks.estimates``.

A long run of weighted paths is the reference, and disjoint parts of it are the runs whose intervals are counted. How
many block VJPs weighted paths, uniform paths and random signs take to a true error of 10 % follows from the variance
about the reference. What populations of paths take follows from their own standard errors in one run. About ten minutes
on one core.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import pandas as pd
import torch

import resnet_paths as rp
from resnet_paths.core.paths import path_polynomial
from resnet_paths.gradients.estimates import Draws, measure_weighted
from resnet_paths.gradients.importance import WeightedNorms, mean_of
from resnet_paths.gradients.points import Place, num_block_vjps
from resnet_paths.gradients.populations import measure_populations
from resnet_paths.zoo import load_network
from tests.benchmarks.lesions import fashion_images

ERROR = 0.1
WORTH = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.estimates", description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="preact-resnet-110")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--paths", type=int, default=2048, help="paths of each length in the long run")
    parser.add_argument("--part", type=int, default=256, help="paths of each length in the runs that are judged")
    parser.add_argument("--signs", type=int, default=128, help="draws of signs")
    parser.add_argument("--longest", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_network(options.network).eval()
    chain = rp.unravel(model, torch.zeros(2, 1, 28, 28))
    place = Place.of(chain, "stem")
    images, labels = fashion_images(0, options.images)
    counts = dict(enumerate(path_polynomial(chain)[: options.longest + 1]))
    draws = Draws(options.paths, ERROR, torch.Generator().manual_seed(0))
    measured = measure_weighted(place, lambda rows: place.points(images, labels, None, 2**34, rows), counts, draws)
    (found,) = measured.weighted
    point = next(iter(place.points(images, labels, None, 2**34, 8 * (options.longest + 1))))
    signs = energies_by_signs(point, options.longest, options.signs)
    frame, coverage = judged(found, signs, counts, options.part)
    pd.set_option("display.width", 250)
    pd.set_option("display.max_columns", 50)
    print(frame.round(3).to_string(index=False))
    norm, energy = (frame[frame[f"{name}_share"] >= WORTH] for name in ("norm", "energy"))
    cost = num_block_vjps(((False, True),) * len(chain), options.longest)
    needed = {
        "weighted paths, both": both(norm, energy),
        "weighted paths, mean norm": float(norm.path_length @ norm.norm_weighted),
        "weighted paths, energy": float(energy.path_length @ energy.energy_weighted),
        "uniform paths, mean norm": float(norm.path_length @ norm.norm_uniform),
        "uniform paths, energy": float(energy.path_length @ energy.energy_uniform),
        "random signs, energy": cost * float(energy.energy_signs.max()),
    }
    for name, vjps in needed.items():
        print(f"{name:28} {vjps:12,.0f} block VJPs to {ERROR:.0%}, {vjps / needed['weighted paths, both']:.1f} times")
    for name, vjps in of_populations(place, images, labels, counts, norm, energy).items():
        print(f"populations, {name:15} {vjps:12,.0f} block VJPs to {ERROR:.0%} at every length that holds a thousandth")
    for name, rows in (("norm", norm), ("energy", energy)):
        held = np.mean([coverage[name][k] for k in rows.path_length if coverage[name][k]])
        print(f"95 % intervals of {options.part} weighted paths, {name}: {held:.1%} hold the reference")


def of_populations(place, images, labels, counts, norm: pd.DataFrame, energy: pd.DataFrame) -> dict[str, float]:
    """Block VJPs of populations until the worst length is known to the error, from the errors that one run states."""
    draws = Draws(None, ERROR, torch.Generator().manual_seed(2))
    measured = measure_populations(place, lambda rows: place.points(images, labels, None, 2**34, rows), counts, draws)
    (found,) = measured.weighted
    needed = {}
    for power, name, rows in ((1, "mean norm", norm), (2, "energy", energy)):
        means = [mean_of([found[k]], power, found[k].scale) for k in rows.path_length]
        needed[name] = measured.num_path_vjps * max((mean.se / mean.value / ERROR) ** 2 for mean in means)
    return needed | {"both": max(needed.values())}


def both(norm: pd.DataFrame, energy: pd.DataFrame) -> float:
    """Block VJPs of one run that measures both: the larger number of paths at each length."""
    paths = pd.concat([norm.set_index("path_length").norm_weighted, energy.set_index("path_length").energy_weighted])
    most = paths.groupby(level=0).max()
    return float(most.index.to_numpy() @ most.to_numpy())


def energies_by_signs(point, longest: int, number: int) -> np.ndarray:
    """Estimates of the energy from single draws of signs, mean over images, [length, draw]."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(number // 8):
        bits = [torch.randint(2, (8, point.num_examples), generator=generator) for _ in range(len(point.place.chain))]
        signs = iter(2 * b - 1 for b in bits)
        found.append((point.norms(point.by_length(longest, 8, lambda signs=signs: next(signs)))[0] ** 2).mean(2))
    return np.concatenate(found, 1)


def judged(
    found: list[WeightedNorms], signs: np.ndarray, counts: dict[int, int], part: int
) -> tuple[pd.DataFrame, dict[str, list[list[bool]]]]:
    """What each length takes to the error, and which intervals of parts of the run hold the mean of all of it."""
    rows, coverage = [], {"norm": [], "energy": []}
    for k, one in enumerate(found):
        row = {"path_length": k}
        scale = float(one.norms.max())
        norms = one.norms / scale
        for power, name in ((1, "norm"), (2, "energy")):
            mean = mean_of([one], power, scale)
            products = one.weights * (norms**power).mean(1)
            uniform = float((one.weights * (norms**power).mean(1) ** 2).mean())
            row[name] = mean.value * scale**power
            row[f"{name}_share"] = math.log(counts[k]) + math.log(row[name])
            row[f"{name}_weighted"] = 0.0 if one.complete else products.var() / mean.value**2 / ERROR**2
            row[f"{name}_uniform"] = (uniform / mean.value**2 - 1) / ERROR**2
            pieces = [] if one.complete else [slice(i, i + part) for i in range(0, len(one.weights) - part + 1, part)]
            means = [mean_of([WeightedNorms(one.weights[s], one.norms[s], False)], power, scale) for s in pieces]
            coverage[name].append([m.low <= mean.value <= m.high for m in means])
        true = row["energy"] * counts[k]
        row["energy_signs"] = float(((signs[k] - true) ** 2).mean()) / true**2 / ERROR**2
        rows.append(row)
    frame = pd.DataFrame(rows)
    for name in ("norm", "energy"):
        shares = np.exp(frame[f"{name}_share"] - frame[f"{name}_share"].max())
        frame[f"{name}_share"] = shares / shares.sum()
    return frame.drop(columns=["norm", "energy"]), coverage


if __name__ == "__main__":
    main()
