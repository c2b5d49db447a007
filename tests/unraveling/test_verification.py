"""What `unravel` verifies: each fault is refused by the name of what breaks the chain; what is right is accepted."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import resnet_paths as rp


class Net(nn.Module):
    """Three linear layers called by a function that is given."""

    def __init__(self, function, *layers):
        super().__init__()
        self.l = nn.ModuleList(layers or [nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)])
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def net(function, *layers):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(function, *layers).double().eval()


def residual(model, h):
    h = model.l[0](h)
    return model.l[2](h + torch.tanh(model.l[1](h)))


def x(batch=4, seed=1):
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own_gradient(model, value, direction):
    value = value.clone().requires_grad_()
    return torch.autograd.grad(model(value), value, direction)[0]


# --- the batch size ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [4, 8])
def test_code_that_asks_for_the_batch_size_is_refused_with_its_line(batch):
    def forward(model, h):
        out = residual(model, h)
        return out if h.shape[0] < 5 else 2 * out

    condition = "batch < 5" if batch == 4 else "5 <= batch|batch >= 5"
    with pytest.raises(rp.UnravelError, match=rf"({condition}).*line \d+, in forward") as caught:
        rp.unravel(net(forward), x(batch))
    assert "if h.shape[0] < 5" in str(caught.value)


def test_even_batches_only_are_refused():
    def forward(model, h):
        return residual(model, h) * (1 if h.shape[0] % 2 == 0 else 2)

    with pytest.raises(rp.UnravelError, match=r"Mod\(batch, 2\)"):
        rp.unravel(net(forward), x(4))


def test_a_branch_for_one_example_is_refused():
    def forward(model, h):
        return residual(model, h) if h.shape[0] > 1 else model.l[2](h)

    with pytest.raises(rp.UnravelError, match="on one example alone the chain's output differs"):
        rp.unravel(net(forward), x())


def test_an_output_divided_by_the_batch_size_is_refused():
    with pytest.raises(rp.UnravelError, match="depends on the size of its batch"):
        rp.unravel(net(lambda m, h: residual(m, h / h.shape[0])), x())


# --- examples that meet in the batch ----------------------------------------------------------------------------------


def batch_statistics(model, h):
    return model.l[2](h + F.batch_norm(model.l[1](h), None, None, training=True))


def attention_in_batch(model, h):
    return model.l[2](h + model.l[1]((h @ h.T).softmax(-1) @ h))


def centred(model, h):
    return model.l[2](h + model.l[1](h - h.mean(0)))


def rolled(model, h):
    return model.l[2](h + model.l[1](h.roll(1, 0)))


MIXED = {batch_statistics: "batch_norm", attention_in_batch: "matmul", centred: "mean", rolled: "roll"}


@pytest.mark.parametrize("function", MIXED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("example", [x(4), torch.zeros(2, 6, dtype=torch.float64), x(1)], ids=["4", "zeros", "1"])
def test_what_mixes_examples_is_refused_by_name(function, example):
    model = net(function)
    if function is batch_statistics and len(example) == 1:
        with pytest.raises(rp.ResnetPathsError, match="Expected more than 1 value per channel"):
            rp.unravel(model, example)
        return
    # Indeed: another example beside the first changes the first one's output.
    beside = torch.cat([x(1), x(1, seed=5)]), torch.cat([x(1), x(1, seed=6)])
    assert not torch.allclose(model(beside[0])[0], model(beside[1])[0])
    with pytest.raises(rp.UnravelError, match=rf"got .*{MIXED[function]}.*mixes the examples"):
        rp.unravel(model, example)


def test_a_graph_network_with_its_nodes_in_dimension_0_is_refused():
    edges = torch.tensor([[0, 1, 2, 3, 3], [1, 2, 3, 0, 1]])

    def forward(model, h, edges):
        return residual(model, h.index_add(0, edges[0], h[edges[1]]))

    with pytest.raises(rp.UnravelError, match=r"fails on two examples: IndexError.*nodes of a graph"):
        rp.unravel(net(forward), (x(), edges))
    with pytest.raises(rp.UnravelError, match=r"(a batch of 4 only|fails on two examples).*nodes of a graph"):
        rp.unravel(net(lambda m, h, weights: residual(m, weights @ h)), (x(), torch.ones(4, 4).double()))


# --- gradients --------------------------------------------------------------------------------------------------------


class Rounded(torch.autograd.Function):
    """Rounds, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, value):
        return value.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Doubled(torch.autograd.Function):
    """Doubles, with the right gradient."""

    @staticmethod
    def forward(ctx, value):
        return 2 * value

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Rounding(nn.Module):
    def forward(self, h):
        return Rounded.apply(h)


