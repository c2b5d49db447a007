"""The gradient by path length: what one writes with autograd, and this project's three methods.

Two estimates are taken to one relative standard error (10 %) at every length. How many uniformly drawn paths that takes
follows from how much paths differ, which is itself estimated in each repeat anew, so that the spread of a row holds it:
rows that are extrapolated to that number say so. The exact split has no such error and is measured as a whole.

    mean norm over the paths of a length (the paper's)    this project, sampled | by hand, a path at a time
    energy of the paths of a length                       this project, weighted paths, signs | by hand, sampled paths
    sum over the paths of a length                        this project, exact   | the same split by hand
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.sampling import sample_paths
from resnet_paths.gradients.points import Place, Point
from resnet_paths.zoo import load_network
from tests.benchmarks.lesions import fashion_images
from tests.benchmarks.table import row
from tests.benchmarks.workers import timed, workers

PART = "gradients"
ERROR = 0.1
"""Relative standard error at which estimates are compared."""
WORTH = 1e-3
"""Lengths that hold less than this share of the energy are left out where the energy is compared."""
Answer = dict[str, Any]
_LITTLE = {"paths": 2, "weighted_paths": 2, "error": 0.5}


@dataclass(frozen=True)
class Contender:
    """A function from (chain, images, labels, settings, repeat) to an answer, its seconds among it if they are its own.

    Attributes:
        measure: The function.
        images: Which of the settings says how many images it is given.
    """

    measure: Callable[..., Answer]
    images: str = "images"

    def prepare(self, settings: dict[str, Any]) -> Callable[[dict[str, Any]], Answer]:
        model = load_network(settings["network"]).eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)  # gradients of states alone, as in the paper
        chain = rp.unravel(model, torch.zeros(2, 1, 28, 28))
        images, labels = fashion_images(0, settings[self.images])
        self.measure(chain, images[:1], labels[:1], settings | _LITTLE, 0)  # so that kernels are chosen already

        def answer(request: dict[str, Any]) -> Answer:
            seconds, memory, found = timed(lambda: self.measure(chain, images, labels, settings, request["repeat"]))
            return {"seconds": seconds, "memory": memory} | found

        return answer


def sampled(chain: rp.ResidualChain, images: Any, labels: Any, settings: dict[str, Any], repeat: int) -> Answer:
    """Some paths of each length."""
    draws = settings["paths"]
    rp.gradient_by_path_length(
        chain,
        images,
        labels,
        method="sampled",
        paths="uniform",
        num_draws=draws,
        with_respect_to="stem",
        progress=False,
        generator=torch.Generator().manual_seed(repeat),
    )
    return {"vjps": draws * sum(range(len(chain) + 1))}


def energy(
    chain: rp.ResidualChain, images: Any, labels: Any, settings: dict[str, Any], repeat: int, paths: str = "weighted"
) -> Answer:
    """To the relative standard error itself, nothing extrapolated; the sums over paths come with it."""
    error = settings["error"]
    frame = rp.gradient_by_path_length(
        chain,
        images,
        labels,
        method="energy",
        paths=paths,
        # For signs it is that of the norm, the root of the energy.
        relative_error=error if paths == "weighted" else error / 2,
        with_respect_to="stem",
        progress=False,
        generator=torch.Generator().manual_seed(repeat),
    )
    energies = frame["rms_path_gradient_norm"] ** 2 * frame["num_paths"].astype(float)
    return {key: int(frame.attrs[f"num_{key}"]) for key in ("draws", "block_vjps")} | {"energies": energies.tolist()}


def exact(chain: rp.ResidualChain, images: Any, labels: Any, settings: dict[str, Any], repeat: int) -> Answer:
    """All lengths."""
    frame = rp.gradient_by_path_length(chain, images, labels, with_respect_to="stem", progress=False)
    vjps = int(frame.attrs["num_block_vjps"]) + len(chain)  # the whole gradient, too
    return {"vjps": vjps, "norms": frame["summed_path_gradient_norm"].tolist()}


# What people write by hand


def by_hand(chain: rp.ResidualChain, images: Any, labels: Any, settings: dict[str, Any], repeat: int) -> Answer:
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


def states_and_cotangent(chain: rp.ResidualChain, images: Any, labels: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The state before each block and after the last one, and the gradient of the loss there."""
    with torch.no_grad():
        states = list(itertools.accumulate(chain, lambda state, block: block(state), initial=chain.stem(images)))
    last = states[-1].requires_grad_()
    (cotangent,) = torch.autograd.grad(F.cross_entropy(chain.head(last), labels, reduction="sum"), last)
    return states, cotangent


