from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _schema, get
from .._data import Data, holder, listing
from .._expression import expression

if TYPE_CHECKING:
    from ..core.feature_map import Nearest

SETTINGS = {"layer": None, "var_mod": None, "collection": None, "max_padj": 0.05}
"""Settings that not all spaces have, and their defaults."""
SPACES = {
    "coactivation": (),
    "genes": ("layer", "var_mod"),
    "enrichment": ("collection", "max_padj"),
    "decoder": (),
}
"""What features are compared by, and the settings that belong to each."""


def feature_map(
    data: Data,
    *,
    key: str = "sae",
    mod: str | None = None,
    space: str = "coactivation",
    n_neighbors: int = 15,
    resolution: float = 1.0,
    layer: str | None = None,
    var_mod: str | None = None,
    collection: str | None = None,
    max_padj: float = 0.05,
    rng: int | np.random.Generator | None = 0,
) -> None:
    r"""Map the features themselves: which are alike, which belong together, and a layout in the plane.

    Each feature is compared with all others by what `space` says:

    * `"coactivation"`: Pearson's r of their activations over the cells;
    * `"genes"`: the cosine of their signatures, a signature being the correlation of the activation with the expression of every
      gene;
    * `"enrichment"`: the Jaccard index \|A ∩ B\| / \|A ∪ B\| of their gene sets: those whose genes are higher where the feature is
      active, with `padj` ≤ `max_padj` and, where cells were permuted, `fdr` ≤ `max_padj`. The paper's map
      (arXiv:2410.11468) is of these sets;
    * `"decoder"`: the cosine of their decoder directions, in the space of training.

    The `n_neighbors` most similar ones, of those with a similarity above 0, are found exactly. They are joined to the graph of
    UMAP, with 1 − similarity as the distance; Leiden divides this graph into modules, and UMAP lays it out.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, with activations.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE.
    space
        `"coactivation"`, `"genes"`, `"enrichment"` (after :func:`sae.tl.enrich`) or `"decoder"`.
    n_neighbors
        How many other features each is joined to.
    resolution
        Of the Leiden algorithm: the higher, the more and smaller modules.
    layer
        Expression for `"genes"`: this layer, else `.raw` if there is one, else `X`; in memory, on disk or a dask array.
    var_mod
        The modality whose variables `"genes"` reads, by default `mod`. Cells are matched by `obs_names`.
    collection
        Only gene sets of this collection, for `"enrichment"`.
    max_padj
        Only gene sets with an adjusted p-value, and a false discovery rate, up to this, for `"enrichment"`.
    rng
        Seed or generator, for modules and layout.

    Returns
    -------
    Nothing. Writes

    * in `uns[key]["features"]` the columns `map_x` and `map_y`, and `module`: `"0"` is the largest;
    * `uns[key]["feature_map"]`: `neighbors`, a row per feature and neighbor with their `similarity`, the most similar first, and
      `params`.

    A feature that cannot be compared is not on the map, and has NaN: a dead one, one with the same activation in all cells, one
    without a gene set in the space of gene sets.

    Raises
    ------
    KeyError
        There are no activations; no enrichment, or none of this collection; no such layer.
    ValueError
        No such `space`, or a setting of another one; `n_neighbors` or `resolution` is not above 0; NaN or infinite expression.

    Notes
    -----
    Where two features lie close, they are alike; the distance between modules, their size on the map and the empty space between
    them mean little (see Kobak and Berens 2019, doi:10.1038/s41467-019-13056-x). For single features read
    :func:`sae.get.neighbors`. Correlation does not see how strong features are, so a rare feature of some cells is near the common one that
    has all of them only if the two overlap well.

    Which space to choose: with PCA and scVI of marrow and PCA of blood (10 neighbors of each of 64 to 128 features), 21 to 36 % of
    the neighbors by co-activation had the same best label, 24 to 43 % of those by genes, and 7 to 18 % of random pairs. The
    Jaccard index of their gene sets was two to three times that of random pairs for both. Neighbors by decoder were no better than
    random pairs in either. In the space of gene sets are only features that have some, 20 to 75 % there. Co-activation is the
    default because it has nearly all features, and needs neither expression nor gene sets.

    The map stays as it is when gene sets are computed again: run this verb again too.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.feature_map(adata, n_neighbors=5)
    >>> sae.get.features(adata)["module"].cat.categories[0]
    '0'
    >>> sae.get.neighbors(adata, "sae_0", n=3).shape
    (3, 3)
    """
    from scanpy import logging as logg

    from ..core import feature_map as core
    from ..core.seeds import integer_seed

    of_space = {"layer": layer, "var_mod": var_mod, "collection": collection, "max_padj": max_padj}
    _check(space, n_neighbors, resolution, of_space)
    seed = integer_seed(rng)
    held = holder(data, mod)
    activations = _schema.activations_in_memory(held, key)
    names = _schema.feature_names(key, activations.shape[1])
    start = logg.info(f"mapping {len(names)} features of {key!r} by {space}")
    if space == "coactivation":
        features, alive = core.coactivation(activations)
    elif space == "genes":
        expressed, cells = expression(data, held, layer=layer, var_mod=var_mod)
        features, alive = core.gene_signatures(activations[cells], expressed.matrix, expressed.summary.shift)
    elif space == "enrichment":
        features, alive = core.shared_sets(_gene_sets(data, names, key, mod, collection, max_padj))
    else:
        active = activations.getnnz(axis=0) > 0
        features, alive = core.directions(_schema.directions(_schema.read(held, key)) * active[:, None])

    found = core.nearest(features, n_neighbors)
    joined = core.graph(found)
    module, places = core.modules(joined, resolution, seed), core.layout(joined, seed)
    numbers = np.flatnonzero(alive)
    codes, coordinates = np.full(len(names), -1), np.full((len(names), 2), np.nan)
    codes[numbers], coordinates[numbers] = module, places
    n_modules = int(codes.max(initial=-1)) + 1
    columns = {
        "map_x": coordinates[:, 0],
        "map_y": coordinates[:, 1],
        "module": pd.Categorical.from_codes(codes, pd.Index([str(i) for i in range(n_modules)])),
    }
    used = {name: of_space[name] for name in SPACES[space]}
    params = {"space": space, "n_neighbors": n_neighbors, "resolution": float(resolution), "seed": seed, **used}
    stored = _schema.read(held, key)
    new = {
        "features": stored["features"].assign(**columns),
        "feature_map": {"params": params, "neighbors": _table(found, numbers, names)},
    }
    _schema.write(held, key, {**stored, **new})
    if len(numbers) < len(names):
        logg.info(f"    {len(names) - len(numbers)} features cannot be compared by {space}; they are not on the map")
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    to {held.where}.uns[{key!r}]['features'] the columns 'map_x', 'map_y' and 'module' ({n_modules} "
        f"modules)\n    {held.where}.uns[{key!r}]['feature_map'], the neighbors",
    )


