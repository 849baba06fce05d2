"""How long does steering take, how much memory, and how far is that from the products it cannot do without?

    python benchmarks/steering_speed.py
    python benchmarks/steering_speed.py --cells 12500 50000 --genes 2000 --features 20 --doses 5

Simulated counts; through principal components (50) and through scVI (trained for one epoch: its size matters here, not its fit).
Every feature is set to each dose in every cell, with the default controls and labels of ten types. `products` is the time of the matrix
products of all decoded cells alone, with the same matrices: z (n, d) with the loadings, or with the two layers of scVI's decoder.
Each figure is the median of `--repeats` runs, each in turn with its products; memory is the peak above that before the call.
"""

from __future__ import annotations

import argparse
import resource
import threading
import time
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse

import sae

N_PROGRAMS, N_COMPONENTS = 30, 50


def cells(n: int, n_genes: int) -> ad.AnnData:
    """Simulate counts of ten cell types, and normalise them."""
    rng = np.random.default_rng(0)
    programs = rng.gamma(0.3, size=(N_PROGRAMS, n_genes)).astype(np.float32)
    types = rng.gamma(0.5, size=(10, N_PROGRAMS)).astype(np.float32)
    label = rng.integers(10, size=n)
    blocks = []
    for start in range(0, n, 5000):
        some = label[start : start + 5000]
        activity = types[some] * rng.gamma(2, 0.5, size=(len(some), N_PROGRAMS)).astype(np.float32)
        rate = activity @ programs
        rate *= 3000 / rate.sum(axis=1, keepdims=True)
        blocks.append(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)))
    obs = pd.DataFrame({"type": pd.Categorical(label.astype(str))}, index=np.arange(n).astype(str))
    adata = ad.AnnData(sparse.vstack(blocks, format="csr"), obs=obs)
    adata.layers["counts"] = adata.X.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata


def scvi_model(adata: ad.AnnData):
    """Train scVI for one epoch; its latent goes into `obsm["X_scVI"]`."""
    import scvi

    scvi.settings.verbosity = 40
    scvi.settings.seed = 0
    counts = adata.copy()
    scvi.model.SCVI.setup_anndata(counts, layer="counts")
    trained = scvi.model.SCVI(counts, n_latent=20, gene_likelihood="nb")
    trained.train(1, accelerator="cpu", enable_progress_bar=False, logger=False, enable_model_summary=False)
    adata.obsm["X_scVI"] = trained.get_latent_representation(counts)
    return sae.models.SCVI(trained)


def products(widths: list[int], n_decoded: int) -> float:
    """Time the matrix products of decoding so many cells, 4,096 at a time."""
    import torch

    rng = np.random.default_rng(0)
    layers = [
        torch.from_numpy(rng.normal(size=pair).astype(np.float32)) for pair in zip(widths, widths[1:], strict=False)
    ]
    z = torch.from_numpy(rng.normal(size=(4096, widths[0])).astype(np.float32))
    few = 40
    start = time.perf_counter()
    for _ in range(few):
        x = z
        for layer in layers:
            x = x @ layer
    return (time.perf_counter() - start) / few / 4096 * n_decoded


class Peak:
    """The highest resident memory while a block runs, above that before it, in GB."""

    def __enter__(self) -> Peak:
        self.before, self.highest, self.running = self._now(), 0.0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False
        self._thread.join()
        self.above = self.highest - self.before

    def _watch(self) -> None:
        while self.running:
            self.highest = max(self.highest, self._now())
            time.sleep(0.02)

    @staticmethod
    def _now() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[12_500, 50_000])
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--features", type=int, default=20)
    parser.add_argument("--doses", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="scvi|lightning|torch")

    doses = list(np.linspace(0, 2, options.doses))
    print(
        f"{options.features} features × {options.doses} doses × {options.genes:,} genes\n\n"
        "model | cells | seconds (lowest, highest) | products alone | ratio | memory above the data, GB"
    )
    for n in options.cells:
        adata = cells(n, options.genes)
        sc.pp.pca(adata, n_comps=N_COMPONENTS)
        models = {"PCA": ("X_pca", sae.models.PCA(adata), [N_COMPONENTS, options.genes])}
        models["scVI"] = ("X_scVI", scvi_model(adata), [20, 128, options.genes])
        for name, (rep, model, widths) in models.items():
            sae.tl.fit(adata, use_rep=rep, steps=500, progress=False)
            sae.tl.encode(adata, progress=False)
            alive = sae.get.features(adata)["n_cells"].nlargest(options.features).index
            seconds, limits = [], []
            for repeat in range(options.repeats + 1):
                with Peak() as peak:
                    start = time.perf_counter()
                    sae.tl.steer(adata, list(alive), model=model, doses=doses, groupby="type", progress=False)
                    taken = time.perf_counter() - start
                if repeat:  # The first one compiles.
                    seconds.append(taken)
                    limits.append(products(widths, n * options.features * options.doses))
            median, limit = np.median(seconds), np.median(limits)
            print(
                f"{name} | {n:,} | {median:.1f} ({min(seconds):.1f}, {max(seconds):.1f}) | {limit:.1f} | {median / limit:.1f} | "
                f"{peak.above:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
