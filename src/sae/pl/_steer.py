from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from .. import get
from .._names import shorten
from ._style import BLACK, BLUE, COLORS, GREY, MARKERS, ORANGE, activation_colors, axes, open_frame
from ._titles import titles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from .._data import Data

KINDS = ("genes", "doses", "labels", "arrows")
MEASURES = {
    "effect": "effect (RMS over genes)",
    "distance": "distance to nearest cells",
    "off_manifold": "share off the manifold",
    "step": "length of the step",
}
CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "of_features": (
        "random features, mean",
        {"color": GREY, "marker": "s", "linestyle": "--", "markerfacecolor": "none"},
    ),
    "of_directions": ("random directions, mean", {"color": GREY, "marker": "x", "linestyle": ":"}),
}
CHANGE = "mean change of prediction"
LABEL_WIDTH = 24
LONGEST = 2.5
"""The longest arrow, in squares."""


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
        An unknown `kind` or `measure`; several features; a dose at which nothing changes; `"arrows"` without `key_added`, of another feature
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
        ax = _arrows(ax, data, names[0], key_added, basis, n_grid, key, mod)
    else:
        steered = _Steered(data, names[0], label, modality, key, mod)
        if kind == "genes":
            ax = _genes(ax, steered, steered.dose(dose), n_genes, genes)
        elif kind == "labels":
            ax = _labels(ax, steered, steered.dose(dose))
        elif genes is not None:
            ax = _genes_by_dose(ax, steered, genes)
        else:
            ax = _measure_by_dose(ax, steered, measure)
    # Beside long labels, a title over the middle of the Axes would be cut.
    title = titles(data, names, key=key, mod=mod)[0]
    ax.set_title(title, loc="right" if kind in ("genes", "labels") else "center", fontsize="small")
    return ax


class _Steered:
    """The stored tables of one feature."""

    def __init__(self, data: Data, name: str, label: str | None, modality: str | None, key: str, mod: str | None):
        self.name, self.label = name, label
        self._data, self._modality = data, modality
        self._where: dict[str, Any] = {"key": key, "mod": mod}
        self.doses = self.table("doses")
        if self.doses.empty:
            known = get.steering(data, table="doses", **self._where)["feature"].unique()
            raise KeyError(f"{name} was not steered; {', '.join(known)} were. Run sae.tl.steer with it first.")

    def table(self, name: str, label: str | None = None, modality: str | None = None) -> pd.DataFrame:
        """Return one of the tables of `tl.steer`."""
        return get.steering(self._data, self.name, table=name, label=label, modality=modality, **self._where)

    def dose(self, asked: float | None) -> float:
        """Choose a dose among those there are."""
        known = self.doses["dose"]
        if asked is None:
            return 1.0 if (known == 1).any() else float(known.max())
        if not (known == asked).any():
            raise KeyError(f"{self.name} was not steered at dose={asked}; it was at {', '.join(map(str, known))}.")
        return asked

    def changes(self) -> tuple[pd.DataFrame, int]:
        """Return the changes of genes, and over how many labels they are averaged."""
        found = self.table("genes", self.label, self._modality)
        n_labels = 1 if self.label is not None else max(1, self.table("labels")["label"].nunique())
        return found.assign(gene=found["gene"].astype(str)), n_labels


def _genes(ax: Axes | None, steered: _Steered, dose: float, n: int, chosen: Sequence[str] | None) -> Axes:
    found, n_labels = steered.changes()
    found = found[found["dose"] == dose]
    mean = (found.groupby("gene")["change"].sum() / n_labels).sort_values(ascending=False, kind="stable")
    if chosen is not None:
        mean = mean[_known(chosen, mean.index, f"of {steered.name} at dose {dose:g}")].sort_values(ascending=False)
    else:
        mean = pd.concat([mean[mean > 0].iloc[:n], mean[mean < 0].iloc[-n:]])
    if mean.empty:
        raise ValueError(f"No gene changes at dose {dose:g} of {steered.name}: no cell is moved. Pass another dose=.")
    ax = axes(ax, height=0.9 + 0.15 * len(mean))
    y = np.arange(len(mean))
    ax.barh(y, mean, height=0.75, color=np.where(mean > 0, ORANGE, BLUE))
    if n_labels > 1:
        found = found[found["gene"].isin(mean.index)]
        ax.plot(found["change"], mean.index.get_indexer(pd.Index(found["gene"])), "|", color="0.25", markersize=4)
    ax.axvline(0, color=BLACK, linewidth=0.8)
    ax.set_yticks(y, [shorten(gene, LABEL_WIDTH) for gene in mean.index], fontsize="small")
    ax.set_ylim(len(mean) - 0.4, -0.6)
    each = " (a tick per label)" if n_labels > 1 else ""
    ax.set_xlabel(f"{CHANGE} at dose {dose:g}{each}", fontsize="small", loc="right")
    open_frame(ax)
    return ax


