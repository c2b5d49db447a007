"""Free sizes in an exported graph: which inputs have them, and how a part of the graph reads them off its own inputs.

Every size in the graph is an expression in the free sizes of the model's inputs, such as ``(height - 1) // 2 + 1``. A
part of the graph is given other tensors, whose sizes are such expressions too: what it needs is solved from these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from resnet_paths._utils.errors import UnravelError
from resnet_paths.core.input_sizes import InputSizes
from resnet_paths.unraveling.packing import Packed

__all__ = ["SizeReader", "broadcast_sizes", "expression", "input_sizes", "on_example", "same_shape"]


def expression(size: int | torch.SymInt) -> sympy.Expr:
    """A size as an expression in free sizes."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def same_shape(one: Node, other: Node) -> bool:
    """Whether two nodes have tensors of one shape for all inputs: comparing sizes as they are would make them equal."""
    return str(one.meta["val"].shape) == str(other.meta["val"].shape)


def broadcast_sizes(term: Node | Packed, total: Node | Packed) -> list[int | torch.SymInt]:
    """What `torch.Tensor.expand` takes to give a term the shape of a sum.

    Args:
        term: A node with a tensor, or several values in one tensor, which no addition broadcasts.
        total: A sum with this term.

    Returns:
        The sizes of the sum where the term has none or 1, else -1; empty where the term has all sizes of the sum.
    """
    if isinstance(term, Packed) or isinstance(total, Packed):
        return []
    own, wanted = term.meta["val"].shape, total.meta["val"].shape
    is_one = [str(size) == "1" for size in (*[1] * (len(wanted) - len(own)), *own)]  # as text, as in `same_shape`
    if not any(one and str(size) != "1" for one, size in zip(is_one, wanted, strict=True)):
        return []
    return [size if one else -1 for one, size in zip(is_one, wanted, strict=True)]


def on_example(shape: Sequence[int | torch.SymInt], batch: Iterable[Node]) -> tuple[int, ...]:
    """The sizes that a shape has on the example.

    Args:
        shape: Sizes.
        batch: Tensors whose dimension 0 is the batch.

    Returns:
        Numbers; -1 for what varies with the batch.
    """
    varying: set[sympy.Basic] = set()
    for node in batch:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim():
            varying |= expression(value.shape[0]).free_symbols
    return tuple(-1 if expression(size).free_symbols & varying else _hint(size) for size in shape)


