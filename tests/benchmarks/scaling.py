"""How time and memory grow: with blocks, images at a time, lesions and workers; and what a large study would cost.

Each point is measured in a process of its own, points of a curve in turns. Exponents are slopes of straight lines
through the logarithms, with their standard errors: how far the points are from a line, which curves that begin with a
constant are not.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from scipy import stats
from torch import nn

import resnet_paths as rp
from resnet_paths.zoo import load_network
from resnet_paths.zoo.resnet import PreactBasicBlock
from tests.benchmarks.lesions import fashion_images
from tests.benchmarks.limit import operations
from tests.benchmarks.table import row
from tests.benchmarks.workers import timed, workers

PART = "scaling"
ASSUMED_RATES = {"bfloat16": 1.04e14, "TF32": 5.2e13, "float32 without TF32": 6.5e12}
"""Operations a second of the projection: a third of an A100's peaks by NVIDIA's data sheet (312, 156, 19.5 * 1e12)."""


class Narrow(nn.Module):
    """A pre-activation ResNet with 4, 8 and 16 channels and any number of blocks."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        blocks, width = [], 4
        for index in range(num_blocks):
            channels = 4 * 2 ** (3 * index // num_blocks)
            blocks.append(PreactBasicBlock(width, channels, 1 if channels == width else 2))
            width = channels
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.norm(self.blocks(self.conv(x)))).mean((2, 3)))


def narrow(num_blocks: int) -> nn.Module:
    """Untrained, with BatchNorm statistics of random images."""
    torch.manual_seed(0)
    model = Narrow(num_blocks).train()
    with torch.no_grad():
        model(torch.randn(64, 1, 28, 28))
    return model.eval()


def timed_study(chain: rp.ResidualChain, batch: tuple[torch.Tensor, torch.Tensor], plan: list[Any]) -> Any:
    """Seconds and MiB of a study, after one of two images and one lesion, so that kernels are chosen already."""
    rp.lesion_study(chain, [fashion_images(0, 2)], plan[:1], progress=False)
    return timed(lambda: rp.lesion_study(chain, [batch], plan, progress=False))[:2]


def of_blocks(settings: dict[str, Any]) -> dict[str, Any]:
    """All single deletions of a chain of `size` blocks, and the exact split of its gradient."""
    model, example = narrow(settings["size"]), torch.zeros(2, 1, 28, 28)
    rp.gradient_by_path_length(rp.unravel(narrow(3), example), *fashion_images(0, 2), progress=False)
    *unraveling, chain = timed(lambda: rp.unravel(model, example))
    images, labels = fashion_images(0, settings["images"])
    study = timed_study(chain, (images, labels), rp.single_deletions(chain))
    split = timed(lambda: rp.gradient_by_path_length(chain, images, labels, progress=False))[:2]
    return {"unraveling": unraveling, "single deletions": study, "exact gradient": split}


def of_images(settings: dict[str, Any]) -> dict[str, Any]:
    """All single deletions on one batch of `size` images."""
    chain, (images, labels) = network("preact-resnet-20"), fashion_images(0, settings["size"])
    plan = rp.single_deletions(chain)
    return {"single deletions": timed_study(chain, (images, labels), plan)}


