"""SAEs in the files of SAELens."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, holder, listing
from ..core.untrusted import MOST_JSON_BYTES, MOST_TENSOR_BYTES, content, strict_json, tensors
from ._folder import checked_place, write_folder
from ._sae import as_object, check, checked_folder

CONFIG, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
FILES = (CONFIG, WEIGHTS_FILE)
NEWEST = 6
BASE = ("W_enc", "b_enc", "W_dec", "b_dec")
TENSORS = {
    "standard": BASE,
    "topk": BASE,
    "jumprelu": (*BASE, "threshold"),
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"),
    "batchtopk": (*BASE, "topk_threshold"),
    "matryoshka_batchtopk": (*BASE, "topk_threshold"),
}
FINE_TUNED = ("finetuning_scaling_factor", "scaling_factor")
"""Names that versions up to 5 gave to factors of the activations in decoding."""
OURS = {"standard": "vanilla", "topk": "topk"}
"""Architectures with the same activation function; all others become a JumpReLU."""
NOT_PLAIN = {
    "transcoder": "reads one space and reconstructs another",
    "skip_transcoder": "reads one space and reconstructs another",
    "jumprelu_transcoder": "reads one space and reconstructs another",
    "jumprelu_skip_transcoder": "reads one space and reconstructs another",
    "abstopk": "has negative activations",
    "matching_pursuit": "chooses features one after another",
    "temporal": "reads the tokens before",
}
NOT_FOLDED = {
    "expected_average_only_in": "by a factor that the folder does not have",
    "covariance_whitening": "by a matrix that the folder does not have",
    "constant_norm_rescale": "each to the same norm, which no weights can do",
    "layer_norm": "each to the same mean and variance, which no weights can do",
}
FOLD = {
    "expected_average_only_in": " Fold it in SAELens (fold_activation_norm_scaling_factor), and save the SAE again.",
    "covariance_whitening": " Fold it in SAELens (fold_activation_whitening), and save the SAE again.",
}


def read_saelens(path: str | PathLike[str], *, use_rep: str | None = None, key_added: str = "sae") -> ad.AnnData:
    r"""Read an SAE that was trained or saved with SAELens (https://github.com/jbloomAus/SAELens), versions 2 to 6.

    What SAELens does besides is folded into weights that act on the input as it stands,
    a = σ(x W_enc + b_enc) and x̂ = a W_dec + b_dec, in float64:

    ============================== ==============================================================================
    `apply_b_dec_to_input`         b_enc ← b_enc − b_dec W_enc
    gated                          W_enc ← W_enc · exp(r_mag), b_enc ← b_mag, active above b_mag − exp(r_mag) · b_gate
    BatchTopK, Matryoshka          active above `topk_threshold`, as SAELens saves them for use
    `rescale_acts_by_decoder_norm` W_enc and b_enc times ‖W_dec‖ of the feature, W_dec divided by it
    fine-tuned scales              W_dec times them
    ============================== ==============================================================================

    Thresholds below 0 become 0, since SAELens cuts negative activations off. Heads that SAELens would join (`hook_z`) have to be side
    by side in the representation.

    Parameters
    ----------
    path
        The folder, with `cfg.json` and `sae_weights.safetensors`.
    use_rep
        Key of `obsm` where cells have the representation that the SAE reads; by default the name of its hook, or "saelens". It is what
        :func:`sae.tl.encode` reads unless told otherwise.
    key_added
        Name to give to the SAE.

    Returns
    -------
    An AnnData without cells, whose `uns[key_added]` is the SAE: pass it as `reference=` to :func:`sae.tl.encode`. What SAELens does
    not save is missing: the training history is empty, FVU and L0 in training are NaN, and so is the variance, and with it the FVU that
    `encode` gives. `params` has what was read as `saelens_architecture`, `saelens_version`, `saelens_model` and `saelens_hook`.

    Raises
    ------
    FileNotFoundError
        There is no such folder, or it lacks one of the two files.
    OSError
        One of them is a folder, a device or a pipe.
    ValueError
        A file was damaged; the weights do not fit the configuration; the SAE is of a kind that does not have this form (transcoders,
        absolute TopK, matching pursuit, temporal ones), or scales each input on its own.

    Notes
    -----
    SAELens saves no checksum: of a file that was altered but still fits, nothing tells. Configurations of versions up to 5 are
    recognised by their names (`activation_fn_str`, `hook_point`, ...). SAELens computes in the type that the configuration names, and
    this package in float32: of an SAE in bfloat16, activations differ by what that type rounds.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sae.io.write_saelens(adata, Path(folder, "pbmc"))
    ...     published = sae.io.read_saelens(Path(folder, "pbmc"))
    >>> sae.get.model(published).encode(adata.obsm["X_pca"]).activations.shape
    (700, 32)
    """
    from ..core.train import HISTORY_COLUMNS

    folder = checked_folder(path, CONFIG, "SAELens")
    file = folder / CONFIG
    config = _config(strict_json(content(file, MOST_JSON_BYTES), str(file), finite=False), str(file))
    found = tensors(content(folder / WEIGHTS_FILE, MOST_TENSOR_BYTES), str(folder / WEIGHTS_FILE))
    raw = {name: values.astype(np.float64) for name, values in found.arrays.items()}
    _check_tensors(raw, config, str(folder / WEIGHTS_FILE))
    weights = _single(_folded(raw, config), str(folder / WEIGHTS_FILE))
    params = _params(config, use_rep)
    check(weights, None, params, str(folder))
    history = _schema.plain_index(pd.DataFrame(columns=list(HISTORY_COLUMNS), dtype=np.float64))
    stored = {"schema_version": _schema.SCHEMA_VERSION, "params": params, "weights": weights, "history": history}
    return as_object(stored, key_added)


def write_saelens(
    data: Data, path: str | PathLike[str], *, key: str = "sae", mod: str | None = None, overwrite: bool = False
) -> None:
    """Write an SAE to a folder that SAELens reads, version 6 or newer.

    SAEs with a threshold (BatchTopK, Matryoshka, JumpReLU, gated) are written as `"jumprelu"`, TopK as `"topk"`, and those with a plain
    ReLU as `"standard"`. The scaling is in the weights, so there is neither normalisation nor a bias of the input to apply. There is no
    place for the names of the columns, the history, settings and names of features: :func:`sae.io.write` keeps those.

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
        Replace a folder that has these two files and no others. Anything else is never replaced.

    Returns
    -------
    Nothing. Writes `cfg.json` and `sae_weights.safetensors`, which `sae_lens.SAE.load_from_disk(path)` reads; `data` is not changed.

    Raises
    ------
    KeyError
        There is no SAE of this name.
    FileExistsError
        `path` has other files, or these without `overwrite`.
    FileNotFoundError
        The folder that `path` is in does not exist.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sae.io.write_saelens(adata, Path(folder, "pbmc"))
    ...     config = json.loads(Path(folder, "pbmc", "cfg.json").read_text())
    >>> config["architecture"], config["d_in"], config["d_sae"]
    ('jumprelu', 50, 32)
    """
    from safetensors.numpy import save
    from scanpy import logging as logg

    held = holder(data, mod)
    stored = _schema.read(held, key)
    model, params = _schema.model(stored), stored["params"]
    place = checked_place(path, FILES, overwrite=overwrite)
    weights = {name: np.ascontiguousarray(getattr(model, name), np.float32) for name in BASE}
    architecture = {"relu": "standard", "topk": "topk", "threshold": "jumprelu"}[model.activation]
    more: dict[str, Any] = {}
    if model.activation == "topk":
        more = {"k": int(params["k"]), "rescale_acts_by_decoder_norm": False}
    elif model.threshold is not None:
        weights["threshold"] = np.ascontiguousarray(model.threshold, np.float32)
    config = {
        "architecture": architecture,
        "d_in": model.n_inputs,
        "d_sae": model.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **more,
        "metadata": {
            "sae_lens_version": "6.0.0",
            "sae_lens_training_version": None,
            "hook_name": params["layer"] or params["use_rep"],
            "trained_with": f"sae {params['version']}",
            "trained_as": params["architecture"],
        },
    }
    text = json.dumps(config, indent=1, allow_nan=False) + "\n"
    write_folder(place, {WEIGHTS_FILE: save(weights), CONFIG: text.encode()}, FILES)
    logg.info(f"wrote {held.where}.uns[{key!r}] to {place} for SAELens")


def _config(found: object, where: str) -> dict[str, Any]:
    """Bring a configuration of any version to the names and meanings of version 6, and refuse what has another form."""
    if not isinstance(found, dict):
        raise ValueError(f"{where} has a {type(found).__name__}; expected the configuration that SAELens writes.")
    said = found.get("metadata", {})
    metadata = {**found, **said} if isinstance(said, dict) else found
    function = found.get("activation_fn_str", found.get("activation_fn", "relu"))
    options = found.get("activation_fn_kwargs") or {}
    config = {
        "version": _text(
            metadata.get("sae_lens_version") or metadata.get("sae_lens_training_version"), "version", where
        ),
        "model": _text(metadata.get("model_name"), "model_name", where),
        "hook": _text(metadata.get("hook_name", metadata.get("hook_point")), "hook_name", where),
        "architecture": found.get("architecture", "standard"),
        "d_in": found.get("d_in"),
        "d_sae": found.get("d_sae"),
        "k": found.get("k"),
        "centred": found.get("apply_b_dec_to_input", True),
        "rescaled": found.get("rescale_acts_by_decoder_norm", False),
        "fine_tuned": found.get("finetuning_scaling_factor") or False,
    }
    _check_version(config["version"], where)
    if function == "topk" and isinstance(options, dict):
        config |= {"architecture": "topk", "k": options.get("k", config["k"])}
    elif function != "relu":
        raise ValueError(f"{where} has the activation function {str(function)[:50]!r}; expected 'relu' or 'topk'.")
    if isinstance(options, dict) and "postact_fn" in options:
        raise ValueError(
            f"{where} applies {str(options['postact_fn'])[:50]!r} after TopK; expected nothing but a ReLU."
        )
    _check_config(config, where)
    _check_normalisation(found.get("normalize_activations"), where)
    return config


def _text(value: object, name: str, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} has as {name} a {type(value).__name__}; expected text.")
    return value


def _check_version(version: str | None, where: str) -> None:
    number = re.match(r"\d{1,9}(?=\.|$)", version) if version else None
    if version and number is None:
        raise ValueError(f"{where} has the version {version[:50]!r} of SAELens; expected a number.")
    if number and int(number[0]) > NEWEST:
        raise ValueError(
            f"{where} was written by SAELens {version}; versions up to {NEWEST} are known. What a newer one means is not guessed. "
            "Update sae, or save the SAE with an older SAELens."
        )


def _check_config(config: Mapping[str, Any], where: str) -> None:
    architecture = config["architecture"]
    if not isinstance(architecture, str) or architecture not in TENSORS:
        reason = NOT_PLAIN.get(str(architecture), "is not known")
        raise ValueError(
            f"{where} has the architecture {str(architecture)[:50]!r}, which {reason}; those that can be read are {listing(TENSORS)}."
        )
    for name in ("d_in", "d_sae"):
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"{where} has as {name} {str(config[name])[:50]!r}; expected a number of columns.")
    if architecture == "topk" and (type(config["k"]) is not int or not 1 <= config["k"] <= config["d_sae"]):
        raise ValueError(
            f"{where} has as k {str(config['k'])[:50]!r}; expected a number of features up to {config['d_sae']}."
        )
    names = {"centred": "apply_b_dec_to_input", "rescaled": "rescale_acts_by_decoder_norm"}
    for name, theirs in (names | {"fine_tuned": "finetuning_scaling_factor"}).items():
        if type(config[name]) is not bool:
            raise ValueError(f"{where} has as {theirs} {str(config[name])[:50]!r}; expected true or false.")


def _check_normalisation(kind: object, where: str) -> None:
    if isinstance(kind, bool):
        # Early versions said whether, not how.
        kind = "expected_average_only_in" if kind else "none"
    if kind is None or kind == "none":
        return
    how = NOT_FOLDED.get(str(kind), "in a way that is not known")
    raise ValueError(
        f"{where} has normalize_activations={str(kind)[:50]!r}: inputs are scaled {how}.{FOLD.get(str(kind), '')}"
    )


def _check_tensors(raw: Mapping[str, np.ndarray], config: Mapping[str, Any], where: str) -> None:
    d, h = config["d_in"], config["d_sae"]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(TENSORS[config["architecture"]], (h,))
    shapes |= {"W_enc": (d, h), "W_dec": (h, d), "b_dec": (d,)}
    if "topk_threshold" in shapes:
        shapes["topk_threshold"] = ()
    shapes |= {name: (h,) for name in FINE_TUNED if name in raw}
    if set(raw) != set(shapes):
        raise ValueError(
            f"{where} has the tensors {listing(sorted(raw))}; a {config['architecture']} SAE has {listing(sorted(shapes))}."
        )
    for name, shape in shapes.items():
        if raw[name].shape != shape:
            raise ValueError(f"{where} has {name!r} of the shape {raw[name].shape}; {CONFIG} says {shape}.")
        if n := int(np.count_nonzero(~np.isfinite(raw[name]))):
            raise ValueError(f"{where} has {n} NaN or infinite values in {name!r}.")
    scaled = [name for name in FINE_TUNED if name in raw and not np.allclose(raw[name], 1)]
    if scaled and not config["fine_tuned"]:
        raise ValueError(f"{where} has {scaled[0]!r}, and {CONFIG} says that there is none. SAELens refuses that too.")


def _folded(raw: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Rewrite an SAE as σ(x W_enc + b_enc) and a W_dec + b_dec; the formulas are in :func:`read_saelens`."""
    W_enc, W_dec, b_dec = raw["W_enc"], raw["W_dec"], raw["b_dec"]
    threshold = raw.get("threshold")
    if config["architecture"] == "gated":
        with np.errstate(over="ignore"):
            gain = np.exp(raw["r_mag"])
        W_enc, b_enc, threshold = W_enc * gain, raw["b_mag"], raw["b_mag"] - gain * raw["b_gate"]
    else:
        b_enc = raw["b_enc"]
    if config["centred"]:
        b_enc = b_enc - b_dec @ W_enc
    if "topk_threshold" in raw:
        threshold = np.full(len(b_enc), float(raw["topk_threshold"]))
    for name in FINE_TUNED:
        if name in raw and config["fine_tuned"]:
            W_dec = W_dec * raw[name][:, None]
    if config["rescaled"] and config["architecture"] in ("topk", "batchtopk", "matryoshka_batchtopk"):
        norm = np.linalg.norm(raw["W_dec"], axis=1)
        W_enc, b_enc = W_enc * norm, b_enc * norm
        W_dec = np.divide(W_dec, norm[:, None], out=np.zeros_like(W_dec), where=norm[:, None] > 0)
    folded = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    return folded if threshold is None else {**folded, "threshold": np.maximum(threshold, 0)}


def _single(weights: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    with np.errstate(over="ignore"):
        single = {name: values.astype(np.float32) for name, values in weights.items()}
    wrong = [name for name, values in single.items() if not np.isfinite(values).all()]
    if wrong:
        raise ValueError(
            f"{where}: {listing(wrong)} would not be finite numbers of type float32 once all is folded into them."
        )
    return single


def _params(config: Mapping[str, Any], use_rep: str | None) -> dict[str, Any]:
    architecture = OURS.get(config["architecture"], "jumprelu")
    sparsity = {"vanilla": "l1", "topk": "k", "jumprelu": "l0_weight"}[architecture]
    unknown = ("learning_rate", "batch_size", "seed", "recipe", "steps", "validation")
    return {
        "architecture": architecture,
        "n_features": config["d_sae"],
        sparsity: config["k"] if architecture == "topk" else None,
        **dict.fromkeys(unknown),
        "preprocess": "none",
        "n_constant_inputs": 0,
        "input_scale": 1.0,
        **dict.fromkeys(("variance", "fvu", "l0", "val_fvu", "val_l0"), math.nan),
        "ended": "finished",
        "n_obs": 0,
        "use_rep": use_rep or config["hook"] or "saelens",
        "layer": None,
        "fingerprint": "",
        "version": f"SAELens {config['version'] or 'before 4'}",
        "saelens_architecture": config["architecture"],
        "saelens_version": config["version"],
        "saelens_model": config["model"],
        "saelens_hook": config["hook"],
    }
