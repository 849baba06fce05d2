"""Tools: train an SAE, encode cells, and find out what its features mean."""

from ._ablate import ablate
from ._compare_enrichment import compare_enrichment
from ._encode import encode
from ._enrich import enrich
from ._evaluate import evaluate
from ._feature_map import feature_map
from ._fit import fit
from ._match import match
from ._name_features import name_features
from ._peaks_to_genes import peaks_to_genes
from ._perturbation import perturbation
from ._probe import probe
from ._rank_genes import rank_genes
from ._recovery import recovery
from ._score_labels import score_labels
from ._stability import stability
from ._steer import steer
from ._sweep import sweep

__all__ = [
    "ablate",
    "compare_enrichment",
    "encode",
    "enrich",
    "evaluate",
    "feature_map",
    "fit",
    "match",
    "name_features",
    "peaks_to_genes",
    "perturbation",
    "probe",
    "rank_genes",
    "recovery",
    "score_labels",
    "stability",
    "steer",
    "sweep",
]
