"""The tensors that a chain shares with the model it was read from, to notice when the model replaces one.

A chain holds the model's own parameters and buffers. What is written into them, as training does, both see. What takes
their place in the model the chain never sees: ``load_state_dict(..., assign=True)``, ``model.double()`` (buffers), a
move to another device, a new parameter, a parametrization.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import nn

from resnet_paths._utils.errors import ResnetPathsError

__all__ = ["Source"]


class Source:
    """The tensors that a model and a chain share. A copy shares nothing with the model and has none.

    Args:
        model: The model; it is not kept alive. None for a chain that was made by hand.
        chain: The chain that was read from it.
    """

    def __init__(self, model: nn.Module | None = None, chain: nn.Module | None = None) -> None:
        self._shared: list[tuple[weakref.ref[nn.Module], str, str, str, weakref.ref[torch.Tensor]]] = []
        if model is None or chain is None:
            return
        held = {id(tensor) for _, _, tensor in _tensors_of(chain)}
        for prefix, module in model.named_modules():
            for table, name, tensor in _tensors_of(module, recurse=False):
                if id(tensor) in held:
                    path = f"{prefix}.{name}".lstrip(".")
                    self._shared.append((weakref.ref(module), table, name, path, weakref.ref(tensor)))

    def check(self) -> None:
        """Validate that the model still holds the tensors that the chain computes with.

        Raises:
            ResnetPathsError: If one was replaced; it is named.
        """
        for module, table, name, path, tensor in self._shared:
            owner = module()
            if owner is not None and vars(owner)[table].get(name) is not tensor():
                raise ResnetPathsError(
                    "chain",
                    f"a chain of a model whose tensor {path!r} was replaced",
                    "a chain that shares its weights with its model",
                    "Unravel the model again: load_state_dict(assign=True), .double() and .to() replace tensors.",
                )

    def __deepcopy__(self, memo: dict[int, object]) -> Source:
        return Source()

    def __reduce__(self) -> tuple[type[Source], tuple[()]]:
        return Source, ()


def _tensors_of(module: nn.Module, recurse: bool = True) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Parameters and buffers: the table that holds each, and its name there."""
    for part in module.modules() if recurse else [module]:
        if isinstance(part, torch.jit.ScriptModule):  # makes its tensors again whenever it is asked
            continue
        for table in ("_parameters", "_buffers"):
            yield from ((table, name, tensor) for name, tensor in vars(part)[table].items() if tensor is not None)
