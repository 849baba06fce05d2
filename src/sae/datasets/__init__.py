"""Example cells and marker gene sets. Nothing is downloaded."""

from ._immune_markers import immune_markers
from ._pbmc68k import pbmc68k

__all__ = ["immune_markers", "pbmc68k"]
