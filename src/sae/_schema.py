"""The one place that knows how an SAE is laid out in `uns[key]`, `obsm[key]` and `varm[key]`."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from ._data import Holder, Representation, columns_in_order, is_mudata, listing, readable, recomputed, representation
from ._integrity import SCHEMA_VERSION as SCHEMA_VERSION
from ._integrity import STATISTICS, check_stored, check_values
from ._lazy import OnDemand, loaded
from .core.architectures import ARCHITECTURES
from .core.autoencoder import Autoencoder
from .core.feature_statistics import FeatureStatistics
from .core.interrupts import deferred_interrupts
from .core.pareto import pareto
from .core.preprocess import directions as decoder_directions
from .core.rows import Matrix, on_disk, take_rows

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
GENES = ("feature", "gene", "score", "log2fc", "pval", "padj")
ENRICHMENT = (
    "feature", "collection", "gene_set", "direction", "overlap", "size", "score", "pval", "padj", "padj_all", "fdr",
    "genes",
)  # fmt: skip
ANNOTATED = ("annotated", "annotated_fdr", "annotated_permuted", "annotated_random_sets")
LABELS = (
    "feature", "groupby", "label", "auroc", "f1", "held_out_auroc", "held_out_f1", "difference", "ci_low", "ci_high",
    "pval", "padj",
)  # fmt: skip
LABEL_SUMMARY = (
    "groupby", "label", "source", "n_cells", "selected", "agreement", "selection_auroc", "held_out_auroc", "held_out_sd",
    "held_out_f1", "difference", "ci_low", "ci_high",
)  # fmt: skip
STEERING = {
    "genes": ("feature", "dose", "label", "gene", "modality", "change", "log2fc", "score", "pval", "padj"),
    "doses": (
        "feature", "dose", "value", "n_cells", "n_moved", "step", "effect", "distance_before", "distance",
        "off_manifold_before", "off_manifold",
    ),
    "labels": ("feature", "dose", "label", "towards", "before", "after", "difference", "closed"),
    "controls": (
        "feature", "dose", "measure", "name", "value", "n_features", "of_features", "above_features", "n_directions",
        "of_directions", "above_directions",
    ),
}  # fmt: skip
"""The tables of `tl.steer`; `modality` is dropped where a model knows only one."""
MADE_BY = {
    "genes": "rank_genes", "enrichment": "enrich", "labels": "score_labels", "label_summary": "score_labels",
    "features": "encode", "encoded": "encode", "steering": "steer", "ablation": "ablate",
    "perturbation": "perturbation", "metrics": "evaluate", "stability": "stability",
    "feature_map": "feature_map",
}  # fmt: skip

COLUMNS = {"genes": GENES, "enrichment": ENRICHMENT, "labels": LABELS, "label_summary": LABEL_SUMMARY}
OTHER_TYPES = {"overlap": np.int64, "size": np.int64, "n_cells": np.int64, "genes": np.object_, "selected": np.object_}
"""Of the columns that are neither categories nor float64."""

SWEEP_VERSION = 1
SWEEP = (
    "setting", "architecture", "recipe", "preprocess", "n_features", "k", "l1", "l0_weight", "learning_rate", "steps",
    "batch_size", "validation", "early_stopping", "seed", "fvu", "val_fvu", "l0", "val_l0", "dead", "redundancy",
    "label_auroc", "truth_best", "truth_matched", "truth_found", "stability", "pareto", "seconds", "error",
)  # fmt: skip
"""The columns of `tl.sweep`; those that no run has are dropped."""
SWEEP_TEXT = ("architecture", "recipe", "preprocess", "error")
SWEEP_PARETO = ("l0", "val_fvu")

Features = str | int | Sequence[str | int] | None


def check_key(key: str, held: Holder) -> None:
    """Refuse names that h5ad, zarr or MuData cannot hold, and those of something that is not an SAE's."""
    if not isinstance(key, str) or not key or "/" in key:
        raise ValueError(f"key_added={key!r} cannot name an SAE: it must be a non-empty string without '/'.")
    if is_mudata(held.data) and key in held.data.mod:
        raise ValueError(f"key_added={key!r} is the name of a modality, whose obsm slot MuData owns. Choose another.")
    if key in stored_keys(held.data.uns):
        return
    data = held.data
    # Activations that have lost their `uns`, after a concatenation say, are an SAE's.
    in_obsm = key in data.obsm and not sparse.issparse(getattr(data.obsm[key], "_meta", data.obsm[key]))
    slots = [slot for slot, taken in (("uns", key in data.uns), ("obsm", in_obsm), ("varm", key in data.varm)) if taken]
    if slots:
        raise ValueError(
            f"{held.where}.{slots[0]}[{key!r}] exists and is not an SAE's: it would be overwritten. "
            "Choose another key_added=, or remove it first."
        )


