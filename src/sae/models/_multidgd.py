"""multiDGD, rebuilt from its checkpoint: a decoder without an encoder, whose latents are learned parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from .._data import Data, holder, is_mudata, listing, readable
from .._progress import progress_bar
from ..core.rows import row_blocks, select_rows, take_rows
from ._model import Prediction, check_latent, check_library_size, prediction
from ._multidgd_files import Checkpoint, read_checkpoint
from ._reading import cells_in, genes_in, refuse_fractions, unique

if TYPE_CHECKING:
    from ..core.dgd import Network

SAME = {"gex": "rna", "gene expression": "rna", "peaks": "atac"}
"""What modalities are also called, in lower case."""
MODALITY_COLUMNS = ("modality", "feature_types")
BLOCK_ROWS = 128
ORDER_CELLS = 50, 200
"""How many cells tell whether features are in the order of the model: at least, at most."""
LEAST_CORRELATION = 0.3
"""Of their means with those predicted. In the right order, 50 cells and peaks open in 1 of 50 cells suffice for more."""


@dataclass(frozen=True)
class Features:
    """A modality of the model in some data: columns of an object there, and the names of the cells in the data."""

    key: str
    source: ad.AnnData
    columns: np.ndarray
    where: str
    cells: pd.Index

    @property
    def names(self) -> pd.Index:
        """Names of the features."""
        return self.source.var_names[self.columns]

    @cached_property
    def rows(self) -> np.ndarray:
        """Where the cells are in the object, −1 for those that it lacks."""
        return cells_in(self.source.obs_names, self.cells, self.where)


class MultiDGD:
    r"""A trained multiDGD model, from the files that multiDGD saves; the package itself is not needed.

    multiDGD (Schuster et al., Nature Communications 2024) has no encoder: the latent of each cell that it was made with is a
    parameter, found here by the name of the cell. From the latent z and that of the cell's covariate, the decoder gives the
    share ρ of each feature g in the counts of a modality (RNA, accessibility); predicted are

    .. math::
        \hat{x}_g = \ell \, \rho_g(z, z_{cov}) \qquad \text{or} \qquad \ln(1 + \ell \, \rho_g(z, z_{cov}))

    with a library size ℓ.

    Parameters
    ----------
    path
        The folder with `<name>.pt` (a state dict), `<name>_hyperparameters.json` and, where it was kept, `_obs.csv`. Only
        tensors are read from the state dict; a file with anything else in it is refused.
    name
        Name of the model; by default the only one in the folder.
    obs
        The cells that the model was made with, in their order: `adata.obs` of that data, with the column `train_val_test` and
        that of the covariate (`covariate_...`). By default the file `_obs.csv` or `<name>_obs.csv`, if there is one. multiDGD writes
        it anew for each model that is made or loaded in the folder; it is refused if it has another number of cells than the model.
    var_names
        Features of each modality in the order of the training data, which the files do not hold. By default those of `data`, which
        must then have these features, no others, in this order. `embed` refuses data whose means are nothing like those that
        the model predicts for the same cells; what it cannot see are a few features out of place.
    layer
        Layer with raw counts, by default `X`. They are read for new cells, and for `library_size="observed"`.
    library_size
        ℓ of each modality; or `"observed"` for the cell's own counts there.
    log1p
        Predict ln(1 + x), of scale `"log1p"`, else x, of scale `"linear"`.
    covariate
        Decode all cells as if they had this covariate, by default each with its own: a category, which stands for the mean of its
        component in the model, or a latent.
    new_cells
        What `embed` does with cells that have no latent: `"error"`, or `"optimise"` it as multiDGD does. From the combination of
        components that explains the cell's counts best, Adam takes `n_epochs` steps towards the maximum of the log-likelihood of
        the counts (negative binomial) plus the log density of the latent (Gaussian mixture); it is a local maximum. A modality
        that `data` lacks is left out.
    n_epochs
        Steps for new cells.
    device
        Such as `"cpu"` or `"cuda"`; `"auto"` for the fastest there is.
    progress
        Show a progress bar for new cells.

    Attributes
    ----------
    n_latent
        Width of the latent.
    modalities
        Names of the modalities in the model.
    dispersion
        r of each feature, by modality: the variance of counts is mean + mean² / r.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    ValueError
        A file is damaged or needs unpickling, lacks parameters (they are named), or does not fit the others.

    Examples
    --------
    The files of the smallest model there can be, with two cells and three genes:

    >>> import json, pathlib, tempfile
    >>> import anndata, numpy as np, sae, torch
    >>> settings = {"modalities": ["rna"], "n_features_per_modality": [3], "latent_dimension": 2, "n_components": 1}
    >>> settings |= {"n_hidden": 0, "n_hidden_modality": 1, "n_units": 1, "decoder_width": 1}
    >>> shapes = {"representation.z": (2, 2), "gmm.mean": (1, 2), "gmm.neglogvar": (1, 2), "gmm.weight": (1,)}
    >>> head = {"fc.0.weight": (3, 2), "fc.0.bias": (3,), "distribution.log_r": (1, 3)}
    >>> shapes |= {f"decoder.out_modules.0.{key}": shape for key, shape in head.items()}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({key: torch.ones(shape) for key, shape in shapes.items()}, f"{folder}/dgd.pt")
    ...     _ = pathlib.Path(folder, "dgd_hyperparameters.json").write_text(json.dumps(settings))
    ...     _ = pathlib.Path(folder, "_obs.csv").write_text(",train_val_test\na,train\nb,train\n")
    ...     model = sae.models.MultiDGD(folder, library_size=300, log1p=False)
    >>> adata = anndata.AnnData(np.ones((1, 3)))
    >>> adata.obs_names = ["b"]
    >>> model.decode(model.embed(adata), adata).X.round(2)
    array([[100., 100., 100.]], dtype=float32)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        obs: pd.DataFrame | None = None,
        var_names: Mapping[str, Sequence[str]] | None = None,
        layer: str | None = None,
        library_size: float | Literal["observed"] = 1e4,
        log1p: bool = True,
        covariate: str | Sequence[float] | np.ndarray | None = None,
        new_cells: Literal["error", "optimise"] = "error",
        n_epochs: int = 100,
        device: str = "auto",
        progress: bool = True,
    ) -> None:
        check_library_size(library_size)
        if new_cells not in ("error", "optimise"):
            raise ValueError(f"new_cells={new_cells!r} is neither 'error' nor 'optimise'.")
        if n_epochs < 1:
            raise ValueError(f"n_epochs={n_epochs}: new cells need one step at least.")
        from ..core.dgd import Network
        from ..core.train import choose_device

        checkpoint = read_checkpoint(Path(path), name, obs)
        self.n_latent, self.modalities = checkpoint.n_latent, checkpoint.modalities
        self._network = Network(checkpoint.state, len(self.modalities), choose_device(device))
        self.dispersion = dict(zip(self.modalities, self._network.dispersion, strict=True))
        self._n_covariate, self._has_obs = checkpoint.n_covariate, checkpoint.obs is not None
        # Those that were optimised come after those of the checkpoint.
        self._latents, self._n_learned = checkpoint.latents, len(checkpoint.latents)
        self._layer, self._library_size, self._log1p = layer, library_size, log1p
        self._optimise, self._n_epochs, self._progress = new_cells == "optimise", n_epochs, progress
        self._var_names = None if var_names is None else self._checked_names(var_names)
        self._covariate = None if covariate is None else _covariate(covariate, checkpoint, self._network)

    def embed(self, data: Data) -> np.ndarray:
        """Return the latent (n, d) of the cells in `data`, found by their names.

        Values are read only of new cells, and of some others to check the order of features. The model remembers the covariate's
        latents of new cells, which `decode` needs.

        Raises
        ------
        ValueError
            Cells without a latent, if `new_cells="error"`; names of cells that occur twice; features in another order; for
            new cells, missing features or values that are not counts.
        KeyError
            `data` lacks the layer.
        """
        names = unique(holder(data, None).data.obs_names, "data", "obs_names_make_unique()")
        rows = self._latents.index.get_indexer(names)
        new = (rows < 0) | (rows >= self._n_learned)
        if new.any() and not self._optimise:
            where = "the checkpoint" if self._has_obs else "the model, which has no table of cells (_obs.csv)"
            remedy = "" if self._has_obs else "pass the obs of the data that the model was made with as obs=, or "
            raise ValueError(
                f"{new.sum()} of {len(names)} cells have no latent in {where}: {listing(names[new], 5)}. multiDGD has no encoder; "
                f"{remedy}pass new_cells='optimise' to search for latents under which their counts are likely."
            )
        if self._var_names is None:
            self._refuse_other_order(data, np.flatnonzero(~new), rows[~new])
        if new.any():
            found = self._search(data, np.flatnonzero(new))
            self._latents = pd.concat([self._latents.drop(index=names[new & (rows >= 0)]), found])
            rows = self._latents.index.get_indexer(names)
        return self._latents.to_numpy()[rows, : self.n_latent]

    def decode(self, z: np.ndarray, data: Data) -> Prediction:
        """Return the expression at the latent `z` (n, d) of the cells in `data`.

        Of a MuData, a dict with all its modalities that the model has; with `var_names`, also of those that it lacks. Of an
        AnnData, the modality that it holds, or a dict of several, by the names in the model: `var["modality"]` (or
        `var["feature_types"]`) says which features belong to which; without it, their number tells, and those of all modalities
        are taken to be one modality after the other.

        Raises
        ------
        ValueError
            `z` has another shape, or NaN; the covariate of cells is not known; `data` has other features than the model; values that
            are not counts, if `library_size="observed"`.
        KeyError
            `data` lacks the layer that the counts are in.
        """
        z = check_latent(z, data, self.n_latent, "MultiDGD")
        latents = np.hstack([z, self.covariates(data)])
        found = self._features(data)
        genes = self._genes(data, found)
        library: dict[str, Any] = dict.fromkeys(genes, self._library_size)
        if self._library_size == "observed":
            library = {m: self._totals(data, m, found) for m in genes}
        shares = self._network.shares(latents, [self.modalities.index(m) for m in genes])
        predicted = {}
        for (m, names), values in zip(genes.items(), shares, strict=True):
            values *= library[m]
            key = found[m].key if m in found else m
            if self._log1p:
                np.log1p(values, out=values)
            predicted[key] = prediction(values, data.obs_names, names, "log1p" if self._log1p else "linear")
        return predicted if is_mudata(data) or len(predicted) > 1 else next(iter(predicted.values()))

    def covariates(self, data: Data) -> np.ndarray:
        """Return the covariate's latents (n, c) that the cells in `data` are decoded with; c is 0 if the model has no covariate.

        Raises
        ------
        ValueError
            The covariate of cells is not known.
        """
        if self._n_covariate == 0 or self._covariate is not None:
            given = np.empty(0, np.float32) if self._covariate is None else self._covariate
            return np.tile(given, (data.n_obs, 1))
        rows = self._latents.index.get_indexer(data.obs_names)
        if (rows < 0).any():
            raise ValueError(
                f"The model does not know the covariate of {(rows < 0).sum()} of {len(rows)} cells: "
                f"{listing(data.obs_names[rows < 0], 5)}. Pass covariate= to decode them with a given one, obs= if the model was "
                "made with them, or new_cells='optimise' and embed them first."
            )
        return self._latents.to_numpy()[rows, self.n_latent :]

    def _search(self, data: Data, cells: np.ndarray) -> pd.DataFrame:
        """Optimise the latents of some cells."""
        found = self._features(data)
        self._genes(data, found)
        if not found:
            raise ValueError(f"data has none of the modalities {listing(self.modalities)}, and new cells need counts.")
        latents = []
        with progress_bar(len(cells), "New cells", "cell", shown=self._progress) as bar:
            for rows in row_blocks(len(cells), BLOCK_ROWS):
                counts = {
                    self.modalities.index(m): _dense(self._counts(m, part, cells[rows])) for m, part in found.items()
                }
                latents.append(self._network.search(counts, self._n_epochs))
                bar.update(len(latents[-1]))
        return pd.DataFrame(np.concatenate(latents), index=data.obs_names[cells], columns=self._latents.columns)

    def _refuse_other_order(self, data: Data, cells: np.ndarray, rows: np.ndarray) -> None:
        """Compare the mean of each feature over some cells with what the model predicts for them at their latents (rows)."""
        from scipy.stats import spearmanr

        least, most = ORDER_CELLS
        for m, part in self._features(data).items():
            some = np.flatnonzero(data.obs_names[cells].isin(part.source.obs_names))
            if len(some) < least or len(part.columns) != len(self.dispersion[m]) or self._matrix(part) is None:
                continue
            some = some[np.linspace(0, len(some) - 1, min(len(some), most)).astype(int)]
            values = self._values(m, part, cells[some])
            mean = np.asarray(values.mean(axis=0)).ravel()
            # Scaled values have no order that a mean share could have.
            if not values.min() >= 0 or mean.min() == mean.max():
                continue
            (shares,) = self._network.shares(self._latents.to_numpy()[rows[some]], [self.modalities.index(m)])
            correlation = spearmanr(mean, shares.mean(axis=0)).statistic
            if correlation < LEAST_CORRELATION:
                raise ValueError(
                    f"The features of {part.where} are probably not in the order of the model: the rank correlation of their "
                    f"means over {len(some)} cells with those that the model predicts is {correlation:.2f}. Pass their names "
                    "in the order of the training data as var_names=."
                )

    def _checked_names(self, var_names: Mapping[str, Sequence[str]]) -> dict[str, pd.Index]:
        names = {}
        for m in self.modalities:
            key = _matching(m, var_names)
            if key is None:
                raise ValueError(f"var_names has {listing(var_names)}; the model has {listing(self.modalities)}.")
            names[m] = unique(pd.Index(var_names[key]), f"var_names[{key!r}]", "var_names_make_unique()")
            if len(names[m]) != len(self.dispersion[m]):
                raise ValueError(
                    f"var_names[{key!r}] has {len(names[m])} names; the model has {len(self.dispersion[m])} features of {m!r}."
                )
        return names

    def _features(self, data: Data) -> dict[str, Features]:
        """Find the modalities of the model in `data`."""
        if is_mudata(data):
            keys = {m: key for m in self.modalities if (key := _matching(m, data.mod)) is not None}
            parts = {m: (data.mod[key], f"mdata.mod[{key!r}]") for m, key in keys.items()}
            return {
                m: Features(keys[m], part, np.arange(part.n_vars), where, data.obs_names)
                for m, (part, where) in parts.items()
            }
        for column in MODALITY_COLUMNS:
            labels = data.var[column].astype(str) if column in data.var else pd.Series(dtype=str)
            keys = {m: key for m in self.modalities if (key := _matching(m, set(labels))) is not None}
            if keys:
                return {
                    m: Features(
                        m, data, np.flatnonzero(labels == key), f"adata with var[{column!r}] = {key!r}", data.obs_names
                    )
                    for m, key in keys.items()
                }
        widths = [len(r) for r in self.dispersion.values()]
        if data.n_vars == sum(widths):
            split = np.split(np.arange(data.n_vars), np.cumsum(widths)[:-1])
            return {
                m: Features(m, data, columns, "adata", data.obs_names)
                for m, columns in zip(self.modalities, split, strict=True)
            }
        fitting = [m for m, r in self.dispersion.items() if len(r) == data.n_vars or len(widths) == 1]
        return {
            m: Features(m, data, np.arange(data.n_vars), "adata", data.obs_names) for m in fitting if len(fitting) == 1
        }

    def _genes(self, data: Data, found: Mapping[str, Features]) -> dict[str, pd.Index]:
        """Return the names of what can be predicted for `data`."""
        if self._var_names is not None:
            return self._var_names if is_mudata(data) or not found else {m: self._var_names[m] for m in found}
        widths = ", ".join(f"{m!r} with {len(r)} features" for m, r in self.dispersion.items())
        if not found:
            has = f"the modalities {listing(data.mod)}" if is_mudata(data) else f"{data.n_vars} features"
            raise ValueError(
                f"data has {has}, and the model {widths}. Name the modalities of a MuData so, say in var['modality'] of an "
                "AnnData which each feature belongs to, or pass var_names=."
            )
        for m, part in found.items():
            if len(part.columns) != len(self.dispersion[m]):
                raise ValueError(
                    f"{part.where} has {len(part.columns)} features, and the model {widths}. Pass data with exactly the features of "
                    "the training data in their order, or the names of these as var_names=."
                )
        return {m: part.names for m, part in found.items()}

    def _matrix(self, part: Features) -> Any:
        if self._layer is None:
            return part.source.X
        if self._layer not in part.source.layers:
            raise KeyError(f"{part.where} has no layer {self._layer!r}; it has {listing(part.source.layers)}.")
        return part.source.layers[self._layer]

    def _values(self, m: str, part: Features, cells: np.ndarray) -> Any:
        """Read the features of a modality in the order of the model, for some cells (by position): dense or CSR."""
        rows = part.rows[cells]
        if (rows < 0).any():
            raise ValueError(
                f"{(rows < 0).sum()} cells of the MuData are not in {part.where}. Keep those that all modalities have: "
                "mudata.pp.intersect_obs(mdata), or embed the others without that modality."
            )
        columns = part.columns
        if self._var_names is not None:
            remedy = "Its counts are read with all of them; add those as zeros if they were not measured."
            columns = columns[genes_in(part.names, self._var_names[m], part.where, "features", "the model has", remedy)]
        return take_rows(select_rows(readable(self._matrix(part), part.where), rows), slice(None))[:, columns]

    def _counts(self, m: str, part: Features, cells: np.ndarray) -> Any:
        """Read values that have to be counts."""
        values = self._values(m, part, cells)
        where = part.where if self._layer is None else f"{part.where}, layer {self._layer!r},"
        genes = part.names if self._var_names is None else self._var_names[m]
        refuse_fractions(values, genes, where, "multiDGD", "Pass the layer that has them as layer=.")
        return values

    def _totals(self, data: Data, m: str, found: Mapping[str, Features]) -> np.ndarray:
        """Return the counts of each cell in a modality (n, 1)."""
        if m not in found:
            raise ValueError(f"data has no counts of {m!r} to scale its prediction to. Pass a number as library_size=.")
        blocks = row_blocks(data.n_obs, BLOCK_ROWS)
        parts = [self._counts(m, found[m], np.arange(data.n_obs)[rows]).sum(axis=1) for rows in blocks]
        return np.concatenate([np.asarray(part).reshape(-1, 1) for part in parts]).astype(np.float32)


