"""Every network is what its name says, starts from its generator alone, and is read by `unravel` as it states."""

import copy
import functools
import itertools
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.zoo import NETWORKS, build_network, find_network, load_network
from resnet_paths.zoo import vit as zoo_vit
from resnet_paths.zoo.highway import GatedBranch, GatedSkip, HighwayLayer

SMALL = "preact-resnet-20"
# Those of 20 layers stand for the deeper ones of their class, which take seconds each.
DEEPER = {name for name in NETWORKS if name.endswith(("-32", "-44", "-56", "-110", "-164"))}
# Of each class, those of few layers and the deepest: the others are of the same form.
MIDDLE = {name for name in NETWORKS if re.search("-(32|44|56)(-option-a)?$", name)}
UNRAVELED = [
    pytest.param(name, marks=pytest.mark.slow) if name in DEEPER else name for name in NETWORKS if name not in MIDDLE
]


PREACTIVATED = ("preact-resnet", "stochastic-depth", "effective", "se-resnet")


def on_meta(name, **shape):
    with torch.device("meta"):
        return NETWORKS[name].build(**shape)


def untrained(name, seed=0, **shape):
    return build_network(name, torch.Generator().manual_seed(seed), **shape)


def images(batch, channels=1, size=28, seed=0):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def inputs_of(name, batch, seed=0):
    """Images, or tokens for a language model."""
    if name == "gpt-small":
        return torch.randint(1024, (batch, 20), generator=torch.Generator().manual_seed(seed))
    return images(batch, seed=seed)


