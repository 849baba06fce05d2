from __future__ import annotations

from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from ..core.seeds import integer_seed
from ._drawing import check_amounts, check_sizes, draw_counts, names


@dataclass(frozen=True)
class Program:
    """Genes that are used together: on some branches, from the time `on` to `off`, and there by a share of the cells.

    `boost` is the expression that it adds to an average one of them, relative to that of an average gene.
    """

    genes: str
    branches: str = "erythroid monocytic lymphoid"
    on: float = -np.inf
    off: float = np.inf
    share: float = 1.0
    boost: float = 5.0


SHARES = {"erythroid": 0.45, "monocytic": 0.3, "lymphoid": 0.25}
"""How the cells are distributed over the branches."""
FORK = 0.2
"""Time at which the branches part."""
STAGES = {
    "erythroid": {0.2: "MK/E progenitor", 0.4: "proerythroblast", 0.6: "erythroblast", 0.8: "normoblast"},
    "monocytic": {0.2: "G/M progenitor", 0.6: "monocyte"},
    "lymphoid": {0.2: "lymphoid progenitor", 0.45: "pro-B cell", 0.7: "B cell"},
}
"""When each stage begins."""
SWITCH = 0.04
"""Width in time of the slope with which programs go on and off."""
PROGRAMS = {
    "stem": Program("CD34 AVP CRHBP HLF MECOM MEIS1 MLLT3 SPINK2 PROM1 CD164 HOPX NRIP1 MSI2 FAM30A EGFL7", off=0.22),
    "megakaryocyte-erythroid": Program(
        "GATA2 GATA1 FCER1A ITGA2B PBX1 ZFPM1 TAL1 CNRIP1 SLC40A1 PLEK MYC CYTL1 TESPA1", "erythroid", 0.2, 0.5
    ),
    "erythroid commitment": Program(
        "KLF1 TFRC EPOR CNRIP1 BLVRB APOC1 APOE REXO2 KCNH2 MYB TFR2 RHAG ANK1 CA1 GATA1 TAL1", "erythroid", 0.38, 0.75
    ),
    "heme": Program(
        "ALAS2 ALAD HMBS UROS UROD CPOX PPOX FECH SLC25A38 SLC25A37 ABCB10 GLRX5 FTH1 FTL", "erythroid", 0.5, 0.95
    ),
    "oxygen transport": Program("HBA1 HBA2 HBB HBD HBM HBQ1 HBG2 AHSP", "erythroid", 0.65, boost=40.0),
    "red-cell membrane": Program(
        "SLC4A1 SPTA1 SPTB EPB42 EPB41 GYPA GYPB GYPC DMTN TMCC2 CA2 BPGM BNIP3L FAM210B SELENBP1 SNCA",
        "erythroid",
        0.75,
    ),
    "granule": Program("MPO ELANE AZU1 PRTN3 CTSG CST7 CALR SRGN IGFBP7 PRSS57 RNASE2 MS4A3", "monocytic", 0.22, 0.6),
    "monocyte": Program(
        "CD14 LYZ VCAN FCN1 S100A8 S100A9 S100A12 CSF3R MNDA FPR1 CSF1R CTSS AIF1 CST3 TYROBP CD36",
        "monocytic",
        0.55,
        boost=10.0,
    ),
    "lymphoid": Program("DNTT IL7R LTB FLT3 SATB1 ADA JCHAIN CD99 RUNX2 HCST LSP1", "lymphoid", 0.22, 0.55),
    "pro-B": Program("VPREB1 VPREB3 IGLL1 RAG1 RAG2 CD79B CD9 EBF1 SOX4 TCF3 MME ERG CD79A", "lymphoid", 0.42, 0.75),
    "B cell": Program(
        "MS4A1 CD79A CD79B CD19 CD22 CD72 PAX5 BANK1 BLK FCRLA TNFRSF13C IGHD IGHM TCL1A CD37",
        "lymphoid",
        0.65,
        boost=10.0,
    ),
    "antigen presentation": Program(
        "CD74 HLA-DRA HLA-DRB1 HLA-DPA1 HLA-DPB1 HLA-DQA1 HLA-DQB1", "monocytic lymphoid", 0.6, boost=10.0
    ),
    "cell cycle": Program(
        "MKI67 TOP2A CDK1 CCNB1 CCNB2 CCNA2 PCNA TYMS MCM2 MCM3 MCM5 RRM2 UBE2C BIRC5 CENPF TUBB HMGB2 H2AZ1",
        off=0.7,
        share=0.5,
    ),
    "interferon": Program("ISG15 IFI6 IFI44L IFIT1 IFIT2 IFIT3 MX1 OAS1 STAT1 IRF7 RSAD2 XAF1", share=0.1),
    "early response": Program("FOS FOSB JUN JUNB EGR1 IER2 DUSP1 ATF3 ZFP36 NR4A1 HSPA1A", share=0.25),
}
EVERYWHERE = (
    "ACTB ACTG1 B2M EEF1A1 GAPDH MALAT1 TMSB4X TPT1 RPLP0 RPLP1 RPL3 RPL13 RPS2 RPS6 RPS18 MT-CO1 MT-CO2 MT-CO3 MT-ND4"
)
"""Genes that every cell has plenty of."""