def straight_through(model, h):
    return residual(model, h + model.l[0](model.l[3](h)))


def without_gradient(model, h):
    with torch.no_grad():
        h = model.l[0](h)
    return model.l[2](h + model.l[1](h))


def tensor_hook(model, h):
    h = model.l[0](h)
    if h.requires_grad:
        h.register_hook(lambda gradient: 2 * gradient)
    return model.l[2](h + model.l[1](h))


RULES = {
    straight_through: r"autograd\.Function Rounded in l\.3",
    without_gradient: r"linear under no_grad, File .*test_verification\.py.* in without_gradient",
    tensor_hook: r"hook on the gradient of a tensor, File .*test_verification\.py.* in tensor_hook",
}


@pytest.mark.parametrize("function", RULES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("example", [x(), torch.zeros(2, 6, dtype=torch.float64)], ids=["random", "zeros"])
def test_a_backward_rule_that_export_loses_is_refused_by_name(function, example):
    model = net(function, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2), Rounding())
    with pytest.raises(rp.UnravelError, match=RULES[function]):
        rp.unravel(model, example)
    # The output is right, so that it can be had for the asking; the gradient is not.
    chain, value, direction = rp.unravel(model, example, verify=False), x(3), x(3)[:, :2]
    torch.testing.assert_close(chain(value), model(value))
    mine = own_gradient(chain, value, direction)
    with contextlib.suppress(RuntimeError):  # there is no gradient at all under no_grad
        assert not torch.allclose(mine, own_gradient(model, value, direction))


def test_a_hook_on_the_gradients_of_a_module_is_refused():
    model = net(residual)
    model.l[1].register_full_backward_hook(lambda _module, inputs, _outputs: (2 * inputs[0],))
    with pytest.raises(rp.UnravelError, match=r"hook on the gradients of l\.1"):
        rp.unravel(model, x())


@pytest.mark.parametrize(
    "function",
    [
        lambda m, h: residual(m, h + m.l[0](h + (h.round() - h).detach())),
        lambda m, h: m.l[2]((k := m.l[0](h).detach()) + m.l[1](k)) + m.l[2](h),
        lambda m, h: residual(m, h + m.l[0](Doubled.apply(h))),
    ],
    ids=["straight-through", "detached part", "right rule"],
)
def test_forms_that_keep_their_gradient_are_accepted(function):
    model = net(function)
    chain, value, direction = rp.unravel(model, x()), x(3), x(3)[:, :2]
    expected = own_gradient(model, value, direction)
    torch.testing.assert_close(own_gradient(chain, value, direction), expected)


def test_backward_rules_of_networks_of_tokens_are_compared_at_the_stem():
    def forward(model, tokens):
        h = model.l[0](tokens).mean(1)
        return model.l[2](h + model.l[1](model.l[3](h)))

    model = net(forward, nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 2), Rounding())
    tokens = torch.arange(8).view(2, 4)
    with pytest.raises(rp.UnravelError, match=r"autograd\.Function Rounded in l\.3"):
        rp.unravel(model, tokens)
    model.l[3] = nn.Tanh()
    assert len(rp.unravel(model, tokens)) == 1


def test_frozen_models_are_verified_and_stay_frozen():
    model = net(residual).requires_grad_(False)
    with torch.inference_mode():
        assert len(rp.unravel(model, x())) == 1
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


# --- structure --------------------------------------------------------------------------------------------------------


def test_residual_additions_of_a_second_tower_are_refused():
    def forward(model, a, b):
        def tower(h):
            for layer in model.l[:-1]:
                h = h + torch.tanh(layer(h))
            return h

        return model.l[-1]((tower(a) - tower(b)).abs())

    with pytest.raises(rp.UnravelError, match=r"add.*inside the (stem|head)\. A second tower or an encoder"):
        rp.unravel(net(forward), (x(), x(seed=2)))


class Reversible(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.f, self.g = (nn.Sequential(nn.Linear(3, 3), activation) for _ in range(2))

    def forward(self, h):
        a, b = h.chunk(2, 1)
        a = a + self.f(b)
        return torch.cat([a, b + self.g(a)], 1)


class CrossStage(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(12, 6)
        self.m = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), activation) for _ in range(2))

    def forward(self, h):
        parts = list(self.first(h).chunk(2, 1))
        for module in self.m:
            parts.append(parts[-1] + module(parts[-1]))
        return self.last(torch.cat(parts, 1))


