"""Chains on another device, in another precision or layout; no tensor is left on the wrong device."""

from __future__ import annotations

import copy
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

import resnet_paths as rp
from resnet_paths._utils.devices import wide, widest_float
from resnet_paths.core import placement, segments
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.parts import Constant
from resnet_paths.core.placement import place_modules
from resnet_paths.lesions.trie import Trie
from tests.chains import Plan, assert_same, inputs, random_chain, snapshot
from tests.gradients.gradient_reference import seeded

STEADY = (3, tuple(Plan(3, "identity", False, False) for _ in range(5)))


class ImageBlock(nn.Module):
    """A residual block with constants that an exported graph makes as it runs."""

    def __init__(self, kind):
        super().__init__()
        self.norm, self.conv, self.kind = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), kind
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x):
        h = self.conv(torch.relu(self.norm(x)))
        if self.kind == "range":
            h = h * torch.arange(4, device=x.device, dtype=x.dtype).view(1, 4, 1, 1)
        if self.kind == "zeros":
            h = torch.cat([h[:, :2], torch.zeros(h.shape[0], 2, *h.shape[2:], device=x.device)], 1)
        if self.kind == "new":
            h = h + x.new_full((4, 1, 1), 0.5) + torch.full((4, 1, 1), 0.25, device=x.device)
        if self.kind == "softmax":
            h = torch.softmax(h, 1, dtype=torch.float32).to(x.dtype) + torch.eye(6, device=x.device)
        if self.kind == "lifted":
            h = h * torch.tensor([1.0, -1.0, 0.5, 2.0]).view(4, 1, 1)
        if self.kind == "size":  # a number that is known only when it runs
            h = h * (torch.arange(1, h.shape[0] + 1, device=x.device) > 0).view(-1, 1, 1, 1)
        return x + self.conv(h)


KINDS = ["plain", "range", "zeros", "new", "softmax", "lifted", "size"]


CAST = {"range", "softmax"}  # their code chooses a dtype


class ImageNet(nn.Module):
    def __init__(self, kinds=KINDS):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(*map(ImageBlock, kinds))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def images(size=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 6, 6, generator=generator), torch.randint(3, (size,), generator=generator)


@pytest.fixture(scope="module")
def exported():
    with seeded():
        return rp.unravel(ImageNet().eval(), images(3)[0])


@pytest.fixture(scope="module")
def without_casts():
    """A chain that lower precisions are not refused for."""
    with seeded():
        return rp.unravel(ImageNet([kind for kind in KINDS if kind not in CAST]).eval(), images(3)[0])


def test_a_chain_that_is_where_it_should_be_is_kept():
    chain = random_chain(STEADY)
    chains = [chain, rp.delete_block(chain, 1)]
    for options in ({}, {"device": "cpu"}, {"device": torch.device("cpu", 0)}, {"precision": "float64"}):
        assert [id(c) for c in place_modules(chains, **options)] == list(map(id, chains))
    bare = ResidualChain(nn.Identity(), [Block(nn.Tanh(), nn.Identity())], nn.Identity())
    assert place_modules([bare], precision="float32")[0] is bare
    assert placement.device_of(bare) == torch.device("cpu")


def test_copies_share_what_was_shared_and_nothing_with_the_original():
    chain = random_chain(STEADY)
    before = snapshot(chain)
    chains = [chain, rp.delete_block(chain, 1), rp.swap_blocks(chain, 0, 4), rp.scale_block(chain, 2, 0.5)]
    placed = place_modules(chains, precision="float32")
    assert_same(before, snapshot(chain))
    assert placed[0][0].branch is placed[1][0].branch is placed[2][4].branch
    assert placed[0][2].branch is placed[3][2].branch[0]
    assert Trie(placed).block_evaluations == Trie(chains).block_evaluations
    kept = {t.data_ptr() for t in chain.parameters()}
    assert not kept & {t.data_ptr() for c in placed for t in c.parameters()}
    assert {t.dtype for c in placed for t in c.parameters()} == {torch.float32}


