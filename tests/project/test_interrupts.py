"""Every long call, stopped by hand in the middle or run by four threads at once: the chain and the numbers stay."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pandas as pd
import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import ResidualChain
from tests.chains import Plan, assert_same, inputs, random_chain, random_model, snapshot

PLAN = (3, tuple(Plan(3, "identity", False, False) for _ in range(4)))
X, Y = inputs(8), torch.arange(8) % 3
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]
QUIET = {"progress": False}


def drawn(**options):
    return QUIET | options | {"generator": torch.Generator().manual_seed(0)}


CALLS = {
    "block_norms": lambda chain, loader: rp.block_norms(chain, loader),
    "deletion_account": lambda chain, loader: rp.deletion_account(chain, loader, **drawn()),
    "direct_effects": lambda chain, loader: rp.direct_effects(chain, loader, **drawn()),
    "effect_matrix": lambda chain, loader: rp.effect_matrix(chain, loader, **QUIET),
    "gradient_by_depth": lambda chain, loader: rp.gradient_by_depth(chain, loader, **QUIET),
    "gradient_by_path_length": lambda chain, loader: rp.gradient_by_path_length(chain, loader, **QUIET),
    "gradient_by_path_length, sampled": lambda chain, loader: rp.gradient_by_path_length(
        chain, loader, **drawn(method="sampled", num_draws=20)
    ),
    "gradient_by_stage_lengths": lambda chain, loader: rp.gradient_by_stage_lengths(chain, loader, **QUIET),
    "gradient_by_path_length of weights": lambda chain, loader: rp.gradient_by_path_length(
        chain, loader, with_respect_to=("parameters", "block1"), **QUIET
    ),
    "gradient_through_block": lambda chain, loader: rp.gradient_through_block(chain, loader, **QUIET),
    "iterative_inference": lambda chain, loader: rp.iterative_inference(chain, loader, **QUIET),
    "jacobian_svd": lambda chain, loader: rp.jacobian_svd(chain, loader, rank=1, tolerance=0, **QUIET).to_frame(),
    "lens": lambda chain, loader: rp.lens(chain, loader, **QUIET),
    "lesion_study": lambda chain, loader: rp.lesion_study(chain, loader, rp.single_deletions(chain), **QUIET),
    "path_length_moments": lambda chain, loader: pd.DataFrame([vars(rp.path_length_moments(chain, loader, **QUIET))]),
    "predicted_effects": lambda chain, loader: rp.predicted_effects(chain, loader, **QUIET),
    "prediction_by_path_length": lambda chain, loader: rp.prediction_by_path_length(chain, loader, **QUIET),
    "prediction_path_length_moments": lambda chain, loader: pd.DataFrame([
        vars(rp.prediction_path_length_moments(chain, loader, **QUIET))
    ]),
    "subset_values": lambda chain, loader: rp.subset_values(chain, loader, **QUIET).drop(columns="influences"),
}


@pytest.fixture(scope="module")
def alone():
    """What each call returns when nothing else runs."""
    return {name: call(random_chain(PLAN), BATCHES) for name, call in CALLS.items()}


def same(frame, expected):
    pd.testing.assert_frame_equal(frame, expected, rtol=1e-12, atol=1e-12)


def stopping():
    """One batch, and then somebody presses Ctrl-C."""
    yield BATCHES[0]
    raise KeyboardInterrupt


class Pressed(nn.Module):
    """A part during which Ctrl-C is pressed once, in the second batch."""

    def __init__(self, part):
        super().__init__()
        self.part, self.armed = part, False

    def forward(self, x):
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt
        return self.part(x)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("trained", [False, True])
def test_ctrl_c_leaves_the_chain_and_the_modes_as_they_were(trained, name, alone):
    """Also where some parts that do not depend on it are in training mode, and some weights take no gradient."""
    chain = random_chain(PLAN)
    pressed = Pressed(chain[2].branch)
    blocks = [block.replace(branch=pressed) if block is chain[2] else block for block in chain]
    chain = ResidualChain(chain.stem, blocks, chain.head).eval()
    if trained:
        pressed.train()
        next(chain.parameters()).requires_grad_(False)

    def arming():
        for number, batch in enumerate(BATCHES):
            pressed.armed = number == 1
            yield batch

    before = snapshot(chain)
    for loader in (stopping(), arming()):
        with pytest.raises(KeyboardInterrupt):
            CALLS[name](chain, loader)
        assert_same(before, snapshot(chain))
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not pressed.armed
    same(CALLS[name](chain, BATCHES), alone[name])


@pytest.mark.parametrize("name", ["effect_matrix", "gradient_by_depth", "gradient_by_stage_lengths"])
def test_bars_state_batches_and_examples(name, capsys):
    arguments = [random_chain(PLAN), iter([(X[:4], Y[:4]), (X[4:7], Y[4:7]), (X[7:], Y[7:])])]
    getattr(rp, name)(*arguments)
    bar = capsys.readouterr().err
    assert "3batch" in bar
    assert "8 examples" in bar


# Threads


class Attending(nn.Module):
    """A branch with attention and a normalisation: fused kernels, and graphs that are traced while the call runs."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(3), nn.Linear(3, 3)

    def forward(self, x):
        tokens = self.norm(x)[:, None, :, None]
        return self.mix(nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0, :, 0])


