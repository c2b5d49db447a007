"""Settings of the process that several threads change at once."""

from __future__ import annotations

import contextlib
import itertools
import warnings

import pytest
import torch

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.threads import (
    SharedContext,
    ignoring_warnings,
    refuse_fork_after_autograd,
    requiring_gradients,
)

# Each order in which three contexts can be entered and left: as many threads do it.
ORDERS = sorted(set(itertools.permutations([0, 0, 1, 1, 2, 2])))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_first_changes_and_the_last_restores(order):
    setting = ["its own"]

    @contextlib.contextmanager
    def changed():
        before = setting[0]
        setting[0] = "changed"
        yield
        setting[0] = before

    shared, inside = SharedContext(changed), set()
    for number in order:
        if number in inside:
            shared.__exit__(None, None, None)
        else:
            shared.__enter__()
        inside ^= {number}
        assert setting == (["changed"] if inside else ["its own"])


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_frozen_tensors_are_frozen_again_by_the_last(order):
    frozen, free = torch.ones(1), torch.ones(1, requires_grad=True)
    contexts, inside = [requiring_gradients([frozen, free]) for _ in range(3)], set()
    for number in order:
        if number in inside:
            contexts[number].__exit__(None, None, None)
        else:
            contexts[number].__enter__()
        inside ^= {number}
        assert frozen.requires_grad == bool(inside)
        assert free.requires_grad


def test_only_its_own_filter_of_warnings_is_removed():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ignoring = ignoring_warnings("slow")
        with ignoring:
            warnings.warn("slow operation", stacklevel=1)
            warnings.filterwarnings("ignore", "of another thread")
        warnings.warn("slow operation", stacklevel=1)
        warnings.warn("of another thread", stacklevel=1)
    assert [str(w.message) for w in seen] == ["slow operation"]


def test_a_filter_that_others_removed_is_no_error():
    with warnings.catch_warnings(), ignoring_warnings("slow"):
        warnings.resetwarnings()


def test_a_fork_in_which_autograd_does_not_run_is_one_clear_error(monkeypatch):
    refuse_fork_after_autograd()  # not one

    def refuses(*args, **kwargs):
        raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing.")

    monkeypatch.setattr(torch.autograd, "grad", refuses)
    with pytest.raises(ResnetPathsError, match=r"process: got 'a fork .* autograd.*; allowed: .*'spawn'") as caught:
        refuse_fork_after_autograd()
    assert "fork-based" in str(caught.value.__cause__)