def forward_kept(chain: rp.ResidualChain, images: Any, labels: Any, settings: dict[str, Any], repeat: int) -> Answer:
    """Seconds of a block's VJP, the mean over blocks, by someone who keeps the forward pass for all paths."""
    states, cotangent = states_and_cotangent(chain, images, labels)
    total = 0.0
    for block, state in zip(reversed(list(chain)), reversed(states[:-1]), strict=True):
        state.requires_grad_()
        output = block(state)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            (below,) = torch.autograd.grad(output, state, cotangent, retain_graph=True)
            seconds.append(time.perf_counter() - start)
        cotangent = below
        total += min(seconds)
    return {"seconds_of_vjp": total / len(chain)}


def split_by_hand(chain: rp.ResidualChain, images: Any, labels: Any, settings: dict[str, Any], repeat: int) -> Answer:
    """The exact split by someone who knows how: at each block the rows of all lengths, stacked in the batch."""
    states, cotangent = states_and_cotangent(chain, images, labels)
    rows = cotangent[None]
    for block, state in zip(reversed(list(chain)), reversed(states[:-1]), strict=True):
        x = state.detach().repeat(len(rows), 1, 1, 1).requires_grad_()
        shared = block.pre(x)
        skip, branch = block.skip(shared), block.branch(shared)
        merged = (skip + branch).detach().requires_grad_()
        (above,) = torch.autograd.grad(block.post(merged), merged, rows.flatten(0, 1))
        by_branch, by_skip = (
            torch.autograd.grad(part, x, above, retain_graph=part is branch)[0].unflatten(0, (len(rows), -1))
            for part in (branch, skip)
        )
        rows = torch.cat([by_skip, torch.zeros_like(by_skip[:1])])
        rows[1:] += by_branch
    return {"vjps": sum(range(1, len(chain) + 1)), "norms": rows.flatten(2).norm(dim=2).mean(1).tolist()}


# How much paths of one length differ


def spread(chain: rp.ResidualChain, images: Any, labels: Any, settings: dict[str, Any], repeat: int) -> Answer:
    """Uniformly drawn paths that it takes to measure norm and energy of each length; its own time is not used."""
    n = len(chain)
    point = next(Place.of(chain, "stem").points(images, labels, None, 2**34, n + 1))
    generator = torch.Generator().manual_seed(repeat)
    means, variances = variance_of_sampling(point, n, settings["weighted_paths"], generator)
    energies = means[1] * np.array([math.comb(n, k) for k in range(n + 1)], dtype=float)
    worth = energies >= WORTH * energies.sum()
    paths_of_norm, paths_of_energy = np.maximum(2, np.ceil(variances / ERROR**2))
    return {
        "of_norm": paths_of_norm.tolist(),
        "of_energy": np.where(worth, paths_of_energy, 0).tolist(),
        "energies": energies.tolist(),
    }


