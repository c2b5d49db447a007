"""Gradients path by path with nothing but autograd, and random chains of every kind to try them on.

Two ways that share no code with `resnet_paths.gradients` nor with one another: dense Jacobians of each side of each
block, multiplied along every path; and a gate t on every branch of the backward pass, at all roots of unity at once.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import resnet_paths as rp
from resnet_paths.core.backward.cotangents import Stack
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.parts import LinearCombination, Parallel, Placed
from resnet_paths.core.paths import InBranch, path_length, path_polynomial
from resnet_paths.gradients.points import Place

MOST_PATHS = 1100

# Random chains


@dataclass(frozen=True)
class Recipe:
    """What one block is made of.

    `branch` is "one", "scaled", the number of parallel branches, "chain" (a parallel pair, of which one is a chain), or
    a tuple of recipes: those of a chain inside the branch. `width` is that of the output; "concat" adds it to that of
    the input.
    """

    width: int
    skip: str  # "identity", "projection", "concat" or "none"
    branch: Any = "one"
    pre: bool = False
    post: bool = False
    deleted: bool = False
    copies: int = 1


@st.composite
def recipes(draw: st.DrawFn, max_blocks: int = 10, depth: int = 2, of_pairs: bool = False) -> tuple[Recipe, ...]:
    """Recipes for a chain of 1 to `max_blocks` blocks; branches hold chains down to `depth` levels."""
    blocks: list[Recipe] = []
    for _ in range(draw(st.integers(1, max_blocks))):
        kinds = st.sampled_from(["one", "one", "scaled", 2, 3, "chain"])
        if depth > 0:
            kinds = st.one_of(kinds, kinds, kinds, recipes(3, depth - 1, of_pairs))
        skips = ["identity", "identity", "projection", "none"] + ["concat"] * (not of_pairs)
        recipe = Recipe(
            width=draw(st.integers(1, 3)),
            skip=draw(st.sampled_from(skips)),
            branch=draw(kinds),
            pre=draw(st.booleans()),
            post=draw(st.booleans()),
        )
        if recipe.skip == "concat":
            recipe = replace(recipe, branch="one")
        if recipe.skip != "none" and draw(st.integers(0, 7)) == 0:
            recipe = replace(recipe, deleted=True)
        elif draw(st.integers(0, 7)) == 0:
            recipe = replace(recipe, copies=2)
        if _num_paths([*blocks, recipe]) <= MOST_PATHS and sum(r.copies for r in [*blocks, recipe]) <= max_blocks:
            blocks.append(recipe)
    return tuple(blocks or [Recipe(2, "identity")])


def _num_paths(blocks: list[Recipe] | tuple[Recipe, ...]) -> int:
    def of_branch(branch: Any) -> int:
        if isinstance(branch, tuple):
            return _num_paths(branch)
        return branch if isinstance(branch, int) else 3 if branch == "chain" else 1

    return math.prod((int(r.skip != "none") + (0 if r.deleted else of_branch(r.branch))) ** r.copies for r in blocks)


class OnPair(nn.Module):
    """A map of the state (x, sum) in one tensor, as in WaveNet; `keep` adds the sum to the second result.

    If it `opens`, it makes such a state of x; if it `joins`, it returns the sum of both results.
    """

    def __init__(
        self, first: nn.Module, second: nn.Module, keep: bool = False, joins: bool = False, opens: bool = False
    ) -> None:
        super().__init__()
        self.first, self.second, self.keep, self.joins, self.opens = first, second, keep, joins, opens

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        x, total = (state, state.new_zeros(())) if self.opens else (state[:, :-SUMS], state[:, -SUMS:])
        if self.joins:
            return self.first(x) + self.second(total)
        return torch.cat([self.first(x), self.second(x) + (total if self.keep else 0)], 1)


SUMS = 2  # width of the sum in a pair


def build(blocks: tuple[Recipe, ...], seed: int = 0, of_pairs: bool = False) -> ResidualChain:
    """The chain, of 5 features and 3 classes, float64, in eval mode, with names, shapes and stages."""
    with seeded(seed):
        made, width = _blocks(blocks, 3, of_pairs)
        stem = OnPair(nn.Linear(5, 3), nn.Linear(5, SUMS), opens=True) if of_pairs else nn.Linear(5, 3)
        head = OnPair(nn.Linear(width, 3), nn.Linear(SUMS, 3), joins=True) if of_pairs else nn.Linear(width, 3)
        return _edited(ResidualChain(stem, made, head), blocks).double().eval()


def _edited(chain: ResidualChain, blocks: tuple[Recipe, ...]) -> ResidualChain:
    index = 0
    for recipe in blocks:
        if recipe.copies > 1:
            chain = rp.duplicate_block(chain, index)
        if recipe.deleted:
            chain = rp.delete_block(chain, index)
        index += recipe.copies
    return chain


def _blocks(blocks: tuple[Recipe, ...], width: int, of_pairs: bool) -> tuple[list[Block], int]:
    made = []
    for index, recipe in enumerate(blocks):
        wide = {"identity": width, "concat": width + recipe.width}.get(recipe.skip, recipe.width)
        if recipe.copies > 1:  # runs twice: keeps its shape
            wide = width
        if wide > 6:
            recipe, wide = replace(recipe, skip="projection"), 2
        layer = functools.partial(_on_pair if of_pairs else lambda f, _, **__: f, width=width)
        skip = {
            "identity": nn.Identity(),
            "none": None,
            "projection": layer(nn.Linear(width, wide), wide, keep=True),
            "concat": Placed(1, 0, wide - width),
        }[recipe.skip]
        if recipe.skip == "concat" and wide > width:
            branch: nn.Module = nn.Sequential(_function(width, wide - width), Placed(1, width, 0))
        elif recipe.branch == "scaled":
            branch = LinearCombination([layer(_function(width, wide), wide, keep=False)], [-0.7])
        elif isinstance(recipe.branch, int):
            sides = [layer(_function(width, wide), wide, keep=False) for _ in range(recipe.branch)]
            branch = Parallel([*sides[1:], LinearCombination([sides[0]], [0.5])])
        elif recipe.branch == "chain":
            inside = [Block(layer(_function(width, width), width, keep=False), nn.Identity())]
            last = layer(_function(width, wide), wide, keep=False)
            branch = Parallel([ResidualChain(nn.Identity(), inside, nn.Identity()), LinearCombination([last], [0.5])])
            if wide != width:
                branch[0] = nn.Sequential(branch[0], layer(nn.Linear(width, wide), wide, keep=True))
        elif isinstance(recipe.branch, tuple):
            inside, inner = _blocks(recipe.branch, 2, of_pairs)
            branch = _edited(
                ResidualChain(
                    layer(nn.Linear(width, 2), 2, keep=True),
                    inside,
                    _on_pair(nn.Linear(inner, wide), wide, width=inner, keep=True)
                    if of_pairs
                    else nn.Linear(inner, wide),
                ),
                recipe.branch,
            )
        else:
            branch = layer(_function(width, wide), wide, keep=False)
        made.append(
            Block(
                branch,
                skip,
                pre=layer(nn.Tanh(), width, keep=True) if recipe.pre else None,
                post=_on_pair(nn.Softplus(), wide, width=wide, keep=True)
                if recipe.post and of_pairs
                else nn.Softplus()
                if recipe.post
                else None,
                name=f"block{index}",
                stage=index // 3,
                in_shape=(width,),
                out_shape=(wide,),
            )
        )
        width = wide
    return made, width


def _on_pair(function: nn.Module, _wide: int, *, width: int, keep: bool) -> nn.Module:
    return OnPair(function, nn.Sequential(nn.Linear(width, SUMS), nn.Tanh()), keep)


def _function(width_in: int, width_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width_in, 4), nn.Tanh(), nn.Linear(4, width_out))


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Weights drawn inside come from `seed`; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def batch(size: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of 5 features and classes."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, 5, generator=generator, dtype=torch.float64),
        torch.randint(3, (size,), generator=generator),
    )


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


# Dense Jacobians, multiplied along every path


def flat(state: Any) -> torch.Tensor:
    """A state as one vector an example, [batch, features]."""
    return torch.cat([t.reshape(len(t), -1) for t in (state if isinstance(state, tuple) else (state,))], 1)


def _shaped(vectors: torch.Tensor, state: Any) -> Any:
    if not isinstance(state, tuple):
        return vectors.reshape(len(vectors), *state.shape[1:])
    pieces = vectors.split([math.prod(t.shape[1:]) for t in state], 1)
    return tuple(v.reshape(len(v), *t.shape[1:]) for v, t in zip(pieces, state, strict=True))


def jacobian(function: Callable[[Any], Any], state: Any) -> tuple[Any, torch.Tensor]:
    """Output and Jacobian [batch, out, in] at a state, row by row."""
    leaf = flat(state).detach().requires_grad_()
    output = function(_shaped(leaf.clone(), state))
    rows = [
        torch.autograd.grad(column.sum(), leaf, retain_graph=True, allow_unused=True)[0]
        if column.requires_grad
        else None
        for column in flat(output).T
    ]
    dense = torch.stack([torch.zeros_like(leaf) if row is None else row for row in rows], 1)
    return tuple(t.detach() for t in output) if isinstance(output, tuple) else output.detach(), dense


def _branches(block: Block) -> list[nn.Module]:
    if isinstance(block.branch, Parallel):
        return list(block.branch)
    return [] if block.branch is None else [block.branch]


def sides(block: Block, state: Any) -> tuple[Any, dict[Any, torch.Tensor]]:
    """A block's output, and for each entry of a path the Jacobian [batch, out, in] of the side that it takes."""
    shared, before = jacobian(block.pre, state)
    found: dict[Any, torch.Tensor] = {}
    outputs = []
    if block.skip is not None:
        output, found[False] = jacobian(block.skip, shared)
        outputs.append(output)
    for number, branch in enumerate(_branches(block), 1):
        if not isinstance(branch, ResidualChain) or not len(branch):
            output, found[number] = jacobian(branch, shared)
            outputs.append(output)
            continue
        inner, stem = jacobian(branch.stem, shared)
        through: dict[Any, torch.Tensor] = {(): stem}
        for part in branch:
            inner, taken = sides(part, inner)
            through = {(*path, entry): m @ rest for path, rest in through.items() for entry, m in taken.items()}
        output, head = jacobian(branch.head, inner)
        found |= {InBranch(path, number): head @ m for path, m in through.items()}
        outputs.append(output)
    total = outputs[0]
    for other in outputs[1:]:
        total = tuple(a + b for a, b in zip(total, other, strict=True)) if isinstance(total, tuple) else total + other
    output, after = jacobian(block.post, total)
    return output, {entry: after @ m @ before for entry, m in found.items()}