def simulate_differentiation(
    n_cells: int = 3_000,
    n_genes: int = 800,
    *,
    depth: float = 4_000.0,
    dispersion: float = 0.1,
    library_sd: float = 0.3,
    activity_sd: float = 0.3,
    rng: int | np.random.Generator | None = 0,
) -> ad.AnnData:
    r"""Cells of the bone marrow on their way from stem cells to red cells, monocytes and B cells, with real names of genes.

    For tutorials and tests where gene sets must mean something and the answer must be known. A cell has a branch b and a
    time t, uniform from 0 to 1; before t = 0.2 the branches are one. Each of 15 programs (hemoglobin, heme synthesis,
    granules, cell cycle, ...) adds expression to its genes, which are known markers, and to one unnamed gene in twenty. With
    σ(u) = 1 / (1 + exp(−u)),

    .. math::
        a_p &= B_p \, \sigma\!\left(\frac{t - on_p}{0.04}\right) \sigma\!\left(\frac{off_p - t}{0.04}\right)
            \exp(\varepsilon_p), \qquad \varepsilon_p \sim N(0, \texttt{activity_sd}^2) \\
        y_g &= y_{0g} + \sum_p a_p W_{gp}, \qquad
            \mu_g = s \cdot \texttt{depth} \cdot y_g \Big/ \sum_{g'} y_{g'}

    B is 1 on the branches that use the program and 0 elsewhere; cell cycle (up to t = 0.7), interferon and early response are
    on in a share of the cells of any branch. Counts are negative binomial with mean μ and variance μ + `dispersion` μ²;
    log s ~ N(−σ²/2, σ²) with σ = `library_sd`. Genes and weights W are the same for any number of cells. Who marks
    what is textbook knowledge; times and amounts are made up: nothing can be learned from these cells about the marrow.

    Parameters
    ----------
    n_cells
        Number of cells; 3,000 take about a quarter of a second.
    n_genes
        Number of genes: some 200 named ones, and unnamed ones.
    depth
        Counts per cell, on average.
    dispersion
        Of the negative binomial; 0 for Poisson counts.
    library_sd
        How much the library sizes of cells differ: standard deviation of their logarithm.
    activity_sd
        How much a program differs between cells of the same branch and time: standard deviation of its logarithm.
    rng
        Seed or generator. The integer that was drawn is kept in `uns["simulation"]["seed"]`.

    Returns
    -------
    `n_cells` × `n_genes` with natural log1p of counts per 10,000 in `X` and the counts in `layers["counts"]` (both CSR,
    float32), and what is true in `obs["cell_type"]` (`"HSC"`, and in the order of each branch `"MK/E progenitor"`,
    `"proerythroblast"`, `"erythroblast"`, `"normoblast"`; `"G/M progenitor"`, `"monocyte"`; `"lymphoid progenitor"`,
    `"pro-B cell"`, `"B cell"`), `obs["branch"]` (`"stem"` up to t = 0.2, then `"erythroid"`, `"monocytic"`, `"lymphoid"`),
    `obs["time"]` (t), `obsm["programs"]` (a, a DataFrame), `varm["programs"]` (W, a DataFrame), and the parameters in
    `uns["simulation"]`. There is no embedding: :func:`scanpy.pp.pca` makes one.

    Raises
    ------
    TypeError
        A size that is no integer.
    ValueError
        A size below 1, fewer genes than have names, or a number out of range.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.simulate_differentiation(500)
    >>> adata.obsm["programs"].groupby(adata.obs["cell_type"], observed=True)["oxygen transport"].mean().idxmax()
    'normoblast'
    >>> adata.varm["programs"]["heme"].nlargest(3).index.tolist()
    ['ALAS2', 'ALAD', 'HMBS']
    """
    check_sizes(n_cells=n_cells, n_genes=n_genes)
    check_amounts(depth=depth, dispersion=dispersion, library_sd=library_sd, activity_sd=activity_sd)
    if depth == 0:
        raise ValueError("depth=0 leaves no counts. Pass how many a cell has on average.")
    named = list(dict.fromkeys(" ".join([EVERYWHERE, *(one.genes for one in PROGRAMS.values())]).split()))
    if n_genes < len(named):
        raise ValueError(f"n_genes={n_genes} is less than the {len(named)} genes with names. Pass that many at least.")
    genes = named + names("gene", n_genes - len(named))
    seed = integer_seed(rng)
    # One generator each, so that no option changes what the others draw.
    of_genes, of_cells, of_activity, of_counts = np.random.default_rng(seed).spawn(4)

    baseline, weights = _world(genes, len(named), of_genes)
    branch = of_cells.choice(list(SHARES), size=n_cells, p=list(SHARES.values()))
    time = of_cells.random(n_cells)
    size_factor = np.exp(of_cells.normal(-(library_sd**2) / 2, library_sd, size=n_cells))
    activity = np.column_stack([_activity(one, branch, time, activity_sd, of_activity) for one in PROGRAMS.values()])

    counts = (baseline + activity @ weights.T).astype(np.float32)
    counts /= counts.sum(axis=1, keepdims=True)
    draw_counts(counts, depth, size_factor, dispersion, of_counts)
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)

    cells = names("cell", n_cells)
    return ad.AnnData(
        sparse.csr_matrix(np.log1p(counts * (1e4 / totals))),
        obs=_stages(branch, time).set_axis(cells),
        var=pd.DataFrame(index=genes),
        obsm={"programs": pd.DataFrame(activity, index=cells, columns=list(PROGRAMS))},
        varm={"programs": pd.DataFrame(weights, index=genes, columns=list(PROGRAMS))},
        layers={"counts": sparse.csr_matrix(counts)},
        uns={
            "log1p": {"base": None},
            "simulation": {
                "simulator": "differentiation", "depth": depth, "dispersion": dispersion, "library_sd": library_sd,
                "activity_sd": activity_sd, "seed": seed,
            },
        },
    )  # fmt: skip


