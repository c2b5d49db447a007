"""Unraveling: the chain is the model, bit for bit, for anything that is a chain; all else is refused by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.zoo import build_network
from tests.chains import assert_same, inputs, plans, random_model, snapshot

BLOCKS = {
    "resnet18": 8,
    "resnet34": 16,
    "resnet50": 16,
    "resnet101": 33,
    "resnet152": 50,
    "resnext50_32x4d": 16,
    "resnext101_32x8d": 33,
    "wide_resnet50_2": 16,
}
"""Blocks by He et al. 2016a, table 1, and Xie et al. 2017: 2+2+2+2, 3+4+6+3, 3+4+23+3, 3+8+36+3."""
LARGE = {"resnet101", "resnet152", "resnext101_32x8d"}


def torchvision_model(name: str, seed: int = 0) -> nn.Module:
    """Random weights and BatchNorm statistics that are not trivial."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(torchvision.models, name)(weights=None)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def images(batch: int, size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in BLOCKS])
def test_torchvision_resnets(name):
    model = torchvision_model(name)
    before = snapshot(model)
    chain = rp.unravel(model, images(2))
    assert len(chain) == BLOCKS[name]
    assert chain.num_paths == 2 ** BLOCKS[name]
    assert type(chain.num_paths) is int
    with torch.no_grad():
        for batch in (1, 2, 3):  # not only the example's batch
            assert torch.equal(chain(images(batch)), model(images(batch)))
    assert_same(before, snapshot(model))
    blocks = [(n, m) for n, m in model.named_modules() if type(m).__name__ in ("BasicBlock", "Bottleneck")]
    assert [b.name for b in chain] == [n for n, _ in blocks]
    assert [b.skip_kind for b in chain] == ["projection" if m.downsample else "identity" for _, m in blocks]
    assert [b.stage for b in chain] == [int(n[5]) - 1 for n, _ in blocks]
    assert {id(t) for t in [*chain.parameters()]} == {id(t) for t in model.parameters()}
    assert {id(t) for t in chain.buffers()} <= {id(t) for t in model.buffers()}


def test_deleting_a_torchvision_block_equals_zeroing_its_last_batch_norm():
    model = torchvision_model("resnet50")
    for name in ("layer1.0", "layer2.3", "layer4.0"):
        zeroed = copy.deepcopy(model)
        last = zeroed.get_submodule(name).bn3
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        with torch.no_grad():
            edited = rp.delete_block(model, name, example_inputs=images(2))
            torch.testing.assert_close(edited(images(3)), zeroed(images(3)))


