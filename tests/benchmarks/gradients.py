"""The gradient by path length: the paper's protocol as one writes it with autograd, and this project's three methods.

Two estimates are taken to one relative standard error (10 %) at every length. Where that would take hours, the number
of paths that it needs is extrapolated from the error of fewer, which falls as one over the square root of their number:
such rows say so. The exact split has no such error; it is compared with the block VJPs that it is made of.

    mean norm over the paths of a length (the paper's)    this project, sampled | by hand, a path at a time
    energy of the paths of a length                       this project, energy  | by hand, sampled paths
    sum over the paths of a length                        this project, exact   | as many block VJPs by autograd
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.gradients.passes import Place, Point
from resnet_paths.paths import sample_paths
from resnet_paths.zoo import load_network
from tests.benchmarks.lesions import fashion_images
from tests.benchmarks.table import row
from tests.benchmarks.workers import timed, workers

PART = "gradients"
ERROR = 0.1
"""Relative standard error at which estimates are compared."""
WORTH = 1e-3
"""Lengths that hold less than this share of the energy are left out where the energy is compared."""


@dataclass(frozen=True)
class Contender:
    """A function from (chain, images, labels, settings, repeat) to an answer, its seconds among it."""

    measure: Callable[..., dict[str, Any]]

    def prepare(self, settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        model = load_network(settings["network"]).eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)  # gradients of states alone, as in the paper
        chain = rp.unravel(model, torch.zeros(2, 1, 28, 28))
        images, labels = fashion_images(0, settings["images"])
        rp.gradient_by_path_length(chain, images[:2], labels[:2], max_length=1, progress=False)

        def answer(request: dict[str, Any]) -> dict[str, Any]:
            seconds, memory, found = timed(lambda: self.measure(chain, images, labels, settings, request["repeat"]))
            return {"seconds": seconds, "memory": memory} | found

        return answer


def sampled(chain: rp.ResidualChain, images: Any, labels: Any, settings: dict[str, Any], repeat: int) -> dict[str, Any]:
    """Some paths of each length, and how many it would take."""
    draws = settings["paths"]
    frame = rp.gradient_by_path_length(
        chain, images, labels, method="sampled", num_draws=draws, with_respect_to="stem", progress=False,
        generator=torch.Generator().manual_seed(repeat),
    )  # fmt: skip
    relative = (frame["mean_path_gradient_norm_se"] / frame["mean_path_gradient_norm"]).fillna(0).to_numpy()
    return {"needed": needed(relative, draws).tolist(), "draws": draws}


def needed(relative_error: np.ndarray, draws: int) -> np.ndarray:
    """Draws of each length that bring relative errors seen with `draws` down to `ERROR`; at least 2."""
    return np.maximum(2, np.ceil(draws * (relative_error / ERROR) ** 2))


def by_hand(chain: rp.ResidualChain, images: Any, labels: Any, settings: dict[str, Any], repeat: int) -> dict[str, Any]:
    """Seconds of one path of each length, a forward and a backward pass for each."""
    generator, seconds = torch.Generator().manual_seed(repeat), []
    for length in range(len(chain) + 1):
        (path,) = sample_paths(chain, length, 1, generator)
        start = time.perf_counter()
        gradient_of_path(chain, images, labels, path)
        seconds.append(time.perf_counter() - start)
    return {"seconds_by_length": seconds}


def gradient_of_path(chain: rp.ResidualChain, images: torch.Tensor, labels: torch.Tensor, path: tuple) -> torch.Tensor:
    """The paper's measurement with autograd: a full forward pass, one path backward; gradient at the stem's output."""
    state = chain.stem(images).detach().requires_grad_()
    start = state
    for block, taken in zip(chain, path, strict=True):
        shared = block.pre(state)
        skip, branch = block.skip(shared), block.branch(shared)
        state = block.post(skip.detach() + branch if taken else skip + branch.detach())
    loss = F.cross_entropy(chain.head(state), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, start, allow_unused=True)
    return gradient


def energy(chain: rp.ResidualChain, images: Any, labels: Any, settings: dict[str, Any], repeat: int) -> dict[str, Any]:
    """To the relative standard error itself, nothing extrapolated; the sums over paths come with it."""
    frame = rp.gradient_by_path_length(
        chain, images, labels, method="energy", relative_error=ERROR / 2, with_respect_to="stem", progress=False,
        generator=torch.Generator().manual_seed(repeat),
    )  # fmt: skip
    # The norm is the root of the energy: half the relative error.
    return {"draws": int(frame.attrs["num_draws"]), "vjps": int(frame.attrs["num_block_vjps"])}


def exact(chain: rp.ResidualChain, images: Any, labels: Any, settings: dict[str, Any], repeat: int) -> dict[str, Any]:
    """All lengths."""
    frame = rp.gradient_by_path_length(chain, images, labels, with_respect_to="stem", progress=False)
    return {"vjps": int(frame.attrs["num_block_vjps"])}


def ordinary(
    chain: rp.ResidualChain, images: Any, labels: Any, settings: dict[str, Any], repeat: int
) -> dict[str, Any]:
    """What n (n + 1) / 2 block VJPs take by autograd: that of block i is timed, and counted n - i times."""
    n = len(chain)
    with torch.no_grad():
        states = list(itertools.accumulate(chain, lambda state, block: block(state), initial=chain.stem(images)))
    last = states[-1].requires_grad_()
    (cotangent,) = torch.autograd.grad(F.cross_entropy(chain.head(last), labels, reduction="sum"), last)
    total = 0.0
    for index in reversed(range(n)):
        state = states[index].detach().requires_grad_()
        output, seconds = chain[index](state), []
        for _ in range(2):
            start = time.perf_counter()
            (below,) = torch.autograd.grad(output, state, cotangent, retain_graph=True)
            seconds.append(time.perf_counter() - start)
        cotangent = below
        total += min(seconds) * (n - index)
    return {"seconds": total, "vjps": n * (n + 1) // 2}


def spread(chain: rp.ResidualChain, images: Any, labels: Any, settings: dict[str, Any], repeat: int) -> dict[str, Any]:
    """Paths that it takes to estimate the energy of each length by uniform sampling; its own time is not used."""
    n, few = len(chain), slice(0, 4)
    point = next(Place.of(chain, "stem").points(images[few], labels[few], None, 2**34, n + 1))
    mean, variance = variance_of_sampling(point, n, settings["paths"], torch.Generator().manual_seed(0))
    energies = mean * np.array([math.comb(n, k) for k in range(n + 1)], dtype=float)
    worth = energies >= WORTH * energies.sum()
    return {"needed": np.where(worth, np.maximum(2, np.ceil(variance / ERROR**2)), 0).tolist()}


def variance_of_sampling(
    point: Point, n: int, samples: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mean, and relative variance under uniform sampling, of a path's energy, by length.

    A few paths hold most of the energy: among uniformly drawn ones they are missing, and the variance with them. So
    paths are drawn in proportion to a fitted product of block gains (conditional Bernoulli sampling), then weighted.
    """

    def energies(paths: list[tuple]) -> np.ndarray:
        chunks = [paths[first : first + 100] for first in range(0, len(paths), 100)]
        return np.concatenate([(point.norms(point.of_paths(chunk))[0][:, 0] ** 2).mean(1) for chunk in chunks])

    pilot = [path for k in range(1, n) for path in sample_paths(n, k, 20, generator)]
    logs = np.log(np.maximum(energies(pilot), 1e-250))
    design = np.column_stack([np.array(pilot, dtype=float), np.ones(len(pilot))])
    gains = np.exp(1.5 * np.linalg.lstsq(design, logs, rcond=None)[0][:n])
    gains /= np.exp(np.log(gains).mean())
    sums = [np.eye(1, n + 1)[0]]  # sums[i][k]: elementary symmetric polynomial of the gains of blocks i, i + 1, ...
    for gain in gains[::-1]:
        sums.insert(0, sums[0] + gain * np.roll(sums[0], 1) * (np.arange(n + 1) > 0))
    means, variances = np.zeros((2, n + 1))
    for k in range(n + 1):
        paths, weights = [], []
        for uniforms in torch.rand(samples, n, generator=generator, dtype=torch.float64).tolist():
            path, left = [], k
            for i, uniform in enumerate(uniforms):
                taken = left > 0 and uniform < gains[i] * sums[i + 1][left - 1] / sums[i][left]
                path.append(bool(taken))
                left -= taken
            paths.append(tuple(path))
            weights.append(sums[0][k] / math.comb(n, k) / np.prod(gains[np.array(path)]))
        found = energies(paths)
        means[k] = np.mean(found * weights)
        variances[k] = np.mean(found**2 * weights) / means[k] ** 2 - 1
    return means, np.maximum(variances, 0)


