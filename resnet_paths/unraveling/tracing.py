"""A module as one flat functional graph that shares the module's parameters.

`torch.export` traces the module with a dynamic batch; in-place operations are written as ordinary ones. What comes back
is cut into single-input segments by `Trace.segment`; each is a module whose parameters and buffers are those of the
module that was traced, under their own names.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

import sympy
import torch
from torch import nn
from torch.fx import Graph, Node

from resnet_paths._utils.errors import UnravelError
from resnet_paths.core.input_sizes import InputSizes
from resnet_paths.core.segments import Segment
from resnet_paths.core.signature import Call
from resnet_paths.unraveling.batch_sizes import refuse_guards_of_the_batch
from resnet_paths.unraveling.casts import casts_of
from resnet_paths.unraveling.export import export, quiet
from resnet_paths.unraveling.graphs import dependents, walk_back
from resnet_paths.unraveling.packing import Packed, values_of
from resnet_paths.unraveling.preconditions import refuse_operations
from resnet_paths.unraveling.rewrites import apply_rewrites, write_out_of_place
from resnet_paths.unraveling.rewrites.in_place import draws_random_numbers
from resnet_paths.unraveling.sizes import SizeReader, broadcast_sizes, input_sizes

__all__ = ["IS_CONTEXT", "Trace", "call_of", "module_path", "takes_any_number_of_inputs", "trace", "user_frame"]

_TRAINING = {
    torch.ops.aten._native_batch_norm_legit.default,
    torch.ops.aten._native_batch_norm_legit_functional.default,
}


IS_CONTEXT = "is_context"
"""Marks, in a node's ``meta``, a value that blocks read as context although it is that of another node."""


class Trace:
    """The flat graph of a module.

    Attributes:
        graph: Operations in order; placeholders for inputs only, ``get_attr`` nodes for parameters and buffers.
        inputs: The placeholders.
        output: The node that the module returns.
        tensors: Parameters, buffers and constants by the names that the graph uses.
        given: Inputs on which nothing counts as dependent, such as an attention mask that every block reads.
        sizes: What sizes the inputs may have, for the trace of a whole model; None for a part of one.
        casts: Modules whose code chooses a floating dtype (`resnet_paths.unraveling.casts`), for that of a whole model.
    """

    casts: tuple[str, ...] = ()

    def __init__(
        self,
        graph: Graph,
        inputs: list[Node],
        output: Node,
        tensors: dict[str, torch.Tensor],
        given: Sequence[Node] = (),
        *,
        sizes: InputSizes | None = None,
    ) -> None:
        self.graph = graph
        self.inputs = inputs
        self.output = output
        self.tensors = tensors
        self.given = given
        self.sizes = sizes
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._dependent = dependents(graph, inputs, given)

    def seen_from(self, inputs: Sequence[Node], given: Sequence[Node] = ()) -> Trace:
        """The same graph, where only what is made from some nodes counts as dependent.

        Args:
            inputs: These nodes, such as the first state.
            given: Nodes on which nothing counts as dependent.

        Returns:
            A trace of the same graph.
        """
        return Trace(self.graph, list(inputs), self.output, self.tensors, given)

    def comes_before(self, one: Node, other: Node) -> bool:
        """Whether a node stands before another in the graph."""
        return self._position[one] < self._position[other]

    def depends_on_input(self, node: Node) -> bool:
        """Whether a node's values, not only its shape, depend on the module's input."""
        return node in self._dependent

    def dependent_inputs(self, node: Node) -> list[Node]:
        """The inputs of a node that depend on the module's input, each once."""
        return [arg for arg in node.all_input_nodes if arg in self._dependent]

    def region(self, sources: Iterable[Node], target: Node) -> set[Node]:
        """The dependent nodes on the way from `sources` to `target`: without the sources, with the target."""
        return walk_back(target, set(sources), self.dependent_inputs)

    def in_order(self, nodes: Iterable[Node]) -> list[Node]:
        """`nodes` in the order of the graph."""
        return sorted(nodes, key=self._position.__getitem__)

    def segment(
        self,
        source: Node | Packed | Sequence[Node],
        *targets: Node | Packed,
        context: Sequence[Node] = (),
        term_of: Node | Packed | None = None,
    ) -> nn.Module:
        """The module that computes `targets` from a state, or from the inputs of the model.

        Args:
            source: The node that becomes the module's input, or several.
            *targets: The node that it returns; several are returned as a tuple.
            context: Nodes that the module may read beside the source. Those that it does read become further inputs,
                under their names in the graph.
            term_of: The sum of which the one target is a term, if it is one: the module returns the term in the shape
                of the sum, as the addition broadcasts it, so that it can stand without the other terms.

        Returns:
            An `nn.Identity` if the one target is the source, else a `Segment` in eval mode.

        Raises:
            UnravelError: If something besides the source and the context is needed.
        """
        broadcast = [] if term_of is None else broadcast_sizes(targets[0], term_of)
        if targets == (source,) and not broadcast:
            return nn.Identity().eval()
        graph = Graph()
        copies: dict[Node, Node] = {}
        for node in source if isinstance(source, Sequence) else [source]:
            made = graph.placeholder(node.name)
            copies |= node.unpacked(graph, made) if isinstance(node, Packed) else {node: made}
        beside = [node for node in context if node not in copies]
        copies |= {node: graph.placeholder(node.name) for node in beside}
        for node, copy in copies.items():
            copy.meta = dict(node.meta)
        sources = list(copies)

        reader = SizeReader(sources)
        sizes: dict[Node, sympy.Basic] = {}

        def needed_by(node: Node) -> list[Node]:
            value = node.meta.get("val")
            found = reader.read(value) if isinstance(value, torch.SymInt) else None
            if found is None:
                return node.all_input_nodes
            sizes[node] = found
            return []

        wanted = [node for target in targets for node in values_of(target)]
        needed = set().union(*(walk_back(node, set(sources), needed_by) for node in wanted))
        for node in self.in_order(needed):
            if node.op == "placeholder":
                raise UnravelError(
                    "model",
                    node.name,
                    f"a chain; {wanted[0].name} ({describe(wanted[0])}) also reads its input",
                    "Only the stem may read the input.",
                )
            if IS_CONTEXT in node.meta:  # the same tensor under another name
                copies[node] = copies[node.all_input_nodes[0]]
                continue
            if node in sizes:
                copies[node] = reader.write(sizes[node], graph, copies)
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        results = [target.packed(graph, copies) if isinstance(target, Packed) else copies[target] for target in targets]
        if broadcast:
            results = [reader.expanded(results[0], broadcast, graph, copies)]
        graph.output(results[0] if len(results) == 1 else tuple(results))
        for node in beside:
            if not copies[node].users:
                graph.erase_node(copies[node])
        names = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        return Segment({name: self.tensors[name] for name in names}, graph, class_name="Segment").eval()


