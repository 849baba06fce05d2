"""Which features are alike: the nearest ones of each, the graph of them, its modules, and a layout in the plane."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from .enrichment import OverRepresentation, over_representation
from .rows import Matrix, varying_columns
from .signatures import signatures
from .similarity import Activations, Features, Sets, Vectors, blocks, highest

STEPS = 200
"""Of the walk on the graph that the layout starts from."""
EXTENT = 10
"""The layout starts within so many units of the origin, as UMAP's own do."""
MIN_DISTANCE, SPREAD = 0.5, 1.0
"""Of UMAP: how close points may lie, and how far they spread. The defaults of Scanpy."""
EPOCHS, FEWER_EPOCHS, MANY = 500, 200, 10_000
"""Of UMAP, up to `MANY` features and above, as it does itself."""
BISECTIONS = 64
LEAST_SCALE = 1e-3
"""The scale of a feature is at least this share of the mean distance of its neighbours (itself at 0 among them)."""


@dataclass(frozen=True)
class Nearest:
    """The nearest others of each of m features, the most similar first."""

    index: np.ndarray
    """(m, k), −1 where there are fewer that are similar at all."""
    similarity: np.ndarray
    """(m, k), 0 there."""


def coactivation(a: Matrix) -> tuple[Features, np.ndarray]:
    """Compare features by Pearson's r of their activations (n, h); mark those that vary, which alone can be compared."""
    return Activations.alive(a)


def gene_signatures(a: sparse.csr_matrix, x: Matrix, shift: np.ndarray) -> tuple[Features, np.ndarray]:
    """Compare features by the cosine of their correlations with every gene; mark those that vary.

    With 10,000 features and 20,000 genes this takes 2.4 GB, of which 0.8 GB stay.

    Parameters
    ----------
    a
        (n, h) activations.
    x
        (n, g) expression, in memory or read by rows.
    shift
        (g,) of :func:`sae.core.moments.scan`: a value of each gene, which sums are taken about.
    """
    alive = varying_columns(a)
    signature = signatures(a[:, alive], x, shift).astype(np.float32, order="C")
    length = np.sqrt(np.einsum("ij,ij->i", signature, signature))
    signature /= np.where(length > 0, length, 1)[:, None]
    return Vectors(signature), alive


def shared_sets(members: sparse.csr_matrix) -> tuple[Features, np.ndarray]:
    """Compare features by the Jaccard index of what they hold (h, m); mark those that hold anything."""
    return Sets.alive(members)


def directions(vectors: np.ndarray) -> tuple[Features, np.ndarray]:
    """Compare features by the cosine of vectors (h, d); mark those that are not zero."""
    return Vectors.alive(vectors)


def nearest(features: Features, k: int) -> Nearest:
    """Find the k nearest others of each feature, of those with a similarity above 0, looking at all pairs in blocks.

    Of several that are equally similar, the first ones are taken.
    """
    m = len(features)
    k = max(min(k, m - 1), 0)
    found = Nearest(np.full((m, k), -1), np.zeros((m, k)))
    if k == 0:
        return found
    for rows, block in blocks(features, features):
        block[np.arange(len(block)), np.arange(rows.start, rows.stop)] = -np.inf
        listed, columns, similarity, place = highest(block, k)
        found.index[rows.start + listed, place] = columns
        found.similarity[rows.start + listed, place] = similarity
    return found


