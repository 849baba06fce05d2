from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from .. import _schema
from .._data import Data, holder, listing
from ..core.pareto import HIGHER_IS_BETTER as HIGHER_IS_BETTER
from ._rows import plain


def sweep(
    data: Data, *, pareto: Sequence[str] = _schema.SWEEP_PARETO, key: str = "sae_sweep", mod: str | None = None
) -> pd.DataFrame:
    """Return the runs of a sweep, a row each.

    Parameters
    ----------
    data, mod
        As in :func:`sae.get.activations`, after `tl.sweep`.
    pareto
        Numbers, two or more, by which the column `pareto` marks the settings that no other beats: is as good as in all of them,
        and better in one, in the means over seeds. Of `label_auroc`, `truth_best`, `truth_matched`, `truth_found` and `stability` higher is better, of
        everything else lower. :func:`sae.tl.sweep` describes the columns.
    key
        Name of the sweep.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> runs = sae.tl.sweep(adata, {"n_features": [16, 32], "steps": 50}, groupby="bulk_labels")
    >>> runs = sae.get.sweep(adata, pareto=["n_features", "label_auroc"])
    >>> int(runs.loc[runs["pareto"], "n_features"].min())
    16
    """
    found = plain(_schema.sweep(holder(data, mod), key))
    if isinstance(pareto, str) or len(pareto) < 2:
        raise ValueError(f"pareto={pareto!r} is not a list of two or more columns of numbers.")
    numbers = found.select_dtypes("number").columns
    for name in pareto:
        if name not in numbers:
            raise KeyError(f"The sweep has no numbers {name!r}; it has {listing(numbers, len(numbers))}.")
    return found.assign(pareto=_schema.not_beaten(found, pareto))
