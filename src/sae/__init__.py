"""Sparse autoencoders on the latent space of any single-cell model, inside AnnData."""

from importlib.metadata import version

from . import datasets, get, io, models, pl, tl

__all__ = ["datasets", "get", "io", "models", "pl", "tl"]
__version__ = version("scsae")
