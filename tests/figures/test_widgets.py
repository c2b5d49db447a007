"""Explorers without a browser: what they say is what the library says, and a control changes words and picture."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.gradients import scalar_gradients
from tests.chains import Plan, random_chain
from tests.lesions.test_lesions import STEADY, labelled
from tests.predictions.plain_networks import made


class Explorer:
    """What a reader sees and touches."""

    def __init__(self, box):
        panel, self.words, self.picture = box.children
        self.controls = {control.description: control for control in panel.children}

    @property
    def text(self):
        return re.sub("<[^>]+>", "", self.words.value)

    def set(self, name, value):
        """Move a control; whether the words and the picture changed."""
        before = self.words.value, bytes(self.picture.value)
        self.controls[name].value = value
        assert bytes(self.picture.value).startswith(b"\x89PNG")
        return before[0] != self.words.value, before[1] != bytes(self.picture.value)


@pytest.fixture(scope="module")
def loader():
    return labelled()


def test_the_highway_says_both_products():
    explorer = Explorer(rp.widgets.explore_gradient_highway(depth=5, weight=2.0))
    assert explorer.set("depth", 8) == (True, True)
    assert explorer.set("activation", "relu") == (True, True)
    assert explorer.set("weight", 0.5) == (True, True)
    ends = scalar_gradients([0.5] * 8, "relu").groupby("network").gradient.last()
    assert explorer.text == (
        f"Through 8 layers the product of F' is {ends.plain:.3g}, the product of 1 + F' is {ends.residual:.3g}."
    )


def test_scaling_a_branch_gives_the_error_of_the_lesion_study(loader):
    chain = random_chain(STEADY)
    explorer = Explorer(rp.widgets.explore_blocks(chain, loader))
    assert explorer.set("block", 2) == (True, True)
    assert explorer.set("factor", 2.0)[1]
    row = rp.lesion_study(chain, loader, [lambda c: rp.scale_block(c, 2, 2.0)], progress=False).iloc[0]
    sizes = rp.block_norms(chain, loader).iloc[2]
    assert explorer.text.startswith(f"block2: |x| = {sizes.input_norm:.3g}, |F(x)| = {sizes.branch_norm:.3g}")
    assert f"With 2.0 F(x): test error {row.error_rate:.1%} (intact {row.intact_error_rate:.1%}; 37" in explorer.text


def test_pressing_a_button_deletes_and_pressing_it_again_restores(loader):
    chain = random_chain(STEADY)
    explorer = Explorer(rp.widgets.explore_lesions(chain, loader))
    intact = explorer.text
    assert "Deleted: none (0 of 6). 64 of 64 paths remain." in intact
    assert explorer.set("block1", True) == (True, True)
    assert explorer.controls["block1"].icon == "check"
    explorer.set("block4", True)
    row = rp.lesion_study(chain, loader, [lambda c: rp.delete_blocks(c, [1, 4])], progress=False).iloc[0]
    assert "Deleted: block1, block4 (2 of 6). 16 of 64 paths remain." in explorer.text
    assert f"Test error {row.error_rate:.1%}" in explorer.text
    explorer.set("block4", False)
    explorer.set("block1", False)
    assert (explorer.text, explorer.controls["block1"].icon) == (intact, "")


def test_a_block_that_cannot_be_deleted_has_no_button(loader):
    chain = random_chain((2, (Plan(2, "identity", False, False), Plan(3, "none", False, False))))
    assert list(Explorer(rp.widgets.explore_lesions(chain, loader)).controls) == ["block0"]


def test_the_path_explorer_counts_paths_of_one_length():
    explorer = Explorer(rp.widgets.explore_paths(3))
    assert explorer.text.startswith("This path takes no branch: length 0. 1 of the 8 paths have")
    assert explorer.set("f1", True) == (True, True)
    assert explorer.set("f3", True) == (True, True)
    assert explorer.text == "This path takes f1 and f3: length 2. 3 of the 8 paths have this length (37.5%)."
    explorer.set("blocks", 2)
    assert explorer.text.startswith("This path takes f1: length 1. 2 of the 4 paths")
    assert explorer.controls["f3"].disabled
    assert not explorer.controls["f2"].disabled


def test_the_prediction_explorer_says_the_account_of_a_deletion():
    _, chain, images = made("resnet")
    explorer = Explorer(rp.widgets.explore_prediction(chain, images))
    frame = rp.prediction_by_path_length(chain, images[:1], by_source=True, linearization="detached")
    margin, of_stem = frame.attrs["mean_output"], frame[frame.source == "stem"].contribution.sum()
    assert explorer.text == f"The margin of image 0 is {margin:.3g}, of which {of_stem:.3g} starts at the stem."
    assert explorer.set("image", 2) == (True, True)
    lesion = rp.single_deletions(chain)[1]
    assert explorer.set("deletion", lesion.name) == (True, True)
    margin = rp.direct_effects(chain, images[2:3]).attrs["mean_output"]
    row = rp.deletion_account(chain, images[2:3], [lesion]).iloc[0]
    with torch.no_grad():
        chosen, other = chain(images[2:3])[0].topk(2).indices
        logits = rp.delete_block(chain, 1)(images[2:3])[0]
    assert row.total_effect == pytest.approx((logits[chosen] - logits[other]).item() - margin)
    assert f"Without {chain[1].name} it is {margin + row.total_effect:.3g}: {-row.direct_effect:+.3g}" in explorer.text


def test_bad_input_is_refused(loader):
    with pytest.raises(rp.ResnetPathsError, match=r"images: got \[2, 3\]"):
        rp.widgets.explore_prediction(random_chain(STEADY), torch.zeros(2, 3))
    with pytest.raises(rp.ResnetPathsError, match="num_blocks: got 6; allowed: an int from 1 to 5"):
        rp.widgets.explore_paths(6)
    with pytest.raises(rp.ResnetPathsError, match="depth: got 0; allowed: an int from 1 to 100"):
        rp.widgets.explore_gradient_highway(depth=0)
    with pytest.raises(rp.ResnetPathsError, match="activation: got 'tanh'"):
        rp.widgets.explore_gradient_highway(activation="tanh")
    chain = random_chain((2, (Plan(2, "identity", False, False),)))
    with pytest.raises(rp.ResnetPathsError, match="without a branch"):
        rp.widgets.explore_blocks(rp.delete_block(chain, 0), loader)
    for explore in (rp.widgets.explore_blocks, rp.widgets.explore_lesions):
        with pytest.raises(rp.ResnetPathsError, match="chain: got 'Linear'"):
            explore(nn.Linear(2, 2), [(torch.zeros(1, 2), torch.zeros(1))])
