"""The one abstraction: stem, then blocks in series, then head; a block is a skip and a branch in parallel.

    ResidualChain = stem -> Block -> Block -> ... -> head
    Block         : y = post(skip(h) + branch(h, **context)) with h = pre(x)

The state that the blocks hand on is one tensor. What several of them read and none changes, such as an attention mask,
is *context*: the stem computes it, and each part is given the entries that it reads, by name.

Chains are values: nothing here changes one in place. `resnet_paths.core.edits` makes new chains from old ones, sharing
every weight. `resnet_paths.unravel` makes a chain from any model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Unpack, cast

import pandas as pd
import torch
from torch import nn

from resnet_paths._utils.arguments import is_boolean, require_int, require_list, require_module
from resnet_paths._utils.errors import ResnetPathsError, nearest_names
from resnet_paths.core.cache import ByBlock, Cache
from resnet_paths.core.inputs import refusing_other_dtypes, refusing_other_inputs
from resnet_paths.core.parts import BlockFields, LinearCombination, Parallel, Placed, added, call_part, context_read_by
from resnet_paths.core.paths import Choice, InBranch, num_paths
from resnet_paths.core.polynomials import shown_count
from resnet_paths.core.source import Source
from resnet_paths.core.summary import chain_table, dimensions, indented
from resnet_paths.core.units import length_polynomial
from resnet_paths.core.weight_layers import weight_layers

__all__ = ["Block", "ResidualChain"]


class Block(nn.Module):
    """One residual block: ``y = post(skip(h) + branch(h))`` with ``h = pre(x)``.

    Args:
        branch: The residual function f; None once deleted. It may be a `ResidualChain`, whose own paths then count.
        skip: Identity, or the projection at a change of shape, to the shape of the sum; None in a plain net.
        pre: What skip and branch share: the pre-activation at a change of stage (He et al. 2016b), a downsampling
            layer between two stages.
        pre_stays: Whether `pre` belongs to the place and not to the block, as a layer between two stages does: it stays
            where it is when blocks are swapped, and is not repeated with the block.
        post: What follows the addition: nothing in a pre-activation network, ReLU in a post-activation ResNet.
        name: Name of the block's module in the model, such as ``"layer2.0"``.
        skip_kind: ``"identity"``, ``"concat"`` or, of any other skip, ``"projection"``; None without skip. Inferred
            from `skip` if not given.
        stage: Number of the run of blocks with outputs of one shape, counted from 0.
        in_shape: Shape of an input without its batch dimension; None if not known.
        out_shape: Shape of an output, likewise.

    Raises:
        ResnetPathsError: If there is neither a skip nor a branch, or an argument is of another type.
    """

    def __init__(
        self,
        branch: nn.Module | None,
        skip: nn.Module | None,
        *,
        pre: nn.Module | None = None,
        pre_stays: bool = False,
        post: nn.Module | None = None,
        name: str = "",
        skip_kind: str | None = None,
        stage: int = 0,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        for argument, part in (("branch", branch), ("skip", skip), ("pre", pre), ("post", post)):
            require_module(argument, part, optional=True)
        if not isinstance(name, str):
            raise ResnetPathsError("name", name, "a str")
        if branch is None and skip is None:
            advice = f"Block {name!r} would cut the chain."
            raise ResnetPathsError("skip", None, "a module where branch is None", advice)
        self.pre = pre if pre is not None else nn.Identity()
        self.pre_stays = pre_stays
        self.skip = skip
        self.branch = branch
        self.post = post if post is not None else nn.Identity()
        self.name = name
        if skip_kind is None and skip is not None:
            skip_kind = {nn.Identity: "identity", Placed: "concat"}.get(type(skip), "projection")
        self.skip_kind = skip_kind
        self.stage = require_int("stage", stage, 0)
        self.reads_context = context_read_by(self.pre, skip, branch, self.post)
        self.in_shape = None if in_shape is None else tuple(in_shape)
        self.out_shape = None if out_shape is None else tuple(out_shape)

    def forward(self, x: torch.Tensor, **context: torch.Tensor) -> torch.Tensor:
        """``post(skip(h) + branch(h))`` with ``h = pre(x)``, ``[batch, *in_shape]`` to ``[batch, *out_shape]``."""
        x = call_part(self.pre, x, context)
        return call_part(self.post, self.added_up(x, context), context)

    def added_up(self, x: torch.Tensor, context: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``skip(x) + branch(x)``, or the one of them that is there; `x` is the output of `pre`."""
        if self.run is not None:
            return call_part(self.run, x, context)
        onto_skip = isinstance(self.branch, Parallel) and self.branch.onto_skip
        parts = [self.skip, *(self.branches if onto_skip else [self.branch])]
        first, *others = (call_part(part, x, context) for part in parts if part is not None)
        return functools.reduce(added, others, first)

    @property
    def path_choices(self) -> tuple[Choice, ...]:
        """The entries it offers to a path: False for the skip, 1, 2... for its branches (`resnet_paths.core.paths`)."""
        skips: tuple[Choice, ...] = (False,) if self.skip is not None else ()
        nested = self.nested
        offered = (
            InBranch(nested[number].path_choices, number) if number in nested else True if number == 1 else number
            for number in range(1, len(self.branches) + 1)
        )
        return (*skips, *offered)

    @property
    def branches(self) -> tuple[nn.Module, ...]:
        """What a path may take instead of the skip: the branch, or each of several; empty if it is deleted."""
        if isinstance(self.branch, Parallel):
            return tuple(self.branch)
        return () if self.branch is None else (self.branch,)

    @property
    def nested(self) -> dict[int, ResidualChain]:
        """The chains inside its branches, by the number of the branch, counted from 1."""
        numbered = enumerate(self.branches, start=1)
        return {number: chain for number, chain in numbered if isinstance(chain, ResidualChain) and len(chain)}

    @property
    def run(self) -> ResidualChain | None:
        """The blocks of a group (`resnet_paths.group_blocks`) as a chain; None if the block is not a group."""
        if not (isinstance(self.branch, LinearCombination) and self.branch.is_difference):
            return None
        run, around = self.branch
        leads_around = self.skip is around or (is_identity(self.skip) and is_identity(around))
        return cast("ResidualChain", run) if leads_around else None

    @property
    def branch_names(self) -> tuple[str, ...]:
        """Names of the branches if there are several; empty if they have no names."""
        return self.branch.names if isinstance(self.branch, Parallel) else ()

    def with_branch(self, number: int, branch: nn.Module) -> Block:
        """The block with one of its branches replaced.

        Args:
            number: Number of the branch, counted from 1.
            branch: What takes its place; of a group, another run of blocks.

        Returns:
            A block.
        """
        if isinstance(self.branch, LinearCombination) and self.branch.is_difference:
            return self.replace(branch=LinearCombination([branch, self.branch[1]], self.branch.factors))
        if not isinstance(self.branch, Parallel):
            return self.replace(branch=branch)
        branches = [branch if i == number else other for i, other in enumerate(self.branch, start=1)]
        return self.replace(branch=Parallel(branches, onto_skip=self.branch.onto_skip, names=self.branch.names))

    @property
    def keeps_shape(self) -> bool:
        """Whether outputs have the shape of inputs, as far as known: such blocks of a stage can be swapped.

        Without `pre`, where that stays in its place.
        """
        return self.in_shape == self.out_shape or (self.pre_stays and self.skip_kind == "identity")

    def moved_to(self, place: Block) -> Block:
        """The block in the place of another: before it is the `pre` that stays in that place, else its own.

        Args:
            place: The block that was there.

        Returns:
            A block.
        """
        if not (self.pre_stays or place.pre_stays) or self is place:
            return self
        own_shape = self.out_shape if self.pre_stays else self.in_shape
        own_pre = None if self.pre_stays else self.pre
        return self.replace(
            pre=place.pre if place.pre_stays else own_pre,
            pre_stays=place.pre_stays,
            in_shape=place.in_shape if place.pre_stays else own_shape,
        )

    def replace(self, **changes: Unpack[BlockFields]) -> Block:
        """A block that shares all parts with this one but those in `changes`, named as in `Block`."""
        fields: dict[str, Any] = {field: getattr(self, field) for field in BlockFields.__annotations__} | dict(changes)
        block = Block(**fields)
        block.training = self.training  # not block.train(): the parts are shared
        return block

    def summary(self) -> str:
        """One line: name, stage, skip, what is left of the branch, shapes."""
        skip = f"{self.skip_kind} skip" if self.skip is not None else "no skip"
        branch = "branch deleted"
        if self.branch is not None:
            branch = f"{sum(p.numel() for p in self.branch.parameters()):,} parameters in the branch"
        shapes = " -> ".join(dimensions(shape) for shape in (self.in_shape, self.out_shape))
        said = [f"stage {self.stage}", skip, branch, *([] if self.in_shape is None else [shapes])]
        return f"{self.name or '(unnamed)'}: {', '.join(said)}"


