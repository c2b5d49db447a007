"""No instrument of predictions assumes the CPU."""

from __future__ import annotations

import copy
import functools

import pandas as pd
import pytest
import torch

import resnet_paths as rp
from tests.gradients.gradient_reference import Elsewhere, OtherDevice
from tests.predictions.plain_networks import made

STUDIES = [
    functools.partial(rp.lens, max_length=None),
    rp.direct_effects,
    rp.effect_matrix,
    rp.deletion_account,
    functools.partial(rp.prediction_by_path_length, by_source=True),
]


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_nothing_assumes_the_cpu(name, monkeypatch):
    make = torch.tensor
    # torch.tensor makes nothing but a shape on "meta".
    monkeypatch.setattr(torch, "tensor", lambda data, device="cpu", **o: make(data, **o).to(device))
    _, chain, inputs = made(name)
    expected = [study(chain, inputs) for study in STUDIES]
    chain = copy.deepcopy(chain)
    for module in chain.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({key: Elsewhere(t.detach()) for key, t in tensors.items() if t is not None})
    with OtherDevice():
        for study, frame in zip(STUDIES, expected, strict=True):
            pd.testing.assert_frame_equal(study(chain, Elsewhere(inputs)), frame, rtol=1e-9, atol=1e-12)
