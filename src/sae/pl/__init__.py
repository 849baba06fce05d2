"""Figures, one per result, each on given Axes and returning Axes."""

from ._enrichment import enrichment
from ._feature_umap import feature_umap
from ._history import history
from ._sweep import sweep

__all__ = ["enrichment", "feature_umap", "history", "sweep"]