def path_gradients(
    chain: ResidualChain, inputs: Any, targets: Any, place: Any = "input", loss: Any = cross_entropy
) -> dict[Any, torch.Tensor]:
    """Every path's gradient of each example's own loss, [batch, features]; at the output of a block if `place` is one.

    For ``("parameters", block)`` the gradients for the block's parameters, end to end.
    """
    below = 0 if place in ("input", "stem") else chain.block_index(place[1] if isinstance(place, tuple) else place) + 1
    several = isinstance(inputs, tuple)
    if place == "input":
        state, stem = jacobian(lambda x: chain.stem(*x) if several else chain.stem(x), inputs)
    else:
        with torch.no_grad():
            state, stem = (chain.stem(*inputs) if several else chain.stem(inputs)), None
    states, blocks = [state], []
    for block in chain:
        state, taken = sides(block, states[-1])
        states.append(state)
        blocks.append(taken)
    leaf = flat(state).detach().requires_grad_()
    losses = loss(chain.head(_shaped(leaf, state)), targets)
    paths: list[Any] = [()]
    vectors = torch.autograd.grad(losses.sum(), leaf)[0][None]
    for taken in reversed(blocks[below:]):
        vectors = torch.cat([torch.einsum("pbo,boi->pbi", vectors, m) for m in taken.values()])
        paths = [(entry, *path) for entry in taken for path in paths]
    if stem is not None:
        vectors = torch.einsum("pbo,boi->pbi", vectors, stem)
    if isinstance(place, tuple):
        vectors = torch.stack([for_parameters(chain[below - 1], states[below - 1], v) for v in vectors])
    return dict(zip(paths, vectors, strict=True))


