"""Gene sets: a decoupler net, a dict or a GMT file, matched to the measured genes."""

from __future__ import annotations

import gzip
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd
from scipy import sparse

from ._data import listing

Net = pd.DataFrame | Mapping[str, Iterable[str]] | str | Path
IDENTIFIER = re.compile(r"^[A-Za-z_]+:\w+$")
PEAK = re.compile(r"^(.+?)[:_-](\d+)[-_](\d+)$")
"""The name of a peak: chromosome, start and end, as in "chr1-100-200" or "chr1:100-200"."""


@dataclass(frozen=True)
class GeneSets:
    """Gene sets on the measured genes.

    Attributes
    ----------
    names
        (sets,)
    weights
        (sets, genes), stored where a gene belongs to a set: the weight of the net, or 1.
    n_small, n_large, n_unmeasured
        How many sets were left out: with fewer or more measured genes than asked for, and with none.
    """

    names: pd.Index
    weights: sparse.csr_matrix
    n_small: int
    n_large: int
    n_unmeasured: int

    def left_out(self) -> str:
        """Say how many sets were left out, and why."""
        return (
            f"left out {self.n_small} gene sets with too few measured genes, {self.n_large} with too many and "
            f"{self.n_unmeasured} without any"
        )


def read_net(net: Net) -> pd.DataFrame:
    """Bring gene sets into decoupler's long form: `source`, `target`, `weight`."""
    if isinstance(net, pd.DataFrame):
        missing = [name for name in ("source", "target") if name not in net.columns]
        if missing:
            raise ValueError(
                f"net has the columns {listing(net.columns)}; it lacks {listing(missing)}. A net is a table with a row per "
                "gene: 'source' (gene set), 'target' (gene) and optionally 'weight'."
            )
        known = net.dropna(subset=["source", "target"])
        table = known[["source", "target"]].astype(str)
        table["weight"] = known["weight"].astype(float) if "weight" in net.columns else 1.0
        if table["weight"].isna().any():
            first = table[table["weight"].isna()].iloc[0]
            raise ValueError(
                f"net has {table['weight'].isna().sum()} missing weights ({first['target']!r} in {first['source']!r}, for "
                "one). Fill them in, or drop the column 'weight'."
            )
    else:
        if isinstance(net, str | Path):
            sets: Mapping[str, Iterable[str]] = read_gmt(net)
        elif isinstance(net, Mapping):
            sets = net
        else:
            raise TypeError(
                f"net is a {type(net).__name__}; expected a DataFrame with 'source' and 'target', a dict of gene lists, "
                "or the path of a GMT file."
            )
        for name, genes in sets.items():
            if isinstance(genes, str):
                raise TypeError(f"The gene set {name!r} is the string {genes!r}; expected a list of genes.")
        pairs = [(str(name), str(gene)) for name, genes in sets.items() for gene in genes]
        table = pd.DataFrame(pairs, columns=["source", "target"]).assign(weight=1.0)
    if table.empty:
        raise ValueError("net has no gene sets.")
    table = table.drop_duplicates()
    conflicting = table[table.duplicated(["source", "target"])]
    if len(conflicting):
        first = conflicting.iloc[0]
        raise ValueError(
            f"net gives {len(conflicting)} genes two weights in one set ({first['target']!r} in {first['source']!r}, "
            "for one). Keep one row per set and gene."
        )
    return table.reset_index(drop=True)


@contextmanager
def open_text(path: str | Path) -> Iterator[TextIO]:
    """Open a text file, plain or gzipped; which of the two its first bytes tell, whatever its name."""
    path = Path(path)
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    opened = gzip.open(path, "rt", encoding="utf-8-sig") if packed else path.open(encoding="utf-8-sig")
    try:
        with opened as lines:
            yield lines
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        error.add_note(f"{path} is not readable as text in UTF-8, plain or gzipped. Is the download complete?")
        raise


