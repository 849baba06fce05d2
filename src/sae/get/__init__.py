"""Read results out, as AnnData, arrays and tidy tables. Nothing in here changes the data."""

from ._arrows import steering_arrows
from ._cells import activations, embedding
from ._effects import ablation, perturbation, steering
from ._evidence import HIGHER_IS_BETTER, metrics, stability, sweep
from ._features import enrichment, features, genes, label_summary, labels
from ._map import modules, neighbors, parent_terms, term_features
from ._matrices import by_label, label_matrix
from ._model import decoder, history, model
from ._params import params

__all__ = [
    "ablation",
    "activations",
    "by_label",
    "decoder",
    "embedding",
    "enrichment",
    "features",
    "genes",
    "history",
    "label_matrix",
    "label_summary",
    "labels",
    "metrics",
    "model",
    "modules",
    "neighbors",
    "params",
    "parent_terms",
    "perturbation",
    "stability",
    "steering",
    "steering_arrows",
    "sweep",
    "term_features",
]
