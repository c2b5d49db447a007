"""What the documentation and the notebooks say of the shipped networks, measured again."""

from __future__ import annotations

import itertools

import networkx as nx
import pytest
import torch
from torch.utils.data import DataLoader, Subset

import resnet_paths as rp

NUM_IMAGES = 1_000


@pytest.fixture(scope="module")
def images():
    return rp.load_dataset("fashion-mnist")


def study(name, images):
    chain = rp.unravel(rp.load_network(name), images[0][0][None])
    loader = DataLoader(Subset(images, range(NUM_IMAGES)), batch_size=250)
    frame = rp.lesion_study(chain, loader, rp.single_deletions(chain), progress=False)
    index = frame.blocks.str[0]
    return frame.assign(block_index=index, changes_shape=[not chain[i].keeps_shape for i in index])


@pytest.mark.parametrize(("name", "num_blocks"), [("preact-resnet-20", 9), ("preact-resnet-56", 27), ("plain-20", 9)])
def test_shipped_networks_unravel(name, num_blocks, images):
    model = rp.load_network(name)
    x = torch.stack([images[i][0] for i in range(8)])
    chain = rp.unravel(model, x[:2])
    assert len(chain) == num_blocks
    assert chain.num_paths == (1 if name.startswith("plain") else 2**num_blocks)
    with torch.inference_mode():
        assert torch.equal(chain(x), model(x))


def test_every_path_of_the_trained_nine_block_network_runs_alone_and_is_a_route(images):
    chain = rp.unravel(rp.load_network("preact-resnet-20"), images[0][0][None])
    x = torch.stack([images[i][0] for i in range(2)])
    with torch.inference_mode():
        outputs = [rp.path_network(chain, path)(x) for path in rp.enumerate_paths(chain)]
    assert len(outputs) == 512
    assert torch.isfinite(torch.stack(outputs)).all()
    graph = rp.unraveled_graph(chain)
    routes = [
        tuple(graph.edges[edge]["choice"] for edge in itertools.pairwise(nodes))[1:]
        for nodes in nx.all_simple_paths(graph, "input", "output")
    ]
    assert sorted(routes) == sorted(rp.enumerate_paths(chain))


def inner_mask(frame):
    """Neither the first block nor one that opens a stage."""
    return (frame.block_index > 0) & ~frame.changes_shape


@pytest.mark.slow
def test_no_inner_block_matters_to_the_resnet_as_every_block_does_to_the_plain_net(images):
    """The claims of notebook 02, on half of its images."""
    resnet, plain = study("preact-resnet-56", images), study("plain-20", images)
    inner = resnet[inner_mask(resnet)].error_rate_increase
    assert len(inner) == 24
    assert inner.median() < 0.01
    assert resnet[inner_mask(resnet) & (resnet.error_rate_increase > 0.06)].lesion.tolist() == [
        "delete layer3.1",
        "delete layer3.2",
    ]
    assert plain.block_index.tolist() == [0, 1, 2, 4, 5, 7, 8]
    assert (plain.error_rate > 0.7).sum() >= 6
    assert plain.error_rate_increase.min() > inner.max()
