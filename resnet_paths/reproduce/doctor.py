"""What prevents a model from being unraveled, step by step: ``resnet-paths doctor model.py:make_model``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.inputs import Inputs
from resnet_paths.core.signature import arguments_of
from resnet_paths.unraveling import unravel
from resnet_paths.unraveling.edits import delete_block

__all__ = ["Step", "diagnose", "find_function"]


@dataclass(frozen=True)
class Step:
    """The result of one step.

    Attributes:
        name: What was tried.
        passed: Whether it succeeded.
        finding: What was found, or the error.
    """

    name: str
    passed: bool
    finding: str


def find_function(place: str) -> Callable[[], object]:
    """The function at ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION``.

    Args:
        place: Such as ``"model.py:make_model"`` or ``"torchvision.models:resnet18"``. A file is run, with its folder
            on the import path.

    Returns:
        The function, or class.

    Raises:
        ResnetPathsError: If the file or module cannot be imported or has no such function.
    """
    source, colon, name = place.rpartition(":")
    if not colon or not source or not name:
        raise ResnetPathsError("model", place, "FILE.py:FUNCTION or MODULE:FUNCTION, as in model.py:make_model")
    path = Path(source)
    if path.suffix == ".py" and not path.is_file():
        raise ResnetPathsError("model", place, "an existing file", f"There is no file {str(path.resolve())!r}.")
    try:
        module = _imported(path) if path.suffix == ".py" else importlib.import_module(source)
    except Exception as error:
        raise ResnetPathsError(
            "model", place, "a file or module that can be imported", f"{type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ResnetPathsError("model", place, f"a function of {source}", f"It has no function {name!r}.")
    made: Callable[[], object] = function
    return made


def _imported(path: Path) -> object:
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # the name of the file ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickling look their module up
    spec.loader.exec_module(module)
    return module


def diagnose(function: Callable[[], object], shape: Sequence[int] | None = None) -> Iterator[Step]:
    """Results of building, running, unraveling and editing a model; ends at the first step that fails.

    Args:
        function: Returns the model, or the model and example inputs as `resnet_paths.unravel` takes them.
        shape: Shape of a random example input [batch, ...], where `function` returns the model only.

    Yields:
        The steps: the model, its example inputs, a forward pass, its blocks, the comparison of chain and model, and the
        deletion of a block. The finding of the last one ends with the summary of the chain.
    """
    try:
        made = function()
    except Exception as error:
        yield _failed("model", error, "the function must work without arguments")
        return
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        yield Step("model", False, f"the function returned {type(model).__name__}, not an nn.Module")
        return
    was_training = model.training
    model.eval()
    mode = "was in training mode: call model.eval() before unravel" if was_training else "in eval mode"
    yield Step(
        "model", True, f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, {mode}"
    )
    if inputs is None:
        if shape is None:
            yield Step(
                "example", False, "no example inputs: return (model, example_inputs), or use --shape 2,3,224,224"
            )
            return
        inputs = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    yield from _with_example(model, inputs)


def _with_example(model: nn.Module, inputs: Inputs) -> Iterator[Step]:
    """The steps from the example inputs on."""
    try:
        args, kwargs = arguments_of(inputs)
        with torch.no_grad():
            returned = model(*args, **kwargs)
    except Exception as error:
        yield _failed("forward pass", error, "the model does not take the example inputs")
        return
    yield Step("forward pass", True, f"returns {_described(returned)}")
    try:
        chain = unravel(model, inputs)
    except Exception as error:
        try:
            chain = unravel(model, inputs, verify=False)
        except Exception as first:
            yield _failed("blocks", first)
            return
        yield Step("blocks", True, _counted(chain))
        yield _failed("comparison", error, "unravel(..., verify=False) omits this comparison")
        return
    yield Step("blocks", True, _counted(chain))
    yield Step("comparison", True, "output, gradient and each example alone are those of the model")
    deletable = [index for index, block in enumerate(chain) if block.skip_kind in {"identity", "projection"}]
    if not deletable:
        yield Step("deletion", False, "no block has a skip, so none can be deleted: the network has one path")
        return
    lesioned = delete_block(chain, deletable[0])
    with torch.no_grad():
        change = (lesioned(*args, **kwargs) - chain(*args, **kwargs)).norm() / chain(*args, **kwargs).norm()
    name = chain.blocks[deletable[0]].name
    yield Step(
        "deletion", True, f"without {name!r} the output changes by {100 * float(change):.3g} %\n\n{chain.summary()}"
    )


def _failed(name: str, error: Exception, advice: str = "") -> Step:
    message = str(error) if isinstance(error, ResnetPathsError) else f"{type(error).__name__}: {error}"
    return Step(name, False, f"{message}{f' ({advice})' if advice else ''}")


def _counted(chain: ResidualChain) -> str:
    kinds = [block.skip_kind or "none" for block in chain]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return f"{len(chain)} blocks, {chain.num_paths:,} paths; skips: {counts}"


def _described(returned: object) -> str:
    return str(list(returned.shape)) if isinstance(returned, torch.Tensor) else type(returned).__name__
