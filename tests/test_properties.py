"""Properties that hold for any input: a result that makes sense or an error that we raise, and nothing half-written.

Every case is a `Recipe`, a plain value from which an AnnData with one or two peculiarities is built; a failing one can be copied
from the report into `FOUND`. `SAE_FUZZ=20` draws twenty times as many, at random.
"""

from __future__ import annotations

import linecache
import os
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import chdir
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

import sae

FUZZ = int(os.environ.get("SAE_FUZZ", "1"))
PACKAGE = str(Path(sae.__file__).parent)
TYPED = (ValueError, TypeError, KeyError, FloatingPointError)
OUR_WARNINGS = (
    r"has another '.*' than when",
    r"of the variance of .* unexplained, against",
    r"Only \d+ genes of the net are in the data",
    r"genes of the (net|peaks)",
)
"""UserWarnings that docstrings name."""


def few(n: int) -> settings:
    """Settings for about `n` examples, the same ones in every run unless SAE_FUZZ asks for more."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=n * FUZZ, derandomize=FUZZ == 1, deadline=None, database=None, suppress_health_check=checks
    )


# ---- objects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """All that an object is made from."""

    n: int = 24
    d: int = 3
    g: int = 12
    h: int = 6
    architecture: str = "matryoshka"
    peculiar: tuple[str, ...] = ()
    text: str = "a"
    seed: int = 0


def plain(recipe: Recipe) -> ad.AnnData:
    """Make cells in three groups, with an embedding and log1p values."""
    rng = np.random.default_rng(recipe.seed)
    n, d, g = recipe.n, recipe.d, recipe.g
    group = np.arange(n) % 3
    x = np.log1p(rng.poisson(np.exp(rng.normal(size=(3, g)))[group] * 0.7)).astype(np.float32)
    z = (rng.normal(size=(3, d))[group] * 2 + rng.normal(size=(n, d))).astype(np.float32)
    obs = pd.DataFrame(
        {
            "group": pd.Categorical(np.array(["a", "b", "c"])[group]),
            "donor": pd.Categorical(np.array(["d0", "d1", "d2", "d3"])[rng.integers(4, size=n)]),
            "batch": pd.Categorical(np.array(["x", "y"])[rng.integers(2, size=n)]),
            "depth": rng.normal(size=n),
        },
        index=pd.Index([f"cell{i}" for i in range(n)], dtype=object),
    )
    adata = ad.AnnData(x, obs=obs, var=pd.DataFrame(index=pd.Index([f"g{i}" for i in range(g)], dtype=object)))
    adata.obsm["X_pca"] = z
    return adata


@lru_cache
def trained(d: int, h: int, architecture: str) -> dict[str, Any]:
    """Train an SAE of a size once."""
    adata = plain(Recipe(n=60, d=d))
    sae.tl.fit(adata, architecture=architecture, n_features=h, steps=20, progress=False)
    return adata.uns["sae"]


def _wider(a: np.ndarray) -> np.ndarray:
    held = np.zeros((a.shape[0], 2 * a.shape[1]), a.dtype)
    held[:, ::2] = a
    return held[:, ::2]


def _read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


def _unaligned(a: np.ndarray) -> np.ndarray:
    if a.dtype.hasobject:
        return a
    held = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    held[:] = a
    return held


def _coo_twice(a: np.ndarray) -> sparse.coo_matrix:
    """Store every value in two halves, in reverse order, and a few zeros."""
    rows, columns = np.nonzero(a)
    values = a[rows, columns]
    at = np.concatenate([rows, rows, rows[:2]])[::-1], np.concatenate([columns, columns, columns[:2]])[::-1]
    return sparse.coo_matrix((np.concatenate([values / 2, values / 2, 0 * values[:2]])[::-1], at), a.shape)


def _unsorted(a: np.ndarray) -> sparse.csr_matrix:
    m = sparse.csr_matrix(a)
    for i in range(m.shape[0]):
        row = slice(m.indptr[i], m.indptr[i + 1])
        m.indices[row], m.data[row] = m.indices[row][::-1].copy(), m.data[row][::-1].copy()
    m.has_sorted_indices = False
    return m


def _twice(a: np.ndarray) -> sparse.csr_matrix:
    m = sparse.csr_matrix(a)
    parts = np.repeat(m.data / 2, 2), np.repeat(m.indices, 2), 2 * m.indptr
    return sparse.csr_matrix(parts, shape=m.shape)


def _stored_zeros(a: np.ndarray) -> sparse.csr_matrix:
    n, d = a.shape
    return sparse.csr_matrix((a.ravel().copy(), np.tile(np.arange(d), n), np.arange(n + 1) * d), shape=a.shape)


def _int64(a: np.ndarray) -> sparse.csr_matrix:
    m = sparse.csr_matrix(a)
    m.indices, m.indptr = m.indices.astype(np.int64), m.indptr.astype(np.int64)
    return m


def _frame(a: np.ndarray, index: pd.Index) -> pd.DataFrame:
    return pd.DataFrame(a, index=index, columns=[f"c{i}" for i in range(a.shape[1])])


LAYOUTS: dict[str, Callable[[np.ndarray], Any]] = {
    "fortran": np.asfortranarray,
    "negative strides": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "every second column": _wider,
    "read-only": _read_only,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "unaligned": _unaligned,
    "float64": lambda a: a.astype(np.float64),
    "long double": lambda a: a.astype(np.longdouble),
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "csr array": sparse.csr_array,
    "csc array": sparse.csc_array,
    "csr, not sorted": _unsorted,
    "csr, values in parts": _twice,
    "csr, zeros stored": _stored_zeros,
    "csr, int64 indices": _int64,
    "csr, float64": lambda a: sparse.csr_matrix(a.astype(np.float64)),
    "csr, read-only": lambda a: _locked(sparse.csr_matrix(a)),
}
"""Ways to hold the same float32 values."""


def _locked(m: sparse.csr_matrix) -> sparse.csr_matrix:
    for part in (m.data, m.indices, m.indptr):
        part.flags.writeable = False
    return m


DTYPES = [
    "float16",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint64",
    "bool",
    "complex64",
    "U3",
]
VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one NaN": lambda a: _set(a, np.nan),
    "one inf": lambda a: _set(a, np.inf),
    "one -inf": lambda a: _set(a, -np.inf),
    "one huge": lambda a: _set(a, 1e30),
    "one beyond float32": lambda a: _set(a.astype(np.float64), 1e300),
    "all huge": lambda a: a * np.float32(1e30),
    "all tiny": lambda a: a * np.float32(1e-30),
    "all subnormal": lambda a: a * np.float32(1e-40),
    "zeros": lambda a: a * 0,
    "ones": lambda a: a * 0 + 1,
    "constant column": lambda a: _set_column(a, 3.0),
    "large offset": lambda a: a + np.float32(1e6),
    "negative": lambda a: a - 1,
    "whole": np.rint,
}


def _set(a: np.ndarray, value: float) -> np.ndarray:
    a = a.copy()
    if a.size:
        a[len(a) // 2, -1] = value
    return a


def _set_column(a: np.ndarray, value: float) -> np.ndarray:
    a = a.copy()
    a[:, :1] = value
    return a


def _renamed(labels: pd.Series, names: dict[str, str]) -> pd.Categorical:
    return pd.Categorical([names.get(str(label), str(label)) for label in labels])


LABELS: dict[str, Callable[[pd.Series, str], Any]] = {
    "some missing": lambda s, t: s.where(np.arange(len(s)) % 4 > 0),
    "all missing": lambda s, t: pd.Categorical([None] * len(s), categories=["a", "b"]),
    "one value": lambda s, t: pd.Categorical(["only"] * len(s)),
    "unused categories": lambda s, t: s.astype("category").cat.add_categories(["z", "y"]),
    "ordered": lambda s, t: s.astype("category").cat.as_ordered(),
    "each its own": lambda s, t: [f"l{i}" for i in range(len(s))],
    "strings": lambda s, t: s.astype(str).to_numpy(object),
    "string dtype": lambda s, t: s.astype("string"),
    "objects with None": lambda s, t: [None if i % 5 == 0 else "ab"[i % 2] for i in range(len(s))],
    "mixed types": lambda s, t: pd.Series([(1, "1", "b")[i % 3] for i in range(len(s))], s.index, dtype=object),
    "bool": lambda s, t: np.arange(len(s)) % 2 == 0,
    "nullable bool": lambda s, t: pd.array(
        [None if i % 3 == 0 else i % 2 == 0 for i in range(len(s))], dtype="boolean"
    ),
    "integers": lambda s, t: np.arange(len(s)) % 3,
    "nullable integers": lambda s, t: pd.array([None if i % 3 == 0 else i % 2 for i in range(len(s))], dtype="Int64"),
    "numbers": lambda s, t: np.linspace(0, 1, len(s)),
    "categories of numbers": lambda s, t: pd.Categorical(np.arange(len(s)) % 3 / 2),
    "intervals": lambda s, t: pd.cut(pd.Series(np.arange(len(s)) * 1.0, s.index), [-1, 5, 1e9]),
    "dates": lambda s, t: pd.date_range("2020-01-01", periods=len(s)),
    "text": lambda s, t: _renamed(s, {"a": t, "b": t + "/b"}),
    "names of missing values": lambda s, t: _renamed(s, {"a": "nan", "b": "None", "c": ""}),
    "one cell of a label": lambda s, t: ["rare" if i == 0 else "rest" for i in range(len(s))],
    "long": lambda s, t: _renamed(s, {"a": "x" * 3000}),
    "all in one batch": lambda s, t: ["x" if i % 3 else "y" for i in range(len(s))],
}

Names = Callable[[pd.Index, str], pd.Index]
NAMES: dict[str, Names] = {
    "twice": lambda i, t: pd.Index([*i[:1], *i[:-1]], dtype=object),
    "all the same": lambda i, t: pd.Index(["a"] * len(i), dtype=object),
    "text": lambda i, t: pd.Index([f"{t}{j}" for j in range(len(i))], dtype=object),
    "empty": lambda i, t: pd.Index(["", *i[1:]], dtype=object)[: len(i)],
    "long": lambda i, t: pd.Index([name + "x" * 3000 for name in i], dtype=object),
    "slash": lambda i, t: pd.Index([f"a/{name}" for name in i], dtype=object),
    "numbers": lambda i, t: pd.Index([str(j) for j in range(len(i))], dtype=object),
    "nan": lambda i, t: pd.Index(["nan", *i[1:]], dtype=object)[: len(i)],
    "separator": lambda i, t: pd.Index([f"{name};b" for name in i], dtype=object),
    "upper case": lambda i, t: i.str.upper(),
}

Change = Callable[[ad.AnnData, Recipe], ad.AnnData | None]


def _layout(slot: str, name: str) -> Change:
    def change(adata: ad.AnnData, recipe: Recipe) -> None:
        dense = _dense(adata, slot)
        # SciPy has no float16, long words and the like.
        if "cs" not in name or (dense.dtype.isnative and dense.dtype.kind in "biuf" and dense.dtype != np.float16):
            _put(adata, slot, LAYOUTS[name](dense))

    return change


def _dtype(slot: str, dtype: str) -> Change:
    def change(adata: ad.AnnData, recipe: Recipe) -> None:
        dense = _dense(adata, slot)
        if dense.dtype.kind != "U":
            with np.errstate(all="ignore"):
                _put(adata, slot, dense.astype(dtype))

    return change


def _values(slot: str, name: str) -> Change:
    def change(adata: ad.AnnData, recipe: Recipe) -> None:
        dense = _dense(adata, slot)
        if dense.dtype.kind == "f":
            with np.errstate(all="ignore"):
                _put(adata, slot, VALUES[name](dense))

    return change


def _dense(adata: ad.AnnData, slot: str) -> np.ndarray:
    found = adata.X if slot == "X" else adata.obsm["X_pca"]
    if sparse.issparse(found):
        found = found.toarray()
    return np.array(found)


def _put(adata: ad.AnnData, slot: str, value: Any) -> None:
    if slot == "X":
        adata.X = value
    else:
        adata.obsm["X_pca"] = value


def _column(name: str, column: str = "group") -> Change:
    def change(adata: ad.AnnData, recipe: Recipe) -> None:
        adata.obs[column] = LABELS[name](adata.obs["group"], recipe.text)

    return change


def _named(slot: str, name: str) -> Change:
    def change(adata: ad.AnnData, recipe: Recipe) -> None:
        setattr(adata, f"{slot}_names", NAMES[name](getattr(adata, f"{slot}_names"), recipe.text))

    return change


def _obsm_frame(**how: Any) -> Change:
    def change(adata: ad.AnnData, recipe: Recipe) -> None:
        z = _dense(adata, "obsm")
        columns = how.get("columns") or [f"c{i}" for i in range(z.shape[1])]
        frame = pd.DataFrame(z, index=adata.obs_names, columns=list(columns)[: z.shape[1]])
        adata.obsm["X_pca"] = frame.astype(how.get("dtype", "float32"))

    return change


def _with_raw(adata: ad.AnnData, recipe: Recipe) -> None:
    if adata.X is not None and adata.X.dtype.kind in "iuf":
        adata.raw = adata.copy()
        adata.X = adata.X * 2


def _log1p(base: Any) -> Change:
    def change(adata: ad.AnnData, recipe: Recipe) -> None:
        adata.uns["log1p"] = {"base": base} if base != "none" else {}

    return change


EARLY: dict[str, Change] = {
    **{f"{slot} {name}": _layout(slot, name) for slot in ("X", "obsm") for name in LAYOUTS},
    **{f"{slot} as {dtype}": _dtype(slot, dtype) for slot in ("X", "obsm") for dtype in DTYPES},
    **{f"{slot} with {name}": _values(slot, name) for slot in ("X", "obsm") for name in VALUES},
    **{f"labels: {name}": _column(name) for name in LABELS},
    **{f"donors: {name}": _column(name, "donor") for name in LABELS},
    **{f"batches: {name}": _column(name, "batch") for name in LABELS},
    **{f"{slot} names: {name}": _named(slot, name) for slot in ("obs", "var") for name in NAMES},
    "obsm frame": _obsm_frame(),
    "obsm frame, equal columns": _obsm_frame(columns=["c"] * 5),
    "obsm frame, numbered columns": _obsm_frame(columns=range(5)),
    "obsm frame, nullable": _obsm_frame(dtype="Float32"),
    "no X": lambda adata, recipe: setattr(adata, "X", None),
    "raw": _with_raw,
    "base of log1p": _log1p(2.0),
    "base of log1p is None": _log1p(None),
    "base of log1p is missing": _log1p("none"),
    "base of log1p is 1": _log1p(1.0),
    "uns log1p is a string": lambda adata, recipe: adata.uns.update(log1p="yes"),
}
"""Before there is an SAE."""


def _weights(**values: float) -> Change:
    def change(adata: ad.AnnData, recipe: Recipe) -> None:
        weights = adata.uns["sae"]["weights"]
        for name, value in values.items():
            if name in weights:
                weights[name] = np.full_like(weights[name], value)

    return change


def _one_feature_off(adata: ad.AnnData, recipe: Recipe) -> None:
    adata.uns["sae"]["weights"]["b_enc"][0] = -1e6


BETWEEN: dict[str, Change] = {
    "all features dead": _weights(b_enc=-1e6),
    "all features active": _weights(b_enc=1e3),
    "one feature dead": _one_feature_off,
    "decoder of zeros": _weights(W_dec=0),
    "features alike": _weights(W_enc=0.1, W_dec=0.3),
}
"""To the SAE, before cells are encoded."""


def _activations(make: Callable[[sparse.csr_matrix], Any]) -> Change:
    def change(adata: ad.AnnData, recipe: Recipe) -> None:
        if "sae" in adata.obsm:
            adata.obsm["sae"] = make(adata.obsm["sae"])

    return change


def _view(rows: Callable[[int], Any]) -> Change:
    return lambda adata, recipe: adata[rows(adata.n_obs)]


def _joined(adata: ad.AnnData, recipe: Recipe) -> ad.AnnData | None:
    if not adata.var_names.is_unique:
        return None
    try:
        return ad.concat([adata, adata], uns_merge="first", index_unique="-")
    except Exception:  # noqa: BLE001 (what anndata cannot join is not ours)
        return None


def _represented(make: Callable[[np.ndarray, pd.Index], Any]) -> Change:
    def change(adata: ad.AnnData, recipe: Recipe) -> None:
        if isinstance(adata.obsm["X_pca"], np.ndarray) and adata.obsm["X_pca"].dtype.kind in "biuf":
            adata.obsm["X_pca"] = make(np.asarray(adata.obsm["X_pca"]), adata.obs_names)

    return change


def _without(slot: Any, key: str = "sae") -> None:
    slot.pop(key, None)


LATE: dict[str, Change] = {
    "activations csc": _activations(sparse.csc_matrix),
    "activations csr array": _activations(sparse.csr_array),
    "activations float64": _activations(lambda a: a.astype(np.float64)),
    "activations dense": _activations(lambda a: a.toarray()),
    "activations not sorted": _activations(lambda a: _unsorted(a.toarray())),
    "activations with zeros": _activations(lambda a: _stored_zeros(a.toarray())),
    "activations in parts": _activations(lambda a: _twice(a.toarray())),
    "activations int64 indices": _activations(lambda a: _int64(a.toarray())),
    "view of rows": _view(lambda n: slice(1, None)),
    "view of every second": _view(lambda n: slice(None, None, 2)),
    "view in reverse": _view(lambda n: np.arange(n)[::-1]),
    "view by mask": _view(lambda n: np.arange(n) % 3 > 0),
    "view of none": _view(lambda n: slice(0, 0)),
    "view of genes": lambda adata, recipe: adata[:, ::2],
    "no genes": lambda adata, recipe: adata[:, :0].copy(),
    "joined": _joined,
    "other representation": _represented(lambda z, names: z.astype(np.float64) + 1),
    "representation with words": _represented(lambda z, names: z.astype(str)),
    "representation with NaN": _represented(lambda z, names: z * np.nan),
    "representation beyond float32": _represented(lambda z, names: z.astype(np.float64) * 1e300),
    "wider representation": _represented(lambda z, names: np.hstack([z, z])),
    "representation in a frame": _represented(_frame),
    "sparse representation": _represented(lambda z, names: sparse.csc_matrix(z.astype(np.float64))),
    "no representation": lambda adata, recipe: _without(adata.obsm, "X_pca"),
    "no activations": lambda adata, recipe: _without(adata.obsm),
    "no SAE": lambda adata, recipe: _without(adata.uns),
}
"""After cells were encoded."""
PECULIAR = {**EARLY, **BETWEEN, **LATE}


def build(recipe: Recipe) -> ad.AnnData:
    """Make the object of a recipe, encoded unless that is refused."""
    with warnings.catch_warnings():
        # Of anndata, about names that are not unique and the like.
        warnings.simplefilter("ignore")
        adata = plain(recipe)
        for name in recipe.peculiar:
            adata = _changed(adata, recipe, EARLY.get(name))
        adata.uns["sae"] = _copied(trained(recipe.d, recipe.h, recipe.architecture))
        for name in recipe.peculiar:
            adata = _changed(adata, recipe, BETWEEN.get(name))
        try:
            sae.tl.encode(adata, progress=False)
        except TYPED:
            pass
        for name in recipe.peculiar:
            adata = _changed(adata, recipe, LATE.get(name))
        return adata


def _changed(adata: ad.AnnData, recipe: Recipe, change: Change | None) -> ad.AnnData:
    changed = None if change is None else change(adata, recipe)
    return adata if changed is None else changed


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copied(one) for name, one in value.items()}
    return value.copy() if hasattr(value, "copy") else value


def recipes(**fixed: Any) -> st.SearchStrategy[Recipe]:
    """Draw the sizes and up to two peculiarities."""
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "n": st.sampled_from([24, 40, 12, 10, 3, 2, 1, 0]),
        "d": st.sampled_from([3, 5, 1]),
        "g": st.sampled_from([12, 20, 2, 1]),
        "h": st.sampled_from([6, 2, 1]),
        "architecture": st.sampled_from(["matryoshka", "topk", "relu"]),
        "peculiar": st.lists(st.sampled_from(list(PECULIAR)), max_size=2, unique=True).map(tuple),
        "text": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
        "seed": st.integers(0, 3),
    }
    return st.builds(Recipe, **{**drawn, **{name: st.just(value) for name, value in fixed.items()}})


# ---- the property ----------------------------------------------------------------------------------------------------


def state_of(compare: Any, adata: ad.AnnData) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compare.state(adata)


def result_or_typed_error(compare: Any, adata: ad.AnnData, call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Call, and hold what must hold of any call: a typed error of ours that changes nothing, or a result without strange warnings."""
    before = state_of(compare, adata)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result, error = call(), None
        except TYPED as caught:
            result, error = None, caught
    for warning in said:
        text = str(warning.message)
        if issubclass(warning.category, ad.ImplicitModificationWarning) and "of view" in text:
            # A view becomes an object of its own where something is written to it; anndata says so.
            continue
        if "names are not unique" in text:
            continue
        if warning.category is PendingDeprecationWarning and "scanpy/plotting" in warning.filename:
            # As in pyproject.
            continue
        if warning.category.__name__ == "Pandas4Warning" and "/sae/" not in warning.filename:
            # As in pyproject.
            continue
        ours = issubclass(warning.category, UserWarning) and any(re.search(known, text) for known in OUR_WARNINGS)
        assert ours, f"{warning.category.__name__} at {warning.filename}:{warning.lineno}: {text}"
    if error is not None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        line = linecache.getline(frame.filename, frame.lineno or 0).strip()
        if not (frame.filename.startswith(PACKAGE) and line.startswith("raise") and len(str(error)) > 20):
            raise AssertionError(f"not an error of ours: {type(error).__name__}: {error}") from error
        compare.assert_same(before, state_of(compare, adata))
    return result, error


