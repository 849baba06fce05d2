from __future__ import annotations

from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd

from ..core.rows import row_blocks

COVARIATES = 3
SHIFT_SD = 0.1
LOWEST_RATE, RATE_STEP = 1.0, 0.1
DEFAULT_DEPTH = 5_000.0
SMALL_ACTIVITY = 2.0
SMALL_GATES = (0.5, 0.1, 0.9)
SMALL_GENES = ((0, 1, 1, 0, 0), (1, 1, 0, 1, 0), (0, 0, 0, 1, 1))
BLOCK_ROWS = 4096


def simulate_programs(
    n_cells: int = 10_000,
    n_genes: int = 1_000,
    *,
    n_programs: int = 100,
    n_types: int = 40,
    gene_density: float = 0.1,
    type_density: float = 0.3,
    noise: Literal["poisson"] | None = None,
    depth: float | None = None,
    rare: float | None = None,
    n_rare: int = 10,
    rng: int | np.random.Generator | None = 0,
) -> ad.AnnData:
    r"""Cells whose expression is a known sum of gene programs, to see whether an SAE finds the programs.

    The "high complexity" simulation of Schuster 2024 (arXiv:2410.11468), on fewer genes by default. Of p = `n_programs`
    programs, each drives some genes and is used by some cell types:

    .. math::
        M^{gene}_{jg} &\sim \mathrm{Bernoulli}(\texttt{gene\_density}), \qquad
        M^{type}_{tj} \sim \mathrm{Bernoulli}(\texttt{type\_density}) \\
        X_j &\sim \mathrm{Poisson}(1 + 0.1 j), \quad j = 0, \dots, p - 1 \\
        X'_j &= X_j + \varepsilon, \quad \varepsilon \sim N(B, 0.1^2), \quad B \sim U\{0, 1, 2\} \\
        X''_j &= X'_j M^{type}_{Aj}, \quad A \sim U\{1, \dots, \texttt{n\_types}\} \\
        Y &= X'' M^{gene}

    ε is one number per cell, shared by all its programs. With more genes than programs Y has rank p, so X'' is a linear
    function of Y (R² = 1), and of the first p principal components of Y. The two graphs of a seed do not depend on
    `n_cells`, and the programs of a seed not on `noise`.

    Parameters
    ----------
    n_cells, n_genes
        Size of the data; 60,000 × 1,000 takes about two seconds and 0.5 GB.
    n_programs, n_types
        Number of programs and of cell types.
    gene_density
        Probability that a program drives a gene.
    type_density
        Probability that a cell type uses a program; a cell has `n_programs` · `type_density` active programs on average.
    noise
        None for Y itself, which can fall slightly below 0; `"poisson"` for counts drawn from max(Y, 0), scaled by one
        factor.
    depth
        Counts per cell, on average over the cells, for `noise="poisson"`; a cell's own total follows its Y. By default
        5,000.
    rare
        Share of the cells in which each of the last `n_rare` programs is active, whatever the cell's type, instead of in
        the cells of some types.
    n_rare
        Number of rare programs, if `rare` is given.
    rng
        Seed or generator. The integer that was drawn is kept in `uns["simulation"]["seed"]`.

    Returns
    -------
    `n_cells` × `n_genes` with Y, or counts, in `X` (dense float32) and what is true in `obs["cell_type"]` (A),
    `obs["covariate"]` (B), `obsm["programs"]` (X'', n_cells × p, what there is to find), `obsm["programs_unmasked"]` (X'),
    `obsm["activity"]` (X), `varm["programs"]` (which program drives which gene, genes × p, bool), and
    `uns["simulation"]`: the parameters, and `type_programs` (which type uses which program, types × p, bool; of a rare
    program it says nothing).

    Raises
    ------
    ValueError
        A size below 1, a share that is not one, or `depth` without noise.

    Examples
    --------
    >>> import numpy as np
    >>> import sae
    >>> adata = sae.datasets.simulate_programs(500, 80, n_programs=20)
    >>> adata.obsm["programs"].shape, adata.varm["programs"].shape
    ((500, 20), (80, 20))
    >>> np.allclose(adata.X, adata.obsm["programs"] @ adata.varm["programs"].T, rtol=1e-4)
    True
    """
    _check_sizes(n_cells=n_cells, n_genes=n_genes, n_programs=n_programs, n_types=n_types)
    _check_shares(gene_density=gene_density, type_density=type_density, rare=rare)
    if noise not in (None, "poisson"):
        raise ValueError(f"noise={noise!r} is neither None nor 'poisson'.")
    if depth is not None and (noise is None or not depth > 0):
        why = "is for counts; pass noise='poisson' with it" if noise is None else "must be above 0"
        raise ValueError(f"depth={depth} {why}.")
    if rare is not None and not 1 <= n_rare <= n_programs:
        raise ValueError(f"n_rare={n_rare} is not a number of programs from 1 to n_programs={n_programs}.")

    seed = _integer_seed(rng)
    of_world, of_cells, of_rare, of_counts = np.random.default_rng(seed).spawn(4)
    genes = of_world.random((n_programs, n_genes)) < gene_density
    types = of_world.random((n_types, n_programs)) < type_density

    cell_type = of_cells.integers(n_types, size=n_cells)
    covariate = of_cells.integers(COVARIATES, size=n_cells)
    shift = of_cells.normal(covariate, SHIFT_SD).astype(np.float32)
    rates = LOWEST_RATE + RATE_STEP * np.arange(n_programs)
    activity = of_cells.poisson(rates, size=(n_cells, n_programs)).astype(np.float32)
    unmasked = activity + shift[:, None]
    active = types[cell_type]
    if rare is not None:
        active[:, -n_rare:] = of_rare.random((n_cells, n_rare)) < rare
    programs = np.where(active, unmasked, np.float32(0))
    x = programs @ genes.astype(np.float32)
    if noise == "poisson":
        depth = DEFAULT_DEPTH if depth is None else float(depth)
        _draw_counts(x, depth, of_counts)

    categories = [f"type_{number}" for number in range(n_types)]
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical.from_codes(cell_type, pd.Index(categories)), "covariate": covariate},
        index=_names("cell", n_cells),
    )
    return ad.AnnData(
        x,
        obs=obs,
        var=pd.DataFrame(index=_names("gene", n_genes)),
        obsm={"programs": programs, "programs_unmasked": unmasked, "activity": activity},
        varm={"programs": genes.T.copy()},
        uns={
            "simulation": {
                "simulator": "programs",
                "n_programs": n_programs,
                "n_types": n_types,
                "gene_density": gene_density,
                "type_density": type_density,
                "noise": noise,
                "depth": depth,
                "rare": rare,
                "n_rare": 0 if rare is None else n_rare,
                "seed": seed,
                "type_programs": types,
            }
        },
    )