CONTENDERS = {
    "sampled": Contender(sampled), "by hand": Contender(by_hand), "energy": Contender(energy),
    "exact": Contender(exact), "block VJPs": Contender(ordinary), "spread": Contender(spread),
}  # fmt: skip


def run(options: Any) -> list[dict[str, Any]]:
    """Rows of the three comparisons."""
    settings = {
        "network": options.network, "threads": options.threads, "images": 2 if options.quick else 4,
        "paths": 4 if options.quick else 20,
    }  # fmt: skip
    repeats = 2 if options.quick else 3
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    with workers(PART, dict.fromkeys(CONTENDERS, Path(options.python)), settings) as running:
        for repeat in range(repeats):
            print(f"gradients: repeat {repeat + 1} of {repeats}", flush=True)
            for worker in running:
                if worker.contender != "spread" or repeat == 0:
                    answer = worker.ask(repeat=repeat)
                    if answer is None:
                        raise RuntimeError(f"{worker.contender}: {worker.reason}")
                    answers[worker.contender].append(answer)
    return rows_of(answers, f"{options.network}, {settings['images']} images")


def rows_of(answers: dict[str, list[dict[str, Any]]], what: str) -> list[dict[str, Any]]:
    """The table of what the contenders answered."""
    lengths = np.arange(len(answers["by hand"][0]["seconds_by_length"]))
    by_hand_seconds = [np.array(a["seconds_by_length"]) for a in answers["by hand"]]

    def compared(task: str, ours: tuple[str, Any, str], theirs: tuple[str, Any, str], names: tuple[str, str]) -> Any:
        """Two rows; each of `ours` and `theirs` is a name, seconds and a note."""
        return [
            row(
                PART, f"{task}, {what}", name, "seconds", seconds, np.array(seconds) / np.array(ours[1]), note=note,
                memory=max(a["memory"] for a in answers[worker]),
            )
            for (name, seconds, note), worker in zip((ours, theirs), names, strict=True)
        ]  # fmt: skip

    def seconds_of(name: str, times: float = 1) -> list[float]:
        return [a["seconds"] * times for a in answers[name]]

    autograd = "the paper's protocol by autograd"
    paths = np.median([a["needed"] for a in answers["sampled"]], axis=0)
    share = paths.sum() / (answers["sampled"][0]["draws"] * len(lengths))
    note = f"{vjps(paths)} block VJPs; {paths.sum():.3g} paths for {ERROR:.0%} at each length, extrapolated from fewer"
    rows = compared(
        "mean norm over the paths of each length",
        ("this project, sampled", seconds_of("sampled", share), note),
        (autograd, [float(s @ paths) for s in by_hand_seconds], note),
        ("sampled", "by hand"),
    )
    paths = np.array(answers["spread"][0]["needed"])
    draws = " to ".join(map(str, sorted({a["draws"] for a in answers["energy"]})))
    note = (
        f"{vjps(paths)} block VJPs; {paths.sum():.3g} paths for {ERROR:.0%} at each length with a thousandth of the "
        "energy, extrapolated from fewer"
    )
    rows += compared(
        "energy of the paths of each length",
        ("this project, energy", seconds_of("energy"), f"{answers['energy'][0]['vjps']} block VJPs; {draws} draws"),
        (autograd, [float(s @ paths) for s in by_hand_seconds], note),
        ("energy", "by hand"),
    )
    count = answers["exact"][0]["vjps"]
    return rows + compared(
        "sum over all paths of each length",
        ("this project, exact", seconds_of("exact"), f"{count} block VJPs"),
        (
            "as many block VJPs by autograd", seconds_of("block VJPs"),
            f"{answers['block VJPs'][0]['vjps']} block VJPs, one by one, nothing added up: no peer splits exactly",
        ),
        ("exact", "block VJPs"),
    )  # fmt: skip


def vjps(paths: np.ndarray) -> str:
    """Block VJPs of so many paths of each length: one for each branch on a path."""
    return f"{float(paths @ np.arange(len(paths))):.3g}"