PROBABILITIES = re.compile(r"^(pval|padj|padj_all|fdr|auroc|f1|.*_(pval|padj|fdr|auroc|f1)|density|agreement)$")


def assert_table(table: pd.DataFrame, where: str) -> None:
    """Nothing infinite, and probabilities between 0 and 1."""
    for name in table:
        column = table[name]
        if not pd.api.types.is_float_dtype(column):
            continue
        values = column.to_numpy()
        values = values[~np.isnan(values)]
        # The t statistic of a gene with one value in all active cells and another one in all others.
        assert np.isfinite(values).all() or (where, name) == ("genes", "score"), f"{where}.{name} is infinite"
        if PROBABILITIES.match(str(name)):
            assert ((values >= 0) & (values <= 1)).all(), f"{where}.{name} is no probability"


def assert_sense(adata: ad.AnnData, key: str = "sae") -> None:
    """What holds of every SAE that is stored."""
    stored = adata.uns[key]
    for name, value in stored.items():
        if isinstance(value, pd.DataFrame):
            assert_table(value, name)
    for name in sae._schema.WEIGHTS:
        assert np.isfinite(stored["weights"][name]).all()
    if key in adata.obsm and "features" in stored:
        assert_activations(adata.obsm[key], adata.n_obs, len(stored["features"]))
    if "genes" in stored:
        assert stored["genes"][["score", "pval", "padj"]].notna().all(axis=None)
        assert not stored["genes"].duplicated(["feature", "gene"]).any()


