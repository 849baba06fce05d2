"""Train two small models with the multiDGD package, and keep what it says of them.

The package: https://github.com/Center-for-Health-Data-Science/multiDGD, version 0.0.1, commit
3887a98506769553a0eb347ae6a081cce0b451e7, run with Python 3.11, torch 2.13.0, anndata 0.12.19 and mudata 0.3.10. It is not
needed by the tests. To run this again::

    git clone https://github.com/Center-for-Health-Data-Science/multiDGD
    git -C multiDGD checkout 3887a98506769553a0eb347ae6a081cce0b451e7
    pip install torch anndata mudata scanpy scikit-learn statsmodels matplotlib requests tqdm
    PYTHONPATH=multiDGD/src python tests/models/multidgd/make_fixture.py

Next to this script it writes a folder per model: `dgd.pt`, `dgd_hyperparameters.json` and `_obs.csv`, as the package saves
them, and `package.npz` with the counts and, per split, the representations and the output of the package's own `decode`.

* `multiome`: an AnnData of genes and peaks, with a covariate whose labels are numbers as text.
* `rna`: one modality without a covariate, as a MuData, since the package fails on an AnnData with one modality.
"""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import mudata
import multiDGD
import numpy as np
import pandas as pd
import torch
from scipy import sparse

HERE = Path(__file__).parent
SPLITS = {"train": 40, "test": 12, "validation": 8}
"""Of different sizes: the package's `decode` finds a split by its number of cells."""
SITES = ["2", "9", "10"]
SETTINGS = {
    "latent_dimension": 5,
    "n_hidden": 2,
    "n_units": 8,
    "batch_size": 64,
    "learning_rates": [1e-2, 3e-2, 1e-3],
    "softball_scale": 1,
    "sd_mean": 0.3,
    "dirichlet_a": 5,
}


def simulate(n_features: dict[str, int], depth: int) -> tuple[dict[str, ad.AnnData], pd.DataFrame]:
    """Draw counts of three cell types at three sites, the splits mixed among each other."""
    rng = np.random.default_rng(0)
    n = sum(SPLITS.values())
    kind, site = rng.integers(3, size=n), rng.integers(3, size=n)
    obs = pd.DataFrame(
        {
            "cell_type": np.array(["B", "NK", "T"])[kind],
            "site": np.array(SITES)[site],
            "train_val_test": rng.permutation(np.repeat(list(SPLITS), list(SPLITS.values()))),
        },
        index=[f"cell{i}" for i in rng.permutation(n)],
    )
    parts = {}
    for name, g in n_features.items():
        log_rate = rng.normal(size=g) + 2 * rng.normal(size=(3, g))[kind] + rng.normal(size=(3, g))[site]
        rate = np.exp(log_rate)
        rate *= (depth * rng.lognormal(sigma=0.3, size=n) / rate.sum(axis=1))[:, None]
        counts = sparse.csr_matrix(rng.poisson(rate).astype(np.float32))
        genes = [f"gene{i}" for i in range(g)] if name in ("rna", "GEX") else [f"chr1:{i}00-{i}50" for i in range(g)]
        parts[name] = ad.AnnData(counts, obs=obs[[]], var=pd.DataFrame({"modality": name}, index=genes))
    return parts, obs


def make(
    name: str,
    data: ad.AnnData | mudata.MuData,
    counts: np.ndarray,
    covariates: list[str] | None,
    settings: dict[str, int],
    seed: int,
) -> None:
    """Train a model, learn the latents of its test cells, and write everything."""
    folder = HERE / name
    data = multiDGD.functions.setup_data(
        data, modality_key="modality", observable_key="cell_type", covariate_keys=covariates
    )
    # The package joins folder and file name as they are.
    model = multiDGD.DGD(data, parameter_dictionary=SETTINGS | settings, save_dir=f"{folder}/", random_seed=seed)
    model.train(n_epochs=400, train_minimum=400)
    found = {"counts": counts.astype(np.uint16), "obs_names": np.array(data.obs_names, dtype=str)}
    found["var_names"] = np.array(data.var_names, dtype=str)
    if covariates:
        found["train_component"] = np.array(model.train_set.get_correction_labels())
    for modality, output in zip(model.param_dict["modalities"], model.decoder.out_modules, strict=True):
        found[f"dispersion_{modality}"] = output.distribution.dispersion.detach().numpy()[0]
    # Once there are test cells, the package's decode no longer finds the validation cells.
    for split in ("train", "validation"):
        found |= said_of(model, split)
    model.predict_new(n_epochs=20)
    found |= said_of(model, "test")
    np.savez_compressed(folder / "package.npz", **found)


def said_of(model: multiDGD.DGD, split: str) -> dict[str, np.ndarray]:
    """Collect the representations of a split, and what the package decodes them to: proportions per modality."""
    found = {f"{split}_z": model.get_representation(split)}
    if model.correction_gmm is not None:
        found[f"{split}_covariate"] = model.get_covariate_representation(split)
    with torch.no_grad():
        decoded = model.decode(SPLITS[split])
    names = model.param_dict["modalities"]
    return found | {f"{split}_{name}": part.numpy() for name, part in zip(names, decoded, strict=True)}


def main() -> None:
    """Make both models, with seeds for which the components of the prior come close to the cell types."""
    for name in ("multiome", "rna"):
        (HERE / name).mkdir(exist_ok=True)

    parts, obs = simulate({"GEX": 20, "ATAC": 90}, depth=2000)
    both = ad.concat(parts.values(), axis="var", merge="first")
    both.obs = obs
    make("multiome", both, both.X.toarray(), ["site"], {"n_hidden_modality": 3, "decoder_width": 2}, seed=2)

    parts, obs = simulate({"rna": 25}, depth=2000)
    mdata = mudata.MuData(parts)
    mdata.obs = obs.loc[mdata.obs_names].copy()
    make("rna", mdata, mdata["rna"].X.toarray(), None, {"n_hidden_modality": 2, "decoder_width": 1}, seed=5)


if __name__ == "__main__":
    main()