def attending_chain():
    chain = random_chain(PLAN)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        branch = Attending().double().eval()
    blocks = [block.replace(branch=branch) if block is chain[2] else block for block in chain]
    chain = ResidualChain(chain.stem, blocks, chain.head).eval()
    chain[1].branch[0].requires_grad_(False)
    return chain


def state_of_process():
    """What torch and Python keep for all threads, and a call might leave changed."""
    return {
        "module": (nn.Module.__call__, nn.Module.__getattr__),
        "kernels": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        "transforms": torch._C._functorch.maybe_current_level(),
        "streams": (sys.stdout, sys.stderr),
    }


@pytest.fixture
def switching():
    """Threads take turns fifty times as often, so that each is stopped in the middle of whatever it does."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def alone_with_attention():
    return {name: call(attending_chain(), BATCHES) for name, call in CALLS.items()}


@pytest.mark.parametrize(
    "calls", [[name] for name in CALLS] + [list(CALLS)[i::4] for i in range(4)], ids=lambda calls: " + ".join(calls)
)
def test_four_threads_on_one_chain_get_the_numbers_of_one(calls, alone_with_attention, switching):
    chain, together = attending_chain(), threading.Barrier(4)  # a new one, for which nothing is in any cache
    before, process, outputs = snapshot(chain), state_of_process(), chain(X).detach()

    def run(number):
        name = calls[number % len(calls)]
        together.wait(30)
        same(CALLS[name](chain, BATCHES), alone_with_attention[name])
        assert torch.allclose(chain(X), outputs, rtol=1e-12, atol=1e-12)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(run, range(4)))
    assert_same(before, snapshot(chain))
    assert state_of_process() == process


def test_models_are_unraveled_by_four_threads_at_once(switching):
    model, process = random_model(PLAN), state_of_process()

    def run(_):
        return rp.unravel(model, X)(X)

    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(run, range(4)))
    assert all(torch.equal(output, model(X)) for output in outputs)
    assert state_of_process() == process


# Forks


def call_of_fork(name):
    try:
        return CALLS[name](random_chain(PLAN), BATCHES)
    except Exception as error:
        return error


@pytest.fixture(scope="module")
def forked():
    """What the calls return or raise in a fork of a process in which autograd has run."""
    leaf = torch.ones(1, requires_grad=True)
    torch.autograd.grad(leaf * leaf, leaf)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return dict(zip(CALLS, pool.map(call_of_fork, CALLS), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_calls_in_a_fork_are_right_or_say_why_not(name, forked, alone):
    """Without an accelerator autograd runs in forks; with one it does not, and blocks are only run forward."""
    found = forked[name]
    if isinstance(found, rp.ResnetPathsError) and name not in {"block_norms", "lesion_study"}:
        assert "process: got 'a fork" in str(found)
    else:
        same(found, alone[name])
