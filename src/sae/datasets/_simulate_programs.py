from __future__ import annotations

from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd

from ..core.seeds import integer_seed
from ._drawing import check_amounts, check_shares, check_sizes, correlated_poisson, draw_counts, names

DEFAULT_DEPTH = 5_000.0
DEFAULT_DISPERSION = 0.1


def simulate_programs(
    n_cells: int = 10_000,
    n_genes: int = 1_000,
    *,
    n_programs: int = 100,
    n_types: int = 40,
    n_levels: int = 3,
    gene_density: float = 0.1,
    type_density: float = 0.3,
    lowest_rate: float = 1.0,
    rate_step: float = 0.1,
    shift_sd: float = 0.1,
    correlation: float = 0.0,
    block_size: int = 10,
    rare: float | None = None,
    n_rare: int = 10,
    n_batches: int = 1,
    batch_sd: float = 0.2,
    noise: Literal["poisson", "nb"] | None = None,
    depth: float | None = None,
    dispersion: float | None = None,
    library_sd: float = 0.0,
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
    function of Y (R² = 1), and of the first p principal components of Y. How much of the rest is linear in Y depends on
    which type uses which program: over seeds, R² is .19 ± .005 for X and .28 ± .006 for X' (means over programs), .76 ± .016
    for B and .89 ± .015 for A as a number.

    What the paper leaves out is off by default:

    * `correlation` ρ: the X of blocks of neighbouring programs share a normal variable u (Gaussian copula),
      :math:`X_j = F_j^{-1}(\Phi(\sqrt\rho\, u + \sqrt{1 - \rho}\, e_j))`, with F_j the distribution function of
      Poisson(1 + 0.1 j): the margins stay, and the correlation in a block is a little below ρ;
    * `rare`: some programs are on in a small share of the cells, of any type;
    * `n_batches`: Y of a cell in batch b is multiplied, gene by gene, by exp(N(0, σ²)) with σ = `batch_sd`, drawn once per batch and gene;
    * `noise`: counts with mean μ = s · max(Y, 0) · `depth` / (mean total of max(Y, 0)) and variance μ (`"poisson"`) or
      μ + `dispersion` μ² (`"nb"`); log s ~ N(−σ²/2, σ²) with σ = `library_sd`, so that s has the mean 1.

    The two graphs, and the factors of batches, are the same for any `n_cells`, and programs for any `noise` and `n_batches`.

    Parameters
    ----------
    n_cells, n_genes
        Size of the data; 60,000 × 1,000 takes about two seconds and 0.5 GB.
    n_programs, n_types, n_levels
        Number of programs, of cell types, and of levels of the covariate B (0, 1, ...).
    gene_density
        Probability that a program drives a gene.
    type_density
        Probability that a cell type uses a program; a cell has `n_programs` · `type_density` active programs on average.
    lowest_rate, rate_step
        X_j has the mean `lowest_rate` + `rate_step` · j.
    shift_sd
        Standard deviation of ε around B.
    correlation
        ρ, from 0 to 1, 1 excluded.
    block_size
        Programs in a block, if `correlation` is given; the last block may be smaller.
    rare
        Share of the cells in which each of the last `n_rare` programs is active, whatever the cell's type, instead of in
        the cells of some types: 0.001 for one cell in a thousand.
    n_rare
        Number of rare programs, if `rare` is given.
    n_batches, batch_sd
        Number of batches, to which cells belong at random, and how much they differ.
    noise
        None for Y itself, which can fall slightly below 0; `"poisson"` or `"nb"` (negative binomial) for counts.
    depth
        Counts per cell, on average over the cells, with `noise`; a cell's own total follows its Y. By default 5,000.
    dispersion
        For `noise="nb"`; by default 0.1.
    library_sd
        How much the library sizes of cells with the same Y differ, with `noise`: standard deviation of their logarithm.
    rng
        Seed or generator. The integer that was drawn is kept in `uns["simulation"]["seed"]`.

    Returns
    -------
    `n_cells` × `n_genes` with Y, or counts, in `X` (dense float32) and what is true in `obs["cell_type"]` (A),
    `obs["covariate"]` (B), `obsm["programs"]` (X'', n_cells × p, what there is to find), `obsm["programs_unmasked"]` (X'),
    `obsm["activity"]` (X), `varm["programs"]` (which program drives which gene, genes × p, bool), and
    `uns["simulation"]`: the parameters, and `type_programs` (which type uses which program, types × p, bool; of a rare
    program it says nothing). With several batches `obs["batch"]` and `varm["batch_factors"]` (genes × batches), with
    `library_sd` `obs["size_factor"]` (s).

    Raises
    ------
    TypeError
        A size that is no integer.
    ValueError
        A size below 1, a share that is not one, a negative number, or `depth`, `dispersion` or `library_sd` without the
        noise that they belong to.

    Examples
    --------
    >>> import numpy as np
    >>> import sae
    >>> adata = sae.datasets.simulate_programs(500, 80, n_programs=20)
    >>> adata.obsm["programs"].shape, adata.varm["programs"].shape
    ((500, 20), (80, 20))
    >>> np.allclose(adata.X, adata.obsm["programs"] @ adata.varm["programs"].T, rtol=1e-4)
    True
    >>> counts = sae.datasets.simulate_programs(500, 80, noise="nb", library_sd=0.3, n_batches=2)
    >>> counts.obs.columns.tolist()
    ['cell_type', 'covariate', 'batch', 'size_factor']
    """
    parameters = {name: value for name, value in locals().items() if name not in ("n_cells", "n_genes", "rng")}
    check_sizes(
        n_cells=n_cells, n_genes=n_genes, n_programs=n_programs, n_types=n_types, n_levels=n_levels, block_size=block_size,
        n_batches=n_batches, **({} if rare is None else {"n_rare": n_rare}),
    )  # fmt: skip
    check_shares(gene_density=gene_density, type_density=type_density, rare=rare)
    check_amounts(
        lowest_rate=lowest_rate, rate_step=rate_step, shift_sd=shift_sd, batch_sd=batch_sd, library_sd=library_sd
    )
    _check_noise(noise, depth, dispersion, library_sd)
    if not 0 <= correlation < 1:
        raise ValueError(f"correlation={correlation} is not from 0 to 1, 1 excluded.")
    if rare is not None and n_rare > n_programs:
        raise ValueError(f"n_rare={n_rare} is more than n_programs={n_programs}.")

    seed = integer_seed(rng)
    # One generator each, so that no option changes what the others draw; new ones go last, so that a seed keeps its data.
    streams = np.random.default_rng(seed).spawn(8)
    of_world, of_cells, of_rare, of_counts, of_blocks, of_factors, of_batches, of_libraries = streams
    genes = of_world.random((n_programs, n_genes)) < gene_density
    types = of_world.random((n_types, n_programs)) < type_density

    cell_type = of_cells.integers(n_types, size=n_cells)
    covariate = of_cells.integers(n_levels, size=n_cells)
    shift = of_cells.normal(covariate, shift_sd).astype(np.float32)
    rates = lowest_rate + rate_step * np.arange(n_programs)
    if correlation:
        activity = correlated_poisson(rates, n_cells, correlation, block_size, of_blocks)
    else:
        activity = of_cells.poisson(rates, size=(n_cells, n_programs)).astype(np.float32)
    unmasked = activity + shift[:, None]
    active = types[cell_type]
    if rare is not None:
        active[:, -n_rare:] = of_rare.random((n_cells, n_rare)) < rare
    programs = np.where(active, unmasked, np.float32(0))
    x = programs @ genes.astype(np.float32)

    obs = pd.DataFrame({"cell_type": _categorical("type", cell_type, n_types), "covariate": covariate})
    varm: dict[str, np.ndarray] = {"programs": genes.T.copy()}
    if n_batches > 1:
        batch = of_batches.integers(n_batches, size=n_cells)
        factors = np.exp(of_factors.normal(0, batch_sd, size=(n_batches, n_genes))).astype(np.float32)
        for number in range(n_batches):
            x[batch == number] *= factors[number]
        obs["batch"], varm["batch_factors"] = _categorical("batch", batch, n_batches), factors.T.copy()
    if noise is not None:
        depth = DEFAULT_DEPTH if depth is None else float(depth)
        if noise == "nb":
            dispersion = DEFAULT_DISPERSION if dispersion is None else float(dispersion)
        if library_sd:
            obs["size_factor"] = np.exp(of_libraries.normal(-(library_sd**2) / 2, library_sd, size=n_cells))
        size_factor = obs["size_factor"].to_numpy() if library_sd else np.ones(n_cells)
        draw_counts(x, depth, size_factor, dispersion or 0.0, of_counts)

    made = {"depth": depth, "dispersion": dispersion, "n_rare": 0 if rare is None else n_rare, "seed": seed}
    return ad.AnnData(
        x,
        obs=obs.set_axis(names("cell", n_cells)),
        var=pd.DataFrame(index=names("gene", n_genes)),
        obsm={"programs": programs, "programs_unmasked": unmasked, "activity": activity},
        varm=varm,
        uns={"simulation": {"simulator": "programs", **parameters, **made, "type_programs": types}},
    )


def _categorical(kind: str, codes: np.ndarray, n: int) -> pd.Categorical[str]:
    return pd.Categorical.from_codes(codes, pd.Index(names(kind, n)))


def _check_noise(noise: str | None, depth: float | None, dispersion: float | None, library_sd: float) -> None:
    if noise not in (None, "poisson", "nb"):
        raise ValueError(f"noise={noise!r} is neither None, 'poisson' nor 'nb'.")
    if depth is not None and (noise is None or not 0 < depth < np.inf):
        why = "is for counts; pass noise='poisson' with it" if noise is None else "must be above 0"
        raise ValueError(f"depth={depth} {why}.")
    if dispersion is not None and (noise != "nb" or not 0 < dispersion < np.inf):
        why = "is of the negative binomial; pass noise='nb' with it" if noise != "nb" else "must be above 0"
        raise ValueError(f"dispersion={dispersion} {why}.")
    if library_sd and noise is None:
        raise ValueError(f"library_sd={library_sd} is for counts; pass noise='poisson' with it.")
