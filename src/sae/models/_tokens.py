"""A cell as Geneformer reads it: its genes as tokens, from the highest rank down."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from scipy import sparse

from .._data import listing
from ..core.untrusted import content

Dictionary: TypeAlias = "Mapping[str, Any] | str | Path"
"""Itself, or the JSON file that it is in."""

PAD, MASK, CLS, EOS = "<pad>", "<mask>", "<cls>", "<eos>"
MOST_BYTES = 2**28
VERSIONED_ID = re.compile(r"(ENS[A-Z]*\d{11})\.\d+")
PICKLE = (
    "is a pickle, which can run any code when it is opened, so it is not. Convert it once, in an environment where you trust "
    'it: python -c "import json, pickle; from pathlib import Path; '
    "Path('name.json').write_text(json.dumps(pickle.loads(Path('name.pkl').read_bytes()), default=float))\""
)


def read_dictionary(source: Dictionary, what: str) -> dict[str, Any]:
    """Return a dictionary that was given as such, or as a JSON file, which may be compressed (.gz).

    Raises
    ------
    ValueError
        The file is a pickle, is not JSON, or holds something else than a dictionary.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    where = f"{what}={str(path)!r}"
    read = content(path, MOST_BYTES)
    if read[:2] == b"\x1f\x8b":
        read = _unpacked(read, where)
    # Binary pickles of every protocol begin with this byte, and no JSON does.
    if path.suffix in (".pkl", ".pickle") or read[:1] == b"\x80":
        raise ValueError(f"{where} {PICKLE}")
    try:
        found = json.loads(read.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}. Pass a JSON file, or a dictionary.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds a {type(found).__name__}; expected a dictionary.")
    return found


def _unpacked(read: bytes, where: str) -> bytes:
    """Decompress no more than a dictionary can be."""
    try:
        with gzip.open(io.BytesIO(read)) as file:
            unpacked = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{where} is not a complete gzip file: {error}. Pass a JSON file, or a dictionary.") from error
    if len(unpacked) > MOST_BYTES:
        raise ValueError(f"{where} has more than {MOST_BYTES:,} bytes once it is decompressed; it is not read.")
    return unpacked


@dataclass(frozen=True)
class Batch:
    """Some cells as the model reads them, filled up to the longest; all but `rows` are (cells, positions).

    Attributes
    ----------
    rows
        Which cells these are.
    ids
        Tokens.
    filled
        Whether a position has a token of the cell.
    genes
        Whether this token is a gene.
    """

    rows: np.ndarray
    ids: np.ndarray
    filled: np.ndarray
    genes: np.ndarray


