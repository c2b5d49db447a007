"""What the gradient by path length costs: ``python -m tests.benchmarks.gradients``.

Three ratios, each measured side by side in one run:

1. the exact split of all lengths against its bound: n (n + 1) / 2 block VJPs, at the time that the same blocks'
   ordinary backward takes;
2. the energy of all lengths at one relative standard error: random signs against the paper's sampling as a
   hand-written autograd loop, one forward and backward pass for each path;
3. peak memory over a plain forward and backward pass of the same batch, for several budgets;
4. seconds and peak memory of lengths up to 60 in a narrow network of 501 blocks (the depth of ResNet-1001).
"""

from __future__ import annotations

import argparse
import math
import platform
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.gradients.backward import Rules, head_cotangent, pull_back, states_of
from resnet_paths.gradients.cotangents import Stack
from resnet_paths.gradients.passes import Place, Point
from resnet_paths.paths import sample_paths
from resnet_paths.zoo import load_network
from resnet_paths.zoo.resnet import PreactBasicBlock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="preact-resnet-110", help="a network of the project")
    parser.add_argument("--weights", help="a weights file instead of the shipped one")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=60, help="sampled paths of each length")
    parser.add_argument("--draws", type=int, default=40, help="draws of signs")
    parser.add_argument("--only", choices=["bound", "energy", "memory", "depth"])
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of == "depth":
        depth()
        return
    model = load_network(options.network, options.weights)
    chain = rp.unravel(model, torch.zeros(2, 1, 28, 28))
    data = rp.load_dataset("fashion-mnist", split="test")
    images, labels = (torch.stack(part) if isinstance(part[0], torch.Tensor) else torch.tensor(part) for part in zip(
        *(data[i] for i in range(options.batch)), strict=True
    ))  # fmt: skip
    if options.memory_of:
        memory_of(options.memory_of, chain, images, labels)
        return
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{options.network}, {len(chain)} blocks, {options.batch} test images, float32\n")
    if options.only in (None, "bound"):
        bound(chain, images, labels, options.repeats)
    if options.only in (None, "energy"):
        energy(chain, images[:4], labels[:4], options.samples, options.draws)
    if options.only in (None, "memory"):
        memory(options)
    if options.only in (None, "depth"):
        command = [sys.executable, "-m", "tests.benchmarks.gradients", "--memory-of", "depth"]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def bound(chain: rp.ResidualChain, images: torch.Tensor, labels: torch.Tensor, repeats: int) -> None:
    """The exact recursion, forward pass included, against n (n + 1) / 2 ordinary block VJPs, interleaved."""
    for parameter in chain.parameters():
        parameter.requires_grad_(False)  # the bound's backward computes gradients of states alone, as ours does
    images = images.contiguous(memory_format=torch.channels_last)
    n = len(chain)

    def losses(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    def exact() -> float:
        start = time.perf_counter()
        states = states_of(chain, (images,))
        pull_back(chain, states, Stack.of(head_cotangent(chain, states[-1], losses)), Rules())
        return time.perf_counter() - start

    def ordinary() -> float:
        states = states_of(chain, (images,))
        cotangent = head_cotangent(chain, states[-1], losses)
        total = 0.0
        for index in reversed(range(n)):
            state = states[index].clone().requires_grad_()
            output = chain[index](state)
            seconds = []
            for _ in range(2):
                start = time.perf_counter()
                (below,) = torch.autograd.grad(output, state, cotangent, retain_graph=True)
                seconds.append(time.perf_counter() - start)
            cotangent = below
            total += min(seconds) * (n - index)
        return total

    exact(), ordinary()
    pairs = [(exact(), ordinary()) for _ in range(repeats)]
    ratios = sorted(a / b for a, b in pairs)
    print("1. exact, all lengths, to the output of the stem")
    print(f"   {n * (n + 1) // 2} block VJPs; exact {np.median([a for a, _ in pairs]):.3f} s, ", end="")
    print(f"bound {np.median([b for _, b in pairs]):.3f} s")
    print(f"   ratio {np.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f}, {repeats} repeats)\n")


def energy(chain: rp.ResidualChain, images: torch.Tensor, labels: torch.Tensor, samples: int, draws: int) -> None:
    """Seconds to one relative standard error of the energy of each length, by both methods."""
    n = len(chain)
    generator = torch.Generator().manual_seed(0)
    point = next(Place.of(chain, "stem").points(images, labels, None, 2**34, n + 1))

    def draw_signs() -> torch.Tensor:
        return 2 * torch.randint(2, (1, len(images)), generator=generator) - 1

    start = time.perf_counter()
    signed = np.stack([
        (point.norms(point.by_length(n, 1, draw_signs))[0][:, 0] ** 2).mean(1) for _ in range(draws)
    ])  # fmt: skip
    seconds_a_draw = (time.perf_counter() - start) / draws

    for path in sample_paths(chain, n // 2, 5, generator):
        by_hand = energy_of_path(chain, images, labels, path)
        found = (point.norms(point.of_paths([path]))[0] ** 2).mean()
        assert math.isclose(by_hand, found, rel_tol=1e-3), (by_hand, found)
    seconds_a_path = float(np.median([seconds_of(chain, images, labels, path) for path in sample_paths(
        chain, n // 2, 5, generator
    )]))  # fmt: skip

    # Draws needed for a relative standard error of 1: the relative variance of one.
    needed_signs = signed.var(0, ddof=1) / signed.mean(0) ** 2
    mean, needed_paths = variance_of_sampling(point, n, samples, generator)
    counts = np.array([math.comb(n, k) for k in range(n + 1)], dtype=float)
    ours, theirs = needed_signs * seconds_a_draw, needed_paths * seconds_a_path
    print(f"2. energy of all lengths at one relative standard error, {len(images)} images")
    print(f"   a draw of signs (all lengths) {seconds_a_draw:.3f} s, a sampled path by hand {seconds_a_path:.4f} s")
    print(f"   all lengths together: sampling takes {theirs.sum() / ours.max():.0f} times as long as signs")
    print("   length  draws needed  paths needed  sampling / signs, if only this length is wanted")
    for k in range(n + 1):
        ratio = theirs[k] / ours[k] if needed_signs[k] > 1e-9 else float("nan")
        wins = "  sampling is cheaper here" if ratio < 1 else ""
        print(f"   {k:6d}  {needed_signs[k]:12.3f}  {needed_paths[k]:12.3f}  {ratio:10.2f}{wins}")
    print(f"   energies by the two methods: median ratio {np.median(mean * counts / signed.mean(0)):.2f}\n")


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


def seconds_of(chain: rp.ResidualChain, images: torch.Tensor, labels: torch.Tensor, path: tuple) -> float:
    """Seconds that one measurement of the paper takes."""
    start = time.perf_counter()
    energy_of_path(chain, images, labels, path)
    return time.perf_counter() - start


def energy_of_path(chain: rp.ResidualChain, images: torch.Tensor, labels: torch.Tensor, path: tuple) -> float:
    """The paper's measurement as one writes it with autograd: a full forward pass, one path backward."""
    state = chain.stem(images).detach().requires_grad_()
    start = state
    for block, taken in zip(chain, path, strict=True):
        shared = block.pre(state)
        skip, branch = block.skip(shared), block.branch(shared)
        state = block.post(skip.detach() + branch if taken else skip + branch.detach())
    loss = F.cross_entropy(chain.head(state), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, start, allow_unused=True)
    return float(gradient.double().square().flatten(1).sum(1).mean())


def memory(options: argparse.Namespace) -> None:
    """Peak memory of a fresh process over that of one that runs a plain forward and backward pass."""
    command = [sys.executable, "-m", "tests.benchmarks.gradients", "--network", options.network, "--batch", "64"]
    command += ["--weights", options.weights] if options.weights else []

    def peak(what: str) -> float:
        result = subprocess.run([*command, "--memory-of", what], capture_output=True, text=True, check=True)
        return float(result.stdout)

    plain = peak("plain")
    print("3. peak memory, 64 images")
    print(f"   plain forward and backward {plain / 2**20:.0f} MiB")
    for budget in (2**27, 2**28, 2**29, 2**30, 2**31):
        more = peak(str(budget)) - plain
        print(f"   exact, budget {budget / 2**20:.0f} MiB: {more / 2**20:+.0f} MiB over the plain pass")


def memory_of(what: str, chain: rp.ResidualChain, images: torch.Tensor, labels: torch.Tensor) -> None:
    if what == "plain":
        images.requires_grad_()
        F.cross_entropy(chain(images), labels).backward()
    else:
        rp.gradient_by_path_length(chain, images, labels, with_respect_to="stem", memory_budget=int(what))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


class Narrow(nn.Module):
    """A pre-activation ResNet of 501 blocks with 4, 8 and 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        blocks, width = [], 4
        for channels, stride in ((4, 1), (8, 2), (16, 2)):
            for index in range(167):
                blocks.append(PreactBasicBlock(width, channels, stride if index == 0 else 1))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.norm(self.blocks(self.conv(x)))).mean((2, 3)))


def depth() -> None:
    """Untrained, with BatchNorm statistics of random images."""
    torch.manual_seed(0)
    model = Narrow().train()
    with torch.no_grad():
        model(torch.randn(64, 1, 28, 28))
    start = time.perf_counter()
    chain = rp.unravel(model.eval(), torch.zeros(2, 1, 28, 28))
    unraveled = time.perf_counter()
    frame = rp.gradient_by_path_length(chain, torch.randn(8, 1, 28, 28), torch.arange(8), max_length=60)
    seconds = time.perf_counter() - unraveled
    print(f"4. {len(chain)} blocks, 8 images, lengths up to 60")
    print(
        f"   unraveled in {unraveled - start:.0f} s, split in {seconds:.0f} s, {frame.attrs['num_block_vjps']} VJPs;",
        end=" ",
    )
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB;", end=" ")
    print(f"share left out {frame.attrs['share_left_out']:.1e}")


if __name__ == "__main__":
    main()
