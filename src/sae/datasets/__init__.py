"""Example cells, marker gene sets, and simulated cells with known programs. Nothing is downloaded."""

from ._immune_markers import immune_markers
from ._pbmc68k import pbmc68k
from ._simulate_differentiation import simulate_differentiation
from ._simulate_programs import simulate_programs
from ._simulate_small import simulate_small

__all__ = ["immune_markers", "pbmc68k", "simulate_differentiation", "simulate_programs", "simulate_small"]
