"""Next-token loss of a language model without each of its layers: a study against a loop over lesions.

Times are those of the process on its CPUs, in turns. The loop runs every lesioned network whole; a study runs each
shared prefix once. The bar for a study is 1.1 times the loop divided by what is shared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.zoo.initialisation import initialise
from resnet_paths.zoo.language import LanguageModel
from tests.benchmarks.table import middle, row

PART = "tokens"
NUM_LAYERS = 12
BATCH, POSITIONS = 32, 64


class EveryPosition(nn.Module):
    """The notebook's language model, with logits at every position."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.model.at_every_position(text)


def run(options: Any) -> list[dict[str, Any]]:
    """Rows of the study and of the loop."""
    num_batches, repeats = (1, 1) if options.quick else (8, 7)
    model = LanguageModel(num_layers=NUM_LAYERS)
    initialise(model, torch.Generator().manual_seed(0))
    texts = torch.randint(256, (num_batches, BATCH, POSITIONS), generator=torch.Generator().manual_seed(1))
    chain = rp.group_blocks(rp.unravel(EveryPosition(model).eval(), texts[0, :2]))
    plan = rp.single_deletions(chain)

    def study() -> Any:
        batches = [(ids, ids) for ids in texts]
        return rp.lesion_study(chain, batches, plan, measures=("cross_entropy",), shift_labels=True, progress=False)

    def loop() -> list[list[float]]:
        with torch.inference_mode():
            return [[next_token_loss(lesion.edit(chain)(ids), ids).item() for ids in texts] for lesion in plan]

    frame, losses = study(), loop()
    by_hand = torch.tensor(losses).mean(1)
    if not torch.allclose(torch.tensor(frame["cross_entropy"].to_numpy()).float(), by_hand, rtol=1e-5):
        raise AssertionError("the losses of the study are not those of the loop")
    # The intact network, which a study runs as well, is not in the loop.
    intact = rp.lesion_study(chain, [(texts[0], texts[0])], [], shift_labels=True, progress=False)
    num_shared = frame.attrs["block_evaluations"]
    num_alone = frame.attrs["block_evaluations_naive"] - intact.attrs["block_evaluations"]
    seconds: dict[str, list[float]] = {"this project": [], "one lesion after the other": []}
    for _ in range(repeats):
        for name, work in zip(seconds, (study, loop), strict=True):
            seconds[name].append(cpu_seconds(work))
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    median, low, high = middle([num_alone / num_shared / ratio for ratio in ratios])
    note = (
        f"{median:.2f} ({low:.2f} to {high:.2f}) times the loop divided by {num_alone / num_shared:.2f}, the block "
        "evaluations of the loop over those of the study"
    )
    task = f"next-token loss without each of {NUM_LAYERS} layers, {num_batches} batches of {BATCH} x {POSITIONS} bytes"
    return [
        row(PART, task, "this project", "CPU seconds", seconds["this project"], note=note),
        row(PART, task, "one lesion after the other", "CPU seconds", seconds["one lesion after the other"], ratios),
    ]


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