@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU])
def test_additions_off_the_trunk_do_not_pass_as_a_plain_net(activation):
    kinds = Reversible(activation()), Reversible(activation())
    model = nn.Sequential(nn.Linear(6, 6), *kinds, nn.Linear(6, 2)).double().eval()
    with pytest.raises(rp.ResnetPathsError, match=r"add(_2)? \(add\.Tensor in [12], File .*test_verification"):
        rp.unravel(model, x())


@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU])
def test_blocks_of_cross_stage_modules_are_found(activation):
    kinds = CrossStage(activation()), CrossStage(activation())
    model = nn.Sequential(nn.Linear(6, 6), *kinds, nn.Linear(6, 2)).double().eval()
    names = [block.name for block in rp.unravel(model, x())]
    assert [name[:5] for name in names] == ["1.m.0", "1.m.1", "2.m.0", "2.m.1"]


# --- what cannot be exported ------------------------------------------------------------------------------------------


def test_wrappers_name_what_to_pass():
    with pytest.raises(rp.UnravelError, match=r"DataParallel.*Pass model\.module"):
        rp.unravel(nn.DataParallel(net(residual)), x())
    for compiled in (torch.jit.trace(net(residual), x()), nn.Sequential(torch.jit.trace(net(residual), x())).eval()):
        with pytest.raises(rp.UnravelError, match=r"TorchScript.*Pass the module that was compiled"):
            rp.unravel(compiled, x())


def test_distributed_data_parallel_names_its_module(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        with pytest.raises(rp.UnravelError, match=r"DistributedDataParallel.*Pass model\.module"):
            rp.unravel(nn.parallel.DistributedDataParallel(net(residual)), x())
    finally:
        torch.distributed.destroy_process_group()


def test_quantized_modules_name_what_to_pass():
    model = torch.ao.quantization.quantize_dynamic(net(residual).float(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(rp.UnravelError, match=r"Linear 'l\.0', which is quantized.*before quantization"):
        rp.unravel(model, x().float())


def test_additions_that_stand_in_for_quantized_ones_are_additions():
    class Quantizable(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.skip_add = nn.Conv1d(3, 3, 1), torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x):
            return self.skip_add.add_relu(x, self.conv(x))

    model, images = nn.Sequential(Quantizable(), Quantizable()).eval(), torch.randn(2, 3, 5)
    chain = rp.unravel(model, images)
    assert [block.skip_kind for block in chain] == ["identity"] * 2
    assert torch.equal(chain(images), model(images))
    assert torch.equal(rp.delete_block(chain, "0")(images), model[1](images.relu()))


def test_a_model_without_values_has_its_paths_counted():
    model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))).eval()
    tokens = torch.zeros(2, 5, 8)
    expected = rp.unravel(model, tokens)
    assert expected.num_paths == 2**6
    with FakeTensorMode():
        fake = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))).eval()
    for empty in (model.to("meta"), fake):
        chain = rp.unravel(empty, tokens)
        assert [b.name for b in chain] == [b.name for b in expected]
        assert chain.num_paths == 2**6


class Extra(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, h, *extra):
        return self.out(h + sum(extra, self.f(h)))


def test_a_forward_with_further_inputs():
    model = Extra().double().eval()
    chain = rp.unravel(model, x())
    assert len(chain) == 1
    torch.testing.assert_close(chain(x(3)), model(x(3)))


RANDOM = {
    "normal": lambda m, h: residual(m, h + 1e-9 * torch.empty_like(h).normal_()),
    "exponential": lambda m, h: residual(m, F.gumbel_softmax(h)),
    "scaled_dot_product_attention": lambda m, h: residual(
        m, F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None], dropout_p=0.2)[:, 0]
    ),
    "dropout": lambda m, h: residual(m, F.dropout(h)),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_operations_are_refused_by_name(name):
    with pytest.raises(rp.UnravelError, match=rf"got .\w*{name}.*without random"):
        rp.unravel(net(RANDOM[name]), x())


def test_recurrent_layers_and_attention_without_dropout_are_not_random():
    def forward(model, h):
        h = model.l[0](h)[0]
        return model.l[2](h + model.l[1](F.scaled_dot_product_attention(h, h, h)))

    recurrent = nn.GRU(6, 6, num_layers=2, dropout=0.1, batch_first=True)
    chain = rp.unravel(net(forward, recurrent, nn.Linear(6, 6), nn.Linear(6, 2)), x(2)[:, None].expand(2, 3, 6))
    assert len(chain) == 1


