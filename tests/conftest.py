"""Cells to test on: real ones, fitted once and copied for every test, and small made-up ones."""

from __future__ import annotations

import os

# Before torch loads its OpenMP: idle threads that spin starve the other test worker.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import io
import signal
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import anndata as ad
import hypothesis
import matplotlib
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

import sae

matplotlib.use("Agg")
# A first example may have to wait until a kernel is compiled.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")
if hasattr(mudata, "set_options"):
    # What mudata 0.4 does anyway; before, every update warns without it.
    mudata.set_options(pull_on_update=False)

QUICK = {"n_features": 32, "steps": 150, "progress": False}
"""Enough training on 700 cells for features that mean something."""


@pytest.fixture(scope="session", autouse=True)
def _interruptible():
    """What a script starts in the background ignores Ctrl-C, and tests that send it would wait for ever."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def _pbmc():
    return sae.datasets.pbmc68k()


@pytest.fixture(scope="session")
def _fitted(_pbmc):
    adata = _pbmc.copy()
    sae.tl.fit(adata, **QUICK)
    return adata


@pytest.fixture(scope="session")
def _encoded(_fitted):
    adata = _fitted.copy()
    sae.tl.encode(adata)
    return adata


@pytest.fixture(scope="session")
def _analysed(_encoded):
    adata = _encoded.copy()
    sae.tl.rank_genes(adata)
    sae.tl.enrich(adata, sae.datasets.immune_markers(), collection="immune", progress=False)
    sae.tl.score_labels(adata, "bulk_labels")
    sae.tl.score_labels(adata, "phase")
    model = sae.models.Functions(decode=_linear, genes=["up", "down"], scale="linear")
    sae.tl.steer(adata, [0, 1], model=model, value=1, groupby="bulk_labels", n_controls=2, progress=False)
    sae.tl.ablate(adata, [0], batch="phase", groupby="bulk_labels", n_controls=2, progress=False)
    sae.tl.perturbation(adata, "bulk_labels", "Dendritic", n_permutations=10, progress=False)
    few = {"baselines": ["pca", "genes"], "n_splits": 1, "n_bootstrap": 50}
    sae.tl.evaluate(adata, "bulk_labels", sae.datasets.immune_markers(), progress=False, **few)
    sae.tl.stability(adata, n_seeds=1, progress=False)
    sae.tl.feature_map(adata)
    sae.tl.sweep(adata, {"n_features": [16, 32], "steps": 50}, progress=False)
    return adata


def _linear(z, data):
    return np.column_stack([z[:, 0], -z[:, 0]])


@pytest.fixture
def pbmc(_pbmc):
    """700 real cells with `X_pca`, without an SAE."""
    return _pbmc.copy()


@pytest.fixture
def fitted(_fitted):
    """The same after `tl.fit`."""
    return _fitted.copy()


@pytest.fixture
def encoded(_encoded):
    """The same after `tl.encode`."""
    return _encoded.copy()


@pytest.fixture
def analysed(_analysed):
    """The same after every verb."""
    return _analysed.copy()


@pytest.fixture(scope="session")
def net():
    """Markers of the immune cell types."""
    return sae.datasets.immune_markers()


def _make_adata(
    n: int = 80, d: int = 6, g: int = 20, *, layout: str = "dense", first: int = 0, seed: int = 0
) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    group = rng.integers(3, size=n)
    expected = np.exp(rng.normal(size=(3, g)))
    x = np.log1p(rng.poisson(expected[group]) * 0.7).astype(np.float32)
    embedding = rng.normal(size=(3, d))[group] * 2 + rng.normal(size=(n, d))
    obs = pd.DataFrame(
        {"group": pd.Categorical(np.array(["a", "b", "c"])[group])}, index=[f"cell{first + i}" for i in range(n)]
    )
    var = pd.DataFrame(index=[f"g{i}" for i in range(g)])
    adata = ad.AnnData(sparse.csr_matrix(x) if layout == "csr" else x, obs=obs, var=var)
    adata.obsm["X_pca"] = embedding.astype(np.float32)
    return adata


@pytest.fixture(scope="session")
def make_adata():
    """Factory of small AnnData: n cells in three groups (`obs["group"]`), `X_pca` (n, d), log1p values of g genes."""
    return _make_adata


@pytest.fixture(scope="session")
def make_mudata():
    """Factory of small MuData: `rna` on all n cells, `adt` on the last n − 10 in reverse, and a joint `X_joint`."""

    def make(n: int = 80, d: int = 6) -> mudata.MuData:
        rna, adt = _make_adata(n, d), _make_adata(n - 10, d, 8, first=10, seed=1)[::-1].copy()
        adt.var_names = [f"p{i}" for i in range(adt.n_vars)]
        mdata = mudata.MuData({"rna": rna, "adt": adt})
        mdata.obs["group"] = rna.obs["group"].reindex(mdata.obs_names)
        mdata.obsm["X_joint"] = rna[mdata.obs_names].obsm["X_pca"][:, ::-1].copy()
        return mdata

    return make


@pytest.fixture
def log():
    """What Scanpy logs at its default verbosity; call it for the text so far."""
    before = sc.settings.logfile, sc.settings.verbosity
    stream = io.StringIO()
    sc.settings.logfile, sc.settings.verbosity = stream, "warning"
    yield stream.getvalue
    sc.settings.logfile, sc.settings.verbosity = before


@dataclass(frozen=True)
class Comparison:
    """Find the differences between two states of an object, down to dtypes and categories."""

    @staticmethod
    def state(data: ad.AnnData | mudata.MuData) -> dict:
        """Copy everything that a verb could touch."""
        with warnings.catch_warnings():
            # anndata says so at every copy; repeated gene names are among the bad input.
            warnings.filterwarnings("ignore", message="Variable names are not unique")
            copied = data.copy()
        if isinstance(data, mudata.MuData):
            slots = {name: Comparison.state(part) for name, part in copied.mod.items()}
        else:
            raw = None if copied.raw is None else copied.raw.X
            slots = {"X": copied.X, "layers": dict(copied.layers), "raw": raw}
        for slot in ("obs", "var"):
            slots[slot] = getattr(copied, slot)
        for slot in ("uns", "obsm", "varm", "obsp"):
            slots[slot] = dict(getattr(copied, slot))
        return slots

    @staticmethod
    def without_type_of_nothing(table: pd.DataFrame) -> pd.DataFrame:
        """Make an empty list of categories `object`, as files return it; with pandas 3 it can be `str` before."""
        table = table.copy()
        for i, dtype in enumerate(table.dtypes):
            if isinstance(dtype, pd.CategoricalDtype) and dtype.categories.empty:
                table.isetitem(i, table.iloc[:, i].cat.set_categories(pd.Index([], dtype=object)))
        return table

    @staticmethod
    def assert_same(a: object, b: object, path: str = "") -> None:
        """Compare nested values; a number that storage returned as a NumPy scalar is the same number."""
        if isinstance(a, Mapping):
            assert isinstance(b, Mapping), path
            assert set(a) == set(b), path
            for name in a:
                Comparison.assert_same(a[name], b[name], f"{path}[{name!r}]")
        elif isinstance(a, pd.DataFrame):
            pair = Comparison.without_type_of_nothing(a), Comparison.without_type_of_nothing(b)
            pd.testing.assert_frame_equal(*pair, check_exact=True, check_names=False, obj=path)
        elif sparse.issparse(a):
            assert type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape, path
            for part in ("indptr", "indices", "data"):
                np.testing.assert_array_equal(getattr(a, part), getattr(b, part), err_msg=path)
        elif isinstance(a, np.ndarray) and a.dtype.kind in "OT":
            # Text is object in memory and from h5ad, StringDType from zarr.
            assert isinstance(b, np.ndarray) and b.dtype.kind in "OT", path
            assert a.tolist() == b.tolist(), path
        elif isinstance(a, np.ndarray):
            assert isinstance(b, np.ndarray) and a.dtype == b.dtype, path
            np.testing.assert_array_equal(a, b, err_msg=path)
        elif isinstance(a, float) and np.isnan(a):
            assert np.isnan(b), path
        else:
            kinds = (bool, np.bool_), (int, np.integer), (float, np.floating), (str,), (type(None),)
            kind = next((kind for kind in kinds if isinstance(a, kind)), type(a))
            assert isinstance(b, kind) and a == b, f"{path}: {a!r} and {b!r}"


@pytest.fixture(scope="session")
def compare():
    """`compare.state(data)` before and after, and `compare.assert_same(before, after)`."""
    return Comparison
