"""Sparse autoencoders on the latent space of any single-cell model, inside AnnData."""

from importlib.metadata import version

from . import _accessor, datasets, get, io, models, pl, tl
from .report import report

__all__ = ["datasets", "get", "io", "models", "pl", "report", "tl"]
__version__ = version("scsae")
