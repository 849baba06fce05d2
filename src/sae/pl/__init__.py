"""Figures, one per result, each on given Axes and returning Axes."""

from ._density import density
from ._enrichment import enrichment
from ._feature_card import feature_card
from ._feature_map import feature_map
from ._feature_umap import feature_umap
from ._genes import genes
from ._history import history
from ._labels import labels
from ._lineage import lineage
from ._recovery import recovery
from ._stability import stability
from ._steer import steer
from ._sweep import sweep

__all__ = [
    "density",
    "enrichment",
    "feature_card",
    "feature_map",
    "feature_umap",
    "genes",
    "history",
    "labels",
    "lineage",
    "recovery",
    "stability",
    "steer",
    "sweep",
]
