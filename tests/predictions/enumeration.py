"""Predictions path by path with nothing but autograd: dense Jacobians of parts, multiplied along every path."""

from __future__ import annotations

import torch

import resnet_paths as rp
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.parts import Parallel
from tests.gradients.gradient_reference import jacobian


def margin(logits, chosen):
    own = logits.gather(1, chosen[:, None])[:, 0]
    return own - logits.scatter(1, chosen[:, None], -torch.inf).amax(1)


class Enumeration:
    """What a state is the sum of: one vector for every source and every path from it so far.

    A part ``J x + c`` takes each vector to J times it, and c begins a path of its own; parallel parts read the same
    vectors and their results stand side by side, not added, so that every path has a vector of its own.
    """

    def __init__(self, keys, vectors):
        self.keys = keys  # (source, length) of each vector
        self.vectors = vectors  # [path, batch, features]

    def through(self, part, state, source, longer=0):
        """The output of one part, and its enumeration."""
        output, dense = jacobian(part, state)
        constant = output - torch.einsum("boi,bi->bo", dense, state)
        vectors = torch.cat([torch.einsum("boi,pbi->pbo", dense, self.vectors), constant[None]])
        return output, Enumeration([*((s, k + longer) for s, k in self.keys), (source, longer)], vectors)

    def through_block(self, block, state, source):
        """Through a block; `source` names all of its parts."""
        shared, here = self.through(block.pre, state, source)
        total, found = 0, []
        if block.skip is not None:
            total, taken = here.through(block.skip, shared, source)
            found = [taken]
        branches = block.branch if isinstance(block.branch, Parallel) else [block.branch]
        for branch in branches if block.branch is not None else []:
            if isinstance(branch, ResidualChain) and len(branch):
                inner, taken = here.through(branch.stem, shared, source)
                for part in branch:
                    inner, taken = taken.through_block(part, inner, source)
                output, taken = taken.through(branch.head, inner, source)
                taken = Enumeration([(s, k + 1) for s, k in taken.keys], taken.vectors)
            else:
                output, taken = here.through(branch, shared, source, longer=1)
            total, found = total + output, [*found, taken]
        together = Enumeration([key for one in found for key in one.keys], torch.cat([one.vectors for one in found]))
        return together.through(block.post, total, source)


def enumerated(chain, inputs, output_of):
    """(source, length) to contributions [batch]; and the outputs."""
    state = chain.stem(inputs).detach()
    paths = Enumeration([("stem", 0)], state[None])
    for block in chain:
        state, paths = paths.through_block(block, state, block.name)
    output, paths = paths.through(lambda x: output_of(chain.head(x))[:, None], state, "head")
    found = {}
    for key, value in zip(paths.keys, paths.vectors[:, :, 0], strict=True):
        found[key] = found.get(key, 0) + value
    return found, output[:, 0]


def assert_all_equal(chain, inputs, output=None, twin=None, **options):
    """Every source and length against enumeration; `twin` is the chain that is enumerated, if another."""
    with torch.no_grad():
        predicted = chain(inputs).argmax(1)
    output_of = output or (lambda logits: margin(logits, predicted))
    expected, outputs = enumerated(twin or chain, inputs, output_of)
    each = [
        rp.prediction_by_path_length(chain, x[None], by_source=True, output=output or "margin", **options)
        for x in inputs
    ]
    scale = sum(value.abs() for value in expected.values())
    for example, frame in enumerate(each):
        assert abs(frame.contribution.sum() - outputs[example]) <= 1e-10 * scale[example]
        assert frame.attrs["residual"] <= 1e-10 * scale[example]
        found = dict(zip(zip(frame.source, frame.path_length, strict=True), frame.contribution, strict=True))
        for key in found.keys() | expected.keys():
            wanted = expected[key][example] if key in expected else 0.0
            assert abs(found.get(key, 0.0) - wanted) <= 1e-10 * scale[example], key