def for_parameters(block: Block, state: Any, cotangent: torch.Tensor) -> torch.Tensor:
    """Gradients of each example for a block's parameters, [batch, parameters], given those for its output."""
    parameters = [p for p in block.parameters() if p.is_floating_point()]
    rows = []
    for example, one in enumerate(cotangent):
        output = block(_shaped(flat(state)[example : example + 1], state))
        found = torch.autograd.grad((flat(output)[0] * one).sum(), parameters, allow_unused=True)
        whole = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
        rows.append(torch.cat([g.flatten() for g in whole]))
    return torch.stack(rows)


def summed(gradients: dict[Any, torch.Tensor], of_path: Callable[[Any], Any] = path_length) -> dict[Any, Any]:
    """The sum of the gradients of all paths of each length, or of whatever else `of_path` tells them apart by."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for path, vector in gradients.items():
        groups.setdefault(of_path(path), []).append(vector)
    return {key: torch.stack(groups[key]).sum(0) for key in sorted(groups)}


def energies(gradients: dict[Any, torch.Tensor]) -> torch.Tensor:
    """For each length the sum over its paths of squared norms, [length, batch]."""
    squares = summed({path: v.square().sum(1) for path, v in gradients.items()})
    return torch.stack(list(squares.values()))


# A gate on every branch of the backward pass


def gated_gradients(chain: ResidualChain, inputs: torch.Tensor, targets: Any, longest: int) -> torch.Tensor:
    """The sums over the paths of each length 0 to `longest`, [length, batch, features], as coefficients of G(t).

    G(t) is the gradient with t on every branch; at the roots of unity its values are the discrete Fourier transform of
    its coefficients.
    """
    size = longest + 1
    roots = torch.exp(2j * torch.pi * torch.arange(size, dtype=torch.float64) / size)
    gate = roots.repeat_interleave(len(inputs))
    copies = torch.cat([inputs] * size)
    state = chain.stem(copies)
    state, pull = _gated(chain, state, gate)
    leaf = flat(state).detach().requires_grad_()
    (found,) = torch.autograd.grad(cross_entropy(chain.head(_shaped(leaf, state)), targets.repeat(size)).sum(), leaf)
    back = _vjp(chain.stem, copies)[1]
    values = back(pull(found.to(torch.complex128))).reshape(size, len(inputs), -1)
    # torch.fft has exp(-2 pi i k j / n) and no 1/n in its forward transform.
    return torch.fft.fft(values, dim=0) / size


def _vjp(function: Callable[[Any], Any], state: Any) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor]]:
    leaf = flat(state).detach().requires_grad_()
    output = function(_shaped(leaf.clone(), state))

    def pull(v: torch.Tensor) -> torch.Tensor:
        parts = [
            torch.autograd.grad(flat(output), leaf, part, retain_graph=True, allow_unused=True)[0]
            for part in (v.real, v.imag)
        ]
        return torch.zeros_like(leaf) + 0j if parts[0] is None else torch.complex(*parts)

    return output, pull


def _gated(chain: ResidualChain, state: Any, gate: torch.Tensor) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor]]:
    pulls = []
    for block in chain:
        shared, pre = _vjp(block.pre, state)
        skip = None if block.skip is None else _vjp(block.skip, shared)[1]
        branches: list[Any] = []
        for branch in _branches(block):
            if isinstance(branch, ResidualChain) and len(branch):
                inner, stem = _vjp(branch.stem, shared)
                inner, inside = _gated(branch, inner, gate)
                head = _vjp(branch.head, inner)[1]
                branches.append(functools.partial(lambda v, s, i, h: s(i(h(v))), s=stem, i=inside, h=head))
            else:
                branches.append(_vjp(branch, shared)[1])
        without_post = block.replace(pre=None, post=None)(shared)
        state, post = _vjp(block.post, without_post)
        pulls.append((pre, skip, branches, post))

    def pull(v: torch.Tensor) -> torch.Tensor:
        for pre, skip, branches, post in reversed(pulls):
            v = post(v)
            through_skip = 0 if skip is None else skip(v)
            v = pre(through_skip + sum(gate[:, None] * branch(v) for branch in branches))
        return v

    return state, pull


def detached_gradient(chain: ResidualChain, inputs: torch.Tensor, targets: Any, path: Any) -> torch.Tensor:
    """One path's gradient by a single backward pass in which every other side is detached. No nested chains."""
    x = inputs.clone().requires_grad_()
    state = chain.stem(x)
    for block, taken in zip(chain, path, strict=True):
        shared = block.pre(state)
        outputs = [] if block.skip is None else [(False, block.skip(shared))]
        branches = block.branch if isinstance(block.branch, Parallel) else [block.branch] * (block.branch is not None)
        outputs += [(number + 1, branch(shared)) for number, branch in enumerate(branches)]
        state = block.post(sum(y if entry == taken else y.detach() for entry, y in outputs))
    (found,) = torch.autograd.grad(cross_entropy(chain.head(state), targets).sum(), x, allow_unused=True)
    return torch.zeros_like(x) if found is None else found


