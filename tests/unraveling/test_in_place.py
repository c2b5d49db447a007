"""In-place operations of a graph written as ordinary ones: the same values, and no doubt where memory is shared."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.unraveling.rewrites import write_out_of_place
from tests.chains import inputs


class Net(nn.Module):
    """A residual block whose branch is made by `step` from the state h."""

    def __init__(self, step):
        super().__init__()
        self.inp, self.a, self.b, self.out = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.step = step

    def forward(self, x):
        return self.out(self.step(self, self.inp(x)))


def statement(m, h):
    y = m.a(h)
    y.relu_()
    y.mul_(2)
    return h + m.b(y)


def old_name(m, h):
    y = m.a(h)
    z = y
    y.add_(1).tanh_()
    return h + m.b(y * z)


def onto_the_branch(m, h):
    y = F.dropout(F.relu(m.a(h), inplace=True), 0.5, training=False, inplace=True)
    y += h
    return y


def no_op_between(m, h):
    y = m.a(h)
    z = y.contiguous().to(y.dtype)
    y.relu_()
    return h + m.b(z)


def view_read_before(m, h):
    y = m.a(h)
    first = y[:, :1] * 3
    y.relu_()
    return h + m.b(y) * first


def view_read_later(m, h):
    y = m.a(h)
    view = y.view(-1, 2, 2)
    y.relu_()
    return h + m.b(y) * view.sum((1, 2))[:, None]


def written_into_a_part(m, h):
    y = m.a(h)
    y[:, 1:3] = 0.5
    return h + m.b(y)


def written_at_each_position(m, h):
    y, state, out = m.a(h).view(-1, 2, 2), torch.zeros_like(h[:, :2]), torch.zeros_like(h).view(-1, 2, 2)
    for position in range(2):
        state = torch.tanh(state + y[:, position])
        out[:, position] = state
    return h + m.b(out.view(-1, 4))


def row_made_from_rows_before(m, h):
    y = m.a(h)[:, :, None] * m.b(h)[:, None]
    for i in range(1, 4):
        row = y[..., i, :i].clone()
        y[..., i, :i] = row + (row[..., None] * y[..., :i, :i].clone()).sum(-2)
    return h + m.b(y.sum(-1))


def part_changed_and_read(m, h):
    y = m.a(h)
    part = y[:, 1:3]
    part.mul_(2).add_(1)
    y.tanh_()
    y[:, 1] += h[:, 0]
    return h + m.b(y)


def part_of_a_part(m, h):
    y = m.a(h).view(-1, 2, 2)
    half = y[:, 0]
    half[:, 1] = h[:, 0]
    half[:, :1].add_(h[:, 2:3])
    return h + m.b(y.view(-1, 4)) * half[:, :1]


def other_dtype_and_shape(m, h):
    y = m.a(h)
    y[:, 1:] = h[:, :1].float()
    return h + m.b(y)


def shifted(m, h):
    y = m.a(h)
    y[:, 1:] = y[:, :-1].clone()
    return h + m.b(y)


def parts_made_before_and_written_later(m, h):
    y = m.a(h)
    one, two = y[:, 0], y[:, 1]
    one.add_(h[:, 0])
    two.add_(one)
    return h + m.b(y)


def overlapping_part_read_later(m, h):
    y = m.a(h)
    part = y[:, 1:]
    y[:, :2] = h[:, 2:]
    return h + m.b(y) * part.sum(1, keepdim=True)


def half_read_later(m, h):
    y = m.a(h)
    one, two = y[:, :2], y[:, 2:]
    one.relu_()
    return h + m.b(torch.cat([two, y[:, :2]], 1))


def dtype_kept(m, h):
    y = m.a(h).float()
    y.mul_(h)  # the product of both would be float64
    return h + m.b(y.double())


def compared(m, h):
    y = m.a(h)
    y.gt_(0)  # stays a number; y > 0 would be a truth value
    return h + m.b(y)


def integers_added(m, h):
    y = m.a(h)
    y.add_(torch.arange(4))
    return h + m.b(y)


IN_FULL = [statement, old_name, onto_the_branch, no_op_between, view_read_before, integers_added]
IN_FULL += [written_into_a_part, written_at_each_position, row_made_from_rows_before, part_changed_and_read]
IN_FULL += [part_of_a_part, other_dtype_and_shape, shifted]
IN_PART = [view_read_later, half_read_later, dtype_kept, compared]
IN_PART += [parts_made_before_and_written_later, overlapping_part_read_later]


@pytest.mark.parametrize("step", IN_FULL + IN_PART)
def test_values_are_those_of_the_model(step):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(step).double().eval()
    x = inputs()
    program = exported(model, x)
    untouched = [str(node.target) for node in program.graph.nodes]
    assert write_out_of_place(program.graph) == (step in IN_FULL)
    if step in IN_FULL:
        assert not any(node.target._schema.is_mutable for node in calls(program.graph))
    else:
        assert [str(node.target) for node in program.graph.nodes] == untouched
    chain = rp.unravel(model, x)
    for batch in (1, 4, 7):
        assert torch.equal(chain(inputs(batch)), model(inputs(batch)))
    state = model.inp(x)
    assert torch.allclose(rp.delete_block(chain, 0)(x), model.out(state), rtol=0, atol=1e-14)


def exported(model, x):
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False)


def calls(graph):
    return [node for node in graph.nodes if str(node.target).startswith("aten.")]


def test_what_returns_its_operand_is_taken_out():
    model = Net(onto_the_branch).eval()
    program = exported(model, torch.zeros(2, 5))
    assert write_out_of_place(program.graph)
    assert [str(node.target) for node in calls(program.graph)] == [
        "aten.linear.default",
        "aten.linear.default",
        "aten.relu.default",
        "aten.add.Tensor",
        "aten.linear.default",
    ]


class Random(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.inp, self.draw = nn.Linear(5, 4), draw

    def forward(self, x):
        return self.draw(self.inp(x))


@pytest.mark.parametrize(
    "draw",
    [
        lambda h: F.dropout(h, 0.5),
        lambda h: h + torch.rand_like(h),
        lambda h: h.bernoulli_(0.5),
        lambda h: F.batch_norm(h, None, None, training=True),
    ],
)
def test_what_is_drawn_at_random_is_left_to_the_exporter(draw):
    program = exported(Random(draw).eval(), torch.zeros(2, 5))
    assert not write_out_of_place(program.graph)


def storages(module):
    """Bytes by address, of all that a forward pass reads."""
    tensors = [t for name, t in module.state_dict().items() if not name.endswith("num_batches_tracked")]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_parameters_are_counted_once():
    model = torch.nn.Sequential(nn.Linear(5, 64), *(Residual(64) for _ in range(3)), nn.Linear(64, 3)).eval()
    before = storages(model)
    chain = rp.unravel(model, torch.zeros(2, 5))
    edited = rp.swap_blocks(rp.duplicate_block(rp.delete_block(chain, 1), 0), 0, 3)
    for network in (chain, edited):
        assert storages(network).items() <= before.items()
    assert storages(chain) == before


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(width, track_running_stats=True), nn.Linear(width, width)

    def forward(self, x):
        return x + self.fc(torch.relu(self.norm(x)))
