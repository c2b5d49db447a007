"""Correctness and speed on a GPU: ``python -m tests.benchmarks.gpu``, one table in less than ten minutes.

correctness    every instrument on small networks, on the GPU and, in float64, on the CPU; the exit status is 1 where
               one differs by more than its precision explains, or fails
speed          this project beside the loops that people write, on the same GPU, in turns: a study beside a loop of
               edited chains, the exact split beside a loop over lengths, the energy beside a loop over as many paths,
               and the split of the prediction beside that of the gradient

Without a GPU it says so and ends with status 0.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

import resnet_paths as rp
from resnet_paths._utils.devices import choose_device, widest_float
from resnet_paths.core.placement import place_modules
from resnet_paths.core.sampling import sample_paths
from resnet_paths.zoo import load_network
from tests.benchmarks import gradients, table
from tests.benchmarks.lesions import fashion_images
from tests.benchmarks.table import row

PART = "gpu"
Instrument = Callable[[rp.ResidualChain, torch.Tensor, torch.Tensor], pd.DataFrame]
"""From (chain, images, labels) to a frame."""

TOLERANCES = {"float64": 1e-8, "float32": 1e-3, "TF32": 2e-2, "bfloat16": 1e-1}
"""Largest difference from the CPU in float64, over the largest value of the column."""
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "float32, stacked": {"precision": "float32"},
    "TF32": {"precision": "float32"},
    "bfloat16, channels last": {"precision": "bfloat16", "channels_last": True},
}
"""Ways to run a study, with options of `resnet_paths.lesion_study`; stacked is one with a `batch_budget`."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="preact-resnet-110", help="whose speed is measured")
    parser.add_argument("--images", type=int, default=2000, help="of a study")
    options = parser.parse_args()
    device = choose_device("auto")
    if device.type == "cpu":
        print("There is no GPU: nothing is measured.")
        return 0
    warnings.filterwarnings("ignore", "At path lengths")  # few draws are enough for a comparison
    start = time.perf_counter()
    rows = []
    for name in ("preact-resnet-20", "vit-small"):
        chains = chain_of(name), chain_of(name, torch.bfloat16)
        rows += correctness(name, *chains, *fashion_images(0, 8), device)
    chain = chain_of(options.network)
    rows += study_speed(options.network, chain, batches(options.images, 250), device, batch_budget=1000)
    rows += gradient_speed(options.network, chain, *fashion_images(0, 32), device)
    rows += energy_speed(options.network, chain, *fashion_images(0, 32), device)
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "resnet_paths": rp.__version__}
    frame = table.stamped(rows, versions, torch.get_num_threads())
    print(table.text(frame))
    print(f"\n{name_of(device)}; {'; '.join(frame[['machine', 'features', 'versions']].iloc[0])}")
    wrong = frame["note"].str.startswith("WRONG").sum()
    print(f"{wrong} instruments are wrong; took {time.perf_counter() - start:.0f} s")
    return int(wrong > 0)


def chain_of(network: str, dtype: torch.dtype = torch.float32) -> rp.ResidualChain:
    """A trained network, on the CPU, converted before it is unraveled; gradients are those of states alone."""
    model = load_network(network).eval().requires_grad_(False).to(dtype)
    return rp.unravel(model, torch.zeros(2, 1, 28, 28, dtype=dtype))


