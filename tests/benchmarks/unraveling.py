"""A second `unravel` of one model, whose chain is kept in a folder, against the first."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
import transformers

import resnet_paths as rp
from tests.benchmarks.table import row

PART = "unraveling"
LEAST = 5


def models(layers: int) -> dict[str, tuple[torch.nn.Module, Any]]:
    """Transformers of as many layers, with random weights."""
    configuration = transformers.GPT2Config(
        n_layer=layers, n_embd=256, n_head=8, vocab_size=1000, bos_token_id=0, eos_token_id=0
    )
    return {
        "GPT-2": (transformers.GPT2LMHeadModel(configuration), {"input_ids": torch.zeros(2, 16, dtype=torch.long)}),
        "ViT": (torchvision.models.VisionTransformer(32, 8, layers, 4, 128, 256), torch.randn(2, 3, 32, 32)),
    }


def seconds_of(model: torch.nn.Module, example: Any, folder: Path) -> float:
    start = time.perf_counter()
    rp.unravel(model, example, cache=folder)
    return time.perf_counter() - start


def run(options: Any) -> list[dict[str, Any]]:
    """First and second calls in turns, each pair in a new folder."""
    layers, repeats = (2, 1) if options.quick else (24, 5)
    rows = []
    for name, (model, example) in models(layers).items():
        model.eval()
        first, second = [], []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                first.append(seconds_of(model, example, Path(folder)))
                second.append(seconds_of(model, example, Path(folder)))
        ratios = [one / other for one, other in zip(first, second, strict=True)]
        task = f"unravel {name} of {layers} layers, all checks"
        rows.append(row(PART, task, "exported", "seconds", first, ratios))
        note = f"{'at least' if min(ratios) >= LEAST else 'less than'} {LEAST} times faster in each pair"
        rows.append(row(PART, task, "kept in a folder", "seconds", second, note=note))
    return rows
