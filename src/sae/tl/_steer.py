from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, Holder, holder, is_mudata, listing, modality
from .._expression import log1p_base, recognised_scale
from .._genesets import Net, match
from .._intervention import Settings, cohort_of, steps_of
from .._prediction import Decoder, Part
from .._progress import progress_bar
from .._schema import Features
from .._steered import added_to
from .._steering import Centres, Cohort, Place, Sets, Tables
from ..core.controls import Measures, Sample, alike_in_activity, few_of_each, random_directions
from ..core.neighbours import Reference
from ..core.rows import Matrix, read_rows
from ..core.steering import Decode, Intervention, Steps, chunk_rows
from ..models import PCA

MAX_REFERENCE, MAX_PER_LABEL, MAX_CONTROL_CELLS = 2_500, 100, 100
PSEUDOCOUNT = 0.1
CHECKED_CELLS, WRONG_MODEL = 200, 0.01
"""Cells whose latent a PCA has to make again, and the share of its variance by which it may miss."""


def steer(
    data: Data,
    feature: Features,
    *,
    model: object,
    intervention: Intervention = "set",
    value: float | None = None,
    quantile: float | None = None,
    reference: str | None = None,
    doses: Sequence[float] = (0.0, 0.5, 1.0, 2.0),
    cells: Sequence[bool] | Sequence[str] | None = None,
    groupby: str | None = None,
    reconstruct: bool = False,
    net: Net | None = None,
    n_controls: int = 20,
    control_keys: Sequence[str] = (),
    n_neighbors: int = 15,
    n_genes: int | None = 100,
    pseudocount: float = PSEUDOCOUNT,
    key: str = "sae",
    mod: str | None = None,
    var_mod: str | None = None,
    key_added: str | None = None,
    layer_added: str | None = None,
    rng: int | np.random.Generator | None = 0,
    progress: bool = True,
) -> None:
    r"""Turn features up or down and see what a pretrained model then makes of the cells.

    The activation a of a feature becomes a' in every cell, the latent moves along the feature's decoder direction,

    .. math::
        z' = z + (a' - a) \, W_{dec},

    and the model decodes z and z'. What the SAE does not reconstruct of a cell stays in z', so that without a change of the activation
    nothing changes. arXiv:2410.11468 replaces z by its reconstruction, z' = a' W_dec + b_dec: `reconstruct=True`.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, with activations.
    feature
        A feature or several, by name or number, each steered by itself; None for all.
    model
        A pretrained model such as :class:`sae.models.SCVI`: an object with a method `decode(z, data)`, see :func:`sae.tl.rank_genes`;
        or with `intervene(step, data)`, which predicts expression when the vectors z' − z (cells × dimensions) are added inside it.
    intervention
        `"set"`: a' = dose · value. `"add"`: a' = a + dose · value. `"scale"`: a' = dose · a. `"ablate"`: a' = 0, without doses.
        Never below 0.
    value
        Activation that a dose of 1 stands for, of all features; by default the mean of the feature over its active cells.
    quantile
        Instead: this quantile (0 to 1) of the feature over its active cells.
    reference
        Instead: the mean of the feature over the cells with this label of `groupby`, active or not.
    doses
        Strengths.
    cells
        Cells to steer: a mask, in the order of the cells or a Series with their names, or names; by default all.
    groupby
        Column of `obs` with labels, such as cell types. Changes are then told for the cells of each label, and it is seen whether
        they move towards others. Cells without a label are left out.
    reconstruct
        See above.
    net
        Gene sets, of which is told whether their genes rise more than others. Of a model of several modalities, with the genes of
        `var_mod`, or of its first.
    n_controls
        Random features, and random directions, that a feature is compared with. With 0, the table of controls has only values, and
        those only with `net`.
    control_keys
        Further SAEs of the same representation (other seeds) whose features are among those that are drawn from.
    n_neighbors
        Of a cell in the latent.
    n_genes
        Genes to store per feature, dose, label and direction, those that change most first; None for all. Adjusted p-values are over all.
    pseudocount
        Of the fold change, in the unit of the un-logged values.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE.
    var_mod
        The modality of `net` and `layer_added`, where there are several.
    key_added
        Also write the new latent of all cells to `obsm` under this name, for one feature and dose.
    layer_added
        Also write the prediction to `layers` under this name, for one feature and dose; NaN for genes that the model does not predict.
    rng
        Seed of the cells and controls that are drawn.
    progress
        Show a progress bar when it takes more than a second. A bar of the model itself is set there:
        `Geneformer(..., progress=False)`.

    Returns
    -------
    Nothing. Writes `uns[key]["steering"]`, in place of an earlier one:

    * `genes`: `feature`, `dose`, `label`, `gene`, `change` (mean over cells of the difference, in the unit of the prediction: of ln(1 + x)
      for most models), `log2fc`, `score` (paired t), `pval`, `padj` (over the genes of a feature, dose and label), and `modality` if
      the model knows several.
    * `doses`: `feature`, `dose`, `value` (the activation set, the one added, or the factor), `n_cells`, `n_moved`, `step` (mean of
      ‖z' − z‖), `effect` (root mean square over genes of the mean change), `distance` and `distance_before` (mean distance to the nearest
      neighbours in the original latent), `off_manifold` and `off_manifold_before` (share of cells farther from them than 99 % of
      real cells).
    * `labels`: `feature`, `dose`, `label`, `towards`, `before`, `after` (share of the neighbours with the label `towards`), `difference`, `closed`
      (share of the way from the centre of the steered cells to that of the label `towards` that is covered along the line between them).
    * `controls`: `feature`, `dose`, `measure` (`"effect"`, `"distance"`, `"label"`: difference of the share of neighbours,
      `"gene_set"`: AUROC of its genes by their change), `name` (of the label or set), `value`, and for random features and random directions
      the mean `of_features`, `of_directions`, and the share that the feature exceeds, `above_features`, `above_directions`.
    * `params`: what was done.

    Neighbours are looked for among up to 2,500 cells, drawn at random, for up to 100 cells of each label; controls move up to
    100 cells, each as far as the feature moves it. Random features are those that are active in the most similar number of cells,
    but for those whose direction has a cosine above 0.9 with the feature.

    Raises
    ------
    KeyError
        There are no activations, or no such feature or column.
    TypeError
        The model cannot decode.
    ValueError
        A setting out of range, or several that exclude each other; no cells; a latent that the model does not decode; gene sets that it does
        not predict.
    FloatingPointError
        Distances between cells are beyond float32.

    Notes
    -----
    P-values tell how consistent a change is over cells. Models are deterministic, cells are not independent, and almost any
    step is significant in a few hundred cells: what counts is the size of the change, and what random features and directions do.

    Examples
    --------
    >>> import sae
    >>> import scanpy as sc
    >>> adata = sae.datasets.pbmc68k()
    >>> sc.pp.pca(adata)
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> model = sae.models.PCA(adata)
    >>> sae.tl.steer(adata, "sae_0", model=model, doses=[1], groupby="bulk_labels")
    >>> list(adata.uns["sae"]["steering"])
    ['genes', 'doses', 'labels', 'controls', 'params']
    """
    from scanpy import logging as logg

    from ..core.changes import paired_test, summed_changes

    strengths = (1.0,) if intervention == "ablate" else tuple(float(dose) for dose in np.atleast_1d(doses))
    how = Settings(intervention, value, quantile, reference, strengths, groupby)
    how.check(n_controls, n_neighbors, n_genes)
    rng = np.random.default_rng(rng)
    held = holder(data, mod)
    a = _schema.activations_in_memory(held, key)
    latent = _schema.latent(held, key).matrix
    known = _schema.features(held, key)
    chosen = _schema.resolve(feature, known.index, known.get("name"))
    cohort = cohort_of(held, cells, groupby)
    steps = steps_of(held, key, a, latent, chosen, cohort, how, reconstruct)
    _check_model(model, held, cohort.rows, latent)
    first = cohort.rows[:1]
    decoder = Decoder.of(model, read_rows(latent, first).astype(np.float32, copy=False), held.data[first], steps=True)
    part = _part(data, decoder, var_mod)
    added = added_to(data, held, key_added, layer_added, len(steps), decoder.parts, part, var_mod)

    def decode(rows: np.ndarray, z: np.ndarray, step: np.ndarray | None) -> list[np.ndarray]:
        return decoder.decode(z, held.data[rows], step)

    n_each = [len(part.genes) for part in decoder.parts]
    start = logg.info(
        f"steering {len(chosen)} features of {held.where} at {len(how.doses)} doses in {len(cohort.rows)} cells"
    )
    place = _placing(latent, cohort, n_neighbors, rng)
    sets = _sets(net, decoder.parts, part)
    measures = _measures(place, decode, sets, rng)
    if all(np.isnan(values).all() for values in measures.base):
        raise ValueError(f"The prediction of {decoder.where} is NaN for all genes.")
    centres = _centres(latent, cohort)
    pool = _pool(held, key, control_keys, n_controls, place.deviation, rng)
    tables = Tables(_schema.feature_names(key, a.shape[1]), cohort, place, decoder.parts, sets)
    units = [_units(part, values, held) for part, values in zip(decoder.parts, measures.base, strict=True)]
    with progress_bar(
        len(steps) * (-(-len(cohort.rows) // chunk_rows(n_each)) + 1), "steer", "step", shown=progress
    ) as bar:
        changed = summed_changes(latent, cohort.rows, cohort.codes, steps, decode, n_each, on_chunk=bar.update)
        for number, (step, changes) in enumerate(zip(steps, changed, strict=True)):
            of = int(chosen[number // len(how.doses)])
            tests = [
                paired_test(change, pseudocount=pseudocount, **unit)
                for change, unit in zip(changes, units, strict=True)
            ]
            tables.add_genes(of, step, tests, n_genes)
            [placed] = place.sample.place([step], place.reference)
            tables.add_dose(of, step, changes, placed)
            if cohort.labelled:
                tables.add_labels(of, step, centres, placed)
            if n_controls or net is not None:
                tables.add_controls(of, step, measures, pool.like(step, int(a[:, [of]].nnz)), pool.random)
            bar.update()
    params = {"model": type(model).__name__, **how.described(), "reconstruct": reconstruct, "n_cells": len(cohort.rows)}
    found = tables.finished()
    steering = {**found, "params": params}
    also = added.changes(steps[0], cohort.rows, latent, decoder)
    _schema.write(held, key, {**_schema.read(held, key), "steering": steering}, also=also)
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    {held.where}.uns[{key!r}]['steering'], {len(found['genes'])} rows of genes" + added.told(),
    )


def _check_model(model: object, held: Holder, rows: np.ndarray, latent: Matrix) -> None:
    """Refuse principal components of other cells or another run, whose predictions would look plausible."""
    if not isinstance(model, PCA):
        return
    some = rows[:: -(-len(rows) // CHECKED_CELLS)]
    z = read_rows(latent, some)
    own = model.embed(held.data[some])
    if own.shape != z.shape or np.square(own - z).sum() > WRONG_MODEL * np.square(z - z.mean(axis=0)).sum():
        raise ValueError(
            f"The PCA does not make the latent of the SAE from the expression of {held.where}: it is of other cells, or sc.pp.pca was "
            "run again since. Pass sae.models.PCA of the object and the components that the SAE was trained on."
        )


def _placing(latent: Matrix, cohort: Cohort, k: int, rng: np.random.Generator) -> Place:
    """Choose the cells among which others are placed, and those of the steered that are."""
    known = np.flatnonzero(cohort.all_codes >= 0)
    if len(known) < 3:
        raise ValueError(f"{len(known)} cells have no neighbours. Steering needs three or more with a label.")
    drawn = np.sort(rng.permutation(known)[:MAX_REFERENCE])
    z = read_rows(latent, drawn).astype(np.float32, copy=False)
    reference = Reference(z, cohort.all_codes[drawn], len(cohort.all_labels), k)
    at = few_of_each(cohort.codes, MAX_PER_LABEL, rng)
    rows = cohort.rows[at]
    place = np.searchsorted(drawn, rows).clip(max=len(drawn) - 1)
    own = np.where(drawn[place] == rows, place, -1)
    some = read_rows(latent, rows).astype(np.float32, copy=False)
    return Place(reference, Sample(at, rows, some, own, reference.place(some, own)), z.std(axis=0, dtype=np.float64))


def _part(data: Data, decoder: Decoder, var_mod: str | None) -> int:
    """Return the number of the modality that is meant, by default the first, among those that a model predicts."""
    known = [part.modality for part in decoder.parts]
    if var_mod is None:
        return 0
    if known == [None]:
        if not is_mudata(data):
            raise ValueError(f"var_mod={var_mod!r} names a modality, but {decoder.where} has none. Leave var_mod= out.")
        modality(data, var_mod)
        return 0
    if var_mod not in known:
        raise ValueError(f"{decoder.where} is of the modalities {listing(known)}, not of var_mod={var_mod!r}.")
    return known.index(var_mod)


def _sets(net: Net | None, parts: Sequence[Part], of: int) -> Sets:
    if net is None:
        return Sets(pd.Index([], dtype=object), np.zeros((0, len(parts[of].genes)), dtype=bool), of)
    found = match(net, parts[of].genes, min_size=1, max_size=None)
    return Sets(found.names, found.weights.toarray() != 0, of)


def _measures(place: Place, decode: Decode, sets: Sets, rng: np.random.Generator) -> Measures:
    """Choose the cells that are compared with controls, and decode them."""
    few = place.sample.select(np.sort(rng.permutation(len(place.sample.at))[:MAX_CONTROL_CELLS]))
    return Measures(few, place.reference, decode(few.cells, few.z, None), sets.members, sets.of, decode)


@dataclass(frozen=True)
class _Pool:
    """What a feature is compared with.

    Attributes
    ----------
    directions, n_active
        (features, d) of the SAEs, and in how many cells each is active.
    random
        (controls, d)
    n
        Random features per feature.
    """

    directions: np.ndarray
    n_active: np.ndarray
    random: np.ndarray
    n: int
    deviation: np.ndarray

    def like(self, step: Steps, n_active: int) -> np.ndarray:
        """Return the directions of random features that are as active as a feature."""
        one, others = step.direction / self.deviation, self.directions / self.deviation
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = others @ one / (np.linalg.norm(others, axis=1) * np.linalg.norm(one))
        usable = np.where(np.isfinite(cosine), self.n_active, 0)
        return self.directions[alike_in_activity(n_active, usable, np.nan_to_num(cosine), self.n)]


def _pool(
    held: Holder, key: str, control_keys: Sequence[str], n: int, deviation: np.ndarray, rng: np.random.Generator
) -> _Pool:
    """Gather the features of the SAE and of others of the same representation."""
    if isinstance(control_keys, str):
        raise TypeError(f"control_keys={control_keys!r} is a string; expected a list of SAEs: [{control_keys!r}].")
    directions: list[np.ndarray] = []
    n_active: list[np.ndarray] = []
    own = _read_by(held, key)
    for name in dict.fromkeys([key, *control_keys]):
        n_active.append(_schema.activations_in_memory(held, name).getnnz(axis=0))
        if _read_by(held, name) != own:
            raise ValueError(
                f"The SAE {name!r} of control_keys= is of {_read_by(held, name)[0]!r} and {key!r} of {own[0]!r}, or of other columns "
                "of it. Pass SAEs of the same representation."
            )
        directions.append(_schema.model(_schema.read(held, name)).W_dec)
    d = directions[0].shape[1]
    spread = np.where(deviation > 0, deviation, 1.0)
    return _Pool(np.concatenate(directions), np.concatenate(n_active), random_directions(n, d, rng), n, spread)


def _read_by(held: Holder, key: str) -> tuple[str, tuple[str, ...]]:
    """Tell which representation an SAE reads, and which columns of it where they have names."""
    stored = _schema.read(held, key)
    encoded = stored["encoded"]
    return encoded["layer"] or encoded["use_rep"], tuple(stored["weights"].get("input_names", ()))


def _centres(latent: Matrix, cohort: Cohort) -> Centres:
    from ..core.changes import group_means

    known = np.flatnonzero(cohort.all_codes >= 0)
    of_all = group_means(latent, known, cohort.all_codes[known], len(cohort.all_labels))
    return Centres(of_all, group_means(latent, cohort.rows, cohort.codes, len(cohort.labels)))


def _units(part: Part, base: np.ndarray, held: Holder) -> dict[str, Any]:
    """Tell how fold changes are made of predicted values."""
    from ..core.moments import scan

    if part.scale == "log":
        return {"log_base": None, "log": True}
    scale = part.scale or recognised_scale(scan(base))
    uns = held.data.uns if part.uns is None else part.uns
    return {"log_base": {"log1p": log1p_base(uns), "scaled": np.nan}.get(scale)}
