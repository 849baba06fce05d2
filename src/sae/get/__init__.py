"""Read results out, as AnnData, arrays and tidy tables. Nothing in here changes the data."""

from ._cells import activations, embedding
from ._effects import ablation, perturbation, steering
from ._evidence import HIGHER_IS_BETTER, metrics, stability, sweep
from ._features import enrichment, features, genes, label_summary, labels
from ._model import decoder, history, model

__all__ = [
    "ablation",
    "activations",
    "decoder",
    "embedding",
    "enrichment",
    "features",
    "genes",
    "history",
    "label_summary",
    "labels",
    "metrics",
    "model",
    "perturbation",
    "stability",
    "steering",
    "sweep",
]
