"""The progress bar that all verbs share."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(total: int, what: str, unit: str, *, shown: bool) -> tqdm:
    """Return a bar that appears when the work takes more than a second."""
    with warnings.catch_warnings():
        # A notebook without ipywidgets: tqdm then draws a bar of characters, which is all we need.
        warnings.filterwarnings("ignore", message="IProgress not found")
        from tqdm.auto import tqdm
    return tqdm(total=total, desc=what, unit=unit, delay=1, disable=not shown)