def check_sweep_key(key: str, held: Holder) -> None:
    """Refuse names that h5ad and zarr cannot hold, and those of something that is not a sweep's."""
    if not isinstance(key, str) or not key or "/" in key:
        raise ValueError(f"key_added={key!r} cannot name a sweep: it must be a non-empty string without '/'.")
    if key in held.data.uns and key not in sweep_keys(held.data.uns):
        raise ValueError(
            f"{held.where}.uns[{key!r}] exists and is not a sweep's: it would be overwritten. "
            "Choose another key_added=, or remove it first."
        )


def sweep_keys(uns: Mapping[str, Any]) -> list[str]:
    """List the keys of `uns` that hold a sweep."""
    return [key for key, value in uns.items() if isinstance(value, Mapping) and "sweep_version" in value]


def sweep(held: Holder, key: str) -> pd.DataFrame:
    """Return a copy of the runs of a sweep, or say which verb makes them."""
    uns = held.data.uns
    if key not in sweep_keys(uns):
        raise KeyError(
            f"{held.where}.uns has no sweep {key!r}; it has {listing(sweep_keys(uns))}. "
            f"Run sae.tl.sweep(..., key_added={key!r}) first."
        )
    stored = uns[key]
    if stored["sweep_version"] > SWEEP_VERSION:
        raise ValueError(
            f"{held.where}.uns[{key!r}] has the version {stored['sweep_version']} of sweeps; this version of sae reads up to "
            f"{SWEEP_VERSION}. Update sae."
        )
    return loaded(stored["runs"]).copy()