def variance_of_sampling(
    point: Point, n: int, samples: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Means, and relative variances under uniform sampling, of a path's norm and energy: [2, n + 1] each, by length.

    A few paths hold most of the energy: among uniformly drawn ones they are missing, and the variance with them. So
    paths are drawn in proportion to a fitted product of block gains (conditional Bernoulli sampling), then weighted.
    """

    def of_paths(paths: list[tuple]) -> np.ndarray:
        chunks = [paths[first : first + 100] for first in range(0, len(paths), 100)]
        norms = np.concatenate([point.norms(point.of_paths(chunk))[0][:, 0] for chunk in chunks])
        return np.stack([norms.mean(1), (norms**2).mean(1)])

    pilot = [path for k in range(1, n) for path in sample_paths(n, k, min(samples, 20), generator)]
    logs = np.log(np.maximum(of_paths(pilot)[1], 1e-250))
    design = np.column_stack([np.array(pilot, dtype=float), np.ones(len(pilot))])
    gains = np.exp(1.5 * np.linalg.lstsq(design, logs, rcond=None)[0][:n])
    gains /= np.exp(np.log(gains).mean())
    sums = [np.eye(1, n + 1)[0]]  # sums[i][k]: elementary symmetric polynomial of the gains of blocks i, i + 1, ...
    for gain in gains[::-1]:
        sums.insert(0, sums[0] + gain * np.roll(sums[0], 1) * (np.arange(n + 1) > 0))
    means, variances = np.zeros((2, 2, n + 1))
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
        found = of_paths(paths)
        means[:, k] = (found * weights).mean(1)
        variances[:, k] = (found**2 * weights).mean(1) / means[:, k] ** 2 - 1
    return means, np.maximum(variances, 0)


CONTENDERS = {
    "sampled": Contender(sampled),
    "energy": Contender(energy),
    "signs": Contender(partial(energy, paths="signs")),
    "exact": Contender(exact, "images_of_split"),
    "by hand": Contender(by_hand),
    "forward kept": Contender(forward_kept),
    "split by hand": Contender(split_by_hand, "images_of_split"),
    "spread": Contender(spread),
}


def run(options: Any) -> list[dict[str, Any]]:
    """Rows of the three comparisons."""
    settings = {
        "network": options.network,
        "threads": options.threads,
        "images": 2 if options.quick else 4,
        "images_of_split": 2 if options.quick else 32,
        "paths": 4 if options.quick else 20,
        "weighted_paths": 4 if options.quick else 60,
        "error": ERROR,
    }
    repeats = 2 if options.quick else 3
    answers: dict[str, list[Answer]] = {name: [] for name in CONTENDERS}
    with workers(PART, dict.fromkeys(CONTENDERS, Path(options.python)), settings) as running:
        for repeat in range(repeats):
            print(f"gradients: repeat {repeat + 1} of {repeats}", flush=True)
            for worker in running:
                answer = worker.ask(repeat=repeat)
                if answer is None:
                    raise RuntimeError(f"{worker.contender}: {worker.reason}")
                answers[worker.contender].append(answer)
    return rows_of(answers, options.network, settings)


def rows_of(answers: dict[str, list[Answer]], network: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of what the contenders answered."""
    lengths = np.arange(len(answers["by hand"][0]["seconds_by_length"]))
    each = list(zip(*([dict(a, name=name) for a in found] for name, found in answers.items()), strict=True))
    repeats = [{a["name"]: a for a in one} for one in each]
    rows: list[dict[str, Any]] = []

    def compared(task: str, images: str, *found: tuple[str, str, list[float], str]) -> None:
        """Rows of (what is shown, contender, seconds, note), the first of them this project's."""
        for shown, name, seconds, note in found:
            rows.append(
                row(
                    PART,
                    f"{task}, {network}, {settings[images]} images",
                    shown,
                    "seconds",
                    seconds,
                    np.array(seconds) / np.array(found[0][2]),
                    memory=max(a["memory"] for a in answers[name]),
                    note=note,
                )
            )

    def by_autograd(paths: str) -> list[tuple[str, str, list[float], str]]:
        """The paper's protocol for as many paths of each length as repeat by repeat are needed."""
        needed = [np.array(r["spread"][paths]) for r in repeats]
        vjps = [float(p @ lengths) for p in needed]
        with_forward = [float(r["by hand"]["seconds_by_length"] @ p) for r, p in zip(repeats, needed, strict=True)]
        kept = [r["forward kept"]["seconds_of_vjp"] * count for r, count in zip(repeats, vjps, strict=True)]
        note = f"{span(p.sum() for p in needed)} paths, {span(vjps)} block VJPs, extrapolated"
        return [
            ("the paper's protocol by autograd", "by hand", with_forward, note),
            ("the same, the forward pass kept for all paths", "forward kept", kept, note),
        ]

    of_norm = [np.array(r["spread"]["of_norm"]) @ lengths for r in repeats]
    compared(
        "mean norm over the paths of each length, to 10 %",
        "images",
        (
            "this project, sampled",
            "sampled",
            [float(r["sampled"]["seconds"] * v / r["sampled"]["vjps"]) for r, v in zip(repeats, of_norm, strict=True)],
            "the same paths, a stack of them at a time, extrapolated from fewer",
        ),
        *by_autograd("of_norm"),
    )
    agreement = []
    for r in repeats:
        worth = np.array(r["spread"]["of_energy"]) > 0
        agreement += list(np.array(r["signs"]["energies"])[worth] / np.array(r["energy"]["energies"])[worth])
    (paths, vjps), (signs, vjps_of_signs) = (
        [span(r[name][key] for r in repeats) for key in ("draws", "block_vjps")] for name in ("energy", "signs")
    )
    compared(
        "energy of the paths of each length that holds a thousandth of it, to 10 %",
        "images",
        (
            "this project, energy",
            "energy",
            [r["energy"]["seconds"] for r in repeats],
            f"{paths} weighted paths of a length, {vjps} block VJPs; the mean norm comes with it",
        ),
        (
            "this project, energy by random signs",
            "signs",
            [r["signs"]["seconds"] for r in repeats],
            f"{signs} draws, {vjps_of_signs} block VJPs; {span(agreement)} times what weighted paths give",
        ),
        *by_autograd("of_energy"),
    )
    compared(
        "sum over all paths of each length",
        "images_of_split",
        (
            "this project, exact",
            "exact",
            [r["exact"]["seconds"] for r in repeats],
            f"{repeats[0]['exact']['vjps']} block VJPs, those of the whole gradient among them",
        ),
        (
            "the same split by autograd",
            "split by hand",
            [r["split by hand"]["seconds"] for r in repeats],
            f"{repeats[0]['split by hand']['vjps']} block VJPs; written for this network by one who knows the split",
        ),
    )
    return rows


def span(numbers: Any) -> str:
    """Lowest to highest, in three digits."""
    found = [float(number) for number in numbers]
    low, high = f"{min(found):.3g}", f"{max(found):.3g}"
    return low if low == high else f"{low} to {high}"