def _world(genes: list[str], n_named: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the expression that every cell has (g,), and what each program adds (g, p)."""
    place = pd.Series(range(n_named), index=genes[:n_named])
    everywhere = place[EVERYWHERE.split()]
    baseline = rng.lognormal(-0.5, 1.0, size=len(genes))
    # Markers are next to absent where no program has them.
    baseline[:n_named] *= 0.05
    baseline[everywhere] = rng.lognormal(3.0, 0.5, size=len(everywhere))
    weights = np.zeros((len(genes), len(PROGRAMS)))
    for number, one in enumerate(PROGRAMS.values()):
        own = place[one.genes.split()]
        # The first are the best known, and get the most.
        weights[own, number] = one.boost * np.geomspace(2, 0.5, len(own))
        unnamed = weights[n_named:, number]
        unnamed[:] = (rng.random(len(unnamed)) < 0.05) * rng.lognormal(0.0, 0.5, size=len(unnamed))
    return baseline, weights


def _activity(
    program: Program, branch: np.ndarray, time: np.ndarray, activity_sd: float, rng: np.random.Generator
) -> np.ndarray:
    from scipy.special import expit

    on = np.isin(branch, program.branches.split()) & (rng.random(len(time)) < program.share)
    noise = np.exp(rng.normal(0, activity_sd, size=len(time)))
    return on * expit((time - program.on) / SWITCH) * expit((program.off - time) / SWITCH) * noise


def _stages(branch: np.ndarray, time: np.ndarray) -> pd.DataFrame:
    """Name the stage and branch of every cell, and keep its time."""
    stage = np.full(len(time), "HSC", dtype=object)
    for name, stages in STAGES.items():
        for start, label in stages.items():
            stage[(branch == name) & (time >= start)] = label
    labels = ["HSC", *(label for stages in STAGES.values() for label in stages.values())]
    branches = np.where(time < FORK, "stem", branch)
    return pd.DataFrame(
        {
            "cell_type": pd.Categorical(stage, labels),
            "branch": pd.Categorical(branches, ["stem", *STAGES]),
            "time": time,
        }
    )
