"""How large is a report, how long does it take to write, and how long until Chromium shows it?

For each size, the bundled PBMC are resampled (their principal components and UMAP with noise), an SAE that has hardly learned is
made, and every feature gets genes, gene sets (random ones, as many as asked for) and labels: what is measured is the page, not
biology. Load times are from the start of the navigation to a table that can be used, and to the card of a feature opened by its
address, in a new browser each time; the median of three.

    python benchmarks/report.py
    python benchmarks/report.py --size 700x500 --size 100000x10000
    python benchmarks/report.py --h5ad analysed.h5ad --keep folder

Needs playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import anndata as ad
import numpy as np
import pandas as pd
from playwright.sync_api import sync_playwright
from scipy import sparse

import sae
from sae.report import report

SIZES = ("700x500", "100000x10000")
L0, N_SETS, SET_SIZE, N_LOADS = 32, 1_000, 40, 3
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SETTINGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def resident(name: str) -> float:
    """Return a line of /proc/self/status in GB: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


def analysed(n_cells: int, n_features: int) -> ad.AnnData:
    """Resample cells and let the verbs fill every table."""
    bundled, rng = sae.datasets.pbmc68k(), np.random.default_rng(0)
    rows = rng.integers(bundled.n_obs, size=n_cells)
    obs = pd.DataFrame(
        {"bulk_labels": bundled.obs["bulk_labels"].to_numpy()[rows]}, index=np.arange(n_cells).astype(str)
    )
    adata = ad.AnnData(sparse.csr_matrix(bundled.X)[rows], obs, pd.DataFrame(index=bundled.var_names))
    for name, noise in (("X_pca", 0.5), ("X_umap", 0.1)):
        values = bundled.obsm[name].astype(np.float32)
        spread = noise * values.std(axis=0)
        adata.obsm[name] = values[rows] + rng.normal(scale=spread, size=(n_cells, values.shape[1])).astype(np.float32)
    sets = [
        (f"biological process {i} (GO:{i:07})", gene)
        for i in range(N_SETS)
        for gene in rng.choice(adata.var_names, SET_SIZE, replace=False)
    ]
    net = pd.DataFrame(sets, columns=["source", "target"])
    # Hardly trained on whitened inputs, features share the cells more evenly than good ones do: the hardest case for a small file.
    untrained = {"architecture": "topk", "preprocess": "whiten", "steps": 1}
    sae.tl.fit(adata, n_features=n_features, k=L0, **untrained, progress=False)
    sae.tl.encode(adata, progress=False)
    sae.tl.rank_genes(adata, n_genes=20, progress=False)
    sae.tl.enrich(adata, net, collection="random", n_sets=20, n_null=0, progress=False)
    sae.tl.score_labels(adata, "bulk_labels", progress=False)
    sae.tl.name_features(adata)
    return adata


def loads(path: Path) -> tuple[list[float], list[float], int]:
    """Open the page in a new browser, several times: seconds to the table, seconds to a card, requests other than the file."""
    table, card, requests = [], [], []
    executable = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as playwright:
        for address, found in [(path.as_uri(), table), (f"{path.as_uri()}#sae_7", card)] * N_LOADS:
            browser = playwright.chromium.launch(executable_path=executable, args=SETTINGS)
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.on("request", lambda request: requests.append(request.url))
            page.goto(address)
            page.wait_for_selector("body[data-ready]")
            if found is card:
                page.wait_for_selector("#content canvas")
            name = "card" if found is card else "ready"
            found.append(page.evaluate("name => performance.getEntriesByName(name)[0].startTime", name) / 1e3)
            browser.close()
    return table, card, sum(not url.startswith("file:") for url in requests)


def measure(name: str, adata: ad.AnnData, folder: Path) -> None:
    path = folder / f"{name}.html"
    a, before = adata.obsm["sae"], resident("VmRSS")
    start = time.perf_counter()
    report(adata, path)
    seconds = time.perf_counter() - start
    table, card, requests = loads(path)
    print(
        f"| {name} | {a.shape[1]:,} | {a.shape[0]:,} | {a.nnz / a.shape[0]:.1f} | {path.stat().st_size / 1e6:.1f} | {seconds:.1f} | "
        f"{resident('VmHWM') - before:.1f} | {statistics.median(table):.2f} | {statistics.median(card):.2f} | {requests} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", help="cells x features, of resampled cells")
    parser.add_argument(
        "--h5ad", action="append", default=[], help="a file with an SAE 'sae' and whatever is known of it"
    )
    parser.add_argument("--keep", type=Path, help="folder to write the pages to")
    options = parser.parse_args()
    print(
        "| data | features | cells | L0 | MB | s to write | GB above the data | s to the table | s to a card | other requests |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for path in options.h5ad:
            measure(Path(path).stem, ad.read_h5ad(path), folder)
        for size in options.size or ([] if options.h5ad else SIZES):
            measure(size, analysed(*map(int, size.split("x"))), folder)


if __name__ == "__main__":
    main()
