"""Pretrained models: the latent of cells, and the expression that a latent stands for."""

from ._activations import activations
from ._autoencoder import Autoencoder
from ._functions import Functions
from ._geneformer import Geneformer
from ._multidgd import MultiDGD
from ._pca import PCA
from ._scvi import SCVI

__all__ = ["Autoencoder", "Functions", "Geneformer", "MultiDGD", "PCA", "SCVI", "activations"]