def _known(asked: Sequence[str], known: pd.Index, where: str) -> list[str]:
    """Return genes without repeats, or say which there are none of."""
    asked = [asked] if isinstance(asked, str) else list(dict.fromkeys(asked))
    missing = [gene for gene in asked if gene not in known]
    if missing or not asked:
        raise KeyError(
            f"{missing[0] if missing else 'No gene'!r} is not among the {len(known)} genes stored {where}, such as "
            f"{', '.join(known[:5])}. Pass others as genes=, or run sae.tl.steer with n_genes=None to store all."
        )
    return asked


def _genes_by_dose(ax: Axes | None, steered: _Steered, genes: Sequence[str]) -> Axes:
    found, n_labels = steered.changes()
    mean = (found.groupby(["gene", "dose"])["change"].sum() / n_labels).unstack("dose")
    doses = steered.doses.set_index("dose").sort_index()
    mean = mean.reindex(columns=doses.index)
    mean.loc[:, doses["n_moved"] == 0] = 0.0
    genes = _known(genes, mean.index, f"of {steered.name}")
    ax = axes(ax)
    for number, gene in enumerate(genes):
        style: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        ax.plot(doses.index, mean.loc[gene], markersize=4, label=gene, **style)
    ax.axhline(0, color=BLACK, linewidth=0.8)
    ax.set(xlabel=_dose_label(doses), ylabel=CHANGE)
    return _finished(ax)


def _measure_by_dose(ax: Axes | None, steered: _Steered, measure: str) -> Axes:
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r} is not one of {', '.join(map(repr, MEASURES))}.")
    doses = steered.doses.set_index("dose").sort_index()
    controls = steered.table("controls")
    controls = controls[controls["measure"] == measure].set_index("dose").sort_index()
    compared = [name for name in CONTROLS if controls[name].notna().any()]
    own = controls["value"] if compared else doses[measure]
    ax = axes(ax)
    ax.plot(own.index, own, color=BLUE, marker="o", markersize=4, label=steered.name, zorder=3)
    for name in compared:
        text, style = CONTROLS[name]
        ax.plot(controls.index, controls[name], markersize=5, label=text, zorder=4, **style)
    if f"{measure}_before" in doses:
        ax.axhline(doses[f"{measure}_before"].iloc[0], color=BLACK, linewidth=0.8, label="before")
    ax.set(xlabel=_dose_label(doses), ylabel=MEASURES[measure])
    ax.set_ylim(0, 1.08 * max(ax.get_ylim()[1] / 1.05, 1e-12))
    return _finished(ax)


def _dose_label(doses: pd.DataFrame) -> str:
    """Say which activation a dose stands for, where it is not a factor."""
    one = (doses["value"] / doses.index)[doses.index != 0]
    factor = one.empty or not np.isfinite(one).all() or np.allclose(one, 1) or not one.any()
    return "dose" if factor else f"dose (1 = activation of {one.iloc[-1]:.2g})"


def _finished(ax: Axes) -> Axes:
    ax.legend(frameon=False, fontsize="small", labelspacing=0.3)
    open_frame(ax)
    return ax