class ResidualChain(nn.Module):
    """A network as a chain of residual blocks; ``chain(x)`` is ``head(block_n(... block_1(stem(x))))``.

    Chains made from one another, and the model they were read from, share their weights: moving or converting one
    (``.to``, ``.double``) breaks the others. Move the model first and unravel it there, or move a `copy.deepcopy` of
    the chain.

    Args:
        stem: Everything before the first block; takes the model's inputs.
        blocks: The blocks, first to last; their names must differ.
        head: Everything after the last block.
        context_names: Names of the context, if any; the stem then returns a tuple: the first state, and a tensor for
            each name.

    Raises:
        ResnetPathsError: If two blocks have one name, shapes do not fit, or an argument is of another type.

    Example:
        >>> blocks = [Block(nn.Linear(4, 4), nn.Identity(), name=f"block{i}") for i in range(3)]
        >>> chain = ResidualChain(nn.Linear(2, 4), blocks, nn.Linear(4, 5))
        >>> len(chain), chain.num_paths, chain.blocks[2].name
        (3, 8, 'block2')
    """

    def __init__(
        self, stem: nn.Module, blocks: Iterable[Block], head: nn.Module, context_names: Sequence[str] = ()
    ) -> None:
        super().__init__()
        require_module("stem", stem)
        require_module("head", head)
        blocks = require_list("blocks", blocks, "a list of Block")
        seen: set[str] = set()
        for block in blocks:
            if not isinstance(block, Block):
                raise ResnetPathsError("blocks", block, "a list of Block")
            if block.name and block.name in seen:
                raise ResnetPathsError("blocks", block.name, "blocks with different names")
            seen.add(block.name)
        for left, right in itertools.pairwise(blocks):
            if None not in (left.out_shape, right.in_shape) and left.out_shape != right.in_shape:
                raise ResnetPathsError(
                    "blocks",
                    f"{right.name!r} after {left.name!r}",
                    f"a block that takes {dimensions(left.out_shape)}, not {dimensions(right.in_shape)}",
                    "Only blocks of one stage that keep the shape can be swapped.",
                )
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.context_names = tuple(context_names)
        # Of a chain inside a branch: what it reads of the context of the chain around it.
        read = context_read_by(stem, *blocks, head)
        self.reads_context = tuple(name for name in read if name not in self.context_names)
        self.eval_only = False  # set for a chain that was read from a model in eval mode
        self.notes: tuple[str, ...] = ()  # what was guessed when it was read; the end of the summary
        self.casts: tuple[str, ...] = ()  # modules whose exported code chooses a dtype: see `validate_precision`
        self.source = Source()  # the tensors of the model that it was read from

    def begin(self, *inputs: Any, **keywords: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The first state, and the context that blocks and head read.

        Args:
            *inputs: What the model takes.
            **keywords: Likewise. Of a chain inside a branch: the context of the chain around it.

        Returns:
            Output of the stem, and the context by name; an empty dictionary where there is none.
        """
        self.source.check()
        with refusing_other_inputs(self.stem, inputs, keywords):
            if self.reads_context:
                return call_part(self.stem, inputs[0], keywords), keywords
            if not self.context_names:
                return self.stem(*inputs, **keywords), {}
            state, *context = self.stem(*inputs, **keywords)
        return state, dict(zip(self.context_names, context, strict=True))

    def forward(self, *inputs: object, **keywords: object) -> torch.Tensor:
        """What the network returns."""
        x, context = self.begin(*inputs, **keywords)
        with refusing_other_dtypes((inputs, keywords), "chain", self):
            for block in self:
                x = call_part(block, x, context)
            return call_part(self.head, x, context)

    def run_with_cache(self, *inputs: object, **keywords: object) -> tuple[torch.Tensor, Cache]:
        """The output of the network, with the state, skip and branch of each block.

        Args:
            *inputs: What the model takes.
            **keywords: Likewise.

        Returns:
            The output, and a `Cache` with ``state``, ``skip`` and ``branch`` of each block, by position or name, and
            ``context``. Gradients are recorded as in an ordinary forward pass.
        """
        state, context = self.begin(*inputs, **keywords)
        states, skips, branches = [state], [], []
        with refusing_other_dtypes((inputs, keywords), "chain", self):
            for block in self:
                shared = call_part(block.pre, state, context)
                whole = block.added_up(shared, context) if _rounds_otherwise(block) else None
                skip = None if block.skip is None else call_part(block.skip, shared, context)
                branch = None if block.branch is None else call_part(block.branch, shared, context)
                terms = [term for term in ((skip, branch) if whole is None else (whole,)) if term is not None]
                state = call_part(block.post, functools.reduce(added, terms), context)
                states.append(state)
                skips.append(skip)
                branches.append(branch)
            output = call_part(self.head, state, context)
        names = [block.name for block in self]
        return output, Cache(ByBlock(states, names), ByBlock(skips, names), ByBlock(branches, names), context)

    def train(self, mode: bool = True) -> ResidualChain:
        """Set the mode of all parts, except of a chain that was read from a model, which keeps the mode of the model.

        Args:
            mode: True for training mode.

        Returns:
            The chain itself.

        Raises:
            ResnetPathsError: If `mode` is True and a part was exported in eval mode.
        """
        if mode and self.eval_only:
            raise ResnetPathsError(
                "mode",
                mode,
                "False: the chain was read from a model in eval mode",
                "Train the model itself, which shares its weights with the chain.",
            )
        super().train(mode)
        return self

    def __len__(self) -> int:
        """Number of blocks, deleted ones included: positions never shift."""
        return len(self.blocks)

    @property
    def path_choices(self) -> tuple[tuple[Choice, ...], ...]:
        """The entries that each block offers to a path; see `resnet_paths.core.paths`."""
        return tuple(block.path_choices for block in self)

    @property
    def num_paths(self) -> int:
        """Number of paths from input to output, exact: 2^n for n residual blocks (Veit et al. 2016, section 3)."""
        return num_paths(self.path_choices)

    def __iter__(self) -> Iterator[Block]:
        """The blocks, first to last."""
        return iter(cast("Iterable[Block]", self.blocks))

    def __getitem__(self, block: int | str) -> Block:
        """A block by position or name."""
        return cast("Block", self.blocks[self.block_index(block)])

    def block_index(self, block: int | str) -> int:
        """Position of a block, counted from 0.

        Args:
            block: Position (negative counts from the end) or name.

        Returns:
            Its position.

        Raises:
            ResnetPathsError: If there is no such block; the message has the most similar names.
        """
        if isinstance(block, str):
            names = [b.name for b in self]
            if block not in names:
                raise ResnetPathsError("block", block, f"the name of a block, nearest {nearest_names(block, names)}")
            return names.index(block)
        if is_boolean(block) or not hasattr(block, "__index__"):  # isinstance(block, SupportsIndex) is slow
            raise ResnetPathsError("block", block, "the position or the name of a block")
        return require_int("block", block, -len(self), len(self) - 1, noun="a position") % len(self)

    def with_blocks(self, blocks: Iterable[Block]) -> ResidualChain:
        """A chain of other blocks between the same stem and head."""
        return self._in_my_mode(ResidualChain(self.stem, blocks, self.head, self.context_names))

    def with_head(self, head: nn.Module) -> ResidualChain:
        """A chain of the same blocks with another head."""
        return self._in_my_mode(ResidualChain(self.stem, self, head, self.context_names))

    def _in_my_mode(self, chain: ResidualChain) -> ResidualChain:
        chain.training = chain.blocks.training = self.training  # not chain.train(): the parts are shared
        chain.eval_only, chain.notes, chain.casts = self.eval_only, self.notes, self.casts
        chain.source = self.source
        return chain

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ResidualChain:
        """As of any module; what is moved or converted no longer shares all tensors with its model."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.source = Source()
        return self

    def __repr__(self) -> str:
        """One line for the chain and one line per block."""
        lines = [f"  {index:>3} {block.summary()}" for index, block in enumerate(self)]
        return "\n".join([f"ResidualChain of {len(self)} blocks, {shown_count(self.num_paths)} paths", *lines])

    def summary(self) -> str:
        """A table of all blocks as text; blocks inside branches are indented.

        Returns:
            Lines of text: name, stage, skip, what stands before skip and branch, in the branch and after the addition,
            weight layers on the longest route through the branch, parameters, shapes without the batch.
        """
        size = sum(p.numel() for p in self.parameters())
        first = f"ResidualChain of {len(self)} blocks, {shown_count(self.num_paths)} paths, {size:,} parameters"
        if not len(self):
            return first
        table = indented(self.to_frame()).to_string(index=False, justify="left")
        return "\n".join([first, table, *self.notes])

    def _repr_html_(self) -> str:
        """The same as a table in a notebook."""
        first = f"<p>ResidualChain of {len(self)} blocks, {shown_count(self.num_paths)} paths</p>"
        if not len(self):
            return first
        # Names come from the model's author: they are text, whatever they hold.
        style = indented(self.to_frame()).style.format(escape="html").hide(axis="index")
        left = "text-align: left; white-space: pre"
        return first + style.set_table_styles([{"selector": "th, td", "props": left}]).to_html()

    def to_frame(self) -> pd.DataFrame:
        """A data frame with one row per block; the rows of a chain inside a branch follow that of its block.

        Returns:
            ``index``, the position in its own chain; ``block``, its name; ``depth``, the number of branches that
            contain it; ``stage``; ``skip``, ``"identity"``, ``"projection"``, ``"concat"`` or ``"none"``; ``before``,
            ``branch`` and ``after``, the operations before skip and branch, in the branch and after the addition;
            ``num_branches`` that a path may take, 0 if deleted; ``weight_layers`` on the longest route through the
            branch; ``parameters`` of all parts; ``shape`` without the batch, in and out.
        """
        return chain_table(self)

    def length_polynomial(self, unit: str = "block") -> list[int]:
        """Number of paths of each length, with lengths in a given unit; see `resnet_paths.path_histogram`.

        Args:
            unit: ``"block"``, ``"transformer_layer"`` or ``"weight_layer"``.

        Returns:
            Exact ints; entry k is the number of paths of length k.

        Raises:
            ResnetPathsError: If the unit is unknown, or a branch contains a chain and the unit is not ``"block"``.
        """
        return length_polynomial(self, unit)


@weight_layers.register
def _(block: Block) -> int:
    # Its skip and its branch are side by side.
    longest = max(weight_layers(block.skip), weight_layers(block.branch))
    return weight_layers(block.pre) + longest + weight_layers(block.post)


def _rounds_otherwise(block: Block) -> bool:
    """Whether skip and branch, added, differ by rounding from what a block adds up."""
    adds_onto_skip = isinstance(block.branch, Parallel) and block.branch.onto_skip and block.skip is not None
    return adds_onto_skip or block.run is not None


def require_chain(argument: str, value: object) -> None:
    """Validate that an argument is a chain, and not a model that was not unraveled.

    Args:
        argument: Name of the argument, for the message.
        value: The value received.

    Raises:
        ResnetPathsError: If it is not a `ResidualChain`, or its model has replaced a tensor that both shared.
    """
    if not isinstance(value, ResidualChain):
        raise ResnetPathsError(
            argument,
            type(value).__name__,
            "a ResidualChain",
            "Make one with resnet_paths.unravel(model, example_inputs).",
        )
    value.source.check()


def is_identity(module: nn.Module | None) -> bool:
    """Whether a part does nothing."""
    return isinstance(module, nn.Identity)