def batches(count: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [fashion_images(first, min(size, count - first)) for first in range(0, count, size)]


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether products and convolutions in float32 may be computed in TF32; PyTorch allows it for convolutions."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, was in zip(backends, before, strict=True):
            backend.allow_tf32 = was


# Correctness


def instruments() -> dict[str, Instrument]:
    """Every instrument, with numbers of draws that do not depend on rounding."""
    split = functools.partial(rp.gradient_by_path_length, progress=False, max_length=3)
    return {
        "gradient_by_path_length, exact": functools.partial(split, max_length=None),
        "gradient_by_path_length, energy": functools.partial(split, method="energy", num_draws=64),
        "gradient_by_path_length, sampled": functools.partial(split, method="sampled", paths="uniform", num_draws=8),
        "prediction_by_path_length": functools.partial(rp.prediction_by_path_length, by_source=True, progress=False),
        "lens": lambda chain, images, _: rp.lens(chain, images, max_length=1, progress=False),
        "direct_effects": functools.partial(rp.direct_effects, progress=False),
        "effect_matrix": lambda chain, images, _: rp.effect_matrix(chain, images, progress=False),
        "block_norms": lambda chain, images, _: rp.block_norms(chain, images),
        "predicted_effects": lambda chain, images, labels: rp.predicted_effects(
            chain, [(images, labels)], device=images.device, progress=False
        ),
    }


def losses_without_each_block(
    chain: rp.ResidualChain, images: torch.Tensor, labels: torch.Tensor, **options: Any
) -> pd.DataFrame:
    """Cross-entropy of each example (columns) without each block (rows), by a study on the images' device."""
    plan = rp.single_deletions(chain)
    given = {"measures": ("cross_entropy",), "per_example": True, "device": images.device, "progress": False}
    frame = rp.lesion_study(chain, [(images, labels)], plan, **given | options)
    return pd.DataFrame(np.stack(frame["cross_entropy_per_example"].to_list()))


def correctness(
    network: str,
    chain: rp.ResidualChain,
    low: rp.ResidualChain,
    images: torch.Tensor,
    labels: torch.Tensor,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Rows of each instrument, in the precisions that it is used in; `low` is the chain in bfloat16."""
    task = f"{network}, {len(images)} images: largest difference from the CPU in float64, of the column's largest value"
    dtypes = {"float32": torch.float32} | ({"float64": torch.float64} if widest_float(device) == torch.float64 else {})
    (exact,) = place_modules([chain], device="cpu", precision="float64")
    rows = []
    for name, instrument in instruments().items():
        expected = instrument(exact, images.double(), labels)
        for precision, dtype in dtypes.items():
            (there,) = place_modules([chain], device=device, precision=precision)
            given = images.to(device, dtype), labels.to(device)
            work = functools.partial(instrument, there, *given)
            rows.append(compared(task, f"{name}, {precision}", work, expected, TOLERANCES[precision]))
    expected = losses_without_each_block(exact, images.double(), labels)
    for name, options in WAYS.items():
        more = {"batch_budget": 4 * len(images)} if "stacked" in name else {}
        given = images.to(device), labels.to(device)
        studied = low if options["precision"] == "bfloat16" else chain
        work = functools.partial(losses_without_each_block, studied, *given, **options, **more)
        tolerance = TOLERANCES[name.split(",")[0]]
        rows.append(compared(task, f"lesion_study, {name}", work, expected, tolerance, allowed=name == "TF32"))
    return rows


def compared(
    task: str,
    name: str,
    work: Callable[[], pd.DataFrame],
    expected: pd.DataFrame,
    tolerance: float,
    *,
    allowed: bool = False,
) -> dict[str, Any]:
    """One row, which begins its note with WRONG where what `work` returns differs by more than `tolerance`, or fails.

    Args:
        task: Of the row.
        name: Its contender.
        work: What is run.
        expected: The frame that it should return.
        tolerance: The largest difference that is right.
        allowed: Whether `work` may compute in TF32.
    """
    try:
        with tf32(allowed):
            difference, column = largest_difference(work(), expected)
    except Exception as error:  # so that the others are measured still
        reason = " ".join(str(error).split())[:150]
        return row(PART, task, name, "difference", note=f"WRONG: {type(error).__name__}: {reason}")
    note = f"at most {tolerance:g} is right; largest in {column!r}"
    return row(PART, task, name, "difference", difference, note=note if difference <= tolerance else f"WRONG: {note}")


def largest_difference(found: pd.DataFrame, expected: pd.DataFrame) -> tuple[float, object]:
    """Over the largest finite value of the column, and the column; infinite where rows, names or NaN differ."""
    if list(found.columns) != list(expected.columns) or len(found) != len(expected):
        return float("inf"), "columns and rows"
    differences: dict[object, float] = {}
    for column in expected:
        a, b = found[column], expected[column]
        if not pd.api.types.is_float_dtype(b):
            differences[column] = 0.0 if a.astype(object).equals(b.astype(object)) else float("inf")
            continue
        x, y = a.to_numpy(dtype=float), b.to_numpy(dtype=float)
        if not np.array_equal(np.isfinite(x), np.isfinite(y)):
            differences[column] = float("inf")
            continue
        x, y = x[np.isfinite(y)], y[np.isfinite(y)]
        scale = np.abs(y).max(initial=0.0) or 1.0
        differences[column] = float(np.abs(x - y).max(initial=0.0) / scale)
    worst = max(differences, key=lambda column: differences[column])
    return differences[worst], worst


# Speed


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Of one run, until the device has finished it."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def in_turns(
    task: str, runs: dict[str, Callable[[], Any]], device: torch.device, *, repeats: int = 5, budget: float = 60
) -> list[dict[str, Any]]:
    """Rows of seconds, each with how many times as fast as the first it is.

    Args:
        task: Of the rows.
        runs: By name; ``"TF32"`` in the name allows it.
        device: Which is waited for.
        repeats: At most; a run before them, which chooses kernels, does not count.
        budget: Seconds after which no other repeat begins; there is one at least.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for repeat in range(repeats + 1):
        if repeat > 1 and time.perf_counter() - start > budget:
            break
        for name, work in runs.items():
            with tf32("TF32" in name):
                found = seconds_of(work, device)
            if repeat:
                seconds[name].append(found)
    first = next(iter(seconds.values()))
    return [
        row(PART, task, name, "seconds", found, [a / b for a, b in zip(first, found, strict=True)])
        for name, found in seconds.items()
    ]


def study_speed(
    network: str,
    chain: rp.ResidualChain,
    loader: Sequence[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    *,
    batch_budget: int,
    **limits: Any,
) -> list[dict[str, Any]]:
    """Each block deleted in turn: studies beside a loop of edited chains, with batches on the device already."""
    plan = rp.single_deletions(chain)
    (there,) = place_modules([chain], device=device)
    placed = [(images.to(device), labels.to(device)) for images, labels in loader]
    runs: dict[str, Callable[[], Any]] = {"a loop of edited chains, float32": lambda: loop(there, placed, plan)}
    for name, options in WAYS.items():
        given = options | ({"batch_budget": batch_budget} if "stacked" in name else {})
        work = functools.partial(rp.lesion_study, there, placed, plan, device=device, progress=False, **given)
        runs[f"lesion_study, {name}"] = work
    count = sum(len(labels) for _, labels in loader)
    task = f"each block of {network} deleted in turn, {count} images; how many times as fast as the loop"
    return in_turns(task, runs, device, **limits)


def loop(
    chain: rp.ResidualChain, loader: Sequence[tuple[torch.Tensor, torch.Tensor]], plan: Sequence[rp.Lesion]
) -> list[float]:
    """Error rate of each lesioned chain, one after the other."""
    rates = []
    with torch.inference_mode():
        for lesion in plan:
            edited = lesion.edit(chain)
            wrong = sum((edited(images).argmax(1) != labels).sum() for images, labels in loader)
            rates.append(float(wrong) / sum(len(labels) for _, labels in loader))
    return rates


def gradient_speed(
    network: str,
    chain: rp.ResidualChain,
    images: torch.Tensor,
    labels: torch.Tensor,
    device: torch.device,
    **limits: Any,
) -> list[dict[str, Any]]:
    """The exact split beside a loop over lengths, and the split of the prediction beside that of the gradient."""
    (there,) = place_modules([chain], device=device)
    given = images.to(device), labels.to(device)
    exact = functools.partial(
        rp.gradient_by_path_length, there, *given, with_respect_to="stem", progress=False, max_length=None
    )
    prediction = functools.partial(rp.prediction_by_path_length, there, *given, progress=False)
    of = f"{network}, {len(images)} images"
    runs = {"a loop over lengths at each block": lambda: split_by_lengths(there, *given), "exact": exact}
    rows = in_turns(f"gradient by path length, {of}; how many times as fast as the loop", runs, device, **limits)
    runs = {"gradient_by_path_length, exact": exact, "prediction_by_path_length": prediction}
    return rows + in_turns(f"prediction by path length, {of}; how many times as fast", runs, device, **limits)


def split_by_lengths(chain: rp.ResidualChain, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Gradient at the stem's output by path length, [length, image, ...]: at each block a VJP for each length."""
    states, cotangent = gradients.states_and_cotangent(chain, images, labels)
    rows = [cotangent]
    for block, state in zip(reversed(list(chain)), reversed(states[:-1]), strict=True):
        x = state.detach().requires_grad_()
        shared = block.pre(x)
        skip, branch = block.skip(shared), block.branch(shared)
        merged = (skip + branch).detach().requires_grad_()
        output = block.post(merged)
        above = [torch.autograd.grad(output, merged, r, retain_graph=True)[0] for r in rows]
        by_skip, by_branch = (
            [torch.autograd.grad(part, x, r, retain_graph=True)[0] for r in above] for part in (skip, branch)
        )
        longer = zip(by_skip[1:], by_branch[:-1], strict=True)
        rows = [by_skip[0], *(a + b for a, b in longer), by_branch[-1]]
    return torch.stack(rows)


def energy_speed(
    network: str,
    chain: rp.ResidualChain,
    images: torch.Tensor,
    labels: torch.Tensor,
    device: torch.device,
    *,
    num_draws: int = 32,
    longest: int = 6,
    **limits: Any,
) -> list[dict[str, Any]]:
    """The energy of some lengths beside as many single paths by autograd, a forward and a backward pass for each."""
    (there,) = place_modules([chain], device=device)
    given = images.to(device), labels.to(device)
    energy = functools.partial(
        rp.gradient_by_path_length,
        there,
        *given,
        method="energy",
        num_draws=num_draws,
        max_length=longest,
        with_respect_to="stem",
        progress=False,
    )
    generator = torch.Generator().manual_seed(0)
    counts = energy()["num_draws"]
    paths = [path for k, count in enumerate(counts) for path in sample_paths(chain, k, int(count), generator)]
    runs: dict[str, Callable[[], Any]] = {
        "a loop over paths": lambda: [gradients.gradient_of_path(there, *given, path) for path in paths],
        "energy": energy,
    }
    task = f"energy from {len(paths)} paths of up to {longest} branches of {network}, {len(images)} images"
    return in_turns(f"{task}; how many times as fast as the loop", runs, device, **limits)


if __name__ == "__main__":
    sys.exit(main())