@settings(max_examples=20, deadline=None)
@given(plans(min_blocks=1, max_blocks=5, skips=("identity",)))
def test_random_models_as_users_write_them(plan):
    model = random_model(plan)
    before = snapshot(model)
    chain = rp.unravel(model, inputs())
    assert len(chain) == len(plan[1])
    assert [b.skip_kind for b in chain] == [p.skip for p in plan[1]]
    assert [b.name for b in chain] == [f"blocks.{i}" for i in range(len(plan[1]))]
    with torch.no_grad():
        for batch in (1, 2, 7):
            assert torch.equal(chain(inputs(batch)), model(inputs(batch)))
    # The same gradient, to the input and to every parameter.
    x, y = inputs().requires_grad_(), inputs().requires_grad_()
    found = torch.autograd.grad(chain(x).square().sum(), [x, *model.parameters()], allow_unused=True)
    expected = torch.autograd.grad(model(y).square().sum(), [y, *model.parameters()], allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert_same(before, snapshot(model))
    # Deleting a block leaves out exactly what its forward adds.
    index = len(plan[1]) // 2
    without = copy.deepcopy(model)
    nn.init.zeros_(without.blocks[index].fc2.weight)
    nn.init.zeros_(without.blocks[index].fc2.bias)
    with torch.no_grad():
        assert torch.equal(rp.delete_block(chain, index)(inputs()), without(inputs()))


def test_all_512_paths_of_a_nine_block_network_run_alone():
    model = build_network("preact-resnet-20", torch.Generator().manual_seed(0)).eval()
    chain = rp.unravel(model, images(2, 8, 1))
    x = images(2, 8, 1)
    outputs = []
    with torch.no_grad():
        for path in rp.enumerate_paths(chain):
            outputs.append(rp.path_network(chain, path)(x))
        state = chain.stem(x)
        for block in chain:  # the path of skips alone, written out
            state = block.skip(block.pre(state))
        assert torch.equal(outputs[0], chain.head(state))
    assert len(outputs) == 512
    assert torch.isfinite(torch.stack(outputs)).all()
    assert len({tuple(o.flatten().tolist()) for o in outputs}) == 512


def test_channels_last_double_and_later_changes_of_weights():
    model = torchvision_model("resnet18")
    chain = rp.unravel(model, images(2))
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(2)
        assert torch.equal(chain(images(2)), model(images(2)))
        x = images(2).to(memory_format=torch.channels_last)
        assert torch.equal(chain(x), model(x))
        wide = copy.deepcopy(model).double()
        assert torch.equal(rp.unravel(wide, images(2).double())(images(2).double()), wide(images(2).double()))
        assert torch.equal(copy.deepcopy(chain).double()(images(2).double()), wide(images(2).double()))


def test_nothing_assumes_the_cpu():
    """Under fake tensors on a device that is not there, an operation that mixes devices raises."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    moved = copy.deepcopy(rp.unravel(torchvision_model("resnet18"), images(2)))
    mode = FakeTensorMode(allow_non_fake_inputs=False)

    def fake(tensor):
        return FakeTensor(mode, tensor.detach().to("meta"), torch.device("cuda"))

    for module in moved.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
    x = fake(images(4))
    with mode, torch.no_grad():
        for edited in (moved, rp.delete_block(moved, 3), rp.scale_block(moved, 2, 0.5), rp.swap_blocks(moved, 1, 1)):
            assert edited(x).device.type == "cuda"
        with pytest.raises(RuntimeError, match=r"found two different devices|device"):
            moved(torch.empty(4, 3, 32, 32))


class Toy(nn.Module):
    """Parts for models that are, or are not, chains."""

    def __init__(self, depth=4):
        super().__init__()
        self.inp = nn.Linear(5, 8)
        self.f = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth))
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 3)


def toy(forward, **attributes):
    model = type("Toy", (Toy,), {"forward": forward})().double().eval()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def test_blocks_written_in_the_models_own_forward():
    def forward(self, x):
        x = self.inp(x)
        for f in self.f:
            x += f(x)
            x = F.relu(x, inplace=True)
        return self.out(self.norm(x))

    model = toy(forward)
    chain = rp.unravel(model, inputs())
    assert [b.name for b in chain] == ["f.0", "f.1", "f.2", "f.3"]
    # The ReLU after every addition belongs to its block, the norm before the last layer to the head.
    block = chain[3]
    x = torch.randn(2, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(block(x), F.relu(x + model.f[3](x)))
        assert torch.equal(chain.head(x), model.out(model.norm(x)))


def test_a_norm_after_every_addition_is_post():
    def forward(self, x):
        x = self.inp(x)
        for f in self.f:
            x = self.norm(x + f(x))
        return self.out(x)

    model = toy(forward)
    chain = rp.unravel(model, inputs())
    x = torch.randn(2, 8, dtype=torch.float64)
    with torch.no_grad():
        assert all(torch.equal(b(x), model.norm(x + f(x))) for b, f in zip(chain, model.f, strict=True))
        assert torch.equal(chain.head(x), model.out(x))


def test_additions_inside_a_branch_are_no_blocks():
    def forward(self, x):
        x = self.inp(x)
        for f in self.f:
            h = f(x)
            x = x + (h + 0.04 * h**3) * torch.sigmoid(self.norm(h) + h.mean(-1, keepdim=True))
        return self.out(x)

    assert len(rp.unravel(toy(forward), inputs())) == 4


def test_two_inputs_meet_in_the_stem():
    def forward(self, x, y):
        x = self.inp(x) * self.inp(y)
        for f in self.f:
            x = x + f(x)
        return self.out(x)

    model = toy(forward)
    chain = rp.unravel(model, (inputs(4), inputs(4, seed=2)))
    with torch.no_grad():
        assert torch.equal(chain(inputs(3), inputs(3, seed=5)), model(inputs(3), inputs(3, seed=5)))
    assert len(chain) == 4


def test_a_stack_of_layers_is_a_plain_chain():
    layers = [nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]
    model = nn.Sequential(*layers).double().eval()
    chain = rp.unravel(model, inputs())
    assert [(b.name, b.skip_kind, b.in_shape, b.out_shape) for b in chain] == [
        ("2", None, (8,), (8,)),
        ("4", None, (8,), (6,)),
    ]
    assert chain.num_paths == 1
    with torch.no_grad():
        assert torch.equal(chain(inputs(3)), model(inputs(3)))


def test_a_wrapped_plain_network_has_the_same_blocks():
    class Wrapper(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.clamp(-3, 3))

    model = Wrapper(build_network("plain-20", torch.Generator().manual_seed(0))).eval()
    chain = rp.unravel(model, images(2, 28, 1))
    assert [b.name for b in chain] == [f"net.layer{i}.{j}" for i in (1, 2, 3) for j in range(3)]
    with torch.no_grad():
        assert torch.equal(chain(images(3, 28, 1)), model(images(3, 28, 1)))


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_has_two_blocks_a_layer(norm_first):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.TransformerEncoderLayer(8, 2, 16, norm_first=norm_first, batch_first=True) for _ in range(3)]
        model = nn.Sequential(nn.Linear(5, 8), *layers, nn.LayerNorm(8), nn.Linear(8, 2)).double().eval()
    x = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chain = rp.unravel(model, x)
    assert len(chain) == 6
    with torch.no_grad():
        torch.testing.assert_close(chain(x), model(x))
        # The norm after each addition belongs to its block if it is a post-norm network, and none does otherwise.
        state = torch.randn(2, 7, 8, dtype=torch.float64)
        for index, block in enumerate(chain):
            layer = layers[index // 2]
            norm = layer.norm1 if index % 2 == 0 else layer.norm2
            assert torch.equal(block.post(state), state if norm_first else norm(state))
        assert torch.equal(chain.head(state), model[5](model[4](state)))


def test_a_chain_is_returned_as_it_is():
    chain = rp.unravel(torchvision_model("resnet18"), images(2))
    assert rp.unravel(chain, images(2)) is chain


@pytest.mark.parametrize("copied", [lambda c: c, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_an_unraveled_chain_has_no_training_mode(copied):
    chain = copied(rp.delete_block(rp.unravel(torchvision_model("resnet18"), images(2)), 3))
    assert not any(module.training for module in chain.modules())
    with pytest.raises(rp.ResnetPathsError, match=r"mode: got True; .*eval mode"):
        chain.train()
    assert not any(module.training for module in chain.eval().modules())


def test_another_image_size_is_refused_where_the_answer_would_be_wrong():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            x = x + self.conv(x)
            return F.avg_pool2d(x, x.shape[2:])  # the size stands in the graph as a number

    model = Net().eval()
    chain = rp.unravel(model, images(2, 12))
    with torch.no_grad():
        assert torch.equal(chain(images(3, 12)), model(images(3, 12)))
    with pytest.raises(
        rp.ResnetPathsError, match=r"inputs: got .*14, 14.*; allowed: .*12, 12.*Unravel the model again"
    ):
        chain(images(2, 14))


def test_an_activation_that_adds_is_no_block():
    def forward(self, x):
        x = self.inp(x)
        x = x + torch.sin(x) ** 2
        for f in self.f:
            x = x + f(x)
        return self.out(x)

    assert [b.name for b in rp.unravel(toy(forward), inputs())] == [f"f.{i}" for i in range(4)]

    def plain(self, x):
        x = self.inp(x)
        for f in self.f:
            x = f(x)
            x = x + torch.sin(x) ** 2
        return self.out(x)

    chain = rp.unravel(toy(plain), inputs())
    assert chain.num_paths == 1
    assert [b.name for b in chain] == [f"f.{i}.0" for i in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_blocks"),
    [
        ("mobilenet_v2", 10),
        ("efficientnet_b0", 9),
        ("convnext_tiny", 18),
        ("swin_t", 24),
        ("vit_b_16", 24),
        ("regnet_y_400mf", 16),
    ],
)
def test_other_architectures_that_the_readme_names(name, num_blocks):
    """Counted in the papers' tables: repeats of stride 1 for the mobile nets, blocks, or two a transformer layer."""
    model = torchvision_model(name)
    x = images(2, 224 if name == "vit_b_16" else 64)
    chain = rp.unravel(model, x)
    assert (len(chain), chain.num_paths) == (num_blocks, 2**num_blocks)
    with torch.no_grad():
        assert torch.equal(chain(x), model(x))


def test_hooks_stay():
    model = torchvision_model("resnet18")
    model.layer1.register_forward_hook(lambda *_: None)
    model.layer1[0].register_forward_pre_hook(lambda *_: None)
    model.fc.register_full_backward_hook(lambda *_: None)
    before = snapshot(model)
    chain = rp.unravel(model, images(2))
    rp.delete_block(chain, 1)(images(2)).sum().backward()
    model.zero_grad()
    assert_same(before, snapshot(model))


def data_dependent(self, x):
    x = self.inp(x)
    if x.sum() > 0:
        x = x + self.f[0](x)
    return self.out(x)


def one_batch_size(self, x):
    x = self.inp(x)
    return self.out(x + self.f[0](x).view(4, 8))


def crossing(self, x):
    x = self.inp(x)
    a, b = self.f[0](x), self.f[1](x)
    return self.out(self.f[2](a + b) + self.f[3](b))


def concatenated(self, x):
    h = self.inp(x)
    return self.out(torch.cat([h[:, :2], h[:, 2:4], self.f[0](h)[:, 4:]], 1))  # two skips


def difference(self, x):
    x = self.inp(x)
    return self.out(self.f[0](x) - x)


def interpolation(self, x):
    x = self.inp(x)
    return self.out(torch.lerp(self.f[0](x), self.f[1](x), 0.5))


def one_maximum_among_sums(self, x):
    x = self.inp(x)
    x = x + self.f[0](x)
    x = torch.maximum(x, self.f[1](x))
    return self.out(x + self.f[2](x))


def random_branch(self, x):
    h = self.inp(x)
    return self.out(h + F.dropout(self.f[0](h), 0.5, training=True))


def counting(self, x):
    self.count += 1
    h = self.inp(x)
    return self.out(h + self.f[0](h))


REFUSED = {
    "data-dependent": (data_dependent, r"data; export failed at test_unraveling.py:\d+ in data_dependent: if x.sum"),
    "one batch size": (one_batch_size, r"batch of 4 only.; allowed: a model that takes any batch size"),
    "crossing": (crossing, r"model: got .linear\w* \(linear.default in f.1.0.*share nothing"),
    "concatenated": (concatenated, r"model: got .cat\w* \(cat.default.*not concatenate"),
    "difference": (difference, r"model: got .sub\w* .*not join it by sub"),
    "interpolation": (interpolation, r"model: got .lerp\w* .*not join it by lerp"),
    "maximum among sums": (one_maximum_among_sums, r"model: got .maximum\w* .*not join it by maximum"),
    "random": (random_branch, r"dropout.*without random or training-mode operations.*model.eval\(\)"),
    "a constant": (lambda self, x: self.out.weight[[0, 1, 2, 0]] * 2, r"output depends on its input"),
    "no batch": (lambda self, x: self.out.weight * 2, r"output: got .*a row for each of 4 examples"),
    "no weights": (lambda self, x: torch.relu(x), r"no block found"),
}


@pytest.mark.parametrize(("forward", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_a_chain_is_refused_naming_where(forward, message):
    model = toy(forward)
    before = snapshot(model)
    with pytest.raises(rp.ResnetPathsError, match=message):
        rp.unravel(model, inputs(4))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(("name", "paths"), [("squeezenet1_0", 2**8), ("googlenet", 4**9)])
def test_concatenated_branches_are_alternatives_without_a_skip(name, paths):
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(weights=None, **options).eval()
    chain = rp.unravel(model, images(2, 64))
    assert (chain.num_paths, {block.skip_kind for block in chain}) == (paths, {None})
    with torch.no_grad():
        assert torch.equal(chain(images(2, 64)), model(images(2, 64)))


def test_bad_arguments():
    model = torchvision_model("resnet18")
    with pytest.raises(rp.ResnetPathsError, match=r"example_inputs: got .*\[2, 1, 32, 32\] on cpu.*to have 3 channels"):
        rp.unravel(model, images(2, channels=1))
    with pytest.raises(rp.ResnetPathsError, match=r"example_inputs: got \['str'\]; allowed: a tensor"):
        rp.unravel(model, "images")
    with pytest.raises(
        rp.ResnetPathsError, match=r"model: got 'builtin_function_or_method'; allowed: a torch.nn.Module"
    ):
        rp.unravel(torch.relu, images(2))
    with pytest.raises(rp.ResnetPathsError, match=r"BatchNorm2d 'bn1' in training mode.*Call model.eval\(\) first"):
        rp.unravel(model.train(), images(2))


def test_a_changed_buffer_is_refused():
    model = toy(counting)
    model.register_buffer("count", torch.zeros(()))
    before = snapshot(model)
    with pytest.raises(rp.ResnetPathsError, match="'count' when it runs"):
        rp.unravel(model, inputs(4))
    assert_same(before, snapshot(model))


def test_the_self_check_names_the_first_block_that_differs(monkeypatch):
    from resnet_paths import unraveling

    assemble = unraveling.assemble

    def wrong(*args):
        return rp.scale_block(assemble(*args), 2, 1.5)

    monkeypatch.setattr(unraveling, "assemble", wrong)
    with pytest.raises(rp.ResnetPathsError, match=r"differs from the model's.*first difference is in block 'layer2.0'"):
        rp.unravel(torchvision_model("resnet18"), images(2))


def test_the_report_says_what_each_block_is():
    text = repr(rp.unravel(torchvision_model("resnet18"), images(2)))
    assert text.splitlines()[0] == "ResidualChain of 8 blocks, 256 paths"
    assert "layer2.0: stage 1, projection skip, 221,696 parameters in the branch, 64x8x8 -> 128x4x4" in text


def test_a_head_may_read_the_input():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.f, self.out = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))

        def forward(self, x, f=1):
            h = self.inp(x)
            return self.out(h + f * self.f(h)) * x[:, :1]

    model, x = Around().eval(), torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chain = rp.unravel(model, x)
    assert (len(chain), chain.num_paths) == (1, 2)
    assert torch.equal(rp.delete_block(chain, "f")(x), model(x, f=0))
