"""For which batch sizes an exported graph holds: for all, or the model is refused.

The exporter follows the code for one batch size. Where the code asks for the size, as in ``if len(x) < 5``, it notes a
guard: the graph holds for those sizes only that give the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from traceback import FrameSummary
from typing import NoReturn

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from resnet_paths._utils.errors import UnravelError

__all__ = ["refuse_guards_of_the_batch"]

_SIZES = (2, 3, 4, 5, 7, 8, 16, 33, 64, 100)
_LARGEST = 10**6  # far more than fits in memory


def refuse_guards_of_the_batch(
    model_name: str, program: torch.export.ExportedProgram, inputs: Sequence[object]
) -> None:
    """Refuse a graph that holds for some batch sizes only.

    Args:
        model_name: The class of the model.
        program: What `torch.export` made.
        inputs: The exporter's fake tensors for the inputs.

    Raises:
        UnravelError: If a guard or a range constraint restricts the batch size; it is named with its line.
    """
    sizes: list[object] = [x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.dim()]
    free = [size.node for size in sizes if isinstance(size, torch.SymInt)]
    symbols = set().union(*(node.expr.free_symbols for node in free))
    if not symbols:
        return
    shape_env = free[0].shape_env
    assert shape_env is not None  # it holds the symbols
    for guard in shape_env.guards:
        condition = shape_env.simplify(guard.expr)  # sizes that were found equal are one symbol
        if condition.free_symbols & symbols and not _holds_for_all(condition, symbols, shape_env):
            _refuse(model_name, str(condition), symbols, guard.sloc.framework_loc)
    for symbol, allowed in program.range_constraints.items():
        if symbol in symbols and (allowed.lower > 2 or allowed.upper < _LARGEST):
            _refuse(model_name, f"{allowed.lower} <= {symbol} <= {allowed.upper}", symbols, None)


def _holds_for_all(condition: sympy.Basic, symbols: set[sympy.Symbol], shape_env: ShapeEnv) -> bool:
    """Whether a condition holds for batches of several sizes, the other sizes being those of the example."""
    others = {symbol: shape_env.backed_var_to_val.get(symbol) for symbol in condition.free_symbols - symbols}
    if None in others.values():
        return True  # of a size that only the data tell
    batches = (dict.fromkeys(symbols, size) for size in _SIZES)
    return all(bool(condition.subs(others | batch)) for batch in batches)


def _refuse(model_name: str, condition: str, symbols: set[sympy.Symbol], frame: object) -> NoReturn:
    for symbol in symbols:
        condition = condition.replace(str(symbol), "batch")
    place = ""
    if isinstance(frame, FrameSummary):
        place = f' at File "{frame.filename}", line {frame.lineno}, in {frame.name}: {frame.line}'
    raise UnravelError(
        "model",
        f"{model_name}, read for {condition}{place}",
        "a model that does the same for every batch size",
        f"Its code depends on the batch size: the chain would be right for {condition} only. Replace the condition, "
        "or wrap the part for these batch sizes in a module of its own.",
    )
