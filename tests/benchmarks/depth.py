"""Time and memory of public functions on deep chains: ``python -m tests.benchmarks.depth [BLOCKS ...]``.

A Markdown table of process CPU time and of the growth of the process's memory, each call in a fork of its own. Blocks
are linear maps of four numbers, two examples: what is measured is what grows with the number of blocks. Functions
that take n(n + 1) / 2 steps for n blocks, and studies of n lesions, are left out above 1,000 blocks.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain

WIDTH = 4
FEW = 1_000


@functools.cache
def deep_chain(num_blocks: int) -> ResidualChain:
    """A chain of linear blocks in float64, whose branches are small so that nothing overflows."""
    shape = {"in_shape": (WIDTH,), "out_shape": (WIDTH,)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = [Block(nn.Linear(WIDTH, WIDTH), nn.Identity(), name=f"block{i}", **shape) for i in range(num_blocks)]
        chain = ResidualChain(nn.Identity(), blocks, nn.Identity()).double().eval()
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter /= num_blocks
    return chain


X = torch.ones(2, WIDTH, dtype=torch.float64)
Y = torch.zeros(2, dtype=torch.int64)
LOADER = [(X, Y)]
Call = Callable[[ResidualChain, int], object]

LINEAR: dict[str, Call] = {
    "chain(x)": lambda c, n: c(X),
    "chain.run_with_cache": lambda c, n: c.run_with_cache(X),
    "chain.summary": lambda c, n: c.summary(),
    "chain.num_paths": lambda c, n: c.num_paths,
    "path_histogram": lambda c, n: rp.path_histogram(c),
    "enumerate_paths, the first": lambda c, n: next(rp.enumerate_paths(c, n // 2)),
    "sample_paths, 100": lambda c, n: rp.sample_paths(c, n // 2, 100, torch.Generator()),
    "delete_blocks, all": lambda c, n: rp.delete_blocks(c, range(n)),
    "scale_block": lambda c, n: rp.scale_block(c, 0, 2.0),
    "duplicate_block": lambda c, n: rp.duplicate_block(c, 0),
    "swap_blocks": lambda c, n: rp.swap_blocks(c, 0, n - 1),
    "permute_blocks": lambda c, n: rp.permute_blocks(c, list(range(n))[::-1]),
    "reverse_blocks": lambda c, n: rp.reverse_blocks(c, 0),
    "parallel_blocks": lambda c, n: rp.parallel_blocks(c, range(n)),
    "path_network": lambda c, n: rp.path_network(c, [True] * n),
    "block_norms": lambda c, n: rp.block_norms(c, X),
    "random_deletions, 20": lambda c, n: rp.random_deletions(c, [n // 2], 20, torch.Generator()),
    "lesion_study, 20 random deletions": lambda c, n: rp.lesion_study(
        c, LOADER, rp.random_deletions(c, [n // 2], 20, torch.Generator()), progress=False
    ),
    "gradient_by_depth": lambda c, n: rp.gradient_by_depth(c, X, Y),
    "gradient_by_path_length, up to 20": lambda c, n: rp.gradient_by_path_length(c, X, Y, max_length=min(20, n)),
}
QUADRATIC: dict[str, Call] = {
    "single_deletions": lambda c, n: rp.single_deletions(c),
    "lesion_study, all single deletions": lambda c, n: rp.lesion_study(
        c, LOADER, rp.single_deletions(c), progress=False
    ),
    "gradient_by_path_length": lambda c, n: rp.gradient_by_path_length(c, X, Y),
    "prediction_by_path_length": lambda c, n: rp.prediction_by_path_length(c, X),
}


def measured(call: Call, num_blocks: int) -> tuple[float, float]:
    """CPU seconds and MiB of a call on a chain, in a fork; the chain is made before."""
    chain = deep_chain(num_blocks)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(call, chain, num_blocks, sender))
    process.start()
    sender.close()
    try:
        seconds, mebibytes = receiver.recv()
    finally:
        process.join()
    return seconds, mebibytes


def _measure(call: Call, chain: ResidualChain, num_blocks: int, sender: Connection) -> None:
    torch.set_num_threads(1)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    call(chain, num_blocks)
    seconds = time.process_time() - start
    sender.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def table(sizes: list[int]) -> Iterator[str]:
    """Lines of a Markdown table: a row for each function, seconds and MiB for each number of blocks."""
    yield "| function | " + " | ".join(f"{n:,} blocks: s | MiB" for n in sizes) + " |"
    yield "| --- |" + " ---: | ---: |" * len(sizes)
    for name, call in (LINEAR | QUADRATIC).items():
        cells = []
        for n in sizes:
            is_left_out = name in QUADRATIC and n > FEW
            seconds, mebibytes = (math.nan, math.nan) if is_left_out else measured(call, n)
            cells += ["", ""] if is_left_out else [f"{seconds:.2f}", f"{mebibytes:.0f}"]
        yield f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    for line in table([int(argument) for argument in sys.argv[1:]] or [1_000, 10_000]):
        print(line, flush=True)
