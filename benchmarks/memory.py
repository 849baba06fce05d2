"""How much memory does training take when the embedding stays on disk?

A memory-mapped matrix of 1,000,000 cells × 50 is written to a temporary folder and trains 4,096 features; the peak of the
resident memory is given above what the interpreter holds with everything imported. It includes the pages of the file that
the system keeps mapped.

    python benchmarks/memory.py
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import anndata as ad
import numpy as np
import scanpy  # noqa: F401

import sae
import sae.core.train

N_CELLS, N_INPUTS, N_PROGRAMS, N_FEATURES, STEPS = 1_000_000, 50, 20, 4_096, 500
BLOCK = 50_000


def resident(name: str) -> float:
    """Return a line of /proc/self/status in GB: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


def write(path: Path) -> None:
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((N_PROGRAMS, N_INPUTS))
    x = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(N_CELLS, N_INPUTS))
    for start in range(0, N_CELLS, BLOCK):
        x[start : start + BLOCK] = rng.standard_normal((BLOCK, N_PROGRAMS)) @ directions
    x.flush()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "embedding.npy"
        write(path)
        before = resident("VmHWM")
        adata = ad.AnnData(obsm={"X_pca": np.load(path, mmap_mode="r")})
        start = time.perf_counter()
        sae.tl.fit(adata, n_features=N_FEATURES, k=32, steps=STEPS, progress=False)
        print(
            f"{N_CELLS:,} × {N_INPUTS} → {N_FEATURES:,}, {STEPS} steps of {adata.uns['sae']['params']['batch_size']}: peak "
            f"{resident('VmHWM') - before:.2f} GB above {before:.2f} GB, {time.perf_counter() - start:.0f} s"
        )