@dataclass(frozen=True)
class Vocabulary:
    """The genes that a Geneformer knows.

    Attributes
    ----------
    names
        (tokens,) Ensembl id of each token, and the names of the special ones.
    medians
        (tokens,) what counts of a gene are divided by before they are ranked, NaN for those without one.
    gene_names
        Other names of genes → Ensembl id.
    """

    names: np.ndarray
    medians: np.ndarray
    gene_names: Mapping[str, str]
    _token: dict[str, int] = field(repr=False)

    @classmethod
    def read(cls, tokens: Dictionary, medians: Dictionary, gene_names: Dictionary | None) -> Vocabulary:
        """Read the three dictionaries and check that they belong together."""
        token = read_dictionary(tokens, "tokens")
        _check_tokens(token)
        names = np.array(sorted(token, key=token.__getitem__), dtype=object)
        of_genes = read_dictionary(medians, "medians")
        values = np.array([of_genes.get(name, np.nan) for name in names], dtype=np.float64)
        if np.isnan(values).all():
            raise ValueError(
                f"None of the {len(of_genes)} medians ({listing(of_genes, 3)}) is of a gene in tokens "
                f"({listing(names[-3:])}). Pass the two dictionaries of one version of Geneformer."
            )
        wrong = names[(values <= 0) | np.isinf(values)]
        if len(wrong):
            raise ValueError(f"{len(wrong)} medians are not above 0: {listing(wrong, 5)}. Counts are divided by them.")
        return cls(names, values, {} if gene_names is None else read_dictionary(gene_names, "gene_names"), token)

    @property
    def mask(self) -> int:
        """What stands for a gene that is to be predicted."""
        return self._token[MASK]

    @property
    def frame(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens before and after the genes of a cell: `<cls>` and `<eos>` in V2, none in V1."""
        before, after = ([self._token[CLS]], [self._token[EOS]]) if CLS in self._token else ([], [])
        return np.array(before, dtype=np.int32), np.array(after, dtype=np.int32)

    @property
    def n_genes(self) -> int:
        """Genes that can be ranked."""
        return int(np.isfinite(self.medians).sum())

    def find(self, names: Iterable[str]) -> np.ndarray:
        """Return the token of each gene, −1 for those that cannot be ranked.

        Each is looked up as it is, without the version of an Ensembl id (`ENSG00000102145.14`), and then in `gene_names`.
        """
        found = np.fromiter((self._find(str(name)) for name in names), dtype=np.int64)
        return np.where(np.isfinite(self.medians[found]), found, -1)

    def batch(self, rows: np.ndarray, cells: Sequence[np.ndarray]) -> Batch:
        """Put the genes of some cells between what comes before and after them, and fill up the short ones."""
        before, after = self.frame
        lengths = np.array([len(before) + len(genes) + len(after) for genes in cells])[:, None]
        position = np.arange(lengths.max())
        filled = position < lengths
        ids = np.full(filled.shape, self._token[PAD], dtype=np.int64)
        ids[filled] = np.concatenate([part for genes in cells for part in (before, genes, after)])
        return Batch(rows, ids, filled, (position >= len(before)) & (position < lengths - len(after)))

    def _find(self, name: str) -> int:
        gene = _without_version(name)
        if gene not in self._token:
            gene = _without_version(self.gene_names.get(name) or self.gene_names.get(gene) or "")
        return self._token.get(gene, -1)


def rank(counts: sparse.csr_matrix, tokens: np.ndarray, medians: np.ndarray, longest: int) -> list[np.ndarray]:
    """Return the tokens of the genes that each cell expresses, from the highest rank down.

    Genes are ranked by counts / median; the sequencing depth, by which Geneformer's authors divide as well, is the same for
    all genes of a cell and changes no rank. Columns with the same token are added up. Of genes that tie, the one with the
    lower token comes first, whatever the order of the columns.

    Parameters
    ----------
    counts
        (n, g)
    tokens
        (g,) of the columns, −1 where there is none.
    medians
        Of all tokens.
    longest
        Genes of a cell to keep.
    """
    known = np.flatnonzero(tokens >= 0)
    genes, column = np.unique(tokens[known], return_inverse=True)
    collect = sparse.csr_matrix((np.ones(len(known)), (known, column)), shape=(counts.shape[1], len(genes)))
    summed = sparse.csr_matrix(counts.astype(np.float64) @ collect)
    summed.sort_indices()
    cell = np.repeat(np.arange(summed.shape[0]), np.diff(summed.indptr))
    # Stable, and columns are in the order of their tokens: that decides ties.
    order = np.lexsort((-summed.data / medians[genes[summed.indices]], cell))
    ranked = genes[summed.indices[order]].astype(np.int32)
    return [ranked[start:end][:longest] for start, end in zip(summed.indptr[:-1], summed.indptr[1:], strict=True)]


def _check_tokens(token: Mapping[str, Any]) -> None:
    """Check that the tokens number the names from 0 on, and that the special ones are there."""
    missing = [name for name in (PAD, MASK) if name not in token]
    if (CLS in token) != (EOS in token):
        missing.append(EOS if CLS in token else CLS)
    if missing:
        raise ValueError(
            f"tokens has no {listing(missing)}. Pass the token dictionary of the model: it has '<pad>' and '<mask>' (V1), and "
            "also '<cls>' and '<eos>' (V2)."
        )
    values = list(token.values())
    if not all(isinstance(value, Integral) for value in values) or sorted(values) != list(range(len(values))):
        raise ValueError(
            f"The {len(values)} values of tokens do not number its names from 0 to {len(values) - 1}. "
            "Pass the token dictionary of the model: Ensembl id → token."
        )


def _without_version(name: str) -> str:
    found = VERSIONED_ID.fullmatch(name)
    return name if found is None else found[1]
