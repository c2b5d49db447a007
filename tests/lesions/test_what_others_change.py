"""Lesion functions, loaders and losses written by others: what they change or raise reaches no row without a word."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import ResidualChain
from tests.chains import assert_same, inputs, random_chain, snapshot
from tests.lesions.killed_studies import counts
from tests.lesions.test_lesion_options import study
from tests.lesions.test_lesions import STEADY, labelled
from tests.project.test_interrupts import CALLS as INSTRUMENTS

same = pd.testing.assert_frame_equal


def without_grad(change):
    def lesion(chain):
        with torch.no_grad():
            change(chain)
        return rp.delete_block(chain, 0)

    return lesion


def drops_a_block(chain):
    del chain.blocks[2]


STRUCTURE = {
    "branch": lambda c: setattr(c[0], "branch", None),
    "branch by the list": lambda c: setattr(c.blocks[0], "branch", None),
    "skip": lambda c: setattr(c[1], "skip", nn.Linear(3, 3).double()),
    "post": lambda c: setattr(c[1], "post", nn.Tanh()),
    "drops a block": drops_a_block,
    "another block": lambda c: c.blocks.__setitem__(0, c[1]),
    "appends": lambda c: c.blocks.append(c[0]),
    "order": lambda c: setattr(c, "blocks", nn.ModuleList(list(c)[::-1])),
    "head": lambda c: setattr(c, "head", nn.Identity()),
    "inside a branch": lambda c: c[0].branch.__setitem__(1, nn.ReLU()),
    "parameter": lambda c: setattr(c[0].branch[0], "weight", nn.Parameter(torch.zeros(4, 3).double())),
    "hook": lambda c: c[0].register_forward_hook(lambda module, args, output: 0 * output),
    "pre-hook": lambda c: c[0].branch.register_forward_pre_hook(lambda module, args: (0 * args[0],)),
    "name": lambda c: setattr(c[0], "name", "other"),
    "mode": lambda c: c.train(),
}
NUMBERS = {
    "zeroed": lambda c: c[0].branch[0].weight.zero_(),
    "zeroed data": lambda c: c[0].branch[0].weight.data.zero_(),
    "sign": lambda c: c[0].branch[2].weight.data.neg_(),
    "one number": lambda c: c.head.bias[1].add_(1e-9),
    "initialised": lambda c: nn.init.normal_(c.stem.weight),
    "converted": lambda c: c.float(),
}


@pytest.mark.parametrize("change", STRUCTURE)
def test_a_function_that_changes_the_chain_is_named_and_the_chain_restored(change):
    chain = random_chain(STEADY)
    before, x = snapshot(chain), inputs()
    expected, names = chain(x), [b.name for b in chain]
    lesion = without_grad(STRUCTURE[change])
    with pytest.raises(rp.ResnetPathsError, match=r"lesions: got 'lesion'; allowed: functions that return another"):
        study(chain, labelled(8), [lambda c: rp.delete_block(c, 1), lesion])
    assert_same(before, snapshot(chain))
    assert torch.equal(chain(x), expected)
    assert [b.name for b in chain] == names


@pytest.mark.parametrize("change", NUMBERS)
def test_a_function_that_writes_over_weights_is_named(change):
    chain = random_chain(STEADY)
    with pytest.raises(rp.ResnetPathsError, match=r"lesions: got 'lesion'; .*It wrote over '.*(weight|bias)'"):
        study(chain, labelled(8), [without_grad(NUMBERS[change])])


def test_a_function_that_raises_is_named_and_keeps_the_cause():
    def broken(chain):
        raise KeyError("conv3")

    with pytest.raises(rp.ResnetPathsError, match=r"lesions: got 'broken'; .* It raised KeyError: 'conv3'") as caught:
        study(random_chain(STEADY), labelled(8), [broken])
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_measure_that_raises_is_named_and_keeps_the_cause():
    def broken(outputs, labels):
        return outputs.logits

    with pytest.raises(rp.ResnetPathsError, match=r"measures: got 'broken'; .* It raised AttributeError") as caught:
        study(random_chain(STEADY), labelled(8), measures=[broken])
    assert isinstance(caught.value.__cause__, AttributeError)


# Loaders


def reusing(loader):
    """The same batches, in the same two tensors each time."""
    held = [torch.empty_like(t) for t in next(iter(loader))]
    for batch in loader:
        for tensor, new in zip(held, batch, strict=True):
            tensor.copy_(new)
        yield held[0], held[1]


@pytest.mark.parametrize("options", [{}, {"store": True}, {"per_class": True}])
@pytest.mark.parametrize("with_threads", [False, True])
def test_a_loader_may_use_its_tensors_again(with_threads, options, tmp_path):
    chain, loader = random_chain(STEADY), labelled(40, batch_size=4)
    if "store" in options:
        options = {"store": tmp_path}
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        executor = threads if with_threads else None
        found = study(chain, reusing(loader), executor=executor, **options)
        expected = study(chain, loader, per_class="per_class" in options)
        same(found, expected)
        if "store" in options:
            again = study(chain, loader, **options)
            assert counts(again) == (0, 10)
            same(again, expected)


def test_statistics_are_taken_from_all_batches_of_a_loader_that_uses_its_tensors_again():
    from tests.lesions.test_lesion_options import norm_chain

    chain, loader = norm_chain(), labelled(16)
    expected = study(chain, loader, reestimate_batchnorm=list(loader))
    same(study(chain, loader, reestimate_batchnorm=reusing(loader)), expected)


@pytest.mark.parametrize("with_threads", [False, True])
def test_a_loader_that_raises_names_the_batch_and_what_was_handed_out_is_kept(with_threads, tmp_path):
    chain, batches = random_chain(STEADY), list(labelled(40, batch_size=4))

    def broken():
        yield from batches[:5]
        raise OSError("no such image")

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        executor = threads if with_threads else None
        message = r"loader: got 'OSError at batch 5: no such image'; .* those before it are kept"
        with pytest.raises(rp.ResnetPathsError, match=message) as caught:
            study(chain, broken(), store=tmp_path, executor=executor)
    assert isinstance(caught.value.__cause__, OSError)
    assert counts(study(chain, batches, store=tmp_path)) == (5, 5)


# Losses and targets of gradients

GRADIENTS = (
    rp.gradient_by_path_length,
    rp.gradient_by_depth,
    rp.gradient_by_stage_lengths,
    rp.gradient_through_block,
)
WRONG_LOSSES = {
    "raises": (lambda outputs, targets: outputs.nothing, "It raised AttributeError"),
    "constant": (lambda outputs, targets: torch.zeros(4), "does not depend on the outputs"),
    "detached": (lambda outputs, targets: outputs.detach().sum(1), "does not depend on the outputs"),
    "not finite": (lambda outputs, targets: outputs.sum(1) / 0, "a finite loss for every example"),
}
WRONG_DATA = {
    "ignored label": (inputs(4), torch.tensor([0, -100, 1, 2]), "Leave out examples that a negative label"),
    "image of NaN": (inputs(4) * torch.tensor([[1], [torch.nan], [1], [1]]), torch.zeros(4).long(), "all finite"),
    "label beyond": (inputs(4), torch.tensor([0, 1, 2, 3]), "class indices from 0 to 2"),
    "complex labels": (inputs(4), torch.zeros(4, dtype=torch.complex64), "what cross-entropy takes"),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", WRONG_LOSSES)
def test_a_loss_without_gradient_or_that_raises_is_refused(kind, gradient):
    loss, message = WRONG_LOSSES[kind]
    with pytest.raises(rp.ResnetPathsError, match=f"loss: got .*{message}"):
        gradient(random_chain(STEADY), inputs(4), loss=loss)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", WRONG_DATA)
def test_examples_that_would_count_as_zeros_are_refused(kind, gradient):
    x, y, message = WRONG_DATA[kind]
    with pytest.raises(rp.ResnetPathsError, match=message):
        gradient(random_chain(STEADY), x, y)


# Forks

FORK = """
import concurrent.futures, multiprocessing, torch
import resnet_paths as rp
from torch import nn
from resnet_paths.core.chain import Block, ResidualChain

