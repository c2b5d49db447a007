"""Single deletion of every block of a pre-activation ResNet, by this project and by what people would use instead.

Every contender gets the same images in batches of one size. What the slow ones are given fewer of is stated in their
row, and times are compared per image and lesion. Each must give the predictions of the same lesioned networks.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.placement import PRECISIONS, place_modules
from resnet_paths.lesions.trie import Trie
from resnet_paths.zoo import load_network
from tests.benchmarks import peers
from tests.benchmarks.table import bfloat16_support, row
from tests.benchmarks.workers import timed, workers

PART = "lesions"
STATED = 1000
"""Images of the study that times are stated for; what is done once a study is charged at its share of them."""


class Clock:
    """Seconds of what is done once a study, however many images it has."""

    def __init__(self) -> None:
        self.once = 0.0

    @contextmanager
    def once_a_study(self) -> Iterator[None]:
        """Count what the block takes."""
        start = time.perf_counter()
        yield
        self.once += time.perf_counter() - start


Predict = Callable[[list[torch.Tensor], Clock], torch.Tensor]
"""From batches of images to predictions [lesion, image]."""


@dataclass(frozen=True)
class Contender:
    """One way to do it.

    Attributes:
        make: From the model and positions of blocks to delete to a function from batches to predictions.
        peer: The library that it needs.
        share: Batches a repeat, as a share of this project's.
        every: Only every so manieth block is deleted.
        channels_last: Whether model and images lie in memory with their channels last.
        options: Of `rp.lesion_study`, for this project.
        note: What to know.
    """

    make: Callable[[nn.Module, list[int]], Predict] | None = None
    peer: str = ""
    share: float = 0.2
    every: int = 1
    channels_last: bool = False
    options: tuple[tuple[str, Any], ...] | None = None
    note: str = ""

    def prepare(self, settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """The model, loaded and wrapped; then a request measures, or checks the predictions."""
        model = load_network(settings["network"]).eval()
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        blocks = list(range(0, len(blocks_of(model)), min(self.every, settings["most_every"])))
        if self.options is None:
            predict = self.make(model, blocks)  # type: ignore[misc]
        else:
            chain = rp.unravel(model, torch.zeros(2, 1, 28, 28))

        def batches(first: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            found = [fashion_images(i * settings["batch"], settings["batch"]) for i in range(first, first + count)]
            return [(x.contiguous(memory_format=layout), y) for x, y in found]

        def check(path: str) -> dict[str, Any]:
            given = batches(0, 1)
            if self.options is None:
                _, memory, predictions = timed(lambda: predict([x for x, _ in given], Clock()))
            else:
                plan, options = rp.single_deletions(chain), dict(self.options)
                _, memory, frame = timed(lambda: rp.lesion_study(chain, given, plan, progress=False, **options))
                predictions = own_predictions(chain, given, options, frame.error_rate)
            np.save(path, predictions.numpy())
            return {"blocks": blocks, "memory": memory}  # of the first run: later ones find it held already

        def measure(request: dict[str, Any]) -> dict[str, Any]:
            if "check" in request:
                return check(request["check"])
            count = max(1, round(self.share * settings["batches"]))
            given, clock = batches(request["repeat"] * count, count), Clock()
            if self.options is None:
                images = [x for x, _ in given]
                seconds, _, _ = timed(lambda: predict(images, clock))
            else:
                plan, ways = rp.single_deletions(chain), dict(self.options)
                with clock.once_a_study():  # seconds of the study hold it too, whatever its images
                    place_modules([chain, *(lesion.edit(chain) for lesion in plan)], **placement_of(ways))
                seconds, _, _ = timed(lambda: rp.lesion_study(chain, given, plan, progress=False, **ways))
            num_images = count * settings["batch"]
            a_study = (seconds - clock.once) * STATED / num_images + clock.once
            every_block = len(blocks_of(model)) / len(blocks)
            return {"seconds": a_study * every_block, "images": num_images, "lesions": len(blocks)}

        return measure


def fashion_images(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Test images [count, 1, 28, 28] from the first on, and their labels."""
    data = rp.load_dataset("fashion-mnist", "test")
    found = [data[i % len(data)] for i in range(first, first + count)]
    return torch.stack([x for x, _ in found]), torch.tensor([int(y) for _, y in found])


def placement_of(options: dict[str, Any]) -> dict[str, Any]:
    """Of the options of a study, those of `place_modules`."""
    return {name: options[name] for name in ("precision", "channels_last", "fold_batchnorm") if name in options}