def assert_activations(a: Any, n: int, h: int) -> None:
    assert a.shape == (n, h)
    values = a.data if sparse.issparse(a) else a
    assert np.isfinite(values).all() and (values >= 0).all()


# ---- verbs and what they can be asked ----------------------------------------------------------------------------------


def some(**optional: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Draw up to three keyword arguments, each from a list of values."""
    pairs = [(name, value) for name, values in optional.items() for value in values]
    if not pairs:
        return st.just({})
    return st.lists(st.sampled_from(pairs), max_size=3, unique_by=lambda pair: pair[0]).map(dict)


NETS: dict[str, Callable[[str], Any]] = {
    "dict": lambda t: {"early": [f"g{i}" for i in range(6)], "late": [f"g{i}" for i in range(6, 14)]},
    "one gene each": lambda t: {f"s{i}": [f"g{i}"] for i in range(12)},
    "all genes": lambda t: {"all": [f"g{i}" for i in range(20)]},
    "text": lambda t: {
        t: [f"g{i}" for i in range(6)],
        f"{t}/b": [f"{t}{i}" for i in range(6)],
        "x" * 3000: ["g1", "g3"],
    },
    "twice": lambda t: {"s": ["g1", "g1", "g2"], "r": ["g1", "g2"]},
    "numbers": lambda t: {1: [1, 2, 3], 2.5: ["g1", "g2", None]},
    "generator": lambda t: {"s": (f"g{i}" for i in range(5))},
    "set of a number": lambda t: {"s": 3},
    "set of None": lambda t: {"s": None},
    "bytes": lambda t: {"s": b"g1 g2"},
    "empty": lambda t: {},
    "empty set": lambda t: {"s": []},
    "blank genes": lambda t: {"s": ["", " ", "g1", "g2"]},
    "other genes": lambda t: {"s": ["ENSG1", "ENSG2"]},
    "other case": lambda t: {"s": ["G1", "G2", "G3"], "r": ["g4", "G5"]},
    "table": lambda t: pd.DataFrame({"source": ["s"] * 4 + ["r"] * 3, "target": [f"g{i}" for i in range(7)]}),
    "weights": lambda t: pd.DataFrame({"source": "s", "target": ["g1", "g2", "g3"], "weight": [1, -2.5, 0]}),
    "infinite weight": lambda t: pd.DataFrame({"source": "s", "target": ["g1", "g2"], "weight": [1, np.inf]}),
    "huge weight": lambda t: pd.DataFrame({"source": "s", "target": ["g1", "g2", "g3"], "weight": [1e300, 1e-300, 1]}),
    "words for weights": lambda t: pd.DataFrame({"source": "s", "target": ["g1", "g2"], "weight": ["a", "b"]}),
    "missing weight": lambda t: pd.DataFrame({"source": "s", "target": ["g1", "g2"], "weight": [1, None]}),
    "missing rows": lambda t: pd.DataFrame({"source": ["s", None, "s"], "target": ["g1", "g2", None]}),
    "equal columns": lambda t: pd.DataFrame([["s", "g1", "g2"]] * 2, columns=["source", "target", "target"]),
    "categories": lambda t: pd.DataFrame({"source": ["s"] * 3, "target": ["g1", "g2", "g3"]}).astype("category"),
    "no table": lambda t: pd.DataFrame({"a": [1]}),
    "list": lambda t: ["g1"],
    "missing file": lambda t: "no/such/file.gmt",
    "folder": lambda t: Path(__file__).parent,
    "NUL in the name": lambda t: "a\0b.gmt",
    "empty path": lambda t: "",
    "number": lambda t: 3,
    "None": lambda t: None,
}
FEATURES = [None, 0, "sae_0", [0], [0, 0], ["sae_0", 1], [], (), "nope", 99, -1, True, 1.5, [None], np.int64(0), np.array([0]), {0}, "", b"sae_0"]  # fmt: skip
GROUPBY = ["group", "group", "group", "donor", "batch", "depth", "none", "", None, 3, "a/b"]
NO_BAR = {"progress": False}


def linear(z: np.ndarray, data: Any) -> np.ndarray:
    z = np.asarray(z, np.float64)
    return np.column_stack([z[:, 0], -z[:, 0], z.sum(axis=1)])


MODELS: dict[str, Callable[[ad.AnnData], Any]] = {
    "linear": lambda a: sae.models.Functions(decode=linear, genes=["g0", "g1", "g2"], scale="linear"),
    "logarithms": lambda a: sae.models.Functions(decode=linear, genes=["g0", "g1", "g2"], scale="log"),
    "constant": lambda a: sae.models.Functions(decode=lambda z, d: np.ones((len(z), 2)), genes=["g0", "g1"]),
    "NaN": lambda a: sae.models.Functions(decode=lambda z, d: np.full((len(z), 2), np.nan), genes=["g0", "g1"]),
    "no genes": lambda a: sae.models.Functions(decode=lambda z, d: np.ones((len(z), 0)), genes=[]),
    "sparse": lambda a: sae.models.Functions(
        decode=lambda z, d: sparse.csr_matrix(np.abs(linear(z, d))), genes=["g0", "g1", "g2"], scale="log1p"
    ),
    "none": lambda a: None,
}


@dataclass(frozen=True)
class Verb:
    """How to call a verb, and what to draw for it."""

    call: Callable[..., Any]
    options: st.SearchStrategy[dict[str, Any]] = field(default_factory=lambda: some())
    first: Mapping[str, Callable[[ad.AnnData], Any]] = field(default_factory=dict)
    """What may have been run before, by name."""
    examples: int = 12

    @property
    def before(self) -> st.SearchStrategy[frozenset[str]]:
        """Draw what was run before: all, or all but one or two."""
        names = frozenset(self.first)
        left_out = st.sets(st.sampled_from(sorted(names)), max_size=2) if names else st.just(set())
        return left_out.map(lambda some: names - some)


def _net(adata: ad.AnnData, text: str, options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    if "net" in options:
        options["net"] = NETS[options["net"]](text)
    if "model" in options:
        options["model"] = MODELS[options["model"]](adata)
    return options


RANKED = {"genes": lambda a: sae.tl.rank_genes(a, min_cells=2, min_expected=0, progress=False)}
ENRICHED = {
    "enrichment": lambda a: sae.tl.enrich(
        a, NETS["dict"](""), min_size=1, min_cells=2, min_expected=0, max_padj=1, min_log2fc=0, n_null=0, progress=False
    )
}
LABELLED = {"labels": lambda a: sae.tl.score_labels(a, "group", progress=False)}
MAPPED = {"map": lambda a: sae.tl.feature_map(a)}
NAMED = {"names": lambda a: sae.tl.name_features(a)}
PERTURBED = {"perturbation": lambda a: sae.tl.perturbation(a, "group", "a", min_cells=2, n_permutations=3, progress=False)}  # fmt: skip
OWN = {"own SAE": lambda a: (sae.tl.fit(a, n_features=2, steps=3, progress=False), sae.tl.encode(a, progress=False))}
STABLE = {"stability": lambda a: sae.tl.stability(a, n_seeds=1, progress=False)}
EVALUATED = {"metrics": lambda a: sae.tl.evaluate(a, "group", baselines=["pca"], n_splits=1, n_bootstrap=5, n_neighbors=3, progress=False)}  # fmt: skip
STEERED = {"steering": lambda a: sae.tl.steer(a, [0], model=MODELS["linear"](a), value=1, groupby="group", n_controls=1, progress=False)}  # fmt: skip
ABLATED = {"ablation": lambda a: sae.tl.ablate(a, [0], batch="batch", groupby="group", n_controls=1, n_neighbors=3, progress=False)}  # fmt: skip
LATENT = {"X_umap": lambda a: a.obsm.update(X_umap=np.random.default_rng(0).normal(size=(a.n_obs, 2)))}
ALL = {**RANKED, **ENRICHED, **LABELLED, **NAMED, **PERTURBED, **MAPPED, **EVALUATED, **STEERED, **ABLATED, **LATENT}

TEST_OPTIONS = {
    "batch": [None, "batch", "donor", "group", "depth", "none"],
    "percentile": [None, 50, 90, 0, 100, -1, np.nan],
    "layer": [None, "log"],
    "use_raw": [None, True, False],
    "min_cells": [2, 10, 1, 0, 3],
    "min_expected": [0, 30, -1, np.nan],
    "pseudocount": [0.1, 1e-30, 1e30, 0, np.nan],
}
RNG = [0, 1, None, np.random.default_rng(0)]

GENES = {
    "table": pd.DataFrame({"chromosome": ["chr1"], "start": [10], "end": [20], "strand": ["+"], "gene": ["A"]}),
    "empty": pd.DataFrame({"chromosome": [], "start": [], "end": [], "gene": []}),
    "words": pd.DataFrame({"chromosome": ["chr1"], "start": ["a"], "end": ["b"], "gene": ["A"]}),
    "negative": pd.DataFrame({"chromosome": ["chr1"], "start": [-5], "end": [-9], "gene": ["A"]}),
    "list": ["A"],
    "missing": pd.DataFrame({"chromosome": ["chr1", None], "start": [1, np.nan], "end": [3, 4], "gene": ["A", None]}),
    "twice": pd.DataFrame({"chromosome": ["chr1"] * 2, "start": [1] * 2, "end": [30] * 2, "gene": ["A"] * 2}),
    "folder": Path("/"),
}

VERBS: dict[str, Verb] = {
    "fit": Verb(
        partial(sae.tl.fit, progress=False),
        some(
            use_rep=[None, "X", "X_pca", "nope", ""],
            layer=[None, "nope"],
            architecture=["topk", "batchtopk", "matryoshka", "vanilla", "relu", "jumprelu", "gated", "no"],
            recipe=["default", "paper"],
            preprocess=[None, "center", "standardize", "whiten", "no"],
            n_features=[None, 1, 2, 8, 0, True, 2.0, np.int64(4)],
            k=[None, 1, 2, "auto", 99],
            l1=[None, 0, 0.1, np.nan, np.inf],
            l0=[None, 0, 0.1],
            learning_rate=[None, 1e-3, 1e3, 1e30, np.nan],
            steps=[1, 5],
            batch_size=[None, 1, 7, 10**6],
            validation=[0.1, 0, 0.5, 0.99, np.nan, 1],
            early_stopping=[None, 1],
            rng=[*RNG, -1, 2**70],
            device=["cpu", "auto", "nope"],
            key_added=["sae", "other", "ü", "X_pca", "", "a/b", "x" * 300, "log1p"],
        ).map(lambda drawn: {"steps": 3, **drawn}),
        examples=60,
    ),
    "encode": Verb(
        partial(sae.tl.encode, progress=False),
        some(use_rep=[None, "X", "X_pca", "nope"], layer=[None, "nope"], key=["sae", "other", ""]),
        examples=30,
    ),
    "rank_genes": Verb(
        partial(sae.tl.rank_genes, progress=False),
        some(
            **TEST_OPTIONS,
            method=["welch", "wilcoxon", "regression", "no"],
            donor=[None, "donor", "group", "depth", "none"],
            covariates=[None, [], ["depth"], ["batch", "group"], ["none"], "depth"],
            n_genes=[None, 1, 100, 0],
            model=["none", *MODELS],
        ).map(lambda drawn: {"min_cells": 2, "min_expected": 0, **drawn}),
        examples=80,
    ),
    "enrich": Verb(
        partial(sae.tl.enrich, progress=False),
        some(
            **TEST_OPTIONS,
            method=["ora", "mannwhitney", "ulm", "gsea", "aucell", "scfeaturelens", "no"],
            collection=[None, "c", "a/b", "ü", ""],
            background=[None, ["g0", "g1", "g2", "g3"], [], ["nope"], "g0"],
            directions=[("up", "down"), "up", ("down",), (), "no"],
            max_padj=[1, 0.05, 0, np.nan],
            min_log2fc=[0, 0.5, 1e9, np.nan],
            min_size=[1, 2, 5, 0, -1],
            max_size=[None, 500, 3],
            n_sets=[None, 1, 50],
            n_null=[0, 1, 2],
            model=["none", *MODELS],
            rng=RNG,
                    net=list(NETS),
        ).map(lambda drawn: {"net": "dict", "min_cells": 2, "min_expected": 0, "min_size": 1, "n_null": 0, **drawn}),
        examples=80,
    ),
    "score_labels": Verb(
        partial(sae.tl.score_labels, progress=False),
        some(
            donor=[None, "donor", "batch", "depth", "group"],
            n_splits=[1, 5, 0],
            scopes=["3-way", "2-way", "no"],
            order=[None, ["a", "b", "c"], ["c", "a"], ["a"], [], "ab", [1, 2]],
            baselines=[True, False],
            layer=[None, "nope"],
            max_padj=[0.05, np.nan],
            rng=RNG,
                    groupby=GROUPBY,
        ).map(lambda drawn: {"groupby": "group", **drawn}),
        examples=60,
    ),
    "name_features": Verb(
        sae.tl.name_features,
        some(
            collection=[None, "gene_sets", "no"],
            groupby=[None, "group", "none"],
            by=["label", ("genes",), (), "no", ("gene set", "label")],
            max_padj=[0.05, 1, np.nan],
            min_auroc=[0.8, 0, 2],
            min_f1=[0.5, 0],
        ),
        {**RANKED, **ENRICHED, **LABELLED},
        examples=20,
    ),
    "feature_map": Verb(
        sae.tl.feature_map,
        some(
            space=["coactivation", "genes", "enrichment", "decoder", "no"],
            n_neighbors=[1, 2, 15, 0, 2.5],
            resolution=[1.0, 0.1, 0, np.nan, 1e30],
            collection=[None, "gene_sets", "no"],
            max_padj=[0.05, 1],
            rng=RNG,
        ),
        {**RANKED, **ENRICHED},
        examples=16,
    ),
    "perturbation": Verb(
        partial(sae.tl.perturbation, progress=False),
        some(
            groupby=GROUPBY,
            control=["b", "no", ["a", "b"], [], None, "", 1],
            batch=["batch", "donor", "depth", "group"],
            target=[{"b": "g1"}, {"b": ["g1", "g2"], "c": "no"}, {}, {"no": "g1"}, "batch", "none", {"b": []}],
            min_cells=[3, 10, 1, 0],
            max_fdr=[0.05, 1, 0, np.nan],
            n_permutations=[1, 0, 2.5],
            rng=RNG,
        ).map(lambda drawn: {"groupby": "group", "control": "a", "min_cells": 2, "n_permutations": 3, **drawn}),
        examples=40,
    ),
    "ablate": Verb(
        partial(sae.tl.ablate, progress=False),
        some(
            features=FEATURES,
            batch=[None, "batch", "donor", "group", "depth", "none"],
            groupby=[None, "group", ["group", "batch"], [], "none", "depth"],
            threshold=[0.75, 0.5, 0.51, 1, np.nan],
            label_threshold=[0.85, 1, 0.51],
            n_controls=[0, 1, 3, -1],
            n_neighbors=[1, 3, 15, 0],
            max_cells=[5000, 5, 1, 0],
            key_added=[None, "X_clean", "sae", "X_pca", "", "a/b"],
            rng=RNG,
        ).map(lambda drawn: {"features": [0], "n_neighbors": 3, "n_controls": 1, **drawn}),
        examples=40,
    ),
    "steer": Verb(
        lambda adata, feature=0, model="linear", **options: sae.tl.steer(
            adata, feature, model=model, progress=False, **options
        ),
        some(
            feature=FEATURES,
            model=list(MODELS),
            intervention=["set", "add", "scale", "ablate", "no"],
            value=[None, 1, 0, -1, 1e30, np.nan, "a"],
            quantile=[None, 0.5, 0, 1, 2, np.nan],
            reference=[None, "a", "no"],
            doses=[(0.0, 1.0), (1.0,), (), (np.nan,), (1, 1), (1e30,)],
            cells=[None, [True] * 24, [False] * 24, ["cell0", "cell1"], [], ["no"], [1, 2]],
            groupby=[None, "group", "donor", "depth", "none"],
            reconstruct=[True, False],
            net=["dict", "empty", "other genes", "number", "one gene each"],
            n_controls=[0, 1, 3, -1],
            control_keys=[(), ("no",), "sae"],
            n_neighbors=[1, 3, 15, 0],
            n_genes=[None, 1, 0],
            pseudocount=[0.1, 0, np.nan],
            key_added=[None, "X_st", "sae", "", "a/b"],
            layer_added=[None, "st", "", "a/b"],
            rng=RNG,
        ).map(lambda drawn: {"model": "linear", "n_controls": 1, **drawn}),
        examples=40,
    ),
    "evaluate": Verb(
        partial(sae.tl.evaluate, progress=False),
        some(
            groupby=["group", "donor", "depth", "none"],
            net=["dict", "empty", "other genes", "one gene each"],
            layer=[None, "nope"],
            baselines=[["representation", "pca"], ["fastica"], ["nmf", "genes"], ["random_directions", "random_rectified"], ["frozen_decoder"], ["l1_genes", "l1_latent"], ["input_x_gradient"], [], ["no"], "pca"],
            donor=[None, "donor", "depth", "group"],
            n_cells=[5000, 20, 1, 0],
            n_splits=[1, 2],
            n_bootstrap=[5, 1, 0],
            n_neighbors=[1, 3, 15],
            min_size=[1, 5],
            rng=RNG,
        ).map(lambda drawn: {"baselines": ["pca"], "n_splits": 1, "n_bootstrap": 5, "n_neighbors": 3, **drawn}),
        examples=30,
    ),
    "stability": Verb(
        partial(sae.tl.stability, progress=False),
        some(n_seeds=[1, 2, 0, 1.5], subsample=[None, 0.5, 0.1, 1.0, 0.0, np.nan], device=["cpu", "no"], rng=RNG),
        OWN,
        examples=12,
    ),
    "recovery": Verb(
        sae.tl.recovery,
        some(
            truth=["group", "depth", ["group", "depth"], "none", "X_pca", [], {}, {"x": "depth"}, 3, None],
            use_rep=[None, "X_pca", "X", "none"],
            thresholds=[(0.9,), (), (1.0,), (np.nan,), 0.5],
            ceiling=[True, False],
            graph=[None, "no", np.ones((12, 1)), np.zeros((12, 3)), "words"],
            edges=["regression", "correlation", "cosine", "no"],
            cut=[None, 0.1, 0, 1],
            summary=[True, False],
            rng=RNG,
        ).map(lambda drawn: {"truth": "group", **drawn}),
        examples=30,
    ),
    "probe": Verb(
        partial(sae.tl.probe, progress=False),
        some(
            use_rep=[None, "X_pca", "X", "sae", "none"],
            targets=["group", "depth", ["group", "depth"], "none", "X_pca", [], {}, 3],
            n_folds=[2, 5, 1, 0, 99, 2.5],
            donor=[None, "donor", "depth", "none"],
            rng=RNG,
        ).map(lambda drawn: {"use_rep": "X_pca", "targets": "group", **drawn}),
        examples=30,
    ),
    "match": Verb(
        lambda adata, **options: sae.tl.match(adata, adata.copy(), **options),
        some(
            by=["auto", "decoder", "activations", "genes", "enrichment", "no"],
            use_raw=[None, True],
            collection=[None, "gene_sets", "no"],
            max_padj=[0.05, 1, 0],
            n_permutations=[None, 0, 1, -1],
            rng=RNG,
        ),
        ENRICHED,
        examples=20,
    ),
    "compare_enrichment": Verb(
        lambda adata, **options: sae.tl.compare_enrichment(adata, adata.copy(), **options),
        some(collection=[None, "gene_sets", "no"], max_padj=[0.05, 1, np.nan, 0], published=[True, False], n_permutations=[1, 3, 0], rng=RNG),
        ENRICHED,
    ),
    "sweep": Verb(
        partial(sae.tl.sweep, progress=False),
        some(
            grid=[{"n_features": [2, 4]}, {"k": [1, 99]}, {}, [], [{"n_features": 2}], {"no": [1]}, {"n_features": []}, {"n_features": 3}, [3], None, {"n_features": [2, 2]}],
            use_rep=[None, "X", "none"],
            groupby=[None, "group", "depth", "none"],
            truth=[None, "depth", "none"],
            n_seeds=[1, 2, 0],
            key_added=["sae_sweep", "sae", "", "a/b"],
            rng=RNG,
        ).map(lambda drawn: {"grid": {"n_features": [2, 4], "steps": [2]}, **drawn}),
        examples=10,
    ),
    "peaks_to_genes": Verb(
        sae.tl.peaks_to_genes,
        some(
            upstream=[0, 2000, -1, 2**62, 1.5],
            downstream=[0, 100],
            max_distance=[0, 5],
            genes=list(GENES),
        ).map(lambda drawn: {"genes": "table", **drawn}),
        examples=16,
    ),
    "report": Verb(
        lambda adata, **options: sae.report(adata, Path("page.html"), **options),
        some(),
        ALL,
        examples=6,
    ),
}  # fmt: skip
GETTERS = {
    name: partial(getattr(sae.get, name), **options)
    for name, options in [
        ("ablation", {}), ("activations", {}), ("decoder", {}), ("enrichment", {}), ("features", {}), ("genes", {}),
        ("history", {}), ("label_matrix", {}), ("label_summary", {}), ("labels", {}), ("metrics", {}), ("model", {}),
        ("modules", {}), ("neighbors", {}), ("params", {}), ("perturbation", {}), ("stability", {}), ("steering", {}),
        ("sweep", {}), ("embedding", {}), ("by_label", {"features": 0, "groupby": "group"}), ("term_features", {"term": "e"}),
        ("parent_terms", {"parents": pd.DataFrame({"term": ["e"], "name": ["early"], "parent": [None]})}),
        ("steering_arrows", {"key_added": "X_st"}),
    ]
}  # fmt: skip
TAKE_FEATURES = {"activations", "by_label", "enrichment", "genes", "label_matrix", "labels", "neighbors", "perturbation", "steering"}  # fmt: skip
FIGURES = {
    "density": sae.pl.density,
    "density by label": partial(sae.pl.density, groupby="group"),
    "enrichment": sae.pl.enrichment,
    "feature_card": partial(sae.pl.feature_card, feature=0),
    "feature_map": sae.pl.feature_map,
    "feature_umap": partial(sae.pl.feature_umap, features=[0]),
    "genes": partial(sae.pl.genes, features=[0]),
    "genes, volcano": partial(sae.pl.genes, features=[0], kind="volcano"),
    "history": sae.pl.history,
    "labels": sae.pl.labels,
    "lineage": lambda a: sae.pl.lineage(a, [0], "group", order=["a", "b", "c"]),
    "stability": sae.pl.stability,
    "steer": lambda a: sae.pl.steer(a, 0),
}


def run_first(adata: ad.AnnData, verbs: Mapping[str, Callable[[ad.AnnData], Any]], names: frozenset[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in verbs:
            if name in names:
                try:
                    verbs[name](adata)
                except TYPED:
                    pass


COUNTS: Counter[tuple[str, str]] = Counter()
"""Cases of this run by verb and by what came of them."""


def call(name: str, recipe: Recipe, options: dict[str, Any], adata: ad.AnnData) -> Any:
    """Call a verb with what its drawn options stand for."""
    if name == "peaks_to_genes":
        options = {**options, "genes": GENES[options["genes"]]}
    return VERBS[name].call(adata, **_net(adata, recipe.text, options))


def peaks(n: int) -> list[str]:
    return [f"chr1:{i}-{i + 5}" for i in range(n)]


def check(compare: Any, name: str, recipe: Recipe, options: dict[str, Any], first: frozenset[str]) -> None:
    """Run one case of a verb."""
    adata = build(recipe)
    run_first(adata, VERBS[name].first, first)
    if name == "peaks_to_genes":
        adata.var_names = peaks(adata.n_vars)
    result, error = result_or_typed_error(compare, adata, lambda: call(name, recipe, options, adata))
    COUNTS[name, type(error).__name__] += 1
    if error is None:
        if isinstance(result, pd.DataFrame):
            assert_table(result, name)
        for key in sae._schema.stored_keys(adata.uns):
            assert_sense(adata, key)


@pytest.mark.parametrize("name", VERBS)
def test_result_or_typed_error(name, compare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verb = VERBS[name]

    @few(verb.examples)
    @given(recipe=recipes(), options=verb.options, first=verb.before)
    def property_(recipe, options, first):
        check(compare, name, recipe, options, first)

    property_()


READERS: dict[str, Verb] = {
    **{f"get.{name}": Verb(getter, first=ALL) for name, getter in GETTERS.items()},
    **{f"get.{name}, some": Verb(GETTERS[name], some(feature=FEATURES).map(lambda o: {"feature": 0, **o}), ALL) for name in sorted(TAKE_FEATURES - {"by_label", "label_matrix"})},
    "get.by_label, some": Verb(GETTERS["by_label"], some(groupby=GROUPBY, order=[["b", "a"], [], ["no"]], n_bins=[1, 0, 3], donor=["donor", "depth", "none"]), ALL),
    "get.label_matrix, some": Verb(GETTERS["label_matrix"], some(groupby=GROUPBY, metric=["f1", "difference", "no"], features=FEATURES), ALL),
    **{f"pl.{name}": Verb(figure, first=ALL) for name, figure in FIGURES.items()},
}  # fmt: skip
"""What changes nothing, whatever comes of it."""


FIRST = {"stability": {**OWN, **STABLE}, "sweep": {"sweep": lambda a: sae.tl.sweep(a, {"n_features": [2, 4], "steps": [2]}, progress=False)}}  # fmt: skip
for _name, _reader in READERS.items():
    _last = _name.removesuffix(", some").rpartition(".")[2]
    READERS[_name] = replace(_reader, first=FIRST.get(_last, ALL))
READ_FROM = [
    Recipe(n=n, g=g, h=h, peculiar=peculiar)
    for n, g, h, peculiar in [
        (24, 12, 6, ()), (24, 12, 1, ()), (40, 1, 2, ()), (2, 12, 6, ()), (24, 12, 6, ("all features dead",)),
        (24, 12, 6, ("all features active",)), (24, 12, 6, ("joined",)), (24, 12, 6, ("view of none",)),
        (24, 12, 6, ("labels: names of missing values", "var names: slash")), (24, 12, 6, ("obs names: twice",)),
        (24, 12, 6, ("labels: one value",)), (24, 12, 6, ("activations dense",)), (24, 12, 6, ("X as int8",)),
        (24, 12, 6, ("view in reverse",)), (24, 12, 6, ("no activations",)), (24, 12, 6, ("labels: long", "var names: long")),
    ]
]  # fmt: skip
"""Few, since everything is computed for each."""


@lru_cache
def analysed(recipe: Recipe, kind: str, left_out: frozenset[str]) -> ad.AnnData:
    """Build an object and run all verbs that a getter or figure reads from, but some."""
    adata, first = build(recipe), FIRST.get(kind, ALL)
    run_first(adata, first, frozenset(first) - left_out)
    return adata


def check_reader(compare: Any, name: str, recipe: Recipe, options: dict[str, Any], first: frozenset[str]) -> None:
    """Run one case of a getter or a figure."""
    from matplotlib import pyplot as plt

    reader = READERS[name]
    kind = name.removesuffix(", some").rpartition(".")[2]
    adata = analysed(recipe, kind if kind in FIRST else "", frozenset(reader.first) - first)
    before = state_of(compare, adata)
    _, error = result_or_typed_error(compare, adata, lambda: reader.call(adata, **options))
    plt.close("all")
    COUNTS[name, type(error).__name__] += 1
    compare.assert_same(before, state_of(compare, adata))


@few(100)
@given(data=st.data(), name=st.sampled_from(sorted(READERS)), recipe=st.sampled_from(READ_FROM))
def test_reading_changes_nothing(compare, data, name, recipe):
    first = READERS[name].first
    left_out = data.draw(st.sets(st.sampled_from(sorted(first)), max_size=1)) if recipe == READ_FROM[0] else set()
    check_reader(compare, name, recipe, data.draw(READERS[name].options), frozenset(first) - left_out)


# ---- files -------------------------------------------------------------------------------------------------------------


def written(adata: ad.AnnData, path: Path) -> ad.AnnData:
    """Write and read again."""
    kind = path.suffix.removeprefix(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(adata.copy(), f"write_{kind}")(path)
        return getattr(ad, f"read_{kind}")(path)


def plain_values(column: pd.Series) -> list[Any]:
    """List the values, text and categories as text."""
    if pd.api.types.is_numeric_dtype(column):
        return column.to_numpy(np.float64, na_value=np.nan).tolist()
    return [None if pd.isna(value) else str(value) for value in column]


@few(12)
@given(data=st.data(), name=st.sampled_from(sorted(VERBS)), recipe=recipes(), kind=st.sampled_from(["h5ad", "zarr"]))
def test_what_a_verb_leaves_can_be_written(data, name, recipe, kind):
    """If what it was given could be."""
    verb, adata = VERBS[name], build(recipe)
    options, first = data.draw(verb.options), data.draw(verb.before)
    if name == "peaks_to_genes":
        adata.var_names = peaks(adata.n_vars)
    with TemporaryDirectory() as folder, chdir(folder):
        try:
            written(adata, Path(f"before.{kind}"))
        except Exception:  # noqa: BLE001 (what anndata cannot write is not ours)
            return
        run_first(adata, verb.first, first)
        run_first(adata, {name: partial(call, name, recipe, options)}, frozenset([name]))
        back = written(adata, Path(f"after.{kind}"))
    for key in sae._schema.stored_keys(adata.uns):
        kept, found = adata.uns[key], back.uns[key]
        assert kept.keys() == found.keys()
        for table, value in kept.items():
            if isinstance(value, pd.DataFrame):
                assert list(value) == list(found[table])
                for column in value:
                    np.testing.assert_array_equal(plain_values(value[column]), plain_values(found[table][column]))
    COUNTS["written", kind] += 1


# ---- encode: every cell alone ------------------------------------------------------------------------------------------


def encoded(x: Any, d: int, h: int, architecture: str) -> sparse.csr_matrix:
    adata = ad.AnnData(obs=pd.DataFrame(index=[f"c{i}" for i in range(x.shape[0])]))
    adata.obsm["X_pca"] = x
    adata.uns["sae"] = _copied(trained(d, h, architecture))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sae.tl.encode(adata, progress=False)
    return adata.obsm["sae"]


def same(a: sparse.csr_matrix, b: sparse.csr_matrix) -> bool:
    """Tell whether two matrices are equal to the last bit, and stored in the same way."""
    return a.shape == b.shape and all(
        np.array_equal(getattr(a, part), getattr(b, part)) for part in ("indptr", "indices", "data")
    )


@few(60)
@given(
    recipe=recipes(peculiar=()),
    layout=st.sampled_from(sorted(LAYOUTS)),
    scale=st.sampled_from([1.0, 1e30, 1e-30, 1e-40, 0.0]),
    seed=st.integers(0, 99),
)
def test_a_cell_is_encoded_alone_as_in_any_company(recipe, layout, scale, seed):
    """Bit-equal in any order, number, memory layout and type that holds the same float32 values."""
    rng = np.random.default_rng(seed)
    size = recipe.d, recipe.h, recipe.architecture
    x = plain(replace(recipe, n=max(recipe.n, 1) * int(rng.choice([1, 60])))).obsm["X_pca"] * np.float32(scale)
    a = encoded(x, *size)
    assert a.dtype == np.float32 and a.has_canonical_format and (a.data > 0).all()
    assert same(a, encoded(LAYOUTS[layout](x), *size))
    order = rng.permutation(len(x))
    assert same(a[order], encoded(x[order], *size))
    alone = int(rng.integers(len(x)))
    assert same(a[alone], encoded(x[[alone]], *size))
    COUNTS["encode, alone", layout] += 1


# ---- what was found ----------------------------------------------------------------------------------------------------

FOUND: list[tuple[str, Recipe, dict[str, Any]]] = [
    ("fit", Recipe(), {"steps": 3, "n_features": True}),
    ("fit", Recipe(), {"steps": 3, "rng": 2**70}),
    ("fit", Recipe(peculiar=("obsm with one beyond float32",)), {"steps": 3}),
    ("fit", Recipe(peculiar=("obsm long double",)), {"steps": 3}),
    ("encode", Recipe(peculiar=("obsm with one beyond float32",)), {}),
    ("encode", Recipe(peculiar=("representation beyond float32",)), {}),
    ("rank_genes", Recipe(peculiar=("X with one beyond float32",)), {"min_cells": 2}),
    ("rank_genes", Recipe(peculiar=("X long double", "X csr")), {"min_cells": 2}),
    ("rank_genes", Recipe(n=0), {"percentile": 50}),
    ("rank_genes", Recipe(n=0), {"method": "regression"}),
    ("rank_genes", Recipe(), {"model": "no genes"}),
    ("rank_genes", Recipe(peculiar=("uns log1p is a string",)), {"min_cells": 2}),
    ("rank_genes", Recipe(n=10, peculiar=("X as int8",)), {"min_cells": 2, "min_expected": 0}),
    ("enrich", Recipe(), {"net": "set of a number"}),
    ("enrich", Recipe(), {"net": "set of None"}),
    ("enrich", Recipe(), {"net": "bytes"}),
    ("enrich", Recipe(), {"net": "equal columns", "min_size": 1}),
    ("enrich", Recipe(), {"net": "words for weights", "min_size": 1}),
    ("enrich", Recipe(), {"net": "infinite weight", "min_size": 1}),
    ("enrich", Recipe(), {"net": "folder"}),
    ("enrich", Recipe(), {"net": "NUL in the name"}),
    ("enrich", Recipe(), {"net": "empty path"}),
    ("ablate", Recipe(), {"features": 1.5}),
    ("steer", Recipe(), {"feature": 1.5}),
    ("steer", Recipe(n=40), {"model": "NaN", "n_controls": 1}),
    ("steer", Recipe(n=40, peculiar=("obsm with one huge",)), {"model": "linear", "n_controls": 1}),
    ("evaluate", Recipe(n=0), {"baselines": ["pca"]}),
    ("evaluate", Recipe(n=40, peculiar=("obsm with ones",)), {"baselines": ["pca"], "n_neighbors": 3}),
    ("evaluate", Recipe(n=40, peculiar=("obsm with zeros",)), {"baselines": ["frozen_decoder"], "n_neighbors": 3}),
    (
        "evaluate",
        Recipe(n=40, d=1, g=12, h=2, peculiar=("obsm as float64", "obsm as uint64"), seed=2),
        {"baselines": [], "n_splits": 1, "n_bootstrap": 5, "n_neighbors": 3},
    ),
    ("steer", Recipe(), {"value": "a"}),
    (
        "steer",
        Recipe(n=40, d=5, g=20, h=2, architecture="relu", seed=2),
        {"model": "linear", "n_controls": 1, "value": 1e30},
    ),
    ("recovery", Recipe(), {"truth": 3}),
    ("recovery", Recipe(), {"truth": "depth", "thresholds": 0.5}),
    ("probe", Recipe(), {"use_rep": "X_pca", "targets": 3}),
]
"""Cases that once ended in an error of NumPy, pandas or SciPy, in a warning, or in nonsense."""


@pytest.mark.parametrize(
    ("name", "recipe", "options"), FOUND, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_was_found(name, recipe, options, compare):
    check(compare, name, recipe, options, frozenset(VERBS[name].first))
