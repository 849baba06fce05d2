"""Numerics on arrays. Nothing in here knows AnnData or pandas."""
