"""Tools: train an SAE, encode cells, and find out what its features mean."""

from ._encode import encode
from ._enrich import enrich
from ._fit import fit
from ._name_features import name_features
from ._rank_genes import rank_genes
from ._score_labels import score_labels

__all__ = ["encode", "enrich", "fit", "name_features", "rank_genes", "score_labels"]