def own_predictions(
    chain: rp.ResidualChain, given: list[Any], options: dict[str, Any], error_rates: Any
) -> torch.Tensor:
    """Those that `rp.lesion_study` counts, which does not show them; its error rates must be theirs."""
    chains = [lesion.edit(chain) for lesion in rp.single_deletions(chain)]
    trie = Trie(place_modules(chains, **placement_of(options)))
    images, labels = (torch.cat(part) for part in zip(*given, strict=True))
    with torch.inference_mode():
        found = dict(trie.logits(images.to(PRECISIONS.get(options.get("precision", "float32")))))
    predictions = torch.stack([found[i].argmax(1) for i in range(len(found))])
    assert np.allclose(error_rates, (predictions != labels).double().mean(1).numpy())
    return predictions


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Its blocks, first to last."""
    return [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]


def block_names(model: nn.Module) -> list[tuple[str, int]]:
    """Stage and position in it, for each block."""
    return [(stage, i) for stage in ("layer1", "layer2", "layer3") for i in range(len(getattr(model, stage)))]


# What people write by hand


class SkipAlone(nn.Module):
    """A pre-activation block of which only the skip is left."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block = self.block
        return x if block.projection is None else block.projection(F.relu(block.bn1(x)))


def copy_and_run(model: nn.Module, blocks: list[int]) -> Predict:
    names = block_names(model)

    @torch.inference_mode()
    def predict(batches: list[torch.Tensor], clock: Clock) -> torch.Tensor:
        predictions = []
        for number in blocks:
            with clock.once_a_study():
                cut = copy.deepcopy(model)
                stage, index = names[number]
                getattr(cut, stage)[index] = SkipAlone(getattr(cut, stage)[index])
            predictions.append(torch.cat([cut(images).argmax(1) for images in batches]))
        return torch.stack(predictions)

    return predict


def hooks(model: nn.Module, blocks: list[int]) -> Predict:
    parts = blocks_of(model)

    @torch.inference_mode()
    def predict(batches: list[torch.Tensor], clock: Clock) -> torch.Tensor:
        predictions = []
        for number in blocks:
            handle = parts[number].conv2.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
            predictions.append(torch.cat([model(images).argmax(1) for images in batches]))
            handle.remove()
        return torch.stack(predictions)

    return predict


def kept_prefix(model: nn.Module, blocks: list[int]) -> Predict:
    """Written for this one network by someone who sees that what stands before the deleted block need not run again."""
    parts = blocks_of(model)
    cut = [SkipAlone(part) for part in parts]

    @torch.inference_mode()
    def predict(batches: list[torch.Tensor], clock: Clock) -> torch.Tensor:
        found = []
        for images in batches:
            state, predictions = model.conv(images), []
            for number, part in enumerate(parts):
                if number in blocks:
                    x = cut[number](state)
                    for later in parts[number + 1 :]:
                        x = later(x)
                    predictions.append(model.fc(F.relu(model.bn(x)).mean((2, 3))).argmax(1))
                state = part(state)
            found.append(torch.stack(predictions))
        return torch.cat(found, 1)

    return predict


# Other libraries


def captum(model: nn.Module, blocks: list[int]) -> Predict:
    from captum.attr import LayerFeatureAblation

    parts = blocks_of(model)
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.int64)  # the whole output of a branch is one feature

    def predicted(images: torch.Tensor) -> torch.Tensor:
        return model(images).argmax(1).float()

    @torch.no_grad()
    def predict(batches: list[torch.Tensor], clock: Clock) -> torch.Tensor:
        predictions = []
        for number in blocks:
            ablation = LayerFeatureAblation(predicted, parts[number].conv2)
            # It returns intact minus ablated output, here class indices.
            changes = [ablation.attribute(x, layer_baselines=0, layer_mask=mask).flatten(1)[:, 0] for x in batches]
            predictions.append(torch.cat(changes))
        intact = torch.cat([predicted(images) for images in batches])
        return (intact - torch.stack(predictions)).long()

    return predict


def nnsight(model: nn.Module, blocks: list[int]) -> Predict:
    from nnsight import NNsight

    wrapped, names = NNsight(model), block_names(model)

    @torch.no_grad()
    def predict(batches: list[torch.Tensor], clock: Clock) -> torch.Tensor:
        predictions = []
        for number in blocks:
            stage, index = names[number]
            rows = []
            for images in batches:
                with wrapped.trace(images):
                    getattr(wrapped, stage)[index].conv2.output[:] = 0
                    logits = wrapped.output.save()
                rows.append(logits.argmax(1))
            predictions.append(torch.cat(rows))
        return torch.stack(predictions)

    return predict


def torchlens(model: nn.Module, blocks: list[int]) -> Predict:
    import torchlens as tl

    names = block_names(model)

    @torch.no_grad()
    def predict(batches: list[torch.Tensor], clock: Clock) -> torch.Tensor:
        predictions = []
        for number in blocks:
            stage, index = names[number]
            cut = tl.when(tl.module(f"{stage}.{index}.conv2"), tl.zero_ablate())
            logs = [tl.trace(model, images, intervene=cut) for images in batches]
            predictions.append(torch.cat([log["output_1"].out.argmax(1) for log in logs]))
        return torch.stack(predictions)

    return predict