torch.set_num_threads(2)
stem, head = nn.Conv2d(1, 16, 3, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(16 * 784, 10))
blocks = [Block(nn.Conv2d(16, 16, 3, padding=1), nn.Identity(), name=f"b{i}") for i in range(2)]
chain = ResidualChain(stem, blocks, head).eval()
loader = [(torch.randn(64, 1, 28, 28), torch.zeros(64, dtype=torch.int64))] * 2
plain = rp.lesion_study(chain, loader, rp.single_deletions(chain), progress=False)
with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as executor:
    frame = rp.lesion_study(chain, loader, rp.single_deletions(chain), executor=executor, progress=False)
assert torch.allclose(*(torch.tensor(f.cross_entropy.tolist()) for f in (plain, frame)), rtol=1e-6)
assert torch.get_num_threads() == 2
print("the same")
"""


@pytest.mark.slow
def test_forks_of_a_process_whose_threads_have_run_do_not_hang():
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", FORK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "the same\n", done.stderr


# Memory


def held():
    """Tensors that are alive, and the memory that Python's own objects take."""
    gc.collect()
    alive = sum(1 for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
    return alive, len(gc.get_objects())


REPEATED = {
    "lesion_study": lambda c, x, y: study(c, [(x, y)], rp.single_deletions(c)[:2]),
    "lesion_study of functions": lambda c, x, y: study(c, [(x, y)], [lambda c: rp.delete_block(c, 0)]),
    "predicted_effects": lambda c, x, y: rp.predicted_effects(c, [(x, y)], progress=False),
    "gradient_by_path_length": lambda c, x, y: rp.gradient_by_path_length(c, x, y),
    "prediction_by_path_length": lambda c, x, y: rp.prediction_by_path_length(c, x),
    "block_norms": lambda c, x, y: rp.block_norms(c, x),
    "run_with_cache": lambda c, x, y: c.run_with_cache(x),
    "sample_paths": lambda c, x, y: rp.sample_paths(c, 2, 2, torch.Generator()),
}


@pytest.mark.parametrize("call", REPEATED)
def test_repeated_calls_hold_no_more_than_a_few(call):
    chain, x, y = random_chain((3, STEADY[1][:3])), inputs(2), torch.zeros(2, dtype=torch.int64)
    for _ in range(2):
        REPEATED[call](chain, x, y)
    before = held()
    for _ in range(8):
        REPEATED[call](chain, x, y)
    tensors, objects = held()
    assert tensors == before[0]
    assert objects - before[1] < 8  # not one object a call


MANY = REPEATED | {
    name: lambda c, x, y, call=call: call(c, [(x, y)]) for name, call in INSTRUMENTS.items() if name not in REPEATED
}


# Parts written by hand are traced at each call; torch.fx keeps six small objects of each trace, in linecache.
TRACED = ("direct_effects", "effect_matrix", "deletion_account")


def resident():
    """MiB of memory of this process; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if statm.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("call", MANY)
def test_two_hundred_calls_hold_no_more_than_a_few(call):
    chain, x, y = random_chain((3, STEADY[1][:2])), inputs(1), torch.zeros(1, dtype=torch.int64)
    for _ in range(20):
        MANY[call](chain, x, y)
    before, size = held(), resident()
    for _ in range(200):
        MANY[call](chain, x, y)
    tensors, objects = held()
    assert tensors == before[0]
    assert objects - before[1] < 20 + 200 * 6 * (call in TRACED)
    assert resident() - size < 8


# Weights replaced after a chain was made


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 3)

    def forward(self, x):
        return x + self.linear(self.norm(x)).relu()


def model():
    return nn.Sequential(nn.Linear(5, 3), Block(), Block(), nn.Linear(3, 3)).eval()


def assigned(m):
    m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True)


REPLACED = {
    "assign": assigned,
    "parameter": lambda m: setattr(m[1].linear, "weight", nn.Parameter(torch.zeros(3, 3))),
    "no bias": lambda m: setattr(m[1].linear, "bias", None),
    "buffer": lambda m: setattr(m[2].norm, "running_mean", torch.ones(3)),
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "parametrized": lambda m: nn.utils.parametrizations.weight_norm(m[1].linear),
    "meta": lambda m: m.to("meta"),
}
CALLS = {
    "forward": lambda c, x: c(x),
    "of an edit": lambda c, x: c.with_head(c.head)(x),
    "cache": lambda c, x: c.run_with_cache(x),
    "edit": lambda c, x: rp.delete_block(c, 0),
    "study": lambda c, x: study(c, [(x, torch.zeros(2, dtype=torch.int64))]),
    "gradient": lambda c, x: rp.gradient_by_path_length(c, x, torch.zeros(2, dtype=torch.int64)),
    "prediction": lambda c, x: rp.prediction_by_path_length(c, x),
}


@pytest.mark.parametrize("replace", REPLACED)
def test_a_chain_notices_that_its_model_has_other_tensors(replace):
    read, x = model(), torch.zeros(2, 5)
    chain = rp.unravel(read, x)
    edited = rp.delete_block(chain, 0)
    REPLACED[replace](read)
    for one in (chain, edited):
        for call in CALLS.values():
            with pytest.raises(rp.ResnetPathsError, match=r"tensor '.*' was replaced.*Unravel the model again"):
                call(one, x)
    if replace != "meta":
        assert len(rp.unravel(read, x.to(read[0].weight.dtype), verify=False)) == 2


def test_what_is_written_into_the_tensors_of_a_model_reaches_its_chain():
    read, x = model(), torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    chain = rp.unravel(read, x)
    read.load_state_dict(model().state_dict())
    optimizer = torch.optim.SGD(read.parameters(), lr=0.1)
    read(x).sum().backward()
    optimizer.step()
    assert torch.equal(chain(x), read(x))
    moved = rp.unravel(read, x).double()  # the chain itself, by intent
    assert moved(x.double()).dtype == torch.float64


def test_a_copy_a_chain_by_hand_and_one_whose_model_is_gone_stand_alone():
    import copy
    import pickle

    read, x = model(), torch.zeros(2, 5)
    chain = rp.unravel(read, x)
    expected, copied, sent = chain(x), copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))
    assigned(read)
    for one in (copied, sent):
        assert torch.equal(one(x), expected)
    chain = rp.unravel(read, x)
    del read
    assert torch.equal(chain(x), expected)
    by_hand = ResidualChain(chain.stem, chain, chain.head).eval()
    assert torch.equal(by_hand(x), expected)