def test_whole_numbers_stay_whole():
    with seeded():
        block = Block(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Identity(), in_shape=(4,), out_shape=(4,))
        block.branch[1].register_buffer("mask", torch.tensor([True, False]))
        chain = ResidualChain(nn.Sequential(nn.Embedding(7, 4)), [block], nn.Linear(4, 3)).eval()
    placed = place_modules([chain], precision="bfloat16")[0]
    kinds = {name.split(".")[-1]: t.dtype for name, t in placed.named_buffers()}
    assert kinds == {
        "running_mean": torch.bfloat16,
        "running_var": torch.bfloat16,
        "num_batches_tracked": torch.int64,
        "mask": torch.bool,
    }
    tokens, labels = torch.arange(7), torch.arange(7) % 3
    frame = rp.lesion_study(chain, [(tokens, labels)], rp.single_deletions(chain), precision="bfloat16", progress=False)
    assert frame.num_examples.tolist() == [7]


def test_a_lesion_with_tensors_of_its_own_precision_is_converted():
    chain = random_chain(STEADY).float()
    foreign = chain.with_blocks([chain[0].replace(branch=Constant(torch.ones(3).double())), *list(chain)[1:]])
    placed = place_modules([chain, foreign], precision="float32")
    assert {t.dtype for c in placed for t in [*c.parameters(), *c.buffers()]} == {torch.float32}
    loader = [(inputs(16).float(), torch.zeros(16, dtype=torch.int64))]
    frame = rp.lesion_study(chain, loader, [lambda c: foreign], precision="float32", progress=False)
    assert frame.num_not_finite.tolist() == [0]


@pytest.mark.parametrize(("precision", "near"), [("float64", 1e-5), ("float16", 0.02), ("bfloat16", 0.1)])
def test_the_numbers_of_another_precision_are_near(exported, without_casts, precision, near):
    exported = exported if precision == "float64" else without_casts
    batches = [images(40, seed) for seed in range(3)]
    before = snapshot(exported)
    deletions = rp.single_deletions(exported)
    frames = [rp.lesion_study(exported, batches, deletions, precision=p, progress=False) for p in (None, precision)]
    assert_same(before, snapshot(exported))
    assert (frames[0].cross_entropy - frames[1].cross_entropy).abs().max() < near
    # Images on the border between two classes may change sides.
    assert (frames[0].error_rate - frames[1].error_rate).abs().max() <= (0.05 if near > 1e-3 else 0)
    wide = rp.lesion_study(
        copy.deepcopy(exported), [(x, y) for x, y in batches], deletions, precision="float32", progress=False
    )
    assert wide.equals(frames[0])