def graph(found: Nearest) -> sparse.csr_matrix:
    r"""Join features to their nearest others (m, m), as UMAP does (McInnes et al. 2018, arXiv:1802.03426).

    With distances d = 1 − similarity and ρ the shortest one of a feature above 0, its directed edges have the strengths
    v = exp(−max(d − ρ, 0) / σ), with σ such that Σ v = log₂(k + 1). Of the two directions, v + v′ − v v′ is the edge.
    """
    # UMAP has it compiled, which takes ten seconds at the first call.
    m, k = found.index.shape
    there = found.index >= 0
    d = np.where(there, np.maximum(1 - found.similarity, 0), np.inf)
    nearest_one = np.where(d > 0, d, np.inf).min(axis=1, initial=np.inf, keepdims=True)
    beyond = np.maximum(d - np.where(np.isfinite(nearest_one), nearest_one, 0), 0)
    low, high, scale = np.zeros((m, 1)), np.full((m, 1), np.inf), np.ones((m, 1))
    for _ in range(BISECTIONS):
        above = np.exp(-beyond / scale).sum(axis=1, keepdims=True) > np.log2(k + 1)
        low, high = np.where(above, low, scale), np.where(above, scale, high)
        scale = np.where(np.isinf(high), 2 * low, (low + high) / 2)
    mean = np.where(there, d, 0).sum(axis=1, keepdims=True) / (k + 1)
    scale = np.maximum(scale, LEAST_SCALE * np.where(np.isfinite(nearest_one), mean, mean.mean() if m else 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        strength = np.where(beyond > 0, np.exp(-beyond / scale), 1)
    directed = sparse.csr_matrix((strength[there], (np.nonzero(there)[0], found.index[there])), shape=(m, m))
    return (directed + directed.T - directed.multiply(directed.T)).tocsr()


def modules(joined: sparse.csr_matrix, resolution: float, seed: int) -> np.ndarray:
    """Divide a graph into communities (Leiden on modularity, of two iterations), numbered by size; ties by their first member."""
    import igraph

    upper = sparse.triu(joined, k=1).tocoo()
    network = igraph.Graph(joined.shape[0], np.column_stack([upper.row, upper.col]).tolist())
    # igraph draws from Python's own generator, and is given that back.
    igraph.set_random_number_generator(random.Random(seed))
    try:
        found = network.community_leiden(
            "modularity", weights=upper.data.tolist(), resolution=resolution, n_iterations=2
        )
    finally:
        igraph.set_random_number_generator(random)
    _, first, codes, sizes = np.unique(found.membership, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(sizes), dtype=np.int64)
    rank[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return rank[codes]


def layout(joined: sparse.csr_matrix, seed: int) -> np.ndarray:
    """Place the m features of a graph in the plane (m, 2) by UMAP."""
    m = joined.shape[0]
    if m < 3 or joined.nnz == 0:
        return np.column_stack([np.arange(m), np.zeros(m)]).astype(np.float64)
    rng = np.random.default_rng(seed)
    a, b = _umap().find_ab_params(SPREAD, MIN_DISTANCE)
    places, _ = _umap().simplicial_set_embedding(
        None,
        joined.tocoo(copy=True),
        n_components=2,
        initial_alpha=1.0,
        a=a,
        b=b,
        gamma=1.0,
        negative_sample_rate=5,
        n_epochs=EPOCHS if m <= MANY else FEWER_EPOCHS,
        init=_start(joined, rng),
        random_state=np.random.RandomState(rng.integers(2**31)),
        metric="precomputed",
        metric_kwds={},
        densmap=False,
        densmap_kwds={},
        output_dens=False,
    )
    return places.astype(np.float64) - places.mean(axis=0)


def _umap() -> Any:
    with warnings.catch_warnings():
        # It says so at import; what would need it is not used.
        warnings.filterwarnings("ignore", message="Tensorflow not installed", category=ImportWarning)
        import umap.umap_ as umap
    return umap


def _start(joined: sparse.csr_matrix, rng: np.random.Generator) -> np.ndarray:
    """Approximate the two slowest modes of a walk on the graph, which now and then goes anywhere: so parts that nothing joins lie apart.

    This is the spectral layout by subspace iteration; unlike an eigensolver it always ends, whatever the graph.
    """
    m = joined.shape[0]
    degree = np.asarray(joined.sum(axis=1)).ravel()
    anywhere = degree.mean()
    root = np.sqrt(degree + anywhere)
    steps = sparse.diags_array(1 / root) @ joined @ sparse.diags_array(1 / root)
    modes = np.column_stack([root, rng.normal(size=(m, 2))])
    for _ in range(STEPS):
        modes = np.linalg.qr(modes)[0]
        # Half of the time it stays, so that it never swings between two sides.
        modes += steps @ modes + np.outer(1 / root, anywhere / m * (1 / root @ modes))
    places = np.linalg.qr(modes)[0][:, 1:] / root[:, None]
    places *= EXTENT / np.abs(places).max(axis=0)
    return (places + rng.normal(scale=1e-4, size=places.shape)).astype(np.float32)


def common_to_modules(module: np.ndarray, members: sparse.csr_matrix) -> OverRepresentation:
    """Test what the features of each module have more often than the others; arrays (modules, terms).

    Parameters
    ----------
    module
        (m,) number of each feature's module.
    members
        (terms, m), stored where a feature has a term.
    """
    study = module == np.arange(module.max(initial=-1) + 1)[:, None]
    return over_representation(study, members, len(module))
