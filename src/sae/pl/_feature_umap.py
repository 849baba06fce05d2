from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad

from .. import get
from ._style import activation_colors, refuse_several
from ._titles import titles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

    from .._data import Data
    from .._schema import Features


def feature_umap(
    data: Data,
    features: Features,
    *,
    basis: str = "umap",
    key: str = "sae",
    mod: str | None = None,
    ncols: int = 4,
    cmap: str | Colormap | None = None,
    size: float | None = None,
    vmax: float | str | None = None,
    frameon: bool | None = False,
    ax: Axes | None = None,
) -> Axes | list[Axes]:
    """Draw the cells on an embedding, coloured by the activation of features, a panel each.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, with activations.
    features
        One or several, by name or number. Their titles are the names that :func:`sae.tl.name_features` gave them, or would.
    basis
        Key of `obsm` to draw on, with or without `X_`.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE and the embedding.
    ncols
        Panels per row.
    cmap
        Colour map; by default from the light grey of inactive cells over yellow and red to dark violet.
    size
        Size of the dots.
    vmax
        Upper end of the colours, a number or a percentile such as `"p99"`.
    frameon
        Draw a frame around the panels.
    ax
        Axes to draw a single feature on.

    Returns
    -------
    The Axes; a list of them for several features.

    Raises
    ------
    KeyError
        There are no activations, no such feature or no such embedding.
    ValueError
        `ax` with several features, or no cells.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> axes = sae.pl.feature_umap(adata, ["sae_0", "sae_1"])
    """
    import scanpy as sc

    chosen = get.activations(data, features, key=key, mod=mod)
    names = chosen.var_names.tolist()
    refuse_several(ax, len(names), "features")
    coordinates = get.embedding(data, basis, mod=mod)
    if chosen.n_obs == 0:
        raise ValueError("There are no cells to draw.")
    cells = ad.AnnData(chosen.X, obs=chosen.obs[[]], var=chosen.var[[]], obsm={basis: coordinates.to_numpy()})
    axes = sc.pl.embedding(
        cells,
        basis,
        color=names,
        title=titles(data, names, key=key, mod=mod),
        ncols=ncols,
        cmap=cmap or activation_colors(),
        size=size,
        vmin=0,
        # Of a dead feature, 0 would be in the middle of its colours.
        vmax=[None if active else 1 for active in chosen.X.getnnz(axis=0)] if vmax is None else vmax,
        frameon=frameon,
        hspace=0.3,
        ax=ax,
        show=False,
    )
    for panel in axes if isinstance(axes, list) else [axes]:
        panel.set(xlabel=coordinates.columns[0], ylabel=coordinates.columns[1])
    return axes
