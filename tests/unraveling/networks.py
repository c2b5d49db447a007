"""Small networks whose forward is one function, with lesions and gradients written by hand.

Such a function joins skip and branch by ``add(skip, branch)``, which is a plain sum when the model is called. Other
sums in its place give the values that tests expect: `without` leaves branches out, `gated` scales the gradient that
flows through branches. Nothing here uses the library.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 6
TARGETS = torch.tensor([0, 1, 2, 0])


class Net(nn.Module):
    """A module whose forward is ``run(self, *args)``, with its parts as attributes."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def network(run: Callable[..., Any], **parts: Callable[[], nn.Module | nn.Parameter]) -> Net:
    """A seeded float64 network in eval mode, of parts that are made by calling `parts`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net(run, **{name: make() for name, make in parts.items()}).double().eval()
        for parameter in net.parameters():  # large enough that every branch and every gradient shows
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return net


def linear(inputs: int = WIDTH, outputs: int = WIDTH) -> Callable[[], nn.Linear]:
    return lambda: nn.Linear(inputs, outputs)


def linears(number: int, width: int = WIDTH) -> Callable[[], nn.ModuleList]:
    return lambda: nn.ModuleList(nn.Linear(width, width) for _ in range(number))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def without(*calls: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A sum that returns the skip alone at the given calls, counted from 0."""
    counter = itertools.count()
    return lambda skip, branch: skip if next(counter) in calls else skip + branch


def gated(factor: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The same sum; the gradient through the branch is multiplied by `factor`."""
    return lambda skip, branch: skip + (factor * branch + (1 - factor) * branch.detach())


def gradient(model: Net, inputs: Sequence[torch.Tensor], targets: torch.Tensor, factor: float) -> torch.Tensor:
    """The gradient of each example's cross-entropy at all inputs, [example, feature], branches gated by `factor`."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = F.cross_entropy(model.run(model, *leaves, add=gated(factor)), targets, reduction="sum")
    return torch.cat([g.flatten(1) for g in torch.autograd.grad(loss, leaves)], 1)


def gradient_shares(
    model: Net, inputs: Sequence[torch.Tensor], longest: int, targets: torch.Tensor = TARGETS
) -> list[float]:
    """Mean over examples of <G_k, G> / <G, G> for every number k of branches on a route, k = 0 to `longest`.

    With the gradient through every branch multiplied by t, the whole gradient is the polynomial sum over k of G_k t^k:
    its values at ``longest + 1`` points give the G_k.
    """
    points = torch.linspace(-1, 1, longest + 1, dtype=torch.float64)
    values = torch.stack([gradient(model, inputs, targets, float(t)) for t in points])
    powers = points[:, None] ** torch.arange(longest + 1)
    by_length = torch.linalg.solve(powers, values.flatten(1)).view_as(values)
    whole = by_length.sum(0)
    return ((by_length * whole).sum(2) / (whole * whole).sum(1)).mean(1).tolist()


@contextlib.contextmanager
def zeroed(*modules: nn.Module) -> Iterator[None]:
    """Every call of the modules returns zeros, in the shape of what they return; of a tuple, its first entry."""

    def zero(module: nn.Module, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    hooks = [module.register_forward_hook(zero) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
