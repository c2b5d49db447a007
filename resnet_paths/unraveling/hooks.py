"""A model while it is read: hooks that only store are left out, and its attributes are as before afterwards.

What a hook returns, or writes into its tensors, is part of what the model computes and is exported. A hook that stores
activations computes nothing, unless the model reads them; run by the exporter it would keep tensors without values. The
same holds for what a model's forward stores in attributes of its modules.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import nn
from torch.utils import _pytree as pytree

__all__ = ["untouched"]


class _Hooks:
    """The forward hooks of a model; which of them had an effect when the model ran."""

    def __init__(self, model: nn.Module) -> None:
        self._tables = [t for m in model.modules() for t in (m._forward_pre_hooks, m._forward_hooks) if t]
        self._originals = [dict(table) for table in self._tables]
        self._effective: set[int] = set()
        self._run: set[int] = set()
        for table in self._tables:
            table.update({key: self._watched(key, hook) for key, hook in table.items()})

    def _watched(self, key: int, hook: Callable[..., object]) -> Callable[..., object]:
        def watched(*args: object) -> object:
            before = _versions(args)
            returned = hook(*args)
            self._run.add(key)
            if returned is not None or _versions(args) != before:
                self._effective.add(key)
            return returned

        return watched

    def silence(self, runs_alike: Callable[[], bool]) -> None:
        """Put all hooks back but those that ran without effect, unless the model reads what these store.

        Args:
            runs_alike: Whether the model returns without them what it returned before.
        """
        self.restore()
        silent = self._run - self._effective
        if not silent:
            return
        for table, originals in zip(self._tables, self._originals, strict=True):
            table.clear()
            table.update({key: hook for key, hook in originals.items() if key not in silent})
        if not runs_alike():
            self.restore()

    def restore(self) -> None:
        """Put all hooks back, in their order."""
        for table, originals in zip(self._tables, self._originals, strict=True):
            table.clear()
            table.update(originals)


def _versions(values: Sequence[object]) -> list[int]:
    """How often each tensor was written to."""
    tensors = (leaf for leaf in pytree.tree_leaves(values[1:]) if isinstance(leaf, torch.Tensor))
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


_OF_TORCH = {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"}


class _Attributes:
    """The attributes of a model's modules, and what lists, dictionaries and sets among them hold."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = []
        for module in model.modules():
            own = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
            holders = [(x, x.copy()) for x in own.values() if isinstance(x, list | dict | set | deque)]
            self._kept.append((module, own, holders))

    def restore(self) -> None:
        for module, own, holders in self._kept:
            for name in set(vars(module)) - set(own) - _OF_TORCH:
                del vars(module)[name]
            vars(module).update(own)
            for holder, content in holders:
                if not _is_same(holder, content):
                    holder.clear()
                    holder.extend(content) if isinstance(holder, list | deque) else holder.update(content)


def _is_same(holder: Collection[object], content: Collection[object]) -> bool:
    """Whether a container holds the same objects as before; they are not compared by value, which tensors refuse."""
    if isinstance(holder, dict) and isinstance(content, dict):
        return [*map(id, holder.values())] == [*map(id, content.values())] and [*holder] == [*content]
    return [*map(id, holder)] == [*map(id, content)]


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[_Hooks]:
    """Watch a model's forward hooks while it runs once, to silence those without effect; restore what was changed.

    Args:
        model: The model.

    Yields:
        The hooks; call `silence` after the model ran. All are back in place afterwards.
    """
    attributes, hooks = _Attributes(model), _Hooks(model)
    try:
        yield hooks
    finally:
        hooks.restore()
        attributes.restore()
