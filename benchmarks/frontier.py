"""Reconstruction against sparsity on held-out cells: our architectures beside those of SAELens.

Every architecture is trained over a grid of its sparsity setting on four fifths of the cells and judged on the rest:
L0, the mean number of active features, and FVU = Σ‖x − x̂‖² / Σ‖x − mean‖², from the reconstructions that the finished SAE
gives. Both libraries get the same matrix, steps and batch size, once raw and once centred with one factor (mean squared
norm d); between these two spaces FVU does not change. Ours centres and scales its input itself (`preprocess="center"`), SAELens takes it as
it comes. l1 and l0
are in the units of the scaled matrix; on the raw one SAELens gets what makes the same loss of them (l1 / factor,
l0 / factor²).

SAELens runs on its defaults, except that each setting is trained with its learning rate and with ours, and a run is left
out when the other one has a lower FVU at no more than 1.1 times its L0. Its SAEs are saved and loaded for inference, which
turns BatchTopK into a threshold.

    pip install -r benchmarks/peers.txt
    python benchmarks/frontier.py
    python benchmarks/frontier.py --h5ad pbmc4k.h5ad --steps 4000
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TQDM_DISABLE", "1")  # SAELens has a bar for every fit, without a way to turn it off

import anndata as ad
import numpy as np
import pandas as pd
import torch
from labels import cells
from tqdm import tqdm

import sae
from sae.core.architectures import ARCHITECTURES

GRIDS = {"k": (4, 8, 16, 32), "l1": (0.5, 1.0, 2.0, 4.0, 8.0), "l0": (0.03, 0.1, 0.3, 1.0)}
SAE_LENS = {
    "topk": ("TopK", "k", "k"),
    "batchtopk": ("BatchTopK", "k", "k"),
    "jumprelu": ("JumpReLU", "l0_coefficient", "l0"),
    "standard": ("Standard", "l1_coefficient", "l1"),
}
OURS_OF = {"standard": "vanilla"}
HELD_OUT = 0.2
TOLERANCE = 1.1


def fvu(x: np.ndarray, x_hat: np.ndarray) -> float:
    return float(np.square(x - x_hat, dtype=np.float64).sum() / np.square(x - x.mean(axis=0), dtype=np.float64).sum())


def judged(x: np.ndarray, a: np.ndarray, x_hat: np.ndarray) -> dict[str, float]:
    return {"L0": float((a > 0).sum(axis=1).mean()), "FVU": fvu(x, x_hat)}


def ours(
    seen: np.ndarray, held_out: np.ndarray, architecture: str, value: float, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, float]:
    adata, others = ad.AnnData(obsm={"X_pca": seen}), ad.AnnData(obsm={"X_pca": held_out})
    sae.tl.fit(
        adata,
        architecture=architecture,
        preprocess="center",
        n_features=options.n_features,
        steps=options.steps,
        batch_size=options.batch_size,
        validation=0,
        device="cpu",
        progress=False,
        **{ARCHITECTURES[architecture].sparsity: value},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The SAE .* leaves", UserWarning)  # the table says how badly it fits
        sae.tl.encode(others, reference=adata, progress=False)
    params, weights, a = adata.uns["sae"]["params"], adata.uns["sae"]["weights"], others.obsm["sae"].toarray()
    return a, a @ weights["W_dec"] + weights["b_dec"], params["learning_rate"]


def batches(y: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        waiting = torch.cat([waiting, torch.randperm(len(y))])
        while len(waiting) >= size:
            yield y[waiting[:size]]
            waiting = waiting[size:]


def sae_lens(
    seen: np.ndarray, held_out: np.ndarray, prefix: str, settings: dict, rate: float, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray]:
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    config = getattr(sae_lens, f"{prefix}TrainingSAEConfig")(d_in=seen.shape[1], d_sae=options.n_features, **settings)
    training = SAETrainerConfig(
        total_training_samples=options.steps * options.batch_size,
        train_batch_size_samples=options.batch_size,
        lr=rate,
        lr_end=rate / 10,  # has no default here and is not read by the constant schedule
    )
    untrained = getattr(sae_lens, f"{prefix}TrainingSAE")(config)
    trained = SAETrainer(training, untrained, batches(torch.from_numpy(seen), options.batch_size)).fit()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        trained.save_inference_model(folder)
        model = sae_lens.SAE.load_from_disk(folder)
        a = model.encode(torch.from_numpy(held_out))
        return a.numpy(), model.decode(a).numpy()


def default_rate() -> float:
    from sae_lens.config import SAETrainerConfig

    return SAETrainerConfig.lr


def better(runs: list[dict]) -> list[dict]:
    """Leave out runs that another one beats at about the same sparsity."""
    return [
        one
        for one in runs
        if not any(other["FVU"] < one["FVU"] and other["L0"] <= TOLERANCE * one["L0"] for other in runs)
    ]


def table(x: np.ndarray, factor: float, options: argparse.Namespace, bar: Callable[[], object]) -> pd.DataFrame:
    """FVU and L0 of all settings; `factor` is that of the scaled matrix over `x`."""
    rows = np.random.default_rng(0).permutation(len(x))
    n_held_out = round(HELD_OUT * len(x))
    seen, held_out = x[rows[n_held_out:]], x[rows[:n_held_out]]
    found, rates = [], {}
    for architecture in ARCHITECTURES:
        kind = ARCHITECTURES[architecture].sparsity
        for value in GRIDS[kind]:
            a, x_hat, rate = ours(seen, held_out, architecture, value, options)
            name = {"library": "ours", "architecture": architecture, "setting": f"{kind}={value:g}"}
            found.append({**name, "learning rate": f"{rate:.1e}", **judged(held_out, a, x_hat)})
            rates[architecture] = rate
            bar()
    if importlib.util.find_spec("sae_lens") is None:
        return pd.DataFrame(found)
    for architecture, (prefix, argument, kind) in SAE_LENS.items():
        rate_of_ours = rates.get(OURS_OF.get(architecture, architecture), rates["topk"])
        for value in GRIDS[kind]:
            in_units = {"k": value, "l1": value / factor, "l0": value / factor**2}[kind]
            name = {"library": "sae_lens", "architecture": architecture, "setting": f"{kind}={value:g}"}
            runs = []
            for rate in (default_rate(), rate_of_ours):
                a, x_hat = sae_lens(seen, held_out, prefix, {argument: in_units}, rate, options)
                runs.append({**name, "learning rate": f"{rate:.1e}", **judged(held_out, a, x_hat)})
                bar()
            found.extend(better(runs))
    return pd.DataFrame(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--h5ad", help="cells with counts; by default the 700 PBMC of sae.datasets.pbmc68k")
    parser.add_argument("--n-features", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=256)
    given = parser.parse_args()
    raw = np.ascontiguousarray(cells(given.h5ad).obsm["X_pca"], dtype=np.float32)
    centred = raw - raw.mean(axis=0)
    scale = float(np.sqrt(raw.shape[1] / np.square(centred).sum(axis=1).mean()))
    installed = importlib.util.find_spec("sae_lens") is not None
    if not installed:
        print("sae_lens is not installed and left out")
    n_ours = sum(len(GRIDS[architecture.sparsity]) for architecture in ARCHITECTURES.values())
    n_theirs = 2 * sum(len(GRIDS[kind]) for *_, kind in SAE_LENS.values()) * installed
    progress = tqdm(total=2 * (n_ours + n_theirs), disable=None, leave=False)
    for title, matrix, factor_ in (("raw", raw, scale), ("scaled", scale * centred, 1.0)):
        result = table(matrix, factor_, given, progress.update).sort_values(["library", "architecture", "L0"])
        print(f"\n{title} input, {len(raw)} x {raw.shape[1]} -> {given.n_features}, {given.steps} steps")
        print(result.to_string(index=False, float_format="{:.3f}".format))
    progress.close()