def _labels(ax: Axes | None, steered: _Steered, dose: float) -> Axes:
    from matplotlib.transforms import offset_copy

    name, label = steered.name, steered.label
    if steered.table("labels").empty:
        raise ValueError(f"{name} was steered without labels. Run sae.tl.steer with groupby= first.")
    compared = []
    if label is None:
        found = steered.table("controls")
        found = found[(found["dose"] == dose) & (found["measure"] == "label")]
        if found.empty:
            raise ValueError(
                f"{name} was steered without controls. Pass label= to see the cells of one label, or run sae.tl.steer with "
                "n_controls=20."
            )
        compared = [control for control in CONTROLS if found[control].notna().any()]
        own = "value"
    else:
        found = steered.table("labels", label)
        found, own = found[found["dose"] == dose].rename(columns={"towards": "name"}), "difference"
    found = found.sort_values(own, ascending=False, kind="stable")
    ax = axes(ax, height=1.3 + 0.2 * len(found))
    y = np.arange(len(found))
    ax.axvline(0, color=BLACK, linewidth=0.8)
    ax.hlines(y, 0, found[own], color=BLUE, linewidth=1.2)
    ax.plot(found[own], y, "o", color=BLUE, markersize=5, label=name if compared else None, zorder=3)
    for control in compared:
        text, style = CONTROLS[control]
        ax.plot(found[control], y, markersize=4, label=text, **style | {"linestyle": "none"})
    ax.set_yticks(y, [shorten(str(one), LABEL_WIDTH) for one in found["name"]], fontsize="small")
    ax.set_ylim(len(found) - 0.4, -0.6)
    of = "all steered cells" if label is None else shorten(label, LABEL_WIDTH)
    ax.set_xlabel(f"change of share among neighbours\n({of}, dose {dose:g})", fontsize="small", loc="right")
    if compared:
        below = offset_copy(ax.transAxes, ax.get_figure(root=True), y=-0.55)
        ax.legend(
            frameon=False, fontsize="small", labelspacing=0.3, loc="upper right", bbox_to_anchor=(1, 0), bbox_transform=below,
            borderaxespad=0,
        )  # fmt: skip
    open_frame(ax)
    return ax


def _arrows(
    ax: Axes | None, data: Data, name: str, key_added: str, basis: str, n_grid: int, key: str, mod: str | None
) -> Axes:
    from matplotlib.lines import Line2D

    arrows = get.steering_arrows(data, key_added, name, basis=basis, n_grid=n_grid, key=key, mod=mod)
    if arrows.empty:
        raise ValueError(f"No square holds three moved cells. Pass a smaller n_grid= than {n_grid}.")
    places = get.embedding(data, basis, mod=mod)
    activation = get.activations(data, name, key=key, mod=mod).X.toarray().ravel()
    order = np.argsort(activation, kind="stable")
    x, y = places.iloc[order].to_numpy().T
    size = np.clip(8_000 / len(order), 0.5, 12)
    ax = axes(ax)
    dots = ax.scatter(x, y, c=activation[order], s=size, cmap=activation_colors(), vmin=0, linewidths=0)
    dots.set_rasterized(True)
    ax.figure.colorbar(dots, ax=ax, label=f"activation of {name}", shrink=0.6, aspect=25, pad=0.02)
    longest = np.hypot(arrows["dx"], arrows["dy"]).max()
    factor = min(1.0, LONGEST * float(np.nanmax(np.ptp(places, axis=0))) / n_grid / longest) if longest > 0 else 1.0
    far, shift = arrows["off_manifold"] > 0.5, "shift" if factor == 1 else f"shift × {factor:.2g}"
    handles = []
    for some, face, edge, text in (
        (~far, BLACK, "white", shift),
        (far, "white", BLACK, f"{shift}, mostly off the manifold"),
    ):
        part = arrows[some]
        if part.empty:
            continue
        ax.quiver(
            part["x"], part["y"], factor * part["dx"], factor * part["dy"], angles="xy", scale_units="xy", scale=1,
            width=0.009, headwidth=3.5, headlength=4, headaxislength=3.6, facecolor=face, edgecolor=edge, linewidth=0.6,
            zorder=3,
        )  # fmt: skip
        style: dict[str, Any] = {
            "marker": r"$\rightarrow$",
            "markersize": 10,
            "linestyle": "none",
            "markeredgewidth": 0.5,
        }
        handles.append(Line2D([], [], label=text, markerfacecolor=face, markeredgecolor=BLACK, **style))
    ax.legend(
        handles=handles,
        frameon=False,
        fontsize="small",
        labelspacing=0.3,
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.08),
    )
    ax.set(xlabel=places.columns[0], ylabel=places.columns[1], xticks=[], yticks=[])
    ax.margins(0.06)
    open_frame(ax)
    return ax