class Mixes(nn.Module):
    """A branch written by hand that insists on its precision."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x.float())


def test_an_operation_that_insists_on_a_precision_is_named():
    chain = random_chain(STEADY).float()
    mixed = chain.with_blocks([chain[0].replace(branch=Mixes()), *list(chain)[1:]])
    loader = [(inputs(4).float(), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(
        rp.ResnetPathsError, match=r"precision: got 'bfloat16'; .*every operation.*One answered: .*dtype"
    ):
        rp.lesion_study(mixed, loader, [lambda c: c], precision="bfloat16", progress=False)
    with pytest.raises(rp.ResnetPathsError, match=r"precision: got 'float8'; allowed: one of 'float64', 'float32'"):
        rp.lesion_study(chain, loader, [lambda c: c], precision="float8", progress=False)
    with pytest.raises(rp.ResnetPathsError, match=r"precision: got 'half'"):
        place_modules([chain], precision="half")
    with pytest.raises(rp.ResnetPathsError, match=r"device: got 'gpu'; allowed: 'auto' or a torch device"):
        rp.lesion_study(chain, loader, [lambda c: c], device="gpu", progress=False)


def test_images_with_their_channels_last(exported):
    batches = [images(40, seed) for seed in range(2)]
    before = snapshot(exported)
    placed = place_modules([exported], channels_last=True)[0]
    weights = [p for p in placed.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    seen = []
    placed.stem.register_forward_pre_hook(lambda _, args: seen.append(args[0].stride()))
    deletions = rp.single_deletions(exported)
    plain = rp.lesion_study(exported, batches, deletions, progress=False)
    frame = rp.lesion_study(exported, batches, deletions, channels_last=True, progress=False)
    assert_same(before, snapshot(exported))
    assert frame.error_rate.tolist() == plain.error_rate.tolist()
    assert (frame.cross_entropy - plain.cross_entropy).abs().max() < 1e-5
    vectors = rp.lesion_study(
        random_chain(STEADY),
        [(inputs(), torch.zeros(4, dtype=torch.int64))],
        [lambda c: c],
        channels_last=True,
        progress=False,
    )
    assert vectors.num_examples.tolist() == [4]


def test_volumes_stay_as_they_lie_beside_images_with_their_channels_last():
    with seeded():
        parts = [nn.Conv3d(2, 2, 3, padding=1), nn.Flatten(1, 2), nn.Conv2d(8, 8, 3, padding=1)]
        chain = ResidualChain(nn.Identity(), [], nn.Sequential(*parts))
    placed = place_modules([chain], channels_last=True)[0]
    volumes, images = (part.weight for part in placed.head if hasattr(part, "weight"))
    assert volumes.is_contiguous()
    assert images.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(placed(x), chain(x), rtol=0, atol=1e-6)


def test_a_copy_can_be_moved_and_converted_as_any_module(exported):
    before = snapshot(exported)
    x, _ = images(5)
    converted = copy.deepcopy(exported).bfloat16()
    assert torch.equal(converted(x.bfloat16()), place_modules([exported], precision="bfloat16")[0](x.bfloat16()))
    assert copy.deepcopy(exported).to("meta")(x.to("meta")).shape == (5, 3)
    assert_same(before, snapshot(exported))
    assert exported(x).dtype == torch.float32


# A GPU that is not there


class ImaginaryValues(FakeTensorMode):
    """Tensors without values on any device; operations on tensors of two devices are errors.

    A value that the program asks for is made up: no element of any() is true, each of all() is, and numbers are 1.
    """

    has_float64 = True  # the devices, but for the CPU

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return not getattr(args[0], "is_any", False) if args[0].dtype == torch.bool else 1
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64 and result.device.type != "cpu":
            assert self.has_float64
        if func in (torch.ops.aten.any.default, torch.ops.aten.any.dim):
            result.is_any = True
        return result


@pytest.fixture
def imaginary(monkeypatch):
    """The mode; chains that are moved while it lasts get imaginary tensors."""
    # What is not imaginary is taken for one of its own device: an error if it meets one of another.
    mode = ImaginaryValues(allow_non_fake_inputs=True)

    def to(self, device=None, dtype=None):
        moved = {}

        def there(tensor):
            kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            with mode:
                return torch.empty(tensor.shape, device=device or tensor.device, dtype=kind)

        for module in self.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None and tensor not in moved:
                        is_parameter = isinstance(tensor, nn.Parameter)
                        moved[tensor] = nn.Parameter(there(tensor)) if is_parameter else there(tensor)
                    if tensor is not None:
                        held[name] = moved[tensor]
            if isinstance(module, segments.Segment):
                segments.move_constants(module, there)
        return self

    def deepcopy(value):
        with unset_fake_temporarily():
            return copy.deepcopy(value)

    numpy = torch.Tensor.numpy

    def made_up(tensor, **options):
        if not isinstance(tensor, FakeTensor):
            return numpy(tensor, **options)
        assert tensor.device.type == "cpu"
        return np.ones(tensor.shape, str(tensor.dtype).removeprefix("torch."))

    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(placement, "copy", types.SimpleNamespace(deepcopy=deepcopy))
    monkeypatch.setattr(torch.Tensor, "numpy", made_up)
    return mode


def edits_of(chain):
    """Every edit, and those inside plans."""
    lesions = [
        rp.delete_block(chain, 1),
        rp.delete_blocks(chain, [0, 3]),
        rp.swap_blocks(chain, 1, 2),
        rp.permute_blocks(chain, list(range(len(chain)))[::-1]),
        rp.reverse_blocks(chain, 0),
        rp.duplicate_block(chain, 2),
        rp.scale_block(chain, 3, 0.5),
        rp.parallel_blocks(chain, [1, 2]),
        rp.path_network(chain, [True, False] * (len(chain) // 2) + [True] * (len(chain) % 2)),
    ]
    with unset_fake_temporarily():  # the random order has values
        schedules = rp.layer_schedules(chain)
    return lesions + [lesion.edit(chain) for lesion in schedules]


def imaginary_grad(outputs, inputs, grad_outputs=None, is_grads_batched=False, **_):
    """In place of autograd, which asks the driver of a GPU about its streams: gradients without values."""
    inputs = [inputs] if isinstance(inputs, torch.Tensor) else inputs
    rows = (len(grad_outputs[0]),) if is_grads_batched else ()
    return tuple(x.new_empty(*rows, *x.shape) for x in inputs)


# Autograd itself runs with imaginary values on the device "meta" alone.
DEVICES = ["cuda", "meta"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_studies_and_edits_leave_no_tensor_behind(exported, without_casts, imaginary, device, precision):
    studied = exported if precision is None else without_casts
    deletions = rp.single_deletions(studied)
    with imaginary:
        placed = place_modules([exported], device=device, precision=precision)[0]
        x = torch.empty(5, 1, 6, 6, device=device, dtype=next(placed.parameters()).dtype)
        y = torch.zeros(5, dtype=torch.int64)
        everything = [placed, *edits_of(placed), *(m.edit(placed) for m in rp.mean_replacements(placed, x))]
        for budget in (None, 20):
            logits = dict(Trie(everything).logits(x, None, budget))
            assert len(logits) == len(everything)
            assert {(t.device.type, t.dtype) for t in logits.values()} == {(device, x.dtype)}
        for options in (
            {},
            {"batch_budget": 20},
            {"batch_budget": 2},
            {"channels_last": True},
            {"per_class": True},
            {"reestimate_batchnorm": [torch.empty(5, 1, 6, 6)]},
        ):
            # Chain and batches are on the CPU.
            frame = rp.lesion_study(
                studied,
                [(torch.empty(5, 1, 6, 6), y)],
                deletions,
                device=device,
                precision=precision,
                progress=False,
                **options,
            )
            assert len(frame) == len(deletions)
        replaced = rp.branch_replacements(placed, placed) + rp.mean_replacements(placed, x)
        assert len(rp.lesion_study(placed, [(x, y)], replaced, progress=False)) == 2 * len(placed)


@pytest.mark.parametrize(("device", "has_float64"), [("cuda", True), ("cuda", False), ("meta", True)])
def test_gradients_leave_no_tensor_behind(exported, imaginary, monkeypatch, device, has_float64):
    if device == "cuda":
        monkeypatch.setattr(torch.autograd, "grad", imaginary_grad)
    if not has_float64:  # as on Apple's devices
        monkeypatch.setattr("resnet_paths._utils.devices.widest_float", lambda d: widest_float(torch.device("mps")))
    imaginary.has_float64 = has_float64
    with imaginary:
        chain = place_modules([exported], device=device)[0]
        x, y = torch.empty(5, 1, 6, 6), torch.zeros(5, dtype=torch.int64)  # on the CPU
        edited = rp.scale_block(rp.parallel_blocks(chain, [1, 2]), 3, 0.5)
        assert len(rp.gradient_by_path_length(edited, x, y))
        for method in ("energy", "sampled"):
            assert len(rp.gradient_by_path_length(chain, x, y, method=method, num_draws=2))
        assert len(rp.gradient_by_path_length(chain, x, y, with_respect_to=("parameters", 1)))
        assert len(rp.gradient_through_block(chain, x, y))
        assert len(rp.gradient_by_stage_lengths(chain, x, y))
        assert len(rp.predicted_effects(chain, [(x, y)], progress=False)) == len(chain)
        assert len(rp.predicted_effects(exported, [(x, y)], device=device, progress=False)) == len(chain)
        assert len(rp.block_norms(chain, x)) == len(chain)


@pytest.mark.parametrize("device", DEVICES)
def test_a_constant_on_the_wrong_device_would_be_seen(exported, imaginary, monkeypatch, device):
    monkeypatch.setattr(segments, "move_constants", lambda *_: None)
    with imaginary:
        chain = place_modules([exported], device=device)[0]
        x = torch.empty(5, 1, 6, 6, device=device)
        with pytest.raises(RuntimeError, match=r"at least two devices, .*cpu"):
            list(Trie([chain]).logits(x))


def test_float64_where_a_device_has_it():
    with FakeTensorMode():
        found = [wide(torch.ones(3, device=device)) for device in ("cpu", "cuda", "mps")]
    assert [(t.device.type, t.dtype) for t in found] == [
        ("cpu", torch.float64),
        ("cuda", torch.float64),
        ("cpu", torch.float64),
    ]