def with_statistics(model):
    """BatchNorm statistics as of a trained network: in eval mode an untrained one's outputs grow or vanish."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def kind_and_depth(name):
    kind, depth = re.match(r"(.*?)-(\d+|small)", name).groups()
    return kind, None if depth == "small" else int(depth)


# What the networks are


@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.endswith("-small")])
def test_number_of_weight_layers_is_the_one_in_the_name(name):
    """Neither projections nor gates, which stand beside other layers, count."""
    layers = [key for key, m in on_meta(name).named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len([key for key in layers if not re.search("projection|gate", key)]) == kind_and_depth(name)[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_number_of_blocks_and_paths(name):
    model = on_meta(name)
    stages = [getattr(model, f"layer{i}", ()) for i in (1, 2, 3)]
    num_blocks = {"vit-small": 24, "unet-small": 1, "gpt-small": 24}.get(name, sum(map(len, stages)))
    has_skips = not name.startswith(("plain", "vgg"))
    assert NETWORKS[name].num_blocks == num_blocks
    # A path through the U-Net takes the outer skip, or the inner one, or neither.
    assert NETWORKS[name].num_paths == (3 if name == "unet-small" else 2**num_blocks if has_skips else 1)
    assert type(NETWORKS[name].num_paths) is int
    assert re.search(rf"\b{num_blocks} blocks?\b", NETWORKS[name].description)
    assert ("no skips" in NETWORKS[name].description) != has_skips


def test_the_papers_network_has_54_blocks():
    assert NETWORKS["preact-resnet-110"].num_blocks == 54
    assert NETWORKS["preact-resnet-164"].num_blocks == 54


def num_parameters_by_formula(name, in_channels, num_classes):
    """In closed form, from the number of blocks n a stage and the widths alone."""
    kind, depth = kind_and_depth(name)
    if kind == "vgg":
        chain = [in_channels, *[32] * 5, *[64] * 5, *[128] * 4]
        total = sum((9 * a + 1) * b for a, b in itertools.pairwise(chain))
        return total + 128 * num_classes + num_classes
    if kind == "vit":
        w, hidden = 96, 192
        attention = 2 * w + (w + 1) * 3 * w + (w + 1) * w  # LayerNorm, queries with keys and values, output
        mlp = 2 * w + (w + 1) * hidden + (hidden + 1) * w
        return (16 * in_channels + 1) * w + 12 * (attention + mlp) + 2 * w + (w + 1) * num_classes
    if kind == "gpt":
        w = 128
        layer = 2 * 2 * w + (w + 1) * 3 * w + (w + 1) * w + (w + 1) * 4 * w + (4 * w + 1) * w
        return num_classes * w + 128 * w + 12 * layer + 2 * w + (w + 1) * num_classes
    if kind == "unet":
        pairs = [(in_channels, 12), (12, 12), (12, 24), (24, 24), (24, 48), (48, 48)]  # down
        pairs += [(48, 24), (24, 24), (24, 12), (12, 12)]  # and up again
        total = sum(9 * a * b + 2 * b for a, b in pairs)
        return total + (4 * 48 + 1) * 24 + (4 * 24 + 1) * 12 + (12 + 1) * in_channels
    if kind == "highway":
        return (9 * in_channels + 1) * 16 + 48 * 2 * (9 * 16 + 1) * 16 + (256 + 1) * num_classes
    total = 9 * in_channels * 16
    if kind == "densenet":
        growth = 8 if name.endswith("k8") else 12
        width = 16
        for stage in range(3):
            for _ in range(12):
                total += 2 * width + 9 * width * growth
                width += growth
            total += 2 * width + (width * width if stage < 2 else 0)  # a transition, or the last BatchNorm
        return total + (width + 1) * num_classes
    if depth == 164:
        n = 18
        for w, entering in ((16, 16), (32, 64), (64, 128)):
            out = 4 * w
            one = 2 * out + out * w + 2 * w + 9 * w * w + 2 * w + w * out  # BatchNorms and convolutions in turn
            first = 2 * entering + entering * w + 2 * w + 9 * w * w + 2 * w + w * out + entering * out
            total += first + (n - 1) * one
        return total + 2 * 256 + 256 * num_classes + num_classes
    n = (depth - 2) // 6
    for w, entering in ((16, 16), (32, 16), (64, 32)):
        if kind in PREACTIVATED:
            projection = entering * w if entering != w and not name.endswith("option-a") else 0
            total += 2 * entering + 9 * entering * w + 2 * w + 9 * w * w + projection
        else:
            total += 9 * entering * w + 2 * w + 9 * w * w + 2 * w
        total += (n - 1) * (18 * w * w + 4 * w)
        if kind == "se-resnet":
            total += n * ((w + 1) * (w // 4) + (w // 4 + 1) * w)
    return total + (128 if kind in PREACTIVATED else 32) + 64 * num_classes + num_classes


@pytest.mark.parametrize("shape", [(1, 10), (3, 7)])
@pytest.mark.parametrize("name", NETWORKS)
def test_number_of_parameters(name, shape):
    in_channels, num_classes = shape
    model = on_meta(name, in_channels=in_channels, num_classes=num_classes)
    assert sum(p.numel() for p in model.parameters()) == num_parameters_by_formula(name, in_channels, num_classes)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("plain-20", 0.27),
        ("resnet-32", 0.46),
        ("resnet-44", 0.66),
        ("plain-56", 0.85),
        ("resnet-110", 1.7),
        ("preact-resnet-110", 1.7),
        ("densenet-40", 1.0),
    ],
)
def test_sizes_are_those_of_the_literature(name, millions):
    """He et al. 2016a, table 6; Huang et al. 2017, table 2."""
    num_parameters = sum(p.numel() for p in on_meta(name, in_channels=3).parameters())
    assert num_parameters / 1e6 == pytest.approx(millions, rel=0.025)


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_a_plain_net_has_the_parameters_of_its_resnet(depth):
    plain, resnet = (on_meta(f"{kind}-{depth}").state_dict() for kind in ("plain", "resnet"))
    assert {key: value.shape for key, value in plain.items()} == {key: value.shape for key, value in resnet.items()}


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        (SMALL, (16, 32, 64)),
        ("plain-20", (16, 32, 64)),
        ("resnet-20", (16, 32, 64)),
        ("preact-resnet-164", (64, 128, 256)),
        ("vgg-15", (32, 64, 128)),
        ("se-resnet-20", (16, 32, 64)),
        ("densenet-40", (160, 304, 448)),
        ("densenet-40-k8", (112, 208, 304)),
    ],
)
def test_shapes_at_every_stage(name, widths):
    model = untrained(name).eval()
    seen = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    with torch.inference_mode():
        logits = model(images(2))
    assert logits.shape == (2, 10)
    assert bool(logits.isfinite().all())
    assert seen == [(2, width, side, side) for width, side in zip(widths, (28, 14, 7), strict=True)]


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in (*DEEPER, "gpt-small")])
def test_colour_images_and_other_classes(name):
    model = untrained(name, in_channels=3, num_classes=7)
    with torch.no_grad():
        assert model(images(2, 3, 32)).shape == ((2, 3, 32, 32) if name == "unet-small" else (2, 7))


def test_a_preactivation_block_by_hand():
    model = untrained(SMALL).eval()
    for block, width, stride in ((model.layer1[1], 16, 1), (model.layer2[0], 16, 2)):
        x = images(2, width, 8)
        activated = torch.relu(block.bn1(x))
        inner = torch.relu(block.bn2(F.conv2d(activated, block.conv1.weight, stride=stride, padding=1)))
        branch = F.conv2d(inner, block.conv2.weight, padding=1)
        skip = x if stride == 1 else F.conv2d(activated, block.projection.weight, stride=2)
        assert torch.equal(block(x), skip + branch)


def test_a_postactivation_block_by_hand():
    """Option A: every second pixel, and zeros in the new channels."""
    model = untrained("resnet-20").eval()
    for block, width, stride in ((model.layer1[1], 16, 1), (model.layer2[0], 16, 2)):
        x = images(2, width, 8).relu()
        inner = torch.relu(block.bn1(F.conv2d(x, block.conv1.weight, stride=stride, padding=1)))
        y = block.bn2(F.conv2d(inner, block.conv2.weight, padding=1)).clone()
        y[:, :width] += x[:, :, ::stride, ::stride]
        assert torch.equal(block(x), y.relu())


def test_a_plain_block_has_no_skip():
    block = untrained("plain-20").eval().layer1[1]
    with torch.no_grad():
        block.conv2.weight.zero_()
    assert torch.equal(block(torch.ones(1, 16, 4, 4)), torch.zeros(1, 16, 4, 4))


def test_a_vgg_layer_by_hand():
    model = untrained("vgg-15")
    x = images(2, 32, 8)
    first = F.conv2d(F.max_pool2d(x, 2), model.layer2[0].conv.weight, model.layer2[0].conv.bias, padding=1)
    assert torch.equal(model.layer2[0](x), first.relu())
    assert torch.equal(model.layer1[1](x), F.conv2d(x, model.layer1[1].conv.weight, padding=1).relu())


def test_squeeze_and_excitation_by_hand():
    block, x = untrained("se-resnet-20").eval().layer2[1], images(3, 32, 8)
    without = untrained("se-resnet-20").eval().layer2[1]
    without.gate = nn.Identity()
    branch = without(x) - x
    hidden = (branch.mean((2, 3)) @ block.gate.squeeze.weight.T + block.gate.squeeze.bias).clamp_min(0)
    gates = 1 / (1 + torch.exp(-(hidden @ block.gate.excite.weight.T + block.gate.excite.bias)))
    torch.testing.assert_close(block(x), x + branch * gates[:, :, None, None])
    assert hidden.shape == (3, 8)


def test_a_dense_layer_appends_its_channels():
    layer, x = untrained("densenet-40").eval().layer1[1], images(2, 28, 8)
    y = layer(x)
    assert torch.equal(y[:, :28], x)
    assert torch.equal(y[:, 28:], F.conv2d(F.relu(layer.bn(x)), layer.conv.weight, padding=1))
    transition, x = untrained("densenet-40").eval().transition1, images(2, 160, 8)
    mixed = torch.einsum("bchw,dc->bdhw", F.relu(transition.bn(x)), transition.conv.weight[:, :, 0, 0])
    torch.testing.assert_close(transition(x), mixed.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5)))


def test_a_highway_layer_is_between_its_input_and_its_transform():
    layer, x = untrained("highway-50").layer1[3], images(2, 16, 8)
    transformed = F.conv2d(x, layer.transform.weight, padding=1).relu()
    gate = torch.sigmoid(F.conv2d(x, layer.gate.weight, layer.gate.bias, padding=1))
    torch.testing.assert_close(layer(x), gate * transformed + (1 - gate) * x)
    assert (layer.gate.bias == -4).all()
    with torch.no_grad():
        layer.gate.bias.fill_(-1e4)
    assert torch.equal(layer(x), x)


def test_both_readings_of_a_highway_layer_have_the_same_gradient_and_other_paths():
    """Against all eight paths of three layers, multiplied by autograd in plain PyTorch."""
    layers = [HighwayLayer(2).double() for _ in range(3)]
    for seed, layer in enumerate(layers):
        for parameter in layer.parameters():
            parameter.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 3).double()).eval()
    x, y = images(2, 2, 4).double(), torch.tensor([0, 2])
    chain = rp.unravel(model, x)
    gated = chain.with_blocks([
        block.replace(skip=GatedSkip(layer), branch=GatedBranch(layer))
        for block, layer in zip(chain, layers, strict=True)
    ])
    splits = [rp.gradient_by_path_length(each, x, y, progress=False) for each in (chain, gated)]
    for split, is_gated in zip(splits, (False, True), strict=True):
        expected = _shares_of_three_layers(layers, model[3:], x, y, is_gated)
        torch.testing.assert_close(torch.tensor(split.gradient_share.to_numpy()), expected)
    assert (splits[0].gradient_share - splits[1].gradient_share).abs().max() > 0.01


def _shares_of_three_layers(layers, head, x, y, is_gated):
    """Signed share of the gradient at each path length, mean over examples."""
    states = [x.clone().requires_grad_()]
    parts = []
    for layer in layers:
        state = states[-1].detach().requires_grad_()
        states[-1] = state
        gate, new = torch.sigmoid(layer.gate(state)), layer.transform(state).relu()
        parts.append(((1 - gate) * state, gate * new) if is_gated else (state * 1, gate * (new - state)))
        states.append(sum(parts[-1]))
    end = states[-1].detach().requires_grad_()
    (above,) = torch.autograd.grad(F.cross_entropy(head(end), y, reduction="sum"), end)
    by_length = torch.zeros(4, *x.shape, dtype=x.dtype)
    for path in itertools.product((0, 1), repeat=3):
        vector = above
        for state, part, taken in list(zip(states, parts, path, strict=False))[::-1]:
            (vector,) = torch.autograd.grad(part[taken], state, vector, retain_graph=True)
        by_length[sum(path)] += vector
    whole = by_length.sum(0)
    return ((by_length * whole).flatten(2).sum(2) / whole.flatten(1).square().sum(1)).mean(1)


def test_attention_is_that_of_torch():
    attention = untrained("vit-small").layers[0].attention
    reference = nn.MultiheadAttention(96, 3, batch_first=True)
    reference.load_state_dict({
        "in_proj_weight": attention.qkv.weight,
        "in_proj_bias": attention.qkv.bias + 0.1,
        "out_proj.weight": attention.out.weight,
        "out_proj.bias": attention.out.bias,
    })
    with torch.no_grad():
        attention.qkv.bias.add_(0.1)
    x = images(2, 1, 96)[:, 0, :7] * 5
    torch.testing.assert_close(attention(x), reference(x, x, x, need_weights=False)[0])


def test_a_transformer_runs_in_bfloat16():
    """Its positions have the dtype of the tokens: those in float32 would make every later layer mix dtypes."""
    model, x = untrained("vit-small").eval(), images(2)
    low = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        found = low(x.bfloat16())
        assert found.dtype == torch.bfloat16
        assert (found - model(x)).abs().max() < 0.05 * model(x).abs().max()


def test_a_transformer_knows_where_its_patches_lie():
    model = untrained("vit-small").eval()
    x = images(1)
    swapped = x.unflatten(2, (7, 4)).flip(2).flatten(2, 3)  # rows of patches in reverse
    with torch.no_grad():
        assert (model(x) - model(swapped)).abs().max() > 1e-4
    positions = zoo_vit._positions(torch.zeros(1, 96, 7, 7)).flatten(1)
    assert torch.cdist(positions.T, positions.T).fill_diagonal_(9).min() > 0.5
    torch.testing.assert_close(positions.square().sum(0), torch.full((49,), 48.0))


def test_the_paths_of_a_u_net():
    """The outer skip leaves out all that is below; the inner skip only the bottom."""
    model, chain = unraveled("unet-small")
    x, level = images(2), model.level
    assert [block.name for block in chain] == ["level"]
    assert [(block.name, block.skip_kind) for block in chain[0].branch] == [("level.below", "concat")]
    with torch.no_grad():
        first = model.first(x)
        alone = model.last(level.join(torch.cat([first, torch.zeros_like(first)], 1)))
        assert torch.equal(rp.delete_block(chain, "level")(x), alone)
        second = level.down(first)
        second = level.below.join(torch.cat([second, torch.zeros_like(second)], 1))
        without_bottom = model.last(level.join(torch.cat([first, level.up(second)], 1)))
        assert torch.equal(rp.delete_block(chain, "level.below")(x), without_bottom)


# Read by `unravel`


@functools.cache
def unraveled(name):
    """A network and its chain; both are only run."""
    model = with_statistics(untrained(name))
    return model, rp.unravel(model, inputs_of(name, 2))


@pytest.mark.parametrize("name", UNRAVELED)
def test_unravels_bit_for_bit_into_the_stated_blocks_and_paths(name):
    model, chain = unraveled(name)
    assert (len(chain), chain.num_paths) == (NETWORKS[name].num_blocks, NETWORKS[name].num_paths)
    with torch.no_grad():
        assert torch.equal(chain(inputs_of(name, 3, seed=1)), model(inputs_of(name, 3, seed=1)))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in DEEPER])
def test_each_block_that_can_be_deleted_changes_the_answer_when_it_is(name):
    x, (_, chain) = inputs_of(name, 2), unraveled(name)
    deletable = [block.name for block in chain if block.skip is not None or block.keeps_shape]
    assert len(deletable) == {"vgg-15": 11}.get(name, len(chain) - 2 * name.startswith("plain"))
    with torch.no_grad():
        intact = chain(x)
        for block in deletable[:3] + deletable[-3:]:
            answer = rp.delete_block(chain, block)(x)
            assert answer.shape == intact.shape
            assert not torch.equal(answer, intact), block


# Building


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in DEEPER])
def test_initial_weights_follow_from_the_generator_alone(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = untrained(name, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = untrained(name, 5).state_dict(), untrained(name, 6).state_dict()
    for key, value in first.state_dict().items():
        assert bool(value.isfinite().all()), key
        assert torch.equal(value, again[key]), key
    drawn = [key for key, value in first.state_dict().items() if value.unique().numel() > 2]
    assert drawn
    assert not any(torch.equal(first.state_dict()[key], other[key]) for key in drawn)
    assert first.training
    assert all(p.requires_grad and p.dtype == torch.float32 and p.device.type == "cpu" for p in first.parameters())


@pytest.mark.parametrize(
    ("name", "first", "last", "bias"),
    [
        (SMALL, -0.009032616, -0.067631200, -0.113879934),
        ("plain-20", -0.009032616, -0.062998712, -0.111065716),
        pytest.param("preact-resnet-110", -0.009032616, 0.041661907, -0.107802004, marks=pytest.mark.slow),
    ],
)
def test_initial_weights_of_the_first_networks_stay_what_they_were(name, first, last, bias):
    """Else a run that was stopped, or a snapshot at epoch 0, would be of another network."""
    model = untrained(name, 3)
    found = [model.conv.weight.flatten()[0], model.layer3[-1].conv2.weight.flatten()[0], model.fc.bias[0]]
    assert torch.stack(found).tolist() == pytest.approx([first, last, bias], rel=1e-6)


def test_initial_weights_have_the_stated_spread():
    model = untrained("preact-resnet-56")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            relative_error = 4 / module.weight.numel() ** 0.5  # more than four standard errors
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=relative_error)
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.running_var, torch.ones_like(module.weight))
            assert not module.bias.any()
            assert not module.running_mean.any()
            assert module.num_batches_tracked == 0
    assert model.fc.weight.abs().max() <= 1 / 8
    assert model.fc.weight.abs().max() > 0.95 / 8
    assert model.fc.bias.abs().max() <= 1 / 8


@pytest.mark.parametrize("name", ["vgg-15", "highway-50"])
def test_signals_pass_an_untrained_network_without_batchnorm(name):
    """The mean square of what the last layer reads; it is below 0.001 with other first values that were tried."""
    model, seen = untrained(name), []
    (model.layer3 if name == "vgg-15" else model.layer2).register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        model(images(8))
    assert 0.02 < seen[0].square().mean() < 20


@pytest.mark.parametrize("function", [find_network, load_network, lambda name: build_network(name, torch.Generator())])
def test_unknown_name_gives_the_nearest(function):
    with pytest.raises(ResnetPathsError, match=r"name: got 'preact-resnet-111'; .*nearest 'preact-resnet-11"):
        function("preact-resnet-111")
