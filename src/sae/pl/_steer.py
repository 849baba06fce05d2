from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .. import get
from ._steer_arrows import draw_arrows
from ._steer_doses import draw_genes_by_dose, draw_measure_by_dose
from ._steer_genes import draw_genes
from ._steer_labels import draw_labels
from ._steered import Steered
from ._titles import titles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from .._data import Data

KINDS = ("genes", "doses", "labels", "arrows")


def steer(
    data: Data,
    feature: str | int,
    *,
    kind: Literal["genes", "doses", "labels", "arrows"] = "genes",
    dose: float | None = None,
    label: str | None = None,
    modality: str | None = None,
    n_genes: int = 10,
    genes: Sequence[str] | None = None,
    measure: Literal["effect", "distance", "off_manifold", "step"] = "effect",
    key_added: str | None = None,
    basis: str = "umap",
    n_grid: int = 20,
    key: str = "sae",
    mod: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what turning a feature up or down does.

    * `"genes"`: the genes that are raised and lowered most at one dose. A bar is the mean over cells; where cells were steered by
      label, the mean over labels, each a small tick: a gene that is not among those stored for a label counts there as unchanged.
    * `"doses"`: a measure, or the change of some genes, over the doses. Effect and distance are drawn beside random features and random
      directions, for the up to 100 cells that those were tried on: only what exceeds them is of this feature.
    * `"labels"`: by how much the share of each label among the neighbours changes at one dose, beside the same controls; with `label`,
      for the cells of this label, without them.
    * `"arrows"`: where the cells go on an embedding, see :func:`sae.get.steering_arrows`. Arrows are shortened by one factor, that of the
      legend. Hollow ones are of cells that mostly end up far from all real cells: an arrow points at the nearest ones all the same.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, after `tl.steer`.
    feature
        One, by name or number.
    kind
        Which figure.
    dose
        Of `"genes"` and `"labels"`; by default 1 if it was among the doses, else the highest.
    label
        Only cells with this label of the `groupby` of `tl.steer`, of `"genes"`, `"labels"` and the `genes` of `"doses"`.
    modality
        Only variables of this modality, of a model that predicts several.
    n_genes
        Genes per direction, of `"genes"`.
    genes
        Of `"doses"`: draw these instead of a measure. Of `"genes"`: draw these. At a dose where a gene is not among those stored it has
        no point.
    measure
        Of `"doses"`, as :func:`sae.tl.steer` describes them.
    key_added
        Of `"arrows"`: the steered representation in `obsm`, of `tl.steer(..., key_added=)`.
    basis
        Key of `obsm` to draw arrows on, with or without `X_`.
    n_grid
        Squares along the longer side of the embedding, whose cells share an arrow.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE.
    ax
        Axes to draw on.

    Returns
    -------
    The Axes.

    Raises
    ------
    KeyError
        There are no results of steering, or none for this feature, dose, label or gene; no such representation or embedding.
    ValueError
        An unknown `kind` or `measure`; several features; no `n_genes`; a dose at which nothing changes; `"arrows"` without `key_added`, of another feature
        or of too few cells; `"labels"` of cells that were steered without labels or controls.

    Examples
    --------
    >>> import sae
    >>> import scanpy as sc
    >>> adata = sae.datasets.pbmc68k()
    >>> sc.pp.pca(adata)
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.steer(adata, "sae_0", model=sae.models.PCA(adata), n_controls=5)
    >>> ax = sae.pl.steer(adata, "sae_0")
    >>> ax = sae.pl.steer(adata, "sae_0", kind="doses", measure="distance")
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(map(repr, KINDS))}.")
    names = get.activations(data, feature, key=key, mod=mod).var_names.tolist()
    if len(names) > 1:
        raise ValueError(f"feature={feature!r} are {len(names)} features; a figure is of one.")
    if kind == "arrows":
        if key_added is None:
            raise ValueError(
                "kind='arrows' draws a steered representation. Run sae.tl.steer(..., key_added='X_steered') with one feature and one "
                "dose, and pass key_added='X_steered'."
            )
        ax = draw_arrows(ax, data, names[0], key_added, basis, n_grid, key, mod)
    else:
        steered = Steered(data, names[0], label, modality, key, mod)
        if kind == "genes":
            ax = draw_genes(ax, steered, steered.dose(dose), n_genes, genes)
        elif kind == "labels":
            ax = draw_labels(ax, steered, steered.dose(dose))
        elif genes is not None:
            ax = draw_genes_by_dose(ax, steered, genes)
        else:
            ax = draw_measure_by_dose(ax, steered, measure)
    # Beside long labels, a title over the middle of the Axes would be cut.
    title = titles(data, names, key=key, mod=mod)[0]
    ax.set_title(title, loc="right" if kind in ("genes", "labels") else "center", fontsize="small")
    return ax
