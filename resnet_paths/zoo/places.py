"""Where weights lie: ``NAME-seedS.safetensors``, beside it ``NAME-seedS.epochE.safetensors`` for moments of training.

Shipped weights of seed 0 are called by the name alone, ``NAME.safetensors`` and ``NAME.epochE.safetensors``.
"""

from __future__ import annotations

import re
from pathlib import Path

from resnet_paths._utils.errors import ResnetPathsError

__all__ = ["choose_weights", "snapshot_file", "weights_in"]


def snapshot_file(weights: Path, epoch: int) -> Path:
    """The file beside a weights file that holds the weights after `epoch` epochs; 0 is the initialisation."""
    return weights.with_name(f"{weights.stem}.epoch{epoch}.safetensors")


def weights_in(folder: Path, network: str) -> dict[tuple[int, int | None], Path]:
    """The weights files of a network in a folder.

    Args:
        folder: The folder; it may be missing.
        network: Name of the network.

    Returns:
        Paths by (seed, snapshot), in this order; the snapshot is None for the weights at the end of training.
    """
    name = re.compile(rf"{re.escape(network)}(?:-seed(\d+))?(?:\.epoch(\d+))?\.safetensors")
    matches = [(name.fullmatch(path.name), path) for path in folder.glob(f"{network}*.safetensors")]
    found = {(int(m[1] or 0), None if m[2] is None else int(m[2])): path for m, path in matches if m}
    return dict(sorted(found.items(), key=lambda item: (item[0][0], -1 if item[0][1] is None else item[0][1])))


def choose_weights(network: str, place: Path, seed: int | None, snapshot: int | None) -> Path:
    """The weights file that is meant.

    Args:
        network: Name of the network.
        place: A weights file, or a folder of them.
        seed: Seed of the run, by default the lowest that is there; where `place` is a file, only None.
        snapshot: Number of epochs after which the weights were kept; None for the end of training.

    Returns:
        Path of an existing file.

    Raises:
        ResnetPathsError: If there is no such file; what there is, is named.
    """
    if place.is_file():
        if seed is not None:
            raise ResnetPathsError("seed", seed, "None where weights is a file", "Pass the file of that seed.")
        name = re.compile(rf"{re.escape(place.stem)}\.epoch(\d+)\.safetensors")
        matches = [(name.fullmatch(path.name), path) for path in place.parent.iterdir()]
        kept = {None: place} | {int(m[1]): path for m, path in matches if m}
    else:
        found = weights_in(place, network)
        if not found:
            raise ResnetPathsError(
                "weights",
                str(place),
                f"an existing weights file of {network!r} or a folder that holds one",
                f"Train it with 'resnet-paths train {network}' and pass the file as weights=.",
            )
        seeds = sorted({s for s, _ in found})
        seed = seeds[0] if seed is None else seed
        if seed not in seeds:
            raise ResnetPathsError("seed", seed, f"one of {_listed(seeds)}, of which {place} holds {network!r}")
        kept = {e: path for (s, e), path in found.items() if s == seed}
    if snapshot not in kept:
        epochs = sorted(e for e in kept if e is not None)
        raise ResnetPathsError(
            "snapshot",
            snapshot,
            f"None for the end of training, or the epoch of a snapshot: {_listed(epochs)}",
            f"Those are kept of {network!r} in {place}.",
        )
    return kept[snapshot]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