def _check(space: str, n_neighbors: int, resolution: float, of_space: dict[str, Any]) -> None:
    if space not in SPACES:
        raise ValueError(f"space={space!r} is not one of {listing(SPACES)}.")
    for name, value in of_space.items():
        if name not in SPACES[space] and value != SETTINGS[name]:
            owner = next(other for other, settings in SPACES.items() if name in settings)
            raise ValueError(
                f"{name}={value!r} belongs to space={owner!r}, not to {space!r}. Leave it out, or pass space={owner!r}."
            )
    if not isinstance(n_neighbors, int | np.integer) or n_neighbors < 1:
        raise ValueError(f"n_neighbors={n_neighbors!r} is not a number of features of 1 or more.")
    if not resolution > 0:
        raise ValueError(f"resolution={resolution!r} is not above 0.")


def _gene_sets(
    data: Data, names: pd.Index, key: str, mod: str | None, collection: str | None, max_padj: float
) -> sparse.csr_matrix:
    """Return the significant gene sets of each feature (h, sets)."""
    table = get.enrichment(data, collection=collection, direction="up", max_padj=max_padj, key=key, mod=mod)
    table = table[~(table["fdr"] > max_padj)]
    rows = names.get_indexer(pd.Index(table["feature"].astype(str)))
    columns = pd.Index(table["gene_set"].unique()).get_indexer(table["gene_set"])
    shape = (len(names), columns.max(initial=-1) + 1)
    return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape)


def _table(found: Nearest, numbers: np.ndarray, names: pd.Index) -> pd.DataFrame:
    """Make a row per feature and neighbor."""
    rows, places = np.nonzero(found.index >= 0)
    columns = {
        "feature": numbers[rows],
        "neighbor": numbers[found.index[rows, places]],
        "similarity": found.similarity[rows, places],
    }
    return _schema.tidy(columns, list(columns), {"feature": names, "neighbor": names})
