"""Chains saved with torch.export run for any batch size, where this package is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import resnet_paths as rp
from tests.chains import Plan, inputs, random_model

LOAD = """
import sys
sys.modules["resnet_paths"] = None  # an import of it is an error
import torch
given, expected = torch.load("numbers.pt", weights_only=True)
found = torch.export.load("lesioned.pt2").module()(given)
assert torch.equal(found, expected), (found, expected)
"""


def saved(folder):
    """A lesioned chain as the README saves it, with inputs of another batch size and what it returns for them."""
    chain = rp.unravel(random_model((3, tuple(Plan(3, "identity", True, False) for _ in range(3)))), inputs(4))
    lesioned = rp.delete_block(chain, 1)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(lesioned, (inputs(4),), dynamic_shapes=(({0: batch},),))
    torch.export.save(program, folder / "lesioned.pt2")
    given = inputs(7)
    torch.save((given, lesioned(given).detach()), folder / "numbers.pt")
    return given, lesioned(given)


def test_a_lesioned_chain_is_loaded_as_it_was(tmp_path):
    given, expected = saved(tmp_path)
    torch.testing.assert_close(torch.export.load(tmp_path / "lesioned.pt2").module()(given), expected)


@pytest.mark.slow
def test_it_is_loaded_without_the_package(tmp_path):
    saved(tmp_path)
    subprocess.run([sys.executable, "-I", "-c", LOAD], cwd=tmp_path, check=True, timeout=120)