def pyvene(model: nn.Module, blocks: list[int]) -> Predict:
    import pyvene as pv
    from transformers import PretrainedConfig

    model.config = PretrainedConfig()  # it reads one

    def zero(output: torch.Tensor, source: Any) -> torch.Tensor:
        return torch.zeros_like(output)

    names = [block_names(model)[number] for number in blocks]
    wrapped = [
        pv.IntervenableModel({"component": f"{stage}[{index}].conv2.output", "intervention": zero}, model=model)
        for stage, index in names
    ]

    @torch.no_grad()
    def predict(batches: list[torch.Tensor], clock: Clock) -> torch.Tensor:
        return torch.stack([torch.cat([cut({"x": images})[1].argmax(1) for images in batches]) for cut in wrapped])

    return predict


CONTENDERS = {
    "this project, float32": Contender(share=1, options=()),
    "this project, float32, channels last": Contender(share=1, options=(("channels_last", True),)),
    "this project, float32, channels last, BatchNorm folded": Contender(
        share=1, options=(("channels_last", True), ("fold_batchnorm", True))
    ),
    "this project, bfloat16, channels last, BatchNorm folded": Contender(
        share=1, options=(("channels_last", True), ("fold_batchnorm", True), ("precision", "bfloat16"))
    ),
    "loop over copies of the model": Contender(copy_and_run),
    "forward hooks that zero the branch": Contender(hooks),
    "forward hooks, channels last": Contender(hooks, channels_last=True),
    "loop that keeps the state before the block": Contender(
        kept_prefix, note="written for this network; single deletions only"
    ),
    "loop that keeps the state, channels last": Contender(
        kept_prefix, channels_last=True, note="written for this network; single deletions only"
    ),
    "Captum LayerFeatureAblation": Contender(captum, "captum", note="attributes any output to any unit, too"),
    "nnsight": Contender(nnsight, "nnsight", note="edits any intermediate value, too"),
    "pyvene": Contender(pyvene, "pyvene", note="edits any intermediate value, too"),
    "TorchLens": Contender(torchlens, "torchlens", every=27, note="records every operation, too"),
    "baukit": Contender(peer="baukit"),
}
OURS = "this project, float32"


def run(options: Any) -> list[dict[str, Any]]:
    """Rows of all contenders, measured in turns."""
    versions, reasons = peers.install() if options.peers else ({}, {})
    given = {
        name: peers.python() if contender.peer else Path(options.python)
        for name, contender in CONTENDERS.items()
        if not contender.peer or contender.peer in versions
    }
    settings = {
        "network": options.network,
        "threads": options.threads,
        "batch": 10 if options.quick else 50,
        "batches": 1 if options.quick else 5,
        "most_every": 4 if options.quick else 1000,
    }
    repeats = 2 if options.quick else 4
    task = f"each block of {options.network} deleted in turn, 1,000 images in batches of {settings['batch']}"
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in given}
    with tempfile.TemporaryDirectory() as folder, workers(PART, given, settings) as running:
        agreement, memory = agreements(running, folder)
        for repeat in range(repeats):
            print(f"lesions: repeat {repeat + 1} of {repeats}", flush=True)
            for worker in running:
                answer = worker.ask(repeat=repeat)
                if answer is not None:
                    answers[worker.contender].append(answer)
        reasons |= {worker.contender: f"failed: {worker.reason}" for worker in running if worker.reason}
    ours = [a["seconds"] for a in answers[OURS]]
    rows = []
    for name, contender in CONTENDERS.items():
        reason = reasons.get(name, reasons.get(contender.peer))
        found = answers.get(name, [])
        if reason or not found:
            rows.append(row(PART, task, name, "seconds", note=reason or "not asked for (--no-peers)"))
            continue
        seconds = [a["seconds"] for a in found]
        notes = [f"{sum(a['images'] for a in found)} images", agreement[name]]
        if "bfloat16" in name:
            notes.append(bfloat16_support())
        if contender.every > 1:
            notes[0] += f", {found[0]['lesions']} of the deletions"
        rows.append(
            row(
                PART,
                task,
                name,
                "seconds",
                seconds,
                [a / b for a, b in zip(seconds, ours, strict=False)],
                memory=memory[name],
                note="; ".join([*notes, *filter(None, [contender.note])]),
            )
        )
    return rows


def agreements(running: list[Any], folder: str) -> tuple[dict[str, str], dict[str, float]]:
    """How many predictions are those of this project in float32, in words, and peaks of memory in MiB.

    All predictions must be the same, but for rounding.
    """
    found, memory, told = {}, {}, {}
    for number, worker in enumerate(running):
        path = str(Path(folder, f"{number}.npy"))
        answer = worker.ask(check=path)
        if answer is not None:
            found[worker.contender] = answer["blocks"], np.load(path)
            memory[worker.contender] = answer["memory"]
    for name, (blocks, predictions) in found.items():
        same = (predictions == found[OURS][1][blocks]).mean()
        if same < (0.9 if "bfloat16" in name else 0.999):
            raise AssertionError(f"{name}: {same:.2%} of the predictions are those of {OURS}: another lesion")
        told[name] = "the same predictions" if same == 1 else f"{same:.2%} of the predictions the same"
    return told, memory
