"""An SAE on its own, as a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

from .. import _schema
from .._data import Data, Holder, holder, listing
from .._integrity import check_params, check_shapes, check_values
from ..core.untrusted import AGAIN, MOST_JSON_BYTES, MOST_TENSOR_BYTES, as_json, content, strict_json, tensors
from ._folder import checked_place, write_folder
from ._plain import from_params, from_table, to_params, to_table

FORMAT, FORMAT_VERSION = "sae", 1
DOCUMENT, WEIGHTS_FILE = "sae.json", "weights.safetensors"
FILES = (DOCUMENT, WEIGHTS_FILE)
FIELDS = {
    "format", "format_version", "schema_version", "params", "input_names", "history", "features", "weights", "sha256",
}  # fmt: skip


def write(
    data: Data, path: str | PathLike[str], *, key: str = "sae", mod: str | None = None, overwrite: bool = False
) -> None:
    """Write an SAE on its own to a folder, to send or to publish: without the cells it was trained on.

    The folder has the weights in `weights.safetensors`, and in `sae.json` the settings, the names of the columns that it
    reads, the training history, the table of features (with their names and what else verbs wrote there) and the SHA-256
    of both. Nothing in it is code, and R, Julia and other languages read it. Activations and the tables of genes, gene sets and
    labels stay with the cells: `write_h5ad` keeps those.

    The table of features describes the cells at hand: labels, counts of cells, and names that were made from them. Look through it
    before you publish an SAE of cells that you may not share.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`.
    path
        The folder. It is written beside its place and moved there when it is complete.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE.
    overwrite
        Replace an SAE that was written there before. Anything else is never replaced.

    Returns
    -------
    Nothing. Writes the folder; `data` is not changed.

    Raises
    ------
    KeyError
        There is no SAE of this name.
    FileExistsError
        `path` is something else than an SAE's folder, or one without `overwrite`.
    FileNotFoundError
        The folder that `path` is in does not exist.
    TypeError
        The table of features has a column that is neither numbers nor text.
    ValueError
        The weights have NaN, or other shapes than they should.

    See Also
    --------
    sae.io.read : the reverse.
    sae.io.write_saelens : for SAELens.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sae.io.write(adata, Path(folder, "pbmc"))
    ...     sorted(file.name for file in Path(folder, "pbmc").iterdir())
    ['sae.json', 'weights.safetensors']
    """
    from safetensors.numpy import save
    from scanpy import logging as logg

    held = holder(data, mod)
    stored = _schema.read(held, key)
    place = checked_place(path, FILES, overwrite=overwrite)
    where = f"{held.where}.uns[{key!r}]"
    weights = {name: np.ascontiguousarray(array) for name, array in stored["weights"].items() if name != "input_names"}
    names, params = stored["weights"].get("input_names"), from_params(stored["params"], f"{where}['params']")
    check(weights, names, to_params(params, where), where)
    saved = save(weights)
    features = _schema.features(held, key) if "features" in stored else None
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "schema_version": int(stored["schema_version"]),
        "params": params,
        "input_names": None if names is None else [str(name) for name in names],
        "history": from_table(stored["history"], f"{where}['history']"),
        "features": None if features is None else from_table(features, f"{where}['features']"),
        "weights": {
            "shapes": {name: list(array.shape) for name, array in weights.items()},
            "bytes": len(saved),
            "sha256": hashlib.sha256(saved).hexdigest(),
        },
    }
    document["sha256"] = digest(document)
    write_folder(place, {WEIGHTS_FILE: saved, DOCUMENT: lines(document)}, FILES)
    logg.info(f"wrote {where} to {place}", deep=f"{len(saved):,} bytes of weights")


def read(path: str | PathLike[str], *, key_added: str = "sae") -> ad.AnnData:
    """Read an SAE that :func:`sae.io.write` wrote.

    Both files are checked against their checksums before anything else is done with them, and weights and settings against
    each other. Nothing in them is run. (Checksums tell of damage. They do not tell who wrote the files.)

    Parameters
    ----------
    path
        The folder.
    key_added
        Name to give to the SAE, and so to its features.

    Returns
    -------
    An AnnData without cells, whose `uns[key_added]` is the SAE as it was written: pass it as `reference=` to
    :func:`sae.tl.encode`, with your cells, or to `sae.get.model`, `sae.get.decoder`, `sae.get.history` and `sae.get.features`.

    Raises
    ------
    FileNotFoundError
        There is no such folder, or it lacks one of the two files.
    OSError
        One of them is a folder, a device or a pipe.
    ValueError
        One of them was damaged or changed, was written by a newer version, or contradicts the other.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sae.io.write(adata, Path(folder, "pbmc"))
    ...     published = sae.io.read(Path(folder, "pbmc"))
    >>> new = sae.datasets.pbmc68k()
    >>> sae.tl.encode(new, reference=published)
    >>> new.obsm["sae"].shape
    (700, 32)
    """
    folder = checked_folder(path, DOCUMENT, "sae.io.write")
    document = _document(folder / DOCUMENT)
    where = str(folder / DOCUMENT)
    weights = _weights(folder / WEIGHTS_FILE, document["weights"])
    params, names = to_params(document["params"], f"{where}: params"), document["input_names"]
    if names is not None:
        names = _names(names, where)
    check(weights, names, params, str(folder))
    stored = {
        "schema_version": document["schema_version"],
        "params": params,
        "weights": weights if names is None else {**weights, "input_names": names},
        "history": _schema.plain_index(to_table(document["history"], None, f"{where}: history")),
    }
    if document["features"] is not None:
        features = to_table(document["features"], params["n_features"], f"{where}: features")
        stored["features"] = features.set_axis(_schema.feature_names(key_added, len(features)), axis=0)
    return as_object(stored, key_added)


def as_object(stored: dict[str, Any], key: str) -> ad.AnnData:
    """Put an SAE into an object without cells."""
    without_cells = ad.AnnData()
    _schema.check_key(key, Holder(without_cells, "adata"))
    without_cells.uns[key] = stored
    return without_cells


def lines(document: Mapping[str, Any]) -> bytes:
    """Write JSON with a line per entry, to look at in an editor."""
    entries = (f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in document.items())
    return ("{\n" + ",\n".join(entries) + "\n}\n").encode()


def digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of all entries but `sha256`, written without spaces and with sorted names."""
    return hashlib.sha256(as_json({name: value for name, value in document.items() if name != "sha256"})).hexdigest()


def checked_folder(path: str | PathLike[str], file: str, written_by: str) -> Path:
    """Return the folder, or say what is there instead."""
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}. Pass the one that {written_by} wrote.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder. Pass the one that {written_by} wrote.")
    if not (folder / file).exists():
        has = listing(sorted(entry.name for entry in folder.iterdir()))
        raise FileNotFoundError(f"{folder} has no {file!r}; it has {has}. Pass the folder that {written_by} wrote.")
    return folder


def _document(file: Path) -> dict[str, Any]:
    """Read `sae.json`, as far as it can be checked alone."""
    document = strict_json(content(file, MOST_JSON_BYTES), str(file))
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(
            f'{file} does not describe an SAE: it has no "format": "{FORMAT}". Was it made by sae.io.write?'
        )
    for name, newest in (("format_version", FORMAT_VERSION), ("schema_version", _schema.SCHEMA_VERSION)):
        version = document.get(name)
        if type(version) is not int or version < 1:
            raise ValueError(f"{file} has the {name} {str(version)[:50]!r}; expected a number from 1 on. {AGAIN}")
        if version > newest:
            raise ValueError(f"{file} has the {name} {version}; this version of sae reads up to {newest}. Update sae.")
    if set(document) != FIELDS:
        raise ValueError(f"{file} has the entries {listing(document)}; expected {listing(sorted(FIELDS))}. {AGAIN}")
    if document["sha256"] != digest(document):
        raise ValueError(
            f"{file} was changed after it was written: its entries do not have the checksum that it gives. {AGAIN} To change an "
            "SAE, read it as it was, change what was read, and write that."
        )
    return document


def _weights(file: Path, said: object) -> dict[str, np.ndarray]:
    """Read the weights once they are known to be those that were written."""
    read = content(file, MOST_TENSOR_BYTES)
    if not isinstance(said, dict) or said.get("sha256") != hashlib.sha256(read).hexdigest():
        raise ValueError(
            f"{file} ({len(read):,} bytes) does not have the checksum that {DOCUMENT} gives: it was damaged, changed, or is of "
            f"another SAE. {AGAIN}"
        )
    found = tensors(read, str(file))
    if said.get("shapes") != {name: list(array.shape) for name, array in found.arrays.items()}:
        raise ValueError(f"{file} has tensors of other shapes than {DOCUMENT} says. {AGAIN}")
    if set(found.types.values()) != {"F32"}:
        raise ValueError(f"{file} has tensors of {listing(sorted(set(found.types.values())))}; expected F32.")
    return found.arrays


def _names(names: object, where: str) -> np.ndarray:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where} has input_names that are not a list of names. {AGAIN}")
    return np.array(names, dtype=object)


def check(weights: Mapping[str, np.ndarray], names: np.ndarray | None, params: Mapping[str, Any], where: str) -> None:
    """Check that weights and settings are those of one SAE, in single precision."""
    check_params(params, where)
    check_shapes(weights if names is None else {**weights, "input_names": names}, params, where)
    for name, values in weights.items():
        if values.dtype != np.float32:
            raise ValueError(f"{where} has {name!r} of the type {values.dtype}; expected float32.")
    check_values(weights, where)