def read_gmt(path: str | Path) -> dict[str, list[str]]:
    """Read a GMT file, plain or gzipped: a line per set with name, description and genes, separated by tabs.

    A name that is an identifier with a description that is none ("GO:0030218", "erythrocyte differentiation") becomes
    "erythrocyte differentiation (GO:0030218)".
    """
    sets: dict[str, list[str]] = {}
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            fields = [field.strip() for field in line.rstrip("\r\n").split("\t")]
            if len(fields) < 3:
                raise ValueError(
                    f"{path}, line {number} has {len(fields)} fields separated by tabs; a GMT line is name, description, genes."
                )
            name, description = fields[:2]
            if IDENTIFIER.match(name) and description and description != name and "://" not in description:
                name = f"{description} ({name})"
            if name in sets:
                raise ValueError(f"{path}, line {number}: the gene set {name!r} occurs twice.")
            sets[name] = list(dict.fromkeys(gene for gene in fields[2:] if gene))
    return sets


def default_collection(net: Net) -> str:
    """Name a collection after its file, else "gene_sets"."""
    return Path(net).name.removesuffix(".gz").removesuffix(".gmt") if isinstance(net, str | Path) else "gene_sets"


def match(net: Net, genes: pd.Index, *, min_size: int, max_size: int | None) -> GeneSets:
    """Keep the sets with a suitable number of measured genes."""
    table = read_net(net)
    position = genes.get_indexer(pd.Index(table["target"]))
    measured = table[position >= 0]
    if measured.empty:
        hint = "Do both use the same identifiers (symbols or Ensembl ids) and species?"
        if _shared(table, genes, folded=True):
            hint = "They differ in upper and lower case: change adata.var_names, or take gene sets of this species."
        if PEAK.match(str(genes[0])):
            hint = "For sets of genes, say which peaks belong to which gene: var_to_gene=sae.tl.peaks_to_genes(...)."
        raise ValueError(
            f"net and data have no gene in common. The net has {listing(table['target'].unique()[:5])}; "
            f"the data has {listing(genes[:5])}. {hint}"
        )
    exact, folded = _shared(table, genes), _shared(table, genes, folded=True)
    if folded > 2 * exact:
        warnings.warn(
            f"Only {exact} genes of the net are in the data, and {folded} where upper and lower case are taken as one "
            f"({listing(table['target'].unique()[:3])}; {listing(genes[:3])}). Change adata.var_names, or take gene sets of "
            "this species.",
            UserWarning,
            stacklevel=4,
        )
    sizes = measured["source"].value_counts(sort=False)
    fitting = sizes.index[(sizes >= min_size) & (sizes <= (np.inf if max_size is None else max_size))]
    if len(fitting) == 0:
        raise ValueError(
            f"None of the {len(sizes)} gene sets has {min_size} to {max_size or 'any number of'} measured genes; the largest "
            f"has {sizes.max()}. Lower min_size= or raise max_size=."
        )
    n_sets, n_large = table["source"].nunique(), int((sizes > (np.inf if max_size is None else max_size)).sum())
    measured = measured[measured["source"].isin(fitting)]
    names = pd.Index(measured["source"].unique(), dtype=object)
    rows = names.get_indexer(pd.Index(measured["source"]))
    columns = genes.get_indexer(pd.Index(measured["target"]))
    values = measured["weight"].to_numpy(dtype=np.float64)
    weights = sparse.csr_matrix((values, (rows, columns)), shape=(len(names), len(genes)))
    return GeneSets(names, weights, len(sizes) - len(fitting) - n_large, n_large, n_sets - len(sizes))


def _shared(table: pd.DataFrame, genes: pd.Index, *, folded: bool = False) -> int:
    """Count the genes of a net that are measured, by name, or by name in whatever case."""
    targets, names = pd.Index(table["target"].unique()), genes.astype(str)
    return int((targets.str.upper().isin(names.str.upper()) if folded else targets.isin(names)).sum())
