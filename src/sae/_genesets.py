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
from typing import IO

import numpy as np
import pandas as pd
from scipy import sparse

from ._data import listing

Net = pd.DataFrame | Mapping[str, Iterable[str]] | str | Path
IDENTIFIER = re.compile(r"^[A-Za-z_]+:\w+$")
PEAK = re.compile(r"^(.+?)[:_-](\d+)[-_](\d+)$")
"""The name of a peak: chromosome, start and end, as in "chr1-100-200" or "chr1:100-200"."""
MAX_LINE = 50_000_000
"""Characters: a gene set of all genes of ten genomes is shorter."""
MAX_TEXT = 10_000_000_000
"""Characters of a whole file, unpacked: a file of a few kilobytes can be made that never ends."""


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
        twice = [name for name in ("source", "target", "weight") if (net.columns == name).sum() > 1]
        if twice:
            raise ValueError(f"net has several columns {listing(twice)}. Keep one of each.")
        known = net.dropna(subset=["source", "target"])
        table = known[["source", "target"]].astype(str)
        table["weight"] = _weights(known) if "weight" in net.columns else 1.0
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
            if isinstance(genes, str | bytes) or not isinstance(genes, Iterable):
                what = "string" if isinstance(genes, str) else type(genes).__name__
                raise TypeError(f"The gene set {name!r} is the {what} {genes!r}; expected a list of genes.")
        pairs = [(str(name), str(gene)) for name, genes in sets.items() for gene in genes if not _missing(gene)]
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


def _missing(gene: object) -> bool:
    """Tell None and NaN from a name."""
    return gene is None or gene is pd.NA or (isinstance(gene, float) and np.isnan(gene))


def _weights(net: pd.DataFrame) -> pd.Series:
    """Read the weights of a net, all of which must be finite numbers."""
    weights = pd.to_numeric(net["weight"], errors="coerce").astype(np.float64)
    wrong = ~np.isfinite(weights)
    if wrong.any():
        first = net[wrong].iloc[0]
        raise ValueError(
            f"net has {wrong.sum()} weights that are missing, infinite or no numbers ({first['weight']!r} of "
            f"{str(first['target'])!r} in {str(first['source'])!r}, for one). Mend them, or drop the column 'weight'."
        )
    return weights


@contextmanager
def open_text(path: str | Path) -> Iterator[Iterator[str]]:
    """Give the lines of a text file, plain or gzipped; which of the two its first bytes tell, whatever its name."""
    try:
        if Path(path).is_fifo():
            # It can be read once only, and without a writer never.
            raise OSError("it is a pipe")
        with Path(path).open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        opened: IO[str] = (
            gzip.open(path, "rt", encoding="utf-8-sig") if packed else Path(path).open(encoding="utf-8-sig")
        )
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {str(path)!r}.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)[:200]!r} cannot be read as a file: {error}.") from None
    with opened as lines:
        yield _bounded(lines, path)


def _bounded(lines: IO[str], path: str | Path) -> Iterator[str]:
    """Yield lines; refuse what is no text, and what would never end."""
    size, left = MAX_LINE, MAX_TEXT
    try:
        while line := lines.readline(size):
            left -= len(line)
            if len(line) == size or left < 0:
                what = f"a line of {size:,} characters" if left >= 0 else f"more than {MAX_TEXT:,} characters"
                raise ValueError(f"{path} has {what} or more: it is no file of this kind. Download it again.")
            yield line
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is not readable as text in UTF-8, plain or gzipped ({error}). Is the download complete?"
        ) from error


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
            if not name:
                raise ValueError(f"{path}, line {number} has no name of a gene set before its first tab.")
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
    names = pd.Index(measured["source"].unique())
    rows = names.get_indexer(pd.Index(measured["source"]))
    columns = genes.get_indexer(pd.Index(measured["target"]))
    values = measured["weight"].to_numpy(dtype=np.float64)
    weights = sparse.csr_matrix((values, (rows, columns)), shape=(len(names), len(genes)))
    return GeneSets(names, weights, len(sizes) - len(fitting) - n_large, n_large, n_sets - len(sizes))


def _shared(table: pd.DataFrame, genes: pd.Index, *, folded: bool = False) -> int:
    """Count the genes of a net that are measured, by name, or by name in whatever case."""
    targets, names = pd.Index(table["target"].unique()), genes.astype(str)
    return int((targets.str.upper().isin(names.str.upper()) if folded else targets.isin(names)).sum())
