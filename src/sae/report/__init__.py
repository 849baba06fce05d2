"""One HTML file to browse all features of an SAE."""

from ._report import report

__all__ = ["report"]