# What the package finds


def by_length(chain: ResidualChain, inputs: Any, targets: Any, place: Any = "input") -> dict[int, torch.Tensor]:
    """The package's sums over the paths of each length, [batch, features]."""
    (point,) = Place.of(chain, place).points(inputs, targets, None, 2**31, 1)
    stack = point.by_length(len(path_polynomial(Place.of(chain, place).above)) - 1)
    return {stack.shortest + k: v for k, v in enumerate(vectors_of(stack))}


def vectors_of(stack: Stack) -> torch.Tensor:
    """The rows of a stack of one draw, [row, batch, features]."""
    mantissas = stack.values  # noqa: PD011 - no data frame
    return mantissas[:, 0].flatten(2).double() * torch.exp2(stack.exponents[:, 0].double())[..., None]


def assert_close(found: Any, expected: Any, tolerance: float = 1e-10, scale: float | None = None) -> None:
    """Equal up to a fraction of `scale`: the largest number expected, if not given."""
    found, expected = (
        np.asarray(v.detach() if isinstance(v, torch.Tensor) else v, dtype=np.float64) for v in (found, expected)
    )
    assert found.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    if scale is None:
        scale = np.nanmax(np.abs(expected), initial=0)
    assert np.nanmax(np.abs(found - expected), initial=0) <= tolerance * scale, (found, expected)


