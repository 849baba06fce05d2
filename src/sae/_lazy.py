"""What is on disk besides matrices: columns of `obs` and all of `uns`, as `anndata.experimental.read_lazy` gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import anndata as ad
import pandas as pd

from .core.rows import is_dask


def loaded(value: Any) -> Any:
    """Bring a table, an array or a dict of them into memory; what is there stays as it is."""
    if is_dask(value):
        return value.compute()
    match type(value).__module__.partition(".")[0]:
        case "h5py" | "zarr":
            return value[...]
        case "anndata" if hasattr(value, "to_memory"):
            # Unused ones too, as files are read otherwise.
            with ad.settings.override(remove_unused_categories=False):
                return value.to_memory()
    return {name: loaded(part) for name, part in value.items()} if isinstance(value, Mapping) else value


def column(table: Any, name: str) -> pd.Series:
    """Read one column of `obs` or `var`, and only that."""
    return table[name] if isinstance(table, pd.DataFrame) else loaded(table[[name]])[name]


@dataclass(frozen=True)
class OnDemand(Mapping[str, Any]):
    """What `uns` has under a key, each entry brought into memory when it is asked for."""

    stored: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """Read one entry."""
        return loaded(self.stored[name])

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self.stored)

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.stored)
