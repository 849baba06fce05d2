"""Figures, one per result. All return Axes."""

__all__: list[str] = []
