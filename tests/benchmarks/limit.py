"""How far lesion studies are from what the machine can do, and what lies between.

ceiling     the fastest matrix product on this machine, in float32 and bfloat16
achieved    operations counted (`torch.utils.flop_counter`) over seconds, for all forward passes of a study
profile     where the time of these passes goes, by kinds of operation (`torch.profiler`), and how much of it the
            operations counted would take at the rate of the matrix product
variants    what folding, memory format, smaller batches and compiling make of one forward pass, in turns
stacked     a whole study in small batches, with the states of several lesions in one launch and without
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import resnet_paths as rp
from resnet_paths.core.placement import PRECISIONS, place_modules
from resnet_paths.lesions.trie import Trie
from resnet_paths.zoo import load_network
from tests.benchmarks.lesions import fashion_images
from tests.benchmarks.table import bfloat16_support, row

PART = "limit"
WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, BatchNorm folded": {"fold_batchnorm": True},
    "float32, channels last": {"channels_last": True},
    "float32, channels last, BatchNorm folded": {"channels_last": True, "fold_batchnorm": True},
    "bfloat16, channels last": {"channels_last": True, "precision": "bfloat16"},
    "bfloat16, channels last, BatchNorm folded": {
        "channels_last": True,
        "fold_batchnorm": True,
        "precision": "bfloat16",
    },
}
PROFILED = ("float32", "float32, channels last, BatchNorm folded", "bfloat16, channels last, BatchNorm folded")
KINDS = {
    "convolution": ("convolution", "conv2d"),
    "matrix product": ("addmm", "linear", "mm"),
    "BatchNorm": ("batch_norm",),
    "ReLU": ("relu", "clamp"),
    "addition": ("add",),
    "copies and reorders": ("copy", "clone", "contiguous", "reorder", "cat"),
}
"""Kinds by what the names of their operations hold; the first that fits."""


def run(options: Any) -> list[dict[str, Any]]:
    """Rows of the ceiling, the rates, the profile and the variants."""
    chain = rp.unravel(load_network(options.network).eval(), torch.zeros(2, 1, 28, 28))
    batch = 10 if options.quick else 50
    images = fashion_images(0, batch)[0]
    ceilings = {name: ceiling(PRECISIONS[name], options.quick) for name in ("float32", "bfloat16")}
    rows = [
        row(PART, "matrix product", name, "GFLOP/s", rate, note=f"the best, at {size} x {size}")
        for name, (rate, size) in ceilings.items()
    ]
    best = {name: rate for name, (rate, _) in ceilings.items()}
    print("limit: studies", flush=True)
    rows += studies(options, chain, images, best)
    print("limit: profiles", flush=True)
    for name in PROFILED:
        rows += profiled(f"where the time of a study's forward passes goes, {name}", chain, images, WAYS[name], best)
    print("limit: variants", flush=True)
    return rows + variants(options, chain) + stacked(options, chain) + compiled(options)


def ceiling(dtype: torch.dtype, quick: bool) -> tuple[float, int]:
    """GFLOP/s of the fastest square matrix product, and its size.

    Also as a 1x1 convolution: a product may be left to another library (MKL) than a convolution (oneDNN), and is slower
    on processors that this library was not written for.
    """
    rates = {}
    for size in (256, 512) if quick else (512, 1024, 2048, 4096):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        x, weight = (
            each.contiguous(memory_format=torch.channels_last) for each in (a.T[None, ..., None], b[..., None, None])
        )
        for work in (lambda a=a, b=b: torch.mm(a, b), lambda x=x, weight=weight: functional.conv2d(x, weight)):
            work()
            seconds = []
            for _ in range(3 if quick else 5):
                start = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - start)
            rates[size] = max(rates.get(size, 0.0), 2 * size**3 / min(seconds) / 1e9)
    size = max(rates, key=rates.__getitem__)
    return rates[size], size


def operations(work: Callable[[], Any]) -> int:
    """Floating-point operations of convolutions and matrix products; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def studies(options: Any, chain: rp.ResidualChain, images: torch.Tensor, best: dict[str, float]) -> list[Any]:
    """Achieved rates of a study's forward passes over the ceiling of their precision."""
    chains = [chain, *(lesion.edit(chain) for lesion in rp.single_deletions(chain))]
    with torch.no_grad():
        count = operations(lambda: list(Trie(chains).logits(images[:1]))) * len(images)
    task = f"all forward passes of a study: single deletions of {options.network}, {len(images)} images"
    rows = [row(PART, task, "operations", "GFLOP", count / 1e9, note="counted, shared steps once")]
    runs = {}
    for name, way in WAYS.items():
        x = images.to(PRECISIONS[way.get("precision", "float32")]).contiguous(memory_format=layout_of(way))
        trie = Trie(place_modules(chains, **way))
        runs[name] = lambda trie=trie, x=x: list(trie.logits(x))
    for made in in_turns(task, runs, 2 if options.quick else 3):
        rates = {key: count / made[key] / 1e9 for key in ("value", "low", "high")}
        share = rates["low"] / best[WAYS[made["contender"]].get("precision", "float32")]
        made |= rates | {"quantity": "GFLOP/s", "low": rates["high"], "high": rates["low"]}
        made |= dict.fromkeys(("ratio", "ratio_low", "ratio_high"), float("nan"))  # of seconds; these are rates
        note = f"at best {share:.0%} of the matrix product's rate"
        rows.append(made | {"note": f"{note}; {bfloat16_support()}" if "bfloat16" in made["contender"] else note})
    return rows