def trace(model: nn.Module, inputs: tuple[torch.Tensor, ...], *, free_sizes: bool = False) -> Trace:
    """The flat graph of `model`, for any batch size.

    Args:
        model: The module, in eval mode as far as the mode matters.
        inputs: Example tensors, the batch in dimension 0.
        free_sizes: Whether sizes other than the batch are left free, as far as the model's code does.

    Returns:
        Its graph; nothing of the module is copied or changed.

    Raises:
        UnravelError: If the module cannot be exported (naming where), is bound to one batch size, holds operations
            of training mode, changes its buffers, or does not return one tensor.
    """
    try:
        program = export(model, inputs, free_sizes=free_sizes)
        refuse_operations(name_of(model), program.graph)
        sizes = input_sizes(_user_inputs(program))
        casts = tuple(dict.fromkeys(module_path(node) or name_of(model) for node in casts_of(program.graph)))
        if not write_out_of_place(program.graph):
            with torch.no_grad(), quiet():
                program = program.run_decompositions({})
    except UnravelError:
        raise
    except Exception as error:
        raise UnravelError(
            "model",
            f"{name_of(model)}: {_first_line(error)}",
            f"a model whose operations do not depend on the data; export failed at {user_frame(error, model)}",
            "Replace the data-dependent branch by tensor operations such as torch.where; or name the residual modules "
            'of a model that is a stack of them: unravel(model, x, blocks=["layer1.0", ...]).',
        ) from error
    traced = _flatten(model, program, sizes)
    traced.casts = casts
    return traced


def _user_inputs(program: torch.export.ExportedProgram) -> list[Node]:
    is_input = [spec.kind.name == "USER_INPUT" for spec in program.graph_signature.input_specs]
    placeholders = (node for node in program.graph.nodes if node.op == "placeholder")
    return list(itertools.compress(placeholders, is_input))