def test_flex_attention_names_what_to_use():
    def forward(model, h):
        q = model.l[0](h)[:, None, :, None].expand(-1, 1, 6, 16)
        return model.l[2](h + model.l[1](flex_attention(q, q, q)[:, 0, :, 0]))

    with pytest.raises(rp.UnravelError, match=r"flex_attention.*scaled_dot_product_attention"):
        rp.unravel(net(forward).float(), x().float())


def test_a_loss_is_no_output():
    with pytest.raises(rp.UnravelError, match=r"^output: .*row for each of 4 examples.*shape \[\].*loss="):
        rp.unravel(net(lambda m, h: residual(m, h).square().mean()), x())

    def with_loss(model, h):
        logits = residual(model, h)
        return {"loss": logits.square().mean(), "logits": logits}

    with pytest.raises(rp.UnravelError, match=r"^output: got 'loss'.*logits"):
        rp.unravel(net(with_loss), x(), output="loss")
    assert len(rp.unravel(net(with_loss), x())) == 1


def test_states_of_earlier_calls_are_refused():
    past = ((torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)),)
    with pytest.raises(rp.UnravelError, match=r"^past_key_values: .*Leave past_key_values out"):
        rp.unravel(net(lambda m, h, past_key_values=None: residual(m, h)), {"h": x(), "past_key_values": past})


# --- adapters ---------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter (Hu et al. 2021, equation 3)."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(6, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, h):
        return self.base(h) + self.up(self.down(self.dropout(h))) * 0.5


def test_an_adapter_is_a_part_of_its_layer_unless_asked_for():
    def deep(model, h):
        h = model.l[0](h)
        h = h + model.l[3](torch.tanh(model.l[1](h)))
        return model.l[2](h + torch.tanh(model.l[1](h)))

    layers = [nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 6)]
    base = rp.unravel(net(deep, *layers), x())
    model = net(deep, *(Adapted(layer) for layer in layers))
    chain = rp.unravel(model, x())
    assert chain.num_paths == base.num_paths == 4
    torch.testing.assert_close(chain(x(3)), model(x(3)))
    # Deleting a block deletes the adapters of its branch too.
    with torch.no_grad():
        h = model.l[0](x(3))
        expected = model.l[2](h + torch.tanh(model.l[1](h)))
        torch.testing.assert_close(rp.delete_block(chain, 0)(x(3)), expected)
    counted = rp.unravel(model, x(), adapters=True)
    assert counted.num_paths > base.num_paths
    torch.testing.assert_close(counted(x(3)), model(x(3)))


def test_a_residual_block_of_full_rank_is_no_adapter():
    def forward(model, h):
        h = model.l[0](h)
        return model.l[2](h + model.l[3](model.l[1](h)))

    assert rp.unravel(net(forward, *(nn.Linear(6, 6) for _ in range(4))), x()).num_paths == 2


# --- what is left behind ----------------------------------------------------------------------------------------------


def test_nothing_of_the_export_is_left_in_hooks_and_attributes():
    def forward(model, h):
        model.last = model.l[0](h)
        model.all.append(model.last)
        model.new = model.last
        return residual(model, h)

    stored = []
    model = net(forward)
    model.all, model.last = [], None
    handle = model.l[1].register_forward_hook(lambda _module, _args, output: stored.append(output))
    doubling = model.l[0].register_forward_hook(lambda _module, _args, output: 2 * output)
    hooks = [dict(layer._forward_hooks) for layer in model.l]
    chain = rp.unravel(model, x())
    assert model.all == []
    assert model.last is None
    assert not hasattr(model, "new")
    assert not any(isinstance(tensor, FakeTensor) for tensor in stored)
    assert [dict(layer._forward_hooks) for layer in model.l] == hooks
    torch.testing.assert_close(chain(x(3)), model(x(3)))  # with what the second hook returns
    handle.remove()
    doubling.remove()
    assert not torch.allclose(chain(x(3)), model(x(3)))


def test_hooks_are_back_after_a_refusal():
    model = net(centred)
    model.l[1].register_forward_hook(lambda *_: None)
    hooks = dict(model.l[1]._forward_hooks)
    with pytest.raises(rp.UnravelError):
        rp.unravel(model, x())
    assert dict(model.l[1]._forward_hooks) == hooks