def assert_column(frame: pd.DataFrame, name: str, values: torch.Tensor, scale: float | None = None) -> None:
    """A column and its standard error are mean and error of `values` [row, measurement], up to a fraction of them."""
    scale = float(values.abs().max()) if scale is None else scale
    assert_close(frame[name], values.mean(1), scale=scale)
    assert_close(frame[f"{name}_se"], values.std(1) / math.sqrt(values.shape[1]), scale=scale)


def norms_and_shares(sums: dict[Any, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of sums over paths and their shares of the whole gradient, [sum, batch]."""
    vectors = torch.stack(list(sums.values()))
    whole = vectors.sum(0)
    return vectors.norm(dim=2), (vectors * whole).sum(2) / whole.square().sum(1)


def product_paths(chain: ResidualChain) -> list[Any]:
    """All paths, listed without the package: every entry of a block with every entry of the others."""
    return list(itertools.product(*(_entries(block) for block in chain)))


def _entries(block: Block) -> list[Any]:
    skip: list[Any] = [] if block.skip is None else [False]
    found = skip
    for number, branch in enumerate(_branches(block), 1):
        nested = isinstance(branch, ResidualChain) and len(branch)
        found = found + ([InBranch(p, number) for p in product_paths(branch)] if nested else [number])
    return found


# Another device


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device and computes on this one: "meta", which runs no kernel of its own."""

    @staticmethod
    def __new__(cls, real):
        found = torch.Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), dtype=real.dtype, device="meta"
        )
        found.real_tensor = real
        return found

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return OtherDevice.run(operation, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    """Refuses operations between devices, as an accelerator does, but for copies and numbers."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return self.run(operation, args, kwargs or {})

    @staticmethod
    def run(operation, args, kwargs):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        theirs = {id(t.real_tensor): t for t in tensors if isinstance(t, Elsewhere)}
        ours = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim()]
        if theirs and ours and operation is not torch.ops.aten.copy_.default:
            raise RuntimeError(f"{operation} mixes devices")
        there = bool(theirs)
        if kwargs.get("device") is not None:
            there, kwargs = torch.device(kwargs["device"]).type == "meta", kwargs | {"device": "cpu"}
        args, kwargs = tree_map(lambda t: t.real_tensor if isinstance(t, Elsewhere) else t, (args, kwargs))

        def placed(t):
            if not isinstance(t, torch.Tensor) or not there:
                return t
            return theirs[id(t)] if id(t) in theirs else Elsewhere(t)

        return tree_map(placed, operation(*args, **kwargs))