def _hint(size: int | torch.SymInt) -> int:
    """The number that a size is on the example."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    assert isinstance(hint, int)  # the export ran on the example
    return hint


class SizeReader:
    """Reads sizes off some tensors.

    Args:
        sources: The tensors.
    """

    def __init__(self, sources: Sequence[Node]) -> None:
        self._places: dict[sympy.Symbol, tuple[Node, int]] = {}
        self._sizes: dict[sympy.Expr, sympy.Symbol] = {}  # size of a source -> the symbol that stands for it
        for source in sources:
            value = source.meta.get("val")
            for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                known = expression(size)
                if not known.is_number and known not in self._sizes:
                    symbol = sympy.Symbol(f"size_{len(self._places)}", integer=True, positive=True)
                    self._places[symbol], self._sizes[known] = (source, dim), symbol
        self._solved = dict(self._sizes) | {symbol: symbol for symbol in self._places}
        self._solve()

    def _solve(self) -> None:
        """Find what the sizes of the sources are made from, as far as each is linear in one unknown."""
        waiting = list(self._sizes.items())
        while waiting:
            left = []
            for known, symbol in waiting:
                atoms: dict[sympy.Expr, sympy.Symbol] = {}
                polynomial = sympy.expand(self._polynomial(known, atoms))
                unknown = {dummy: atom for atom, dummy in atoms.items() if polynomial.has(dummy)}
                if len(unknown) == 1:
                    ((dummy, atom),) = unknown.items()
                    factor = polynomial.coeff(dummy)
                    rest = sympy.expand(polynomial - factor * dummy)
                    if not rest.has(dummy) and not factor.has(dummy):
                        self._solved[atom] = symbol - rest if factor == 1 else FloorDiv(symbol - rest, factor)
                elif unknown:
                    left.append((known, symbol))
            if len(left) == len(waiting):
                return
            waiting = left

    def _polynomial(self, expr: sympy.Expr, atoms: dict[sympy.Expr, sympy.Symbol]) -> sympy.Expr:
        """An expression with a symbol in the place of what is neither known nor a sum or a product."""
        if expr.is_Add or expr.is_Mul:
            return expr.func(*(self._polynomial(arg, atoms) for arg in expr.args))
        if expr.is_number:
            return expr
        solved = self._solved.get(expr)
        if solved is not None and expr not in self._sizes:
            return solved
        return atoms.setdefault(expr, sympy.Dummy(integer=True, positive=True))

    def _derived(self, expr: sympy.Basic) -> sympy.Basic | None:
        """An expression in the sizes of the sources."""
        if expr in self._solved or expr.is_number:
            return self._solved.get(expr, expr)
        args = [self._derived(arg) for arg in expr.args]
        return expr.func(*args) if args and all(arg is not None for arg in args) else None

    def read(self, wanted: torch.SymInt) -> sympy.Basic | None:
        """How to find a size.

        Args:
            wanted: The size.

        Returns:
            An expression for `write`; None if the sources do not tell it.
        """
        expr = expression(wanted)
        found = self._derived(expr)
        if found is None:
            # A product of two unknowns may be known where neither is: tokens of an image, height times width.
            found = self._derived(expr.subs({size: symbol for size, symbol in self._sizes.items() if size.is_Mul}))
        return found

    def write(self, found: sympy.Basic, graph: Graph, copies: dict[Node, Node]) -> Any:
        """Write into a graph how to find a size.

        Args:
            found: From `read`.
            graph: The graph; operations are added at its end.
            copies: For each source the node of the graph that holds it.

        Returns:
            The node that holds the size, or a number.
        """
        tracer = torch.fx.proxy.GraphAppendingTracer(graph)
        env: dict[sympy.Symbol, Proxy] = {}
        for symbol in sorted(found.free_symbols, key=str):
            source, dim = self._places[symbol]
            node = graph.call_function(torch.ops.aten.sym_size.int, (copies[source], dim))
            env[symbol] = Proxy(node, tracer)
        made = sympy_interp(PythonReferenceAnalysis, env, found)
        return made.node if isinstance(made, Proxy) else made

    def expanded(
        self, tensor: Node, sizes: Sequence[int | torch.SymInt], graph: Graph, copies: dict[Node, Node]
    ) -> Node:
        """Write into a graph a tensor expanded to some sizes.

        Args:
            tensor: Its node in the graph.
            sizes: From `broadcast_sizes`.
            graph: As for `write`.
            copies: As for `write`.

        Returns:
            The node of the expanded tensor; `tensor` where the sources do not tell a size.
        """
        found = [size if isinstance(size, int) else self.read(size) for size in sizes]
        if None in found:
            return tensor
        shape = [size if isinstance(size, int) else self.write(size, graph, copies) for size in found]
        return graph.call_function(torch.ops.aten.expand.default, (tensor, shape))


def input_sizes(inputs: Sequence[Node]) -> InputSizes:
    """The sizes that the inputs of an exported graph may have.

    Args:
        inputs: Its placeholders.

    Returns:
        Sizes and conditions, under names for people.

    Raises:
        UnravelError: If an input has a size that is made from several free ones.
    """
    shapes = [tuple(map(expression, node.meta["val"].shape)) for node in inputs]
    names: dict[sympy.Expr, sympy.Symbol] = {}
    for shape in shapes:
        for dim, size in enumerate(shape):
            if size.is_Symbol and size not in names:
                names[size] = _name(dim, len(shape), {str(name) for name in names.values()})
            elif not size.is_Symbol and not size.is_Integer:
                raise UnravelError("example_inputs", f"a size {size}", "sizes that are free one by one")
    sizes = (size for node in inputs for size in node.meta["val"].shape if isinstance(size, torch.SymInt))
    environment = next((size.node.shape_env for size in sizes), None)
    conditions = [] if environment is None else _conditions(environment, names)
    return InputSizes(tuple(tuple(names.get(size, size) for size in shape) for shape in shapes), tuple(conditions))


def _conditions(environment: ShapeEnv, names: dict[sympy.Expr, sympy.Symbol]) -> list[sympy.Basic]:
    """What the model's code asked of the free sizes, each condition once."""
    asked = (guard.expr.xreplace(environment.replacements).xreplace(names) for guard in environment.guards)
    known = set(names.values())
    return list(dict.fromkeys(each for each in asked if each.free_symbols and each.free_symbols <= known))


def _name(dim: int, rank: int, taken: set[str]) -> sympy.Symbol:
    """What to call a free size."""
    of_images = {4: {2: "height", 3: "width"}, 5: {2: "depth", 3: "height", 4: "width"}}
    name = "batch" if dim == 0 else of_images.get(rank, {}).get(dim, "length")
    free = (each for each in (name, *(f"{name}_{k}" for k in range(2, 100))) if each not in taken)
    return sympy.Symbol(next(free), integer=True, positive=True)
