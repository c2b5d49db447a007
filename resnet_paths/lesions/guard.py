"""Lesion functions are handed the chain itself, whose parts all lesions share: what one changes in it would reach all.

So the chain is compared before and after each function. What was taken out or put in is put back; numbers that were
written over are not kept twice, and only noticed.
"""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import nn

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.fingerprint import bytes_of
from resnet_paths.core.chain import ResidualChain

__all__ = ["guard_of"]

_TABLES = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")


def guard_of(chain: ResidualChain) -> Callable[[str], AbstractContextManager[None]]:
    """A context in which a lesion function runs, for a chain as it is now: its modules and the numbers in its tensors.

    Args:
        chain: The chain.

    Returns:
        From the name of a lesion to a context. It raises `ResnetPathsError`, with the name, where the function changes
        the chain that it is given.
    """
    modules = list(chain.modules())
    tables = [(vars(m), name, vars(m)[name], dict(vars(m)[name])) for m in modules for name in _TABLES]
    attributes = [(vars(m), _attributes_of(m)) for m in modules]
    named = itertools.chain(chain.named_parameters(), chain.named_buffers())
    numbers = [(name, tensor, _checksum(tensor)) for name, tensor in named]

    def restore() -> bool:
        """Put parts and attributes back where they were; returns whether any was changed."""
        changed = [kept for kept in tables if not _is_same(kept[0][kept[1]], kept[3])]
        for own, name, table, before in changed:
            table.clear()  # in their order
            table.update(before)
            own[name] = table
        others = [(own, before) for own, before in attributes if not _is_same(own, before)]
        for own, before in others:
            own.update(before)
        return bool(changed or others)

    @contextlib.contextmanager
    def watching(lesion: str) -> Iterator[None]:
        try:
            yield
        finally:  # also where it raises: what it broke may be why
            was_changed = restore()
            written = [name for name, tensor, before in numbers if _checksum(tensor) != before]
            if written or was_changed:
                raise ResnetPathsError(
                    "lesions",
                    lesion,
                    "functions that return another chain and leave the one they are given as it is",
                    f"It wrote over {written[0]!r} of the intact network: load the weights again, and change a copy."
                    if written
                    else "Use delete_block, Block.replace or ResidualChain.with_blocks, which make new ones.",
                )

    return watching


def _attributes_of(module: nn.Module) -> dict[str, object]:
    """Those that say what it computes; modules written by others may well keep something as they run."""
    ours = type(module).__module__.startswith("resnet_paths.")
    return {k: v for k, v in vars(module).items() if k == "training" or (ours and k not in _TABLES)}


def _is_same(table: Mapping[str, object], before: Mapping[str, object]) -> bool:
    """Whether a table holds the same objects as before; they are not compared by value, which tensors refuse."""
    return all(table.get(key, before) is value for key, value in before.items()) and (
        len(table) == len(before) or "training" in before
    )


def _checksum(tensor: torch.Tensor) -> int:
    # Not version counters, which writing into `tensor.data` passes by.
    return zlib.crc32(bytes_of(tensor))
