"""Residual networks as ensembles of paths (Veit, Wilber and Belongie 2016).

    import resnet_paths as rp

    chain = rp.unravel(model, example_inputs)      # any residual network as a chain of blocks
    rp.path_histogram(chain)                       # its 2^n paths by length, exactly
    rp.delete_block(chain, "layer2.0")             # a new network that shares every weight
    rp.lesion_study(chain, loader, rp.single_deletions(chain))

Names are loaded when they are first used, so that ``import resnet_paths`` costs little more than importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "ResnetPathsError": "errors",
    "StudyInterrupted": "errors",
    "enumerate_paths": "paths",
    "path_histogram": "paths",
    "sample_paths": "paths",
    "Block": "chain",
    "ResidualChain": "chain",
    "path_network": "chain",
    "unravel": "unraveling",
    "delete_block": "edits",
    "delete_blocks": "edits",
    "duplicate_block": "edits",
    "parallel_blocks": "edits",
    "permute_blocks": "edits",
    "reverse_blocks": "edits",
    "scale_block": "edits",
    "swap_blocks": "edits",
    "list_networks": "zoo",
    "load_network": "zoo",
    "training_memory": "memory",
    "training_logs": "zoo",
    "load_dataset": "datasets",
    "EffectiveWindow": "gradients",
    "effective_window": "gradients",
    "fit_decay": "gradients",
    "gradient_by_depth": "gradients",
    "gradient_by_path_length": "gradients",
    "gradient_by_stage_lengths": "gradients",
    "gradient_through_block": "gradients",
    "scalar_gradients": "gradients",
    "lesion_study": "lesions",
    "pair_interactions": "lesions",
    "predicted_effects": "lesions",
    "score_correlations": "lesions",
    "Lesion": "lesion_plans",
    "branch_replacements": "lesion_plans",
    "duplications": "lesion_plans",
    "layer_schedules": "lesion_plans",
    "mean_replacements": "lesion_plans",
    "pair_deletions": "lesion_plans",
    "random_deletions": "lesion_plans",
    "random_duplications": "lesion_plans",
    "random_swaps": "lesion_plans",
    "scalings": "lesion_plans",
    "single_deletions": "lesion_plans",
    "unraveled_graph": "graph",
    "block_norms": "states",
    "forward_cost": "costs",
    "figures": "",
    "widgets": "",
}

__all__ = [
    "Block", "EffectiveWindow", "Lesion", "ResidualChain", "ResnetPathsError", "StudyInterrupted", "block_norms",
    "branch_replacements", "delete_block", "delete_blocks", "duplicate_block", "duplications", "effective_window",
    "enumerate_paths", "figures", "fit_decay", "forward_cost", "gradient_by_depth", "gradient_by_path_length",
    "gradient_by_stage_lengths", "gradient_through_block", "layer_schedules", "lesion_study", "list_networks",
    "load_dataset", "load_network", "mean_replacements", "pair_deletions", "pair_interactions", "parallel_blocks",
    "path_histogram", "path_network", "permute_blocks", "predicted_effects", "random_deletions", "random_duplications",
    "random_swaps", "reverse_blocks", "sample_paths", "scalar_gradients", "scale_block", "scalings",
    "score_correlations", "single_deletions", "swap_blocks", "training_logs", "training_memory", "unravel",
    "unraveled_graph", "widgets",
]  # fmt: skip

if TYPE_CHECKING:
    from resnet_paths import figures, widgets
    from resnet_paths.chain import Block, ResidualChain, path_network
    from resnet_paths.costs import forward_cost
    from resnet_paths.datasets import load_dataset
    from resnet_paths.edits import (
        delete_block,
        delete_blocks,
        duplicate_block,
        parallel_blocks,
        permute_blocks,
        reverse_blocks,
        scale_block,
        swap_blocks,
    )
    from resnet_paths.errors import ResnetPathsError, StudyInterrupted
    from resnet_paths.gradients import (
        EffectiveWindow,
        effective_window,
        fit_decay,
        gradient_by_depth,
        gradient_by_path_length,
        gradient_by_stage_lengths,
        gradient_through_block,
        scalar_gradients,
    )
    from resnet_paths.graph import unraveled_graph
    from resnet_paths.lesion_plans import (
        Lesion,
        branch_replacements,
        duplications,
        layer_schedules,
        mean_replacements,
        pair_deletions,
        random_deletions,
        random_duplications,
        random_swaps,
        scalings,
        single_deletions,
    )
    from resnet_paths.lesions import lesion_study, pair_interactions, predicted_effects, score_correlations
    from resnet_paths.memory import training_memory
    from resnet_paths.paths import enumerate_paths, path_histogram, sample_paths
    from resnet_paths.states import block_norms
    from resnet_paths.unraveling import unravel
    from resnet_paths.zoo import list_networks, load_network, training_logs


def __getattr__(name: str) -> Any:
    # A public name is loaded from its file when it is first used.
    if name not in _HOME:
        raise AttributeError(f"module 'resnet_paths' has no attribute {name!r}")
    home = _HOME[name]
    module = importlib.import_module(f"resnet_paths.{home or name}")
    value = getattr(module, name) if home else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
