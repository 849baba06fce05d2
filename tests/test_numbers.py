"""How exact results are: single against double precision, threads, chunks, and the order of the cells."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import sae
from sae.core import (
    autoencoder,
    columns,
    feature_statistics,
    label_scan,
    moments,
    regression,
    rows,
    set_search,
    wilcoxon,
)

N, D, G, H = 900, 8, 60, 12
SETS = {f"set{i}": [f"g{j}" for j in range(6 * i, 6 * i + 9)] for i in range(8)}


def made(dtype: str = "float32", layout: str = "dense") -> ad.AnnData:
    """Make cells in three groups whose values are no float32 numbers, held as the dtype."""
    rng = np.random.default_rng(0)
    group, batch = rng.integers(3, size=N), rng.integers(2, size=N)
    z = rng.normal(size=(3, D))[group] * 2 + rng.normal(size=(N, D))
    counts = rng.poisson(np.exp(0.7 * rng.normal(size=(3, G)))[group] * np.exp(0.3 * z[:, :1]))
    x = np.log1p(counts * (1 + 0.1 * rng.random(size=(N, 1)))).astype(dtype)
    obs = pd.DataFrame(
        {
            "group": pd.Categorical(np.array(["a", "b", "c"])[group]),
            "batch": pd.Categorical(np.array(["x", "y"])[batch]),
            "depth": rng.normal(size=N),
        },
        index=[f"cell{i}" for i in range(N)],
    )
    adata = ad.AnnData(
        sparse.csr_matrix(x) if layout == "csr" else x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(G)])
    )
    adata.obsm["X_pca"] = z.astype(dtype)
    return adata


def fit(adata: ad.AnnData) -> None:
    sae.tl.fit(adata, n_features=H, k=3, steps=300, progress=False)


def genes(adata: ad.AnnData, **how: Any) -> pd.DataFrame:
    sae.tl.rank_genes(adata, n_genes=None, progress=False, **how)
    return sae.get.genes(adata).astype({"feature": str, "gene": str}).sort_values(["feature", "gene"])


def sets(adata: ad.AnnData, **how: Any) -> pd.DataFrame:
    how = {"max_padj": 1, "min_log2fc": 0, "n_sets": None, "n_null": 0, "progress": False} | how
    sae.tl.enrich(adata, SETS, **how)
    by = ["feature", "gene_set", "direction"]
    found = sae.get.enrichment(adata).drop(columns=["collection", "genes", "fdr"])
    return found.astype(dict.fromkeys(by, str)).sort_values(by)


def labels(adata: ad.AnnData) -> pd.DataFrame:
    sae.tl.score_labels(adata, "group", progress=False)
    found = sae.get.labels(adata).drop(columns=["groupby"])
    return found.astype({"feature": str, "label": str}).sort_values(["feature", "label"])


def responses(adata: ad.AnnData) -> pd.DataFrame:
    sae.tl.perturbation(adata, "group", "a", n_permutations=20, progress=False)
    found = sae.get.perturbation(adata)
    return (
        found.select_dtypes("number")
        .assign(feature=found["feature"].astype(str), name=found["perturbation"].astype(str))
        .sort_values(["feature", "name"])
    )


def steered(adata: ad.AnnData) -> pd.DataFrame:
    loadings = np.random.default_rng(1).normal(size=(D, G)) / 10
    model = sae.models.Functions(decode=lambda z, data: z.astype(np.float64) @ loadings, scale="linear")
    sae.tl.steer(adata, [0, 1], model=model, value=1, groupby="group", n_controls=2, n_genes=None, progress=False)
    found = sae.get.steering(adata)
    return (
        found.select_dtypes("number")
        .assign(feature=found["feature"].astype(str), gene=found["gene"].astype(str), label=found["label"].astype(str))
        .sort_values(["feature", "gene", "label", "dose"])
    )


def evaluated(adata: ad.AnnData) -> pd.DataFrame:
    sae.tl.evaluate(adata, "group", baselines=["representation"], n_splits=2, n_bootstrap=20, progress=False)
    return sae.get.metrics(adata)


def ablated(adata: ad.AnnData) -> np.ndarray:
    sae.tl.ablate(adata, [0], key_added="X_without", n_controls=0, progress=False)
    return adata.obsm["X_without"]


def on_map(adata: ad.AnnData) -> pd.DataFrame:
    sae.tl.feature_map(adata, n_neighbors=3)
    return sae.get.neighbors(adata).assign(
        feature=lambda t: t["feature"].astype(str), neighbor=lambda t: t["neighbor"].astype(str)
    )


VERBS: dict[str, Callable[[ad.AnnData], Any]] = {
    "encode": lambda a: a.obsm["sae"],
    "encode, statistics": lambda a: a.uns["sae"]["features"].iloc[:, :5],
    "rank_genes": genes,
    "rank_genes, percentile": lambda a: genes(a, percentile=90),
    "rank_genes, wilcoxon": lambda a: genes(a, method="wilcoxon"),
    "rank_genes, regression": lambda a: genes(a, method="regression", covariates=["depth", "batch"]),
    "rank_genes, batch": lambda a: genes(a, batch="batch"),
    "enrich": sets,
    "enrich, mannwhitney": lambda a: sets(a, method="mannwhitney"),
    "enrich, ulm": lambda a: sets(a, method="ulm"),
    "enrich, gsea": lambda a: sets(a, method="gsea"),
    "enrich, aucell": lambda a: sets(a, method="aucell"),
    "enrich, scfeaturelens": lambda a: sets(a, method="scfeaturelens"),
    "score_labels": labels,
    "perturbation": responses,
    "steer": steered,
    "ablate": ablated,
    "evaluate": evaluated,
    "feature_map": on_map,
    "recovery": lambda a: sae.tl.recovery(a, "depth"),
    "probe": lambda a: sae.tl.probe(a, "X_pca", ["group", "depth"], progress=False),
    "match": lambda a: sae.tl.match(a, a.copy(), n_permutations=2),
}
"""What is compared: every verb, with a table or a matrix that it writes."""


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    """The SAE of all comparisons but those of `fit`."""
    adata = made()
    fit(adata)
    return adata.uns["sae"]


def encoded(adata: ad.AnnData, weights: dict[str, Any]) -> ad.AnnData:
    adata.uns["sae"] = dict(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sae.tl.encode(adata, progress=False)
    return adata


def difference(a: Any, b: Any) -> float:
    """Largest difference of two results, relative to the size of each column; tables must be of the same rows, NaN in the same places."""
    if sparse.issparse(a):
        a, b = a.toarray(), b.toarray()
    if isinstance(a, np.ndarray):
        a, b = pd.DataFrame(a), pd.DataFrame(b)
    assert a.shape == b.shape and list(a.columns) == list(b.columns)
    apart = 0.0
    for name in a:
        one, other = a[name].to_numpy(), b[name].to_numpy()
        if not pd.api.types.is_float_dtype(a[name]):
            assert one.tolist() == other.tolist(), name
            continue
        assert np.array_equal(np.isnan(one), np.isnan(other)), name
        known = np.isfinite(one)
        assert np.array_equal(one[~known], other[~known], equal_nan=True), name
        if known.any():
            apart = max(apart, float(np.abs(one[known] - other[known]).max() / max(np.abs(one[known]).max(), 1e-300)))
    return apart


@dataclass(frozen=True)
class Exactness:
    """Bounds of relative differences: 0 is equal to the last bit."""

    double: float
    """Input in float64 against the same values rounded to float32."""
    order: float
    """The same cells in another order, but for columns that depend on what is drawn."""
    drawn: tuple[str, ...] = ()
    """Columns of random halves, permutations or resamples of cells, which are drawn by position."""


TOLERANCE = {
    "encode": Exactness(0, 0),
    "encode, statistics": Exactness(0, 1e-12),
    "rank_genes": Exactness(1e-6, 1e-11),
    "rank_genes, percentile": Exactness(1e-6, 1e-11),
    "rank_genes, wilcoxon": Exactness(1e-6, 1e-11),
    "rank_genes, regression": Exactness(1e-6, 1e-11),
    "rank_genes, batch": Exactness(1e-6, 1e-11),
    "enrich": Exactness(1e-6, 1e-11),
    "enrich, mannwhitney": Exactness(1e-6, 1e-11),
    "enrich, ulm": Exactness(1e-6, 1e-11),
    # Genes that rank alike change places, and its p-values count permutations.
    "enrich, gsea": Exactness(0.05, 0.05),
    "enrich, aucell": Exactness(1e-6, 1e-11),
    "enrich, scfeaturelens": Exactness(1e-6, 1e-11),
    "score_labels": Exactness(0, 1e-11, ("held_out_auroc", "held_out_f1")),
    "perturbation": Exactness(0, 1e-11, ("fdr", "responds")),
    # The t statistic of changes that are the same in all cells but for rounding.
    "steer": Exactness(1e-6, 1e-3),
    "ablate": Exactness(1e-6, 0),
    "evaluate": Exactness(1e-6, 0.01, ("ci_low", "ci_high", "difference", "difference_low", "difference_high")),
    "feature_map": Exactness(1e-6, 1e-11),
    "recovery": Exactness(1e-6, 1e-11),
    # Folds are drawn by position.
    "probe": Exactness(1e-6, 0.05),
    "match": Exactness(1e-6, 1e-11),
}
"""What docs/concepts/numbers.md states."""


def result(adata: ad.AnnData, verb: str) -> Any:
    return VERBS[verb](adata.copy())


@pytest.fixture(scope="module")
def expected(weights) -> dict[str, Any]:
    """All results on dense single precision."""
    adata = encoded(made(), weights)
    return {verb: result(adata, verb) for verb in VERBS}


@pytest.fixture(scope="module")
def in_double(weights) -> ad.AnnData:
    return encoded(made("float64"), weights)


@pytest.fixture(scope="module")
def reordered(weights) -> tuple[ad.AnnData, np.ndarray]:
    order = np.random.default_rng(5).permutation(N)
    return encoded(made()[order].copy(), weights), order


def test_fit_in_double_precision(weights):
    """Training is in float32: the rounding of the input is all that differs."""
    adata = made("float64")
    fit(adata)
    found = adata.uns["sae"]
    assert found["params"]["fvu"] == pytest.approx(weights["params"]["fvu"], rel=1e-5)
    for name, values in weights["weights"].items():
        np.testing.assert_allclose(found["weights"][name], values, rtol=0, atol=1e-4 * np.abs(values).max())


@pytest.mark.parametrize("verb", VERBS)
def test_double_precision(verb, expected, in_double):
    assert difference(expected[verb], result(in_double, verb)) <= TOLERANCE[verb].double


@pytest.mark.parametrize("verb", VERBS)
def test_order_of_the_cells(verb, expected, reordered):
    adata, order = reordered
    found, before = result(adata, verb), expected[verb]
    if not isinstance(found, pd.DataFrame):
        before = before[order]
    elif TOLERANCE[verb].drawn:
        found, before = (table.drop(columns=list(TOLERANCE[verb].drawn), errors="ignore") for table in (found, before))
    assert difference(before, found) <= TOLERANCE[verb].order


SMALL: dict[str, tuple[Any, str, int]] = {
    "moments.CHUNK_ROWS": (moments, "CHUNK_ROWS", 64),
    "moments.CHUNK_ROWS, odd": (moments, "CHUNK_ROWS", 7),
    "moments.CHUNK_VALUES": (moments, "CHUNK_VALUES", 500),
    "moments.GENES_PER_TASK": (moments, "GENES_PER_TASK", 5),
    "moments.SUM_VALUES": (moments, "SUM_VALUES", 3 * G),
    "autoencoder.BLOCK_ROWS": (autoencoder, "BLOCK_ROWS", 10),
    "autoencoder.BLOCK_ROWS, odd": (autoencoder, "BLOCK_ROWS", 7),
    "columns.COLUMN_VALUES": (columns, "COLUMN_VALUES", 3 * N),
    "label_scan.RESULT_VALUES": (label_scan, "RESULT_VALUES", 20),
    "wilcoxon.SUM_VALUES": (wilcoxon, "SUM_VALUES", 5 * G),
    "regression.SUM_VALUES": (regression, "SUM_VALUES", 5 * G),
    "set_search.BLOCK_VALUES": (set_search, "BLOCK_VALUES", 5 * G),
    "feature_statistics.PIECE_ROWS": (feature_statistics, "PIECE_ROWS", 50),
}
"""How much is held or computed at a time, made small."""


@pytest.mark.parametrize(("module", "name", "value"), SMALL.values(), ids=SMALL)
def test_size_of_the_chunks(module, name, value, expected, weights, monkeypatch):
    monkeypatch.setattr(module, name, value)
    adata = encoded(made(), weights)
    for verb in CHUNKED:
        assert difference(expected[verb], result(adata, verb)) == 0, verb


CHUNKED = ["encode", "encode, statistics", "rank_genes", "rank_genes, percentile", "rank_genes, wilcoxon", "rank_genes, regression", "rank_genes, batch", "enrich", "enrich, ulm", "score_labels", "perturbation", "steer", "ablate"]  # fmt: skip


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_size_of_what_is_read_from_disk(layout, weights, monkeypatch, tmp_path):
    """HDF5 in chunks of its own choice, and pieces of a few rows or of all."""
    before = encoded(made(layout=layout), weights)
    before.write_h5ad(tmp_path / "cells.h5ad")
    for size in (1, 4000, 10**9):
        monkeypatch.setattr(rows, "PIECE_BYTES", size)
        backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
        for verb in ("rank_genes", "rank_genes, regression", "enrich"):
            now = backed.to_memory()
            now.X = backed.X
            assert difference(result(before, verb), VERBS[verb](now)) == 0, (verb, size)
        backed.file.close()


def digests() -> str:
    """Hash every result, fit included."""
    adata = made()
    fit(adata)
    sae.tl.encode(adata, progress=False)
    lines = [f"fit {_digest(pd.DataFrame(adata.uns['sae']['weights']['W_dec']))}"]
    lines += [f"{verb} {_digest(result(adata, verb))}" for verb in VERBS]
    return "\n".join(lines)


def _digest(found: Any) -> str:
    if sparse.issparse(found):
        found = found.toarray()
    table = found if isinstance(found, pd.DataFrame) else pd.DataFrame(found)
    values = [table[name].to_numpy() for name in table]
    parts = [repr(v.tolist()) if v.dtype.kind not in "biuf" else v.tobytes().hex() for v in values]
    return hashlib.blake2b("|".join(parts).encode(), digest_size=8).hexdigest()


def test_number_of_threads():
    """Every verb, in processes of one and of three threads: equal to the last bit."""
    code = (
        "import importlib.util, scanpy; scanpy.settings.verbosity = 0\n"
        f"spec = importlib.util.spec_from_file_location('numbers_', {__file__!r})\n"
        "import sys; module = sys.modules['numbers_'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module); print(module.digests())"
    )
    found = {}
    for n in ("1", "3"):
        threads = {f"{name}_NUM_THREADS": n for name in ("OMP", "OPENBLAS", "MKL", "NUMBA")}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | threads | {"OMP_WAIT_POLICY": "PASSIVE"},
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
        found[n] = done.stdout.splitlines()
    assert len(found["1"]) == len(VERBS) + 1
    assert found["3"] == found["1"]


def test_every_tolerance_is_of_a_verb():
    assert TOLERANCE.keys() == VERBS.keys()
