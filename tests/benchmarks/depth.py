"""Time and memory of public functions on deep chains: ``python -m tests.benchmarks.depth [--write] [BLOCKS ...]``.

A Markdown table of process CPU time and of the growth of the process's memory, each call in a fork of its own. The cost
is how often a block is run, pulled back through, or listed, for n blocks. Blocks are linear maps of four numbers, two
examples: what is measured is what grows with the number of blocks. Functions whose cost is n^2 are not run above 1,000
blocks. ``--write`` makes the page ``notebooks/tables/depth.md``.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

import resnet_paths as rp
from resnet_paths._utils.files import write_then_rename
from resnet_paths.core.chain import Block, ResidualChain

WIDTH = 4
FEW = 1_000
SECONDS = 180
PAGE = Path(__file__).parents[2] / "notebooks" / "tables" / "depth.md"
INTRO = """\
# Deep chains

`.venv/bin/python -m tests.benchmarks.depth --write` measures public functions on chains of 1,000 and 10,000 blocks and
writes this page: seconds of CPU time, and MiB by which the memory of the process grows, each call in a process of its
own. Blocks are linear maps of four numbers, two examples, float64: what is measured is what grows with the number of
blocks n, not the arithmetic of real blocks. The cost is the number of times that a block is run, pulled back through,
or listed, up to a factor. Functions whose cost is n^2 are not run on 10,000 blocks; expect a hundred times the time of
1,000.

