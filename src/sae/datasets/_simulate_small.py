from __future__ import annotations

from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd

from ..core.seeds import integer_seed
from ._drawing import check_amounts, check_shares, check_sizes, names

GENES = ((0, 1, 1, 0, 0), (1, 1, 0, 1, 0), (0, 0, 0, 1, 1))


def simulate_small(
    n_cells: int = 12_000,
    *,
    rate: float = 2.0,
    gates: Sequence[float] = (0.5, 0.1, 0.9),
    graph: Sequence[Sequence[int]] | np.ndarray = GENES,
    rng: int | np.random.Generator | None = 0,
) -> ad.AnnData:
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
    rate
        Mean of A.
    gates
        Probability of each B: one per program.
    graph
        Which program drives which gene, programs × genes of 0 and 1: a row for each of `gates`.
    rng
        Seed or generator. The integer that was drawn is kept in `uns["simulation"]["seed"]`.

    Returns
    -------
    `n_cells` × genes with Y in `X` (dense float32) and what is true in `obsm["programs"]` (X, n_cells × programs, what
    there is to find), `obs["activity"]` (A), `obsm["gates"]` (B, n_cells × programs, bool), `varm["programs"]` (which
    program drives which gene, genes × programs, bool), and the parameters in `uns["simulation"]`.

    Raises
    ------
    TypeError
        `n_cells` is no integer.
    ValueError
        `n_cells` is below 1, `rate` negative, one of `gates` no probability above 0, or `graph` has other than 0 and 1, or
        not a row per gate.

    Examples
    --------
    >>> import sae
    >>> sae.datasets.simulate_small(500).obsm["programs"].shape
    (500, 3)
    >>> sae.datasets.simulate_small(500, gates=[0.5, 0.2], graph=[[1, 1, 0], [0, 1, 1]]).shape
    (500, 3)
    """
    probability, genes = np.asarray(gates, dtype=np.float64), np.asarray(graph)
    check_sizes(n_cells=n_cells)
    check_amounts(rate=rate)
    check_shares(**{f"gates[{number}]": float(one) for number, one in enumerate(probability.ravel())})
    if genes.ndim != 2 or probability.ndim != 1 or len(genes) != len(probability) or 0 in genes.shape:
        raise ValueError(
            f"graph has the shape {genes.shape} and gates {probability.shape}: expected programs × genes and a gate for each "
            "program. Pass both."
        )
    if not np.isin(genes, (0, 1)).all():
        raise ValueError("graph has values other than 0 and 1. Pass which program drives which gene.")
    genes = genes.astype(np.float32)
    seed = integer_seed(rng)
    generator = np.random.default_rng(seed)
    activity = generator.poisson(rate, size=n_cells)
    on = generator.random((n_cells, len(probability))) < probability
    programs = (activity[:, None] * on).astype(np.float32)
    return ad.AnnData(
        programs @ genes,
        obs=pd.DataFrame({"activity": activity}, index=names("cell", n_cells)),
        var=pd.DataFrame(index=names("gene", genes.shape[1])),
        obsm={"programs": programs, "gates": on},
        varm={"programs": genes.T > 0},
        uns={"simulation": {"simulator": "small", "rate": rate, "gates": probability, "seed": seed}},
    )