def _covariate(covariate: Any, checkpoint: Checkpoint, network: Network) -> np.ndarray:
    """Return the latent (c,) that a category stands for, or one that was given."""
    c, obs = checkpoint.n_covariate, checkpoint.obs
    if c == 0:
        raise ValueError(f"covariate={covariate!r}, but the model has no covariate. Leave covariate= out.")
    if not isinstance(covariate, str):
        latent = np.asarray(covariate, np.float32)
        if latent.shape != (c,) or not np.isfinite(latent).all():
            raise ValueError(
                f"covariate={covariate!r} is neither a category (text) nor a latent of {c} finite numbers."
            )
        return latent
    columns = [] if obs is None else [column for column in obs.columns.astype(str) if column.startswith("covariate_")]
    if obs is None or not columns:
        raise ValueError(
            f"covariate={covariate!r}: nothing says which cells of the model are of this category. Pass obs= with a column "
            f"'covariate_...', or a latent of {c} numbers."
        )
    labels = obs.loc[obs["train_val_test"] == "train", columns[0]]
    if not (labels == covariate).any():
        raise ValueError(f"covariate={covariate!r}: {columns[0]} has {listing(sorted(set(labels)))}.")
    # The order of components is that of the labels' original type, text or numbers, which a CSV file does not keep.
    latents = checkpoint.latents.loc[labels.index[labels == covariate]].to_numpy()[:, checkpoint.n_latent :]
    means = network.covariate_means
    return means[((means - latents.mean(axis=0)) ** 2).sum(axis=1).argmin()]


def _matching(modality: str, names: Collection[str]) -> str | None:
    """Find a modality by its name, or else by another name of the same."""

    def kind(name: str) -> str:
        return SAME.get(name.lower(), name.lower())

    return modality if modality in names else next((name for name in names if kind(name) == kind(modality)), None)


def _dense(values: Any) -> np.ndarray:
    return np.ascontiguousarray(values.toarray() if sparse.issparse(values) else values, dtype=np.float32)