<!-- Made by python -m tests.benchmarks.depth --write. -->
"""


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
QUIET = {"progress": False}
Call = Callable[[ResidualChain, int], object]

LINEAR: dict[str, Call] = {
    "chain(x)": lambda c, n: c(X),
    "chain.run_with_cache": lambda c, n: c.run_with_cache(X),
    "chain.summary": lambda c, n: c.summary(),
    "chain.num_paths": lambda c, n: c.num_paths,
    "path_histogram": lambda c, n: rp.path_histogram(c),
    "enumerate_paths, the first": lambda c, n: next(rp.enumerate_paths(c, n // 2)),
    "sample_paths, 100": lambda c, n: rp.sample_paths(c, n // 2, 100, torch.Generator()),
    "delete_block": lambda c, n: rp.delete_block(c, 0),
    "delete_blocks, all": lambda c, n: rp.delete_blocks(c, range(n)),
    "scale_block": lambda c, n: rp.scale_block(c, 0, 2.0),
    "duplicate_block": lambda c, n: rp.duplicate_block(c, 0),
    "swap_blocks": lambda c, n: rp.swap_blocks(c, 0, n - 1),
    "permute_blocks": lambda c, n: rp.permute_blocks(c, list(range(n))[::-1]),
    "reverse_blocks": lambda c, n: rp.reverse_blocks(c, 0),
    "parallel_blocks": lambda c, n: rp.parallel_blocks(c, range(n)),
    "group_blocks, in pairs": lambda c, n: rp.group_blocks(c, [[i, i + 1] for i in range(0, n, 2)]),
    "path_network": lambda c, n: rp.path_network(c, [True] * n),
    "block_norms": lambda c, n: rp.block_norms(c, X),
    "random_deletions, 20": lambda c, n: rp.random_deletions(c, [n // 2], 20, torch.Generator()),
    "random_duplications, 20": lambda c, n: rp.random_duplications(c, [n // 2], 20, torch.Generator()),
    "random_swaps, 20": lambda c, n: rp.random_swaps(c, [n // 2], 20, torch.Generator()),
    "pair_deletions, of 5 blocks": lambda c, n: rp.pair_deletions(c, range(5)),
    "subset_deletions, of 5 blocks": lambda c, n: rp.subset_deletions(c, range(5)),
    "lesion_study, 20 random deletions": lambda c, n: rp.lesion_study(
        c, LOADER, rp.random_deletions(c, [n // 2], 20, torch.Generator()), **QUIET
    ),
    "predicted_effects": lambda c, n: rp.predicted_effects(c, LOADER, **QUIET),
    "gradient_by_depth": lambda c, n: rp.gradient_by_depth(c, X, Y),
    "gradient_through_block": lambda c, n: rp.gradient_through_block(c, X, Y),
    "path_length_moments": lambda c, n: rp.path_length_moments(c, X, Y),
    "prediction_path_length_moments": lambda c, n: rp.prediction_path_length_moments(c, X),
    "direct_effects": lambda c, n: rp.direct_effects(c, X, **QUIET),
    "iterative_inference": lambda c, n: rp.iterative_inference(c, X, Y, **QUIET),
    "jacobian_svd, of rank 2": lambda c, n: rp.jacobian_svd(c, X, rank=2, **QUIET),
    "gradient_by_path_length, up to 20": lambda c, n: rp.gradient_by_path_length(c, X, Y, max_length=min(20, n)),
}
QUADRATIC: dict[str, Call] = {
    "single_deletions": lambda c, n: rp.single_deletions(c),
    "duplications": lambda c, n: rp.duplications(c),
    "scalings, one factor": lambda c, n: rp.scalings(c, [0.5]),
    "neighbour_swaps": lambda c, n: rp.neighbour_swaps(c),
    "range_swaps, of n / 4": lambda c, n: rp.range_swaps(c, max(1, n // 4)),
    "ranked_deletions, all": lambda c, n: rp.ranked_deletions(c, range(n)),
    "range_deletions, of n / 2": lambda c, n: rp.range_deletions(c, lengths=[n // 2]),
    "range_repeats, of n / 2": lambda c, n: rp.range_repeats(c, lengths=[n // 2]),
    "branch_replacements": lambda c, n: rp.branch_replacements(c, c),
    "mean_replacements": lambda c, n: rp.mean_replacements(c, X),
    "lesion_study, all single deletions": lambda c, n: rp.lesion_study(c, LOADER, rp.single_deletions(c), **QUIET),
    "greedy_deletions, of one block": lambda c, n: rp.greedy_deletions(c, LOADER, 1),
    "gradient_by_path_length": lambda c, n: rp.gradient_by_path_length(c, X, Y),
    "gradient_by_stage_lengths": lambda c, n: rp.gradient_by_stage_lengths(c, X, Y),
    "prediction_by_path_length": lambda c, n: rp.prediction_by_path_length(c, X),
    "effect_matrix": lambda c, n: rp.effect_matrix(c, X, **QUIET),
    "deletion_account": lambda c, n: rp.deletion_account(c, X, **QUIET),
    "lens, paths of up to 3 blocks": lambda c, n: rp.lens(c, X, max_length=3, **QUIET),
}
WITHOUT = {
    "as_causal_lm": "of a language model",
    "effective_window": "of a frame",
    "interaction_spectrum": "of a frame",
    "layer_schedules": "of transformer layers",
    "list_networks": "of no chain",
    "load_dataset": "of no chain",
    "load_network": "of no chain",
    "measure": "of a function",
    "pair_interactions": "of a frame",
    "residual_alignment": "of a frame",
    "sampled_shapley_values": "as lesion_study, with 2 n num_pairs networks",
    "shapley_interactions": "of a frame",
    "shapley_values": "of a frame",
    "show_versions": "of no chain",
    "subset_values": "as lesion_study, with 2^m networks for m blocks",
    "unravel": "of a model: takes what its export takes",
    "unraveled_graph": "2^n nodes",
}
"""Public functions that have no row, and why."""


def measured(call: Call, num_blocks: int) -> tuple[float, float] | None:
    """CPU seconds and MiB of a call on a chain, in a fork; the chain is made before. None if it takes too long."""
    chain = deep_chain(num_blocks)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(call, chain, num_blocks, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


def _measure(call: Call, chain: ResidualChain, num_blocks: int, sender: Connection) -> None:
    torch.set_num_threads(1)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(start) + SECONDS, -1))
    call(chain, num_blocks)
    seconds = time.process_time() - start
    sender.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def table(sizes: list[int]) -> Iterator[str]:
    """Lines of a Markdown table: a row for each function, seconds and MiB for each number of blocks."""
    yield "| function | cost | " + " | ".join(f"{n:,} blocks: s | MiB" for n in sizes) + " |"
    yield "| --- | --- |" + " ---: | ---: |" * len(sizes)
    for name, call in (LINEAR | QUADRATIC).items():
        cells = ["n^2" if name in QUADRATIC else "n"]
        for n in sizes:
            is_left_out = name in QUADRATIC and n > FEW
            found = None if is_left_out else measured(call, n)
            if found is None:
                cells += ["not run" if is_left_out else f"above {SECONDS}", ""]
            else:
                cells += [f"{found[0]:.2f}", f"{found[1]:.0f}"]
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.depth", description=__doc__.splitlines()[0])
    parser.add_argument("blocks", type=int, nargs="*", default=[1_000, 10_000], help="1,000 and 10,000 by default")
    parser.add_argument("--write", action="store_true", help=f"make the page {PAGE.name} of the documentation")
    options = parser.parse_args()
    for name in rp.__all__:
        getattr(rp, name)  # imports what the forks would else import, each for itself
    lines = []
    for line in table(options.blocks):
        print(line, flush=True)
        lines.append(line)
    if options.write:
        with write_then_rename(PAGE) as temporary:
            temporary.write_text(INTRO + "\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