def _flatten(model: nn.Module, program: torch.export.ExportedProgram, sizes: InputSizes) -> Trace:
    kinds = torch.export.graph_signature.InputKind
    graph, inputs, tensors = program.graph, [], {}
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind == kinds.USER_INPUT:
            inputs.append(node)
            continue
        name = str(spec.target)
        tensors[name] = _tensor_of(model, program, name)
        with graph.inserting_before(node):
            attribute = graph.create_node("get_attr", name, name=node.name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    specs = program.graph_signature.output_specs
    output_node = next(n for n in graph.nodes if n.op == "output")
    values = output_node.args[0]
    changed = [s.target for s in specs if s.kind != torch.export.graph_signature.OutputKind.USER_OUTPUT]
    if changed:
        raise UnravelError(
            "model",
            f"{name_of(model)} changes {changed[0]!r} when it runs",
            "a model that only computes",
            "Call model.eval() first; if that is done, keep the count outside the model.",
        )
    leaf = program.call_spec.out_spec
    if len(values) != 1 or leaf is None or not leaf.is_leaf():
        raise UnravelError(
            "model",
            f"{name_of(model)} returns {len(values)} values in a container",
            "a model that returns one tensor",
            "Wrap it in a module whose forward returns the tensor you study.",
        )
    for node in list(graph.nodes):
        if node.target in _TRAINING or draws_random_numbers(node):
            raise UnravelError(
                "model",
                f"{node.name} ({describe(node)})",
                "a model without random or training-mode operations",
                "Call model.eval() first; a functional dropout needs training=self.training, and "
                "scaled_dot_product_attention dropout_p=0 in eval mode. Draw random inputs outside the model.",
            )
    for node in inputs:
        value = node.meta.get("val")
        # One row is one for all examples: the batch that was traced has two at least.
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] != 1 and not _varies(value.shape[0]):
            raise UnravelError(
                "model",
                f"{name_of(model)} works for a batch of {value.shape[0]} only",
                "a model that takes any batch size",
                "Write sizes as x.shape[0] or -1, not as a number or len(x); give a single example as x.unsqueeze(0). "
                "If dimension 0 holds the parts of one example, such as the nodes of a graph, add one for the batch.",
            )
    refuse_guards_of_the_batch(name_of(model), program, [node.meta.get("val") for node in inputs])
    _name_inputs(model, inputs)
    apply_rewrites(graph)
    # Read again: what the model returns may just have been replaced.
    return Trace(graph, inputs, output_node.args[0][0], tensors, sizes=sizes)


def _name_inputs(model: nn.Module, inputs: Sequence[Node]) -> None:
    """Give inputs that are passed by keyword the names of their keywords, which context bears as well."""
    if isinstance(model, Call):
        for node, name in zip(inputs, model.input_names, strict=True):
            if name.isidentifier():
                node._rename(name)


def _tensor_of(model: nn.Module, program: torch.export.ExportedProgram, name: str) -> torch.Tensor:
    tensor: torch.Tensor
    try:
        tensor = operator.attrgetter(name)(model)
    except AttributeError:
        tensor = program.constants[name] if name in program.constants else program.state_dict[name]
    return tensor


def name_of(model: nn.Module) -> str:
    """The class of a model, or of the model that it calls."""
    return str(getattr(model, "called_name", type(model).__name__))


def module_path(node: Node) -> str:
    """Name of the innermost module whose forward made a node, such as ``"layer2.0"``; empty for the model itself."""
    stack = module_stack(node)
    return stack[-1][0] if stack else ""


def module_stack(node: Node) -> list[tuple[str, str]]:
    """Names and types of the modules that a node was made in, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    # A module that is called twice is distinguished by "@1"; the name is the same.
    return [(str(name).split("@")[0], getattr(kind, "__name__", str(kind))) for name, kind in stack.values()]


def call_of(node: Node, module: str) -> str:
    """Which of a module's calls made a node.

    Args:
        node: A node of the graph.
        module: The module's name.

    Returns:
        A key, the same for all nodes that one call made; empty if the module was not called around the node.
    """
    stack = node.meta.get("nn_module_stack") or {}
    return next((key for key, (name, _) in stack.items() if str(name).split("@")[0] == module), "")


def is_within(path: str, module: str) -> bool:
    """Whether a module is another one, or stands inside it, by their names; all stand inside the model, ``""``."""
    return module == "" or path == module or path.startswith(module + ".")


def common_module(nodes: Iterable[Node]) -> str:
    """The innermost module that holds all nodes, those of the model's own forward aside.

    Args:
        nodes: Nodes of the graph.

    Returns:
        Its name; empty if there is none.
    """
    return common_path(path for path in map(module_path, nodes) if path)


def common_path(paths: Iterable[str]) -> str:
    """The longest name of a module that all names begin with; empty if there is none."""
    split = [path.split(".") for path in paths]
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*split, strict=False))
    return ".".join(level[0] for level in levels)


def describe(node: Node) -> str:
    """Where a node comes from, for people: operation, module and line of the user's code."""
    operation = getattr(node.target, "__name__", str(node.target))
    where = module_path(node) or "the model's own forward"
    lines = [line for line in str(node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File")]
    outside = [line for line in lines if "/torch/nn/" not in line]
    line = f", {outside[-1].strip()}" if outside else ""
    return f"{operation} in {where}{line}"


def takes_any_number_of_inputs(model: nn.Module) -> bool:
    """Whether a module's forward has a parameter such as ``*inputs``."""
    return any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(model.forward).parameters.values())


def _varies(size: int | torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def user_frame(error: BaseException, model: nn.Module) -> str:
    """Where an error came up in a model's code.

    Args:
        error: The error.
        model: The model.

    Returns:
        The deepest line of the traceback that is neither PyTorch's nor of this package, for a message.
    """
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
    frames: list[traceback.FrameSummary] = []
    cause: BaseException | None = error
    while cause is not None and not frames:
        frames = [f for f in traceback.extract_tb(cause.__traceback__) if not f.filename.startswith(libraries)]
        cause = cause.__cause__ or cause.__context__
    if not frames:
        return f"{name_of(model)}.forward"
    frame = frames[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}"