def layout_of(way: dict[str, Any]) -> torch.memory_format:
    """Of the images, for a way."""
    return torch.channels_last if way.get("channels_last") else torch.contiguous_format


def kind_of(operation: str) -> str:
    """The kind of an operation by its name."""
    name = operation.removeprefix("aten::").removeprefix("mkldnn_")
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other operations")


def profiled(
    task: str, chain: rp.ResidualChain, images: torch.Tensor, way: dict[str, Any], best: dict[str, float]
) -> list[Any]:
    """Shares of the time by kinds, some deletions of all; what no operation accounts for is Python between them."""
    chains = [chain, *(lesion.edit(chain) for lesion in rp.single_deletions(chain)[:: max(1, len(chain) // 18)])]
    with torch.no_grad():
        count = operations(lambda: list(Trie(chains).logits(images[:1]))) * len(images)
    trie, precision = Trie(place_modules(chains, **way)), way.get("precision", "float32")
    x = images.to(PRECISIONS[precision]).contiguous(memory_format=layout_of(way))
    with torch.inference_mode():
        seconds = [seconds_of(lambda: list(trie.logits(x))) for _ in range(3)]
        with profile(activities=[ProfilerActivity.CPU]) as found:
            with_profiler = seconds_of(lambda: list(trie.logits(x)))
    plain = min(seconds[1:])
    micros: dict[str, float] = {}
    for event in found.key_averages():
        micros[kind_of(event.key)] = micros.get(kind_of(event.key), 0) + event.self_cpu_time_total
    shares = {kind: m / 1e6 / with_profiler for kind, m in sorted(micros.items(), key=lambda item: -item[1])}
    shares["Python between operations"] = 1 - sum(shares.values())
    note = f"{len(chains) - 1} of the deletions; the profiler makes it {with_profiler / plain:.2f} times as long"
    least = count / 1e9 / best[precision] / plain
    told = f"convolutions and products, had they the matrix product's rate in {precision}"
    rows = [row(PART, task, kind, "of the time", share, note=note) for kind, share in shares.items()]
    return [*rows, row(PART, task, told, "of the time", least, note="of the time without the profiler")]


def seconds_of(work: Callable[[], Any]) -> float:
    """Of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def variants(options: Any, chain: rp.ResidualChain) -> list[Any]:
    """Seconds of one forward pass of the same images in several ways, in turns."""
    count = 32 if options.quick else 128
    images = fashion_images(0, count)[0]
    runs: dict[str, Callable[[], Any]] = {}
    for name, way in WAYS.items():
        (placed,) = place_modules([chain], **way)
        x = images.to(PRECISIONS[way.get("precision", "float32")]).contiguous(memory_format=layout_of(way))
        runs[name] = lambda placed=placed, x=x: placed(x)
        if name == "float32, channels last, BatchNorm folded":
            for size in (8, 16, 32, 64):
                runs[f"{name}, {size} at a time"] = lambda p=placed, x=x, size=size: [p(part) for part in x.split(size)]
    task = f"one forward pass of {count} images, ratios to the first row"
    notes = {name: bfloat16_support() for name in runs if "bfloat16" in name}
    return in_turns(task, runs, 2 if options.quick else 7, notes)


def stacked(options: Any, chain: rp.ResidualChain) -> list[Any]:
    """A whole study in batches too small to fill a processor, with `batch_budget` and without."""
    size, deletions = (2, rp.single_deletions(chain)[::3]) if options.quick else (4, rp.single_deletions(chain))
    runs = {
        name: lambda budget=budget: rp.lesion_study(
            chain, [fashion_images(0, size)], deletions, batch_budget=budget, progress=False
        )
        for name, budget in (("one lesion at a time", None), ("stacks of 16", 16), ("stacks of 64", 64))
    }
    return in_turns(f"a study in a batch of {size} images, ratios to the first row", runs, 2 if options.quick else 5)


def in_turns(task: str, runs: dict[str, Callable[[], Any]], repeats: int, notes: dict[str, str] | None = None) -> Any:
    """Rows of seconds, and ratios to the first run."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for name, work in runs.items():
                found = seconds_of(work)
                if repeat:  # the first fills caches
                    seconds[name].append(found)
    first = next(iter(seconds.values()))
    return [
        row(
            PART,
            task,
            name,
            "seconds",
            found,
            [a / b for a, b in zip(found, first, strict=True)],
            note=(notes or {}).get(name, ""),
        )
        for name, found in seconds.items()
    ]


def compiled(options: Any) -> list[Any]:
    """Branches compiled one by one (`torch.compile`), warm-up stated: why the library does not offer it."""
    chain = rp.unravel(load_network("preact-resnet-20").eval(), torch.zeros(2, 1, 28, 28))
    task = "branches of preact-resnet-20 compiled, one forward pass, ratios to the first row"
    count = 32 if options.quick else 128
    x = fashion_images(0, count)[0].contiguous(memory_format=torch.channels_last)
    way = {"channels_last": True, "fold_batchnorm": True}
    (plain,) = place_modules([chain], **way)
    if options.quick:
        plain = plain.with_blocks(list(plain)[:1] + [block.replace(branch=None) for block in list(plain)[1:]])
    fast = copy.deepcopy(plain)
    for block in fast:
        block.branch = torch.compile(block.branch) if block.branch is not None else None
    start = time.perf_counter()
    try:
        with torch.inference_mode():
            fast(x)
    except Exception as error:  # no compiler, or one that fails
        reason = next(iter(str(error).strip().splitlines()), "")[:100]
        return [row(PART, task, "compiled", "seconds", note=f"not to be had: {type(error).__name__}: {reason}")]
    warm_up = time.perf_counter() - start
    runs = {"channels last, BatchNorm folded": lambda: plain(x), "the same, compiled": lambda: fast(x)}
    rows = in_turns(task, runs, 2 if options.quick else 15)
    gain = rows[0]["value"] - rows[1]["value"]
    back = f"regained after {count * warm_up / gain:.0f} images" if gain > 0 else "never regained"
    rows[1]["note"] = f"{warm_up:.0f} s to compile, {back}"
    return rows
