from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, Holder, holder, listing
from .._design import label_column
from .._evaluation import (
    BASELINES,
    OF_GENES,
    Attributed,
    Cells,
    Compared,
    Genes,
    Source,
    drawn_unseen,
    floating_rows,
    frozen,
    read_expression,
    trained,
    unsupervised,
)
from .._genesets import Net, match
from .._progress import progress_bar
from .._scoring import Metrics, Scoring, dictionary_metrics, fidelity_metrics, stored_metrics
from ..core.rows import varying_columns

ATTRIBUTIONS = ("input_x_gradient", "integrated_gradients")


def evaluate(
    data: Data,
    groupby: str | None = None,
    net: Net | None = None,
    *,
    key: str = "sae",
    mod: str | None = None,
    layer: str | None = None,
    var_mod: str | None = None,
    model: object | None = None,
    baselines: Sequence[str] = BASELINES,
    donor: str | None = None,
    n_cells: int = 5_000,
    n_splits: int = 5,
    n_bootstrap: int = 200,
    n_neighbors: int = 15,
    min_size: int = 5,
    max_size: int | None = 500,
    rng: int | np.random.Generator | None = 0,
    progress: bool = True,
) -> None:
    r"""Compare an SAE with other decompositions, with chance, and with what the labels themselves can choose.

    An SAE always finds something. Whether that is more than PCA, ICA, NMF, single genes or random directions find is
    told by the same numbers for all of them, on the same cells. Whatever is compared is a *source*: a matrix with a row
    per cell, whose columns are its features, components or genes.

    *Reconstruction.* FVU = Σ‖x − x̂‖² / Σ‖x − mean‖² over cells, the share of the representation x that the
    reconstruction x̂ misses: 0 is perfect, 1 as bad as the mean.

    *Sparsity.* L0, the mean number of active features of a cell; the density of a feature, the share of cells in which
    it is active; dead features, with a density of 0.

    *Dictionary.* For each feature that is active in some cell, the highest cosine of its decoder row with another's, in
    the space of training.

    *Fidelity.* For each cell, its `n_neighbors` nearest other cells N in the representation, and N̂ in the
    reconstruction. Label accuracy is the share of cells whose label is the most frequent one in N (or N̂); neighbour
    overlap the mean of \|N ∩ N̂\| / \|N\|.

    *Labels.* AUROC = P(a cell of the label has a higher value than another cell) + ½ P(they are equal): 0.5 is chance,
    1 perfect. For each label, the column with the highest AUROC on one half of the cells is scored on the other half,
    both ways, in `n_splits` divisions, as by :func:`sae.tl.score_labels`, and the mean taken: with many columns to
    choose from, the best one is partly the luckiest one, and luck does not repeat. What is fitted with labels is fitted
    on the choosing half alone:

    * logistic regression with an L1 penalty (a tenth of the smallest that leaves no column) on the 500 columns most
      correlated with the label, scored as a whole and by the one column with its largest coefficient;
    * logistic regression of each label on what `model` predicts from the latent z (the 2,000 genes of the highest
      variance), whose logit F is attributed to each dimension j of the latent: by input × gradient, z_j ∂F/∂z_j, and by
      integrated gradients from the mean latent b, (z_j − b_j) ∫₀¹ ∂F/∂z_j (b + t(z − b)) dt (central differences,
      Gauss-Legendre quadrature). The dimension whose attribution tells the label best is chosen as any other column.

    SAE, PCA, ICA and NMF see no label. The SAE has seen all cells that it was trained on, the others `n_cells` of all.

    *Gene sets.* Over one half of the cells, each gene g has a correlation r_g with a column. A set with the genes S
    scores AUROC = P(r of a gene in S > r of another gene) + ½ P(equal), over the genes that vary. The set with the
    highest rank-sum z (Mann-Whitney) is chosen for each column, and its AUROC taken from the correlations in the other
    half; and for each set, the column with the highest AUROC, likewise.

    *Intervals* are bootstrap percentiles (2.5 to 97.5): cells are drawn again within labels, or whole donors, with all
    choices kept; the same ones for all sources, so that differences are paired. Those of gene sets draw columns
    (`auroc`, `same_set`; not paired) or sets (`best_column_auroc`; paired) again.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, with activations.
    groupby
        Column of `obs` with labels; cells without one take no part. Without it there are no label scores.
    net
        Gene sets, as for :func:`sae.tl.enrich`. Without it there are no gene-set scores.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE.
    layer
        Expression: this layer, else `.raw` if there is one, else `X`.
    var_mod
        The modality whose genes are read, by default `mod`, and of what `model` predicts.
    model
        A pretrained model whose latent the SAE reads, such as :class:`sae.models.PCA`: an object with a method
        `decode(z, data)`. Without it there are no attributions.
    baselines
        What to compare with, of

        * `"representation"`: the columns that the SAE reads, whatever they are: components, the latent of a model, genes;
        * `"pca"`, `"fastica"`: up to 100 components of these columns, also where they are principal components or a
          latent already;
        * `"nmf"`: up to 50 factors of the 2,000 genes of the highest variance;
        * `"genes"`: single genes; for gene sets, as many as the SAE has features, drawn at random;
        * `"random_directions"`: as many as features, uniform on the sphere in the space of training;
        * `"random_rectified"`: the same, with thresholds that make each active in as many cells as a feature;
        * `"frozen_decoder"`: the SAE trained again with random directions, as spread as the cells, that do not learn;
        * `"l1_genes"`, `"l1_latent"` (the representation): the regression, and `"l1_genes_column"`,
          `"l1_latent_column"`, its column;
        * `"input_x_gradient"`, `"integrated_gradients"`: with `model`.

        PCA, ICA and the representation count with both signs.
    donor
        Column of `obs`: halves and bootstrap are of whole donors. With fewer than 20 donors, intervals are too narrow.
    n_cells
        Cells that are compared at most; where there are more, drawn as evenly from all labels as possible: rare labels
        keep their cells. What does not need labels (PCA, ICA, NMF) is fitted on as many cells drawn without a look at
        them.
    n_splits
        Divisions into halves.
    n_bootstrap
        Resamples for intervals.
    n_neighbors
        Nearest neighbours, for fidelity.
    min_size, max_size
        Measured genes of a set.
    rng
        Seed or generator.
    progress
        Show a progress bar when it takes more than a second.

    Returns
    -------
    Nothing. Writes `uns[key]["metrics"]`, replacing an earlier one, with the columns `section`, `metric`, `source`,
    `groupby`, `label`, `value`, `ci_low`, `ci_high`, and `difference`, `difference_low`, `difference_high`: the SAE minus
    the source. Missing parts are NaN.

    * `"reconstruction"`: `fvu_train`, `fvu_held_out` and `fvu_all` as stored; `fvu` of the compared cells, also of a
      PCA with as many components as the SAE has active features per cell (where that is less than it has columns), and
      with a frozen decoder; `fvu_scaled`, the same in the space of training.
    * `"sparsity"`: `l0_train`, `l0_held_out`, `l0`, `dead` (share of features), and quantiles of the densities,
      `density_q05` to `density_q95`, of the features that are not dead.
    * `"dictionary"`: `nearest_cosine` (mean) and `duplicates` (share of features with another at a cosine above 0.9),
      beside random directions.
    * `"fidelity"`: `label_accuracy` and `neighbor_overlap` of the reconstructions, `label_accuracy` in the
      representation itself and in the codes (`"sae_codes"`).
    * `"labels"`: `auroc` (mean over labels where `label` is missing, and of each `label`), `labels_at_0.9` (number of
      labels with an AUROC of 0.9 or more), `n_columns` to choose among (both signs counted; for the L1 regression as a
      whole, the mean number with a coefficient).
    * `"attribution"`: for integrated gradients, `n_nodes` of the quadrature, and `completeness_gap`, the largest \|Σ_j
      attribution_j − (F(z) − F(b))\| of a cell, in standard deviations of F.
    * `"gene_sets"`: `auroc` (mean over columns that vary), `same_set` (share of columns for which both halves choose
      the same set), `n_sets` (different ones among them with an AUROC of 0.9 or more), `best_column_auroc` (mean over
      sets). `"permuted_cells"` are the features with cells permuted, what chance finds: the mean of five permutations, of
      fewer where there are more than 200 features.

    Raises
    ------
    KeyError
        There are no activations, or no such column.
    ValueError
        A setting out of range, an unknown baseline, too few cells, labels or donors, a latent that `model` does not decode,
        gene sets that share no gene with the data.
    NotImplementedError
        The model cannot decode.

    Notes
    -----
    A baseline that cannot be computed is left out with a warning in the log: NMF for negative values, for one. A source
    with more columns has more to choose from, which scoring on other cells corrects for chance, not for what there is
    to find.

    Intervals say how far scores vary with the cells that they are taken on, not with those that the SAE was trained on
    or columns chosen on; those of gene sets say nothing of other cells. Cells are taken as independent unless `donor`
    is given. For small groups percentiles are too narrow: in simulations, of nominal 95 % about 90 % covered the true
    AUROC with 20 to 60 cells of a label, 85 % with 10 or fewer, 75 % with three to ten donors and 50 % with two. A
    label whose donors are all missing from a resample counts with its estimate there.

    `fvu` is governed by the columns of the representation with the highest variance; `fvu_scaled` weighs them as
    training did, and tells how well features fit where they were trained.

    Attributions take two predictions of all cells for each dimension of the latent, integrated gradients up to 16 times
    as many. Where a prediction takes seconds, lower `n_cells`, or leave `"integrated_gradients"` out of `baselines`.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.evaluate(adata, "bulk_labels", baselines=["pca", "genes"], n_splits=1, n_bootstrap=50)
    >>> metrics = adata.uns["sae"]["metrics"]
    >>> means = metrics[(metrics["section"] == "labels") & (metrics["metric"] == "auroc") & metrics["label"].isna()]
    >>> means["source"].tolist()
    ['sae', 'pca', 'genes']
    """
    from scanpy import logging as logg

    _check(baselines, n_cells=n_cells, n_splits=n_splits, n_bootstrap=n_bootstrap, n_neighbors=n_neighbors)
    held, baselines = holder(data, mod), list(dict.fromkeys(baselines))
    a = _schema.activations_in_memory(held, key)
    stored, found = _schema.read(held, key), _schema.latent(held, key)
    labels = None if groupby is None else label_column(held.data.obs, groupby, held.where)
    known = np.arange(held.data.n_obs) if labels is None else np.flatnonzero(labels.codes >= 0)
    read = None
    if net is not None or (groupby is not None and any(name in OF_GENES for name in baselines)):
        needed = net is not None or layer is not None or var_mod is not None
        read = read_expression(data, held, layer, var_mod, needed=needed)
    sets = None if net is None or read is None else match(net, read[0].genes, min_size=min_size, max_size=max_size)
    known = known if read is None else np.intersect1d(known, read[1])
    if len(known) == 0:
        raise ValueError(f"There is no cell of {held.where} to compare.")
    labels = None if labels is None else _left(labels, known, held, str(groupby))
    generator = np.random.default_rng(rng)
    cells = Cells.drawn(held, known, labels, donor, n_cells, n_splits, n_bootstrap, generator)
    if len(cells.rows) <= n_neighbors:
        raise ValueError(f"There are {len(cells.rows)} cells to compare, and n_neighbors={n_neighbors}. Lower it.")
    seed = int(generator.integers(2**31))
    seen = drawn_unseen(np.arange(held.data.n_obs) if read is None else read[1], n_cells, seed)
    attributed = None
    if model is not None and labels is not None and any(name in ATTRIBUTIONS for name in baselines):
        attributed = Attributed(model, held, found.matrix, cells, var_mod)

    start = logg.info(f"evaluating {key!r} on {len(cells.rows)} of {held.data.n_obs} cells")
    attributions = [name for name in ATTRIBUTIONS if name in baselines]
    others = [name for name in baselines if name not in ATTRIBUTIONS]
    metrics = Metrics(groupby, cells.labels)
    n_steps = 2 + len(others) + (0 if attributed is None else len(attributions) * found.matrix.shape[1])
    with progress_bar(n_steps, "evaluate", "step", shown=progress) as bar:
        x = floating_rows(found.matrix, cells.rows)
        if not varying_columns(x).any():
            raise ValueError(
                f"{found.where} is the same in all {len(x)} cells that are compared: there is no variance to explain."
            )
        compared = Compared(
            cells,
            x,
            seen,
            x if np.array_equal(seen, cells.rows) else floating_rows(found.matrix, seen),
            trained(stored, a[cells.rows]),
            frozen(stored, found.matrix, cells.rows, seed, found.where) if "frozen_decoder" in baselines else None,
            None if read is None else Genes.at(cells.rows, *read),
            stored["weights"].get("scaling"),
            seed,
        )
        stored_metrics(metrics, stored, a)
        dictionary_metrics(metrics, compared)
        fidelity_metrics(metrics, compared, n_neighbors, with_pca="pca" in baselines)
        bar.update()
        scoring = Scoring(metrics, compared, sets)
        scoring.add(Source("sae", compared.learned.a))
        scoring.add_null()
        bar.update()
        for source in unsupervised(others, compared):
            scoring.add(source)
            bar.update()
        for name in ("l1_genes", "l1_latent"):
            if name in baselines and labels is not None:
                scoring.add_supervised(name)
                bar.update()
        if attributed is not None:
            for name in attributions:
                scoring.add_attributions(name, attributed, bar.update)
    table = metrics.table()
    _schema.write(held, key, {**stored, "metrics": table})
    logg.info("    finished", time=start, deep=f"added\n    {held.where}.uns[{key!r}]['metrics'], {len(table)} rows")


def _left(labels: pd.Categorical, known: np.ndarray, held: Holder, groupby: str) -> pd.Categorical:
    """Return the labels of the cells that have expression as well."""
    left = labels[known].remove_unused_categories()
    if len(left.categories) < 2:
        raise ValueError(
            f"{held.where}.obs[{groupby!r}] has {len(left.categories)} labels ({listing(left.categories)}) among the {len(known)} cells "
            "that have expression; two are needed. Pass var_mod= with another modality."
        )
    return left


def _check(baselines: Sequence[str], **at_least_one: int) -> None:
    unknown = [name for name in baselines if name not in BASELINES]
    if isinstance(baselines, str) or unknown:
        raise ValueError(
            f"baselines={baselines!r} is not a list of some of {listing(BASELINES, len(BASELINES))}."
            + (f" There is no {listing(unknown)}." if not isinstance(baselines, str) else "")
        )
    for name, value in at_least_one.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r} is not an integer of 1 or more.")