def not_beaten(runs: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    """Mark the runs of settings that no other setting beats in the means over its seeds."""
    means = runs.groupby("setting")[list(by)].mean()
    marked = pd.Series(pareto({name: means[name].to_numpy() for name in by}), index=means.index)
    return marked[runs["setting"]].set_axis(runs.index) & runs[list(by)].notna().all(axis=1)


def check_free(held: Holder, key: str) -> None:
    """Refuse to write a representation over an SAE's activations, over what an SAE was trained on, or over a modality's slot."""
    if is_mudata(held.data) and key in held.data.mod:
        raise ValueError(f"key_added={key!r} is the name of a modality, whose obsm slot MuData owns. Choose another.")
    for name in stored_keys(held.data.uns):
        if key in (name, held.data.uns[name]["params"]["use_rep"]):
            what = "the activations" if key == name else "the representation"
            raise ValueError(
                f"{held.where}.obsm[{key!r}] holds {what} of the SAE {name!r}, and would be overwritten. Choose another key_added=."
            )


def feature_names(key: str, n_features: int) -> pd.Index:
    """Return the names `sae_0`, `sae_1`, ... of the features."""
    return pd.Index([f"{key}_{i}" for i in range(n_features)])


def stored_keys(uns: Mapping[str, Any]) -> list[str]:
    """List the keys of `uns` that hold an SAE."""
    return [key for key, value in uns.items() if isinstance(value, Mapping) and "weights" in value]


def read(held: Holder, key: str) -> Mapping[str, Any]:
    """Return what is stored under a key, or say which verb writes it."""
    uns = held.data.uns
    if key not in stored_keys(uns):
        there = f"{held.where}.uns holds the SAEs {listing(stored_keys(uns))}" if stored_keys(uns) else "there is none"
        hint = ""
        if key in held.data.obsm:
            hint = (
                f" But {held.where}.obsm has {key!r}: anndata.concat drops uns. Concatenate with uns_merge='first', or run "
                "sae.tl.encode(..., reference=) with one of the parts."
            )
        if is_mudata(held.data):
            hint += " Modalities with an SAE: " + listing(m for m, a in held.data.mod.items() if stored_keys(a.uns))
            hint += "; pass mod= to use one."
        raise KeyError(
            f"{held.where}.uns has no SAE {key!r} ({there}). Run sae.tl.fit(..., key_added={key!r}) first.{hint}"
        )
    check_stored(uns[key], f"{held.where}.uns[{key!r}]")
    return OnDemand(uns[key])


def model(stored: Mapping[str, Any]) -> Autoencoder:
    """Build the SAE from its stored weights."""
    weights, params = stored["weights"], stored["params"]
    check_values(weights, "The SAE")
    return Autoencoder(
        **{name: np.asarray(weights[name]) for name in WEIGHTS},
        activation=ARCHITECTURES[params["architecture"]].activation,
        k=params.get("k"),
        threshold=np.asarray(weights["threshold"]) if "threshold" in weights else None,
    )


def directions(stored: Mapping[str, Any]) -> np.ndarray:
    """Decoder rows (h, d) in the space of training, scaled to length 1; in the raw space for SAEs that were stored without it."""
    weights = stored["weights"]
    check_values(weights, "The SAE")
    return decoder_directions(weights["W_dec"], weights.get("scaling"))


def activations(held: Holder, key: str, *, stacklevel: int = 4) -> Matrix:
    """Return the activations (n, h), CSR or on disk, warning when the representation they came from has changed."""
    stored = read(held, key)
    if key not in held.data.obsm or not {"features", "encoded"} <= stored.keys():
        raise KeyError(f"{held.where}.obsm has no activations {key!r}. Run sae.tl.encode(..., key={key!r}) first.")
    warn_if_changed(held, key, stored["encoded"], stored["weights"].get("input_names", ()), stacklevel=stacklevel)
    return _stored_activations(held, key, stored["params"]["n_features"])


def _stored_activations(held: Holder, key: str, n_features: int) -> Matrix:
    where = f"{held.where}.obsm[{key!r}]"
    a = readable(held.data.obsm[key], where)
    if a.shape[1] != n_features:
        raise ValueError(
            f"{where} has {a.shape[1]} columns; the SAE {key!r} has {n_features} features. Run sae.tl.encode again."
        )
    if on_disk(a):
        return a
    a = sparse.csr_matrix(a)
    # The lowest one is NaN where any is.
    if a.nnz and not (a.data.min() >= 0 and np.isfinite(a.data.max())):
        raise ValueError(
            f"{where} has values below 0, infinite ones or NaN, which no SAE gives. Run sae.tl.encode again."
        )
    return a


def activations_in_memory(held: Holder, key: str) -> sparse.csr_matrix:
    """Return the activations (n, h), read whole if they are on disk."""
    return sparse.csr_matrix(take_rows(activations(held, key, stacklevel=5), slice(None)))


def latent(held: Holder, key: str) -> Representation:
    """Read the representation that the activations were computed from, with the columns in the order of the SAE."""
    stored = read(held, key)
    names, encoded = stored["weights"].get("input_names", ()), result(held, key, "encoded")
    found = representation(held, encoded["use_rep"], encoded["layer"])
    if found.matrix.shape[1] != len(stored["weights"]["W_enc"]):
        raise ValueError(
            f"{found.where} has {found.matrix.shape[1]} columns; the SAE {key!r} reads {len(stored['weights']['W_enc'])}. Was it "
            "computed again? Run sae.tl.fit and sae.tl.encode on it, or bring back the one before."
        )
    return Representation(columns_in_order(found, names), found.where, np.asarray(names) if len(names) else None)


def warn_if_changed(
    held: Holder, key: str, encoded: Mapping[str, Any], names: Sequence[str], *, stacklevel: int
) -> None:
    """Warn when the cells that were encoded are still there but their representation has other values."""
    use_rep, layer = encoded["use_rep"], encoded["layer"]
    if recomputed(held, use_rep, layer, names, encoded["fingerprint"]):
        warnings.warn(
            f"{held.where} has another {layer or use_rep!r} than when {key!r} was made from it. "
            "Run sae.tl.fit or sae.tl.encode again to bring the features up to date.",
            UserWarning,
            stacklevel=stacklevel,
        )


def result(held: Holder, key: str, name: str) -> Any:
    """Return what a verb has stored, or say which verb it is."""
    stored = read(held, key)
    if name not in stored:
        raise KeyError(
            f"{held.where}.uns[{key!r}] has no {name!r}. Run sae.tl.{MADE_BY[name]}(..., key={key!r}) first."
        )
    return stored[name]


def table(held: Holder, key: str, name: str) -> pd.DataFrame:
    """Return a copy of a stored table, or say which verb makes it."""
    found = result(held, key, name)
    if not isinstance(found, pd.DataFrame):
        raise ValueError(
            f"{held.where}.uns[{key!r}][{name!r}] is a {type(found).__name__}; expected a table. Run sae.tl."
            f"{MADE_BY.get(name, 'fit')} again."
        )
    found = found.copy()
    # Tables of earlier versions lack some.
    missing = [column for column in COLUMNS.get(name, ()) if column not in found]
    return found.assign(**dict.fromkeys(missing, np.nan)) if missing else found


def features(held: Holder, key: str) -> pd.DataFrame:
    """Return the feature table, its statistics brought up to date when cells were added or removed since `encode`."""
    found = table(held, key, "features")
    a = held.data.obsm.get(key)
    if a is not None and a.shape[0] != result(held, key, "encoded")["n_obs"]:
        found[list(STATISTICS)] = statistics_table(
            key, FeatureStatistics.of(_stored_activations(held, key, len(found)))
        )
    return found


@dataclass(frozen=True)
class Change:
    """An entry of one of the slots of an object, to be set, or removed where there is no value."""

    data: Any
    slot: str
    name: str
    value: Any = None


def write(
    held: Holder,
    key: str,
    stored: Mapping[str, Any],
    activations: Matrix | None = None,
    *,
    anew: bool = False,
    also: Sequence[Change] = (),
) -> None:
    """Put a new state of an SAE in place, all of it or nothing: the only change that a verb makes, and its last act.

    Parameters
    ----------
    anew
        Whether it is another SAE, or its activations are others: what rests on the earlier ones is removed.
    also
        What else belongs to the result, in this object or another one.
    """
    changes = [*also]
    if activations is not None:
        changes.append(Change(held.data, "obsm", key, activations))
    changes.append(Change(held.data, "uns", key, dict(stored)))
    if anew:
        # Last: what is removed and put back comes to stand behind the others.
        changes += [Change(held.data, slot, key) for slot in (("obsm", "varm") if activations is None else ("varm",))]
    with deferred_interrupts(), ExitStack() as undo:
        for change in changes:
            _make(change, undo)
        undo.pop_all()


def _make(change: Change, undo: ExitStack) -> None:
    """Make a change, having noted how it is undone."""
    data, slot = change.data, getattr(change.data, change.slot)
    if data.is_view:
        # It becomes an object of its own when something is assigned to it.
        undo.callback(setattr, data, "__dict__", dict(vars(data)))
    else:
        undo.callback(_put_back, slot, change.name, slot.get(change.name))
    if change.value is not None:
        slot[change.name] = change.value
    elif change.name in slot:
        del slot[change.name]


def _put_back(slot: MutableMapping[str, Any], name: str, value: Any) -> None:
    if value is not None:
        slot[name] = value
    elif name in slot:
        del slot[name]


def statistics_table(key: str, found: FeatureStatistics) -> pd.DataFrame:
    """Summarise each feature over the cells: the table that other verbs add columns to."""
    n = max(found.n, 1)
    return pd.DataFrame(
        {
            "n_cells": found.n_cells,
            "density": found.n_cells / n,
            "mean": found.total / n,
            "max": found.highest,
            "dead": found.n_cells == 0,
        },
        index=feature_names(key, len(found.n_cells)),
    )


def tidy(columns: Mapping[str, np.ndarray], order: Sequence[str], categories: Mapping[str, pd.Index]) -> pd.DataFrame:
    """Build a long table; columns with known categories are given as codes into them. No columns make an empty table."""
    data: dict[str, Any] = {}
    for name in order:
        values = columns.get(
            name, np.empty(0, dtype=np.int64 if name in categories else OTHER_TYPES.get(name, np.float64))
        )
        if name in categories:
            data[name] = pd.Categorical.from_codes(
                values, categories=categories[name].rename(None)
            ).remove_unused_categories()
        else:
            data[name] = pd.Categorical(values) if values.dtype == object else values
    return plain_index(pd.DataFrame(data))


def plain_index(frame: pd.DataFrame) -> pd.DataFrame:
    """Number the rows as strings, the only index that h5ad and zarr both keep as it is."""
    return frame.set_axis(pd.RangeIndex(len(frame)).astype(str), axis=0)


def replace_rows(old: pd.DataFrame | None, new: pd.DataFrame, values: Mapping[str, str | None]) -> pd.DataFrame:
    """Put the rows of `new` in place of the rows of `old` that have the given values; None is a missing column."""
    if old is None:
        return new
    replaced = pd.Series(True, index=old.index)
    for column, value in values.items():
        found = old[column] if column in old else pd.Series(None, index=old.index, dtype=object)
        replaced &= found.isna() if value is None else found.astype(object) == value
    kept = old[~replaced]
    if kept.empty:
        return new
    joined = {}
    for name in dict.fromkeys([*kept.columns, *new.columns]):
        dtype = (new if name in new else kept)[name].dtype
        # Tables of a lone AnnData have no `modality`, those of earlier versions no `held_out_auroc`.
        pair = [part[name] if name in part else pd.Series(np.nan, range(len(part)), dtype) for part in (kept, new)]
        joined[name] = _joined(pair)
    return plain_index(pd.DataFrame(joined))


def _joined(pair: Sequence[pd.Series]) -> pd.Series | pd.Categorical:
    """Join two columns. With pandas 3, categories of text can be `object` in one and `str` in the other."""
    if not all(isinstance(part.dtype, pd.CategoricalDtype) for part in pair):
        return pd.concat(pair, ignore_index=True)
    texts = [pd.Categorical.from_codes(part.cat.codes, part.cat.categories.astype(str)) for part in pair]
    return pd.api.types.union_categoricals(texts)


def resolve(features: Features, names: pd.Index, given: pd.Series | None = None) -> np.ndarray:
    """Turn features into positions: by number, by row, or by the name that `tl.name_features` gave; None means all."""
    if features is None:
        return np.arange(len(names))
    asked: Iterable[str | int] = [features] if isinstance(features, str | int | np.integer) else features
    if not isinstance(asked, Iterable):
        raise TypeError(f"{features!r} is a {type(features).__name__}; expected names or numbers of features.")
    positions = []
    for feature in asked:
        if isinstance(feature, int | np.integer) and not isinstance(feature, bool):
            if not 0 <= feature < len(names):
                raise KeyError(
                    f"There is no feature {feature}: the SAE has {len(names)} features, 0 to {len(names) - 1}."
                )
            positions.append(int(feature))
        elif isinstance(feature, str) and feature in names:
            positions.append(int(names.get_indexer(pd.Index([feature]))[0]))
        elif isinstance(feature, str) and given is not None and (given == feature).any():
            positions.append(int(np.flatnonzero(given == feature)[0]))
        else:
            raise KeyError(_unknown(feature, names, given))
    if not positions:
        raise ValueError("No features were given. Pass names or numbers, or None for all.")
    return np.asarray(list(dict.fromkeys(positions)), dtype=np.int64)


def _unknown(feature: object, names: pd.Index, given: pd.Series | None) -> str:
    """Say which features there are, and which ones could be meant."""
    text = f"There is no feature {feature!r}: the SAE has {len(names)} features, {names[0]!r} to {names[-1]!r}."
    if given is not None:
        alike = given.index[given.astype(str).str.contains(str(feature), case=False, regex=False)]
        if len(alike):
            return f"{text} Names with it have {listing(alike, 5)}."
    nearest = difflib.get_close_matches(str(feature), list(names), n=3)
    return f"{text} Did you mean {listing(nearest)}?" if nearest else text