def of_lesions(settings: dict[str, Any]) -> dict[str, Any]:
    """`size` random deletions of 1 to 10 blocks."""
    chain, (images, labels) = network("preact-resnet-56"), fashion_images(0, settings["images"])
    plan = rp.random_deletions(chain, range(1, 11), settings["size"] // 10, torch.Generator().manual_seed(0))
    return {"random deletions": timed_study(chain, (images, labels), plan)}


def of_workers(settings: dict[str, Any]) -> dict[str, Any]:
    """The same single deletions on `size` worker processes of one thread each, which have the chain already."""
    chain, batch = network("preact-resnet-20"), settings["images"]
    batches = [fashion_images(i * batch, batch) for i in range(8)]
    plan = rp.single_deletions(chain)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        settings["size"], mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as executor:
        study = functools.partial(rp.lesion_study, chain, progress=False, executor=executor)
        study(batches, plan)
        return {"single deletions": (timed(lambda: study(batches, plan))[0], None)}  # they hold the memory


def network(name: str) -> rp.ResidualChain:
    return rp.unravel(load_network(name).eval(), torch.zeros(2, 1, 28, 28))


@dataclass(frozen=True)
class Contender:
    """A curve: one point, measured as often as it is asked for."""

    measure: Callable[[dict[str, Any]], dict[str, Any]]
    sizes: tuple[int, ...]
    quick_sizes: tuple[int, ...]
    images: int

    def prepare(self, settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda request: self.measure(settings)


WORKERS = tuple(2**i for i in range((os.cpu_count() or 1).bit_length()))
CONTENDERS = {
    "blocks": Contender(of_blocks, (9, 27, 81, 243, 500), (3, 9, 27), 4),
    "images at a time": Contender(of_images, (16, 64, 256, 512), (8, 16, 32), 0),
    "lesions": Contender(of_lesions, (10, 40, 160, 400), (10, 20, 40), 16),
    "workers": Contender(of_workers, WORKERS, (1,), 100),
}


def run(options: Any) -> list[dict[str, Any]]:
    """Rows of the points, of the exponents, and of the projection."""
    rows = []
    for name, curve in CONTENDERS.items():
        sizes = curve.quick_sizes if options.quick else curve.sizes
        points: dict[str, dict[int, list[Any]]] = {}
        for repeat in range(1 if options.quick else 2):
            print(f"scaling: {name}, repeat {repeat + 1}", flush=True)
            for size in sizes:
                settings = {"threads": options.threads, "size": size, "images": 4 if options.quick else curve.images}
                with workers(PART, {name: Path(options.python)}, settings) as (worker,):
                    for what, found in (worker.ask() or {}).items():
                        points.setdefault(what, {}).setdefault(size, []).append(found)
                    if worker.reason:
                        rows.append(row(PART, name, f"{size} {name}", "seconds", note=f"failed: {worker.reason}"))
        for what, by_size in points.items():
            rows += rows_of_curve(f"{what} by {name}", name, by_size)
    return rows + projection(options)


def rows_of_curve(task: str, unit: str, by_size: dict[int, list[Any]]) -> list[dict[str, Any]]:
    """Points, and the exponents of time and memory."""
    rows = []
    for size, found in by_size.items():
        seconds, memories = zip(*found, strict=True)
        memory = None if None in memories else max(memories)
        rows.append(row(PART, task, f"{size} {unit}", "seconds", list(seconds), memory=memory))
    sizes = list(by_size)
    for quantity, index in (("time", 0), ("peak memory", 1)):
        if len(sizes) < 2 or by_size[sizes[0]][0][index] is None:
            continue
        statistic = np.max if index else np.median  # as the points show them
        values = [statistic([point[index] for point in by_size[size]]) for size in sizes]
        slope, error, num_points = exponent(sizes, values)
        last = exponent(sizes[-2:], values[-2:])[0]
        note = f"of {num_points} points, one standard error about it; between the last two {last:.2f}"
        made = row(PART, task, f"exponent of {quantity}", "exponent", slope, note=note)
        rows.append(made | {"low": slope - error, "high": slope + error})
    return rows


def exponent(sizes: Any, values: Any) -> tuple[float, float, int]:
    """Slope of the logarithms, its standard error (NaN of two points), and the number of points above 0."""
    sizes, values = np.asarray(sizes, dtype=float), np.asarray(values, dtype=float)
    known = values > 0
    if known.sum() < 2:
        return float("nan"), float("nan"), int(known.sum())
    line = stats.linregress(np.log(sizes[known]), np.log(values[known]))
    return float(line.slope), float(line.stderr) if known.sum() > 2 else float("nan"), int(known.sum())


def projection(options: Any) -> list[dict[str, Any]]:
    """ImageNet ResNet-200 and 50,000 images, from counted operations at an assumed rate: nothing of it was run."""
    depth, size, images = ([1, 1, 2, 1], 64, 50_000) if options.quick else ([3, 24, 36, 3], 224, 50_000)
    with torch.device("meta"):
        model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, depth).eval()
        x = torch.zeros(1, 3, size, size)
    parts = [nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)]
    parts += [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    parts.append(nn.Sequential(model.avgpool, nn.Flatten(), model.fc))
    counted = []
    with torch.no_grad():
        for part in parts:
            counted.append(operations(functools.partial(part, x)))
            x = part(x)
    blocks = counted[1:-1]
    # A deleted block leaves its projection, which is small; after it every block and the head run again.
    again = sum(sum(blocks[i + 1 :]) + counted[-1] for i in range(len(blocks)))
    # A VJP costs what the block costs. Besides, each block is run twice and passed by the whole gradient once, and the
    # stem by the rows of all lengths.
    split = sum((len(blocks) - i) * count for i, count in enumerate(blocks))
    split += 2 * sum(counted) + (len(blocks) + 1) * counted[0]
    task = f"projection, not run: ResNet-200 ({len(blocks)} blocks), {images:,} images of {size} x {size} on one GPU"
    rows = [row(PART, task, "one image forward", "GFLOP", sum(counted) / 1e9, note="counted")]
    for name, count in (("all single deletions", sum(counted) + again), ("exact gradient", sum(counted) + split)):
        for precision, rate in ASSUMED_RATES.items():
            note = (
                f"{count * images:.2e} operations at an assumed {rate:.1e} a second, a third of an A100's peak; "
                "what is done element by element is not counted"
            )
            rows.append(row(PART, task, f"{name}, {precision}", "hours", count * images / rate / 3600, note=note))
    return rows