def simulate_small(n_cells: int = 12_000, *, rng: int | np.random.Generator | None = 0) -> ad.AnnData:
    r"""Five genes driven by three programs that share one activity: the smallest case with a known answer.

    The small simulation of Schuster 2024 (arXiv:2410.11468), without noise:

    .. math::
        A \sim \mathrm{Poisson}(2), \qquad B \sim \mathrm{Bernoulli}(0.5, 0.1, 0.9), \qquad X_j = A B_j, \qquad
        Y = X \begin{pmatrix} 0 & 1 & 1 & 0 & 0 \\ 1 & 1 & 0 & 1 & 0 \\ 0 & 0 & 0 & 1 & 1 \end{pmatrix}

    X is a linear function of Y. A and B are only in part: the best linear R² is 0.78 for A and 0.62, 0.66 and 0.21 for B.

    Parameters
    ----------
    n_cells
        Number of cells.
    rng
        Seed or generator. The integer that was drawn is kept in `uns["simulation"]["seed"]`.

    Returns
    -------
    `n_cells` × 5 with Y in `X` (dense float32) and what is true in `obsm["programs"]` (X, n_cells × 3, what there is to
    find), `obs["activity"]` (A), `obsm["gates"]` (B, n_cells × 3, bool), and `varm["programs"]` (which program drives which
    gene, 5 × 3, bool).

    Raises
    ------
    ValueError
        `n_cells` is below 1.

    Examples
    --------
    >>> import sae
    >>> sae.datasets.simulate_small(500).obsm["programs"].shape
    (500, 3)
    """
    _check_sizes(n_cells=n_cells)
    seed = _integer_seed(rng)
    generator = np.random.default_rng(seed)
    activity = generator.poisson(SMALL_ACTIVITY, size=n_cells)
    gates = generator.random((n_cells, len(SMALL_GATES))) < SMALL_GATES
    genes = np.array(SMALL_GENES, dtype=np.float32)
    programs = (activity[:, None] * gates).astype(np.float32)
    return ad.AnnData(
        programs @ genes,
        obs=pd.DataFrame({"activity": activity}, index=_names("cell", n_cells)),
        var=pd.DataFrame(index=_names("gene", genes.shape[1])),
        obsm={"programs": programs, "gates": gates},
        varm={"programs": genes.T > 0},
        uns={"simulation": {"simulator": "small", "seed": seed}},
    )


def _draw_counts(x: np.ndarray, depth: float, rng: np.random.Generator) -> None:
    """Replace expected expression by Poisson counts with a mean total of `depth` per cell, block by block."""
    np.maximum(x, 0, out=x)
    mean_total = x.sum(dtype=np.float64) / len(x)
    factor = depth / mean_total if mean_total > 0 else 0.0
    for rows in row_blocks(len(x), BLOCK_ROWS):
        x[rows] = rng.poisson(factor * x[rows].astype(np.float64))


def _integer_seed(rng: int | np.random.Generator | None) -> int:
    return int(rng) if isinstance(rng, int | np.integer) else int(np.random.default_rng(rng).integers(2**31))


def _names(kind: str, n: int) -> list[str]:
    return [f"{kind}_{number}" for number in range(n)]


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} is below 1.")


def _check_shares(**shares: float | None) -> None:
    for name, share in shares.items():
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"{name}={share} is not a share above 0 and up to 1.")
