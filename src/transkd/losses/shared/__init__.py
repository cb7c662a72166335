"""Building blocks of the terms, public for terms defined elsewhere: checks, grids, distances and adapters."""

from transkd.losses.shared.adapters import adapt, as_weights, stage_adapters
from transkd.losses.shared.checks import (
    check_choice,
    check_count,
    check_needs,
    check_positive,
    check_share,
    check_stage,
    check_stages,
    name_of,
    paired_channels,
    require_target,
    stage_pairs,
)
from transkd.losses.shared.distances import (
    channel_kl,
    hierarchical_context,
    map_criterion,
    mean_squared_error,
    spatial_kl,
    widen,
)
from transkd.losses.shared.grids import feature_pairs, labels_on_grid, logits_pair, nearest, on_grid

__all__ = [
    "adapt",
    "as_weights",
    "channel_kl",
    "check_choice",
    "check_count",
    "check_needs",
    "check_positive",
    "check_share",
    "check_stage",
    "check_stages",
    "feature_pairs",
    "hierarchical_context",
    "labels_on_grid",
    "logits_pair",
    "map_criterion",
    "mean_squared_error",
    "name_of",
    "nearest",
    "on_grid",
    "paired_channels",
    "require_target",
    "spatial_kl",
    "stage_adapters",
    "stage_pairs",
    "widen",
]
