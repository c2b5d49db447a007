# The public names and the modules that define them; `__init__.py` loads each on first use.

from . import figures as figures
from . import gradients as gradients
from . import lesions as lesions
from . import predictions as predictions
from . import zoo as zoo
from ._utils.errors import (
    ResnetPathsError as ResnetPathsError,
)
from ._utils.errors import (
    StoreError as StoreError,
)
from ._utils.errors import (
    StudyInterrupted as StudyInterrupted,
)
from ._utils.errors import (
    UnravelError as UnravelError,
)
from ._utils.versions import show_versions as show_versions
from .core.block_norms import block_norms as block_norms
from .core.causal_lm import as_causal_lm as as_causal_lm
from .core.chain import (
    Block as Block,
)
from .core.chain import (
    ResidualChain as ResidualChain,
)
from .core.edits import (
    duplicate_block as duplicate_block,
)
from .core.edits import (
    parallel_blocks as parallel_blocks,
)
from .core.edits import (
    path_network as path_network,
)
from .core.edits import (
    permute_blocks as permute_blocks,
)
from .core.edits import (
    reverse_blocks as reverse_blocks,
)
from .core.edits import (
    scale_block as scale_block,
)
from .core.edits import (
    swap_blocks as swap_blocks,
)
from .core.groups import group_blocks as group_blocks
from .core.paths import (
    enumerate_paths as enumerate_paths,
)
from .core.paths import (
    path_histogram as path_histogram,
)
from .core.sampling import sample_paths as sample_paths
from .core.unraveled_graph import unraveled_graph as unraveled_graph
from .figures import widgets as widgets
from .gradients import (
    effective_window as effective_window,
)
from .gradients import (
    gradient_by_depth as gradient_by_depth,
)
from .gradients import (
    gradient_by_path_length as gradient_by_path_length,
)
from .gradients import (
    gradient_by_stage_lengths as gradient_by_stage_lengths,
)
from .gradients import (
    gradient_through_block as gradient_through_block,
)
from .gradients import (
    path_length_moments as path_length_moments,
)
from .gradients.jacobians import (
    jacobian_svd as jacobian_svd,
)
from .gradients.jacobians import (
    residual_alignment as residual_alignment,
)
from .lesions import (
    lesion_study as lesion_study,
)
from .lesions import (
    measure as measure,
)
from .lesions import (
    pair_interactions as pair_interactions,
)
from .lesions import (
    predicted_effects as predicted_effects,
)
from .lesions.greedy import (
    greedy_deletions as greedy_deletions,
)
from .lesions.lesion import (
    Lesion as Lesion,
)
from .lesions.permutations import sampled_shapley_values as sampled_shapley_values
from .lesions.plans import (
    branch_replacements as branch_replacements,
)
from .lesions.plans import (
    duplications as duplications,
)
from .lesions.plans import (
    layer_schedules as layer_schedules,
)
from .lesions.plans import (
    mean_replacements as mean_replacements,
)
from .lesions.plans import (
    pair_deletions as pair_deletions,
)
from .lesions.plans import (
    random_deletions as random_deletions,
)
from .lesions.plans import (
    random_duplications as random_duplications,
)
from .lesions.plans import (
    random_swaps as random_swaps,
)
from .lesions.plans import (
    scalings as scalings,
)
from .lesions.plans import (
    single_deletions as single_deletions,
)
from .lesions.plans import (
    subset_deletions as subset_deletions,
)
from .lesions.range_plans import (
    neighbour_swaps as neighbour_swaps,
)
from .lesions.range_plans import (
    range_deletions as range_deletions,
)
from .lesions.range_plans import (
    range_repeats as range_repeats,
)
from .lesions.range_plans import (
    range_swaps as range_swaps,
)
from .lesions.range_plans import (
    ranked_deletions as ranked_deletions,
)
from .lesions.subsets import (
    interaction_spectrum as interaction_spectrum,
)
from .lesions.subsets import (
    shapley_interactions as shapley_interactions,
)
from .lesions.subsets import (
    shapley_values as shapley_values,
)
from .lesions.subsets import (
    subset_values as subset_values,
)
from .predictions import (
    prediction_by_path_length as prediction_by_path_length,
)
from .predictions.deletions import (
    deletion_account as deletion_account,
)
from .predictions.deletions import (
    effect_matrix as effect_matrix,
)
from .predictions.direct import direct_effects as direct_effects
from .predictions.iterative import iterative_inference as iterative_inference
from .predictions.lens import lens as lens
from .predictions.moments import (
    prediction_path_length_moments as prediction_path_length_moments,
)
from .reproduce.datasets import load_dataset as load_dataset
from .unraveling import unravel as unravel
from .unraveling.edits import (
    delete_block as delete_block,
)
from .unraveling.edits import (
    delete_blocks as delete_blocks,
)
from .zoo import (
    list_networks as list_networks,
)
from .zoo import (
    load_network as load_network,
)

__version__: str
