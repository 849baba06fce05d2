from __future__ import annotations

import inspect

import anndata as ad
import numpy as np
import pytest
from scipy import stats

from sae.datasets import simulate_programs, simulate_small

DATA_OF_SEED_0 = [7775, 192, 1209, 119, 38461]
SMALL_OF_SEED_0 = [433, 299]


@pytest.fixture(scope="module")
def cells():
    return simulate_programs(20_000, 300)


def share_explained(x, y):
    """R² of each column of y by the columns of x, on the second half of the cells after a fit to the first."""
    x, y = (np.asarray(part, dtype=np.float64).reshape(len(part), -1) for part in (x, y))
    half = len(x) // 2
    x = np.hstack([x, np.ones((len(x), 1))])
    weights = np.linalg.lstsq(x[:half], y[:half], rcond=1e-6)[0]
    error = np.square(y[half:] - x[half:] @ weights).sum(axis=0)
    return 1 - error / np.square(y[half:] - y[half:].mean(axis=0)).sum(axis=0)


# ---- Large: simulate_programs


def test_every_step_follows_its_formula(cells):
    unmasked, programs, types = cells.obsm["programs_unmasked"], cells.obsm["programs"], cells.obs["cell_type"]
    shift = unmasked - cells.obsm["activity"]
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1], shift.shape), atol=1e-5)
    mask = cells.uns["simulation"]["type_programs"][types.cat.codes]
    np.testing.assert_array_equal(programs, np.where(mask, unmasked, 0))
    np.testing.assert_array_equal(cells.X, programs @ cells.varm["programs"].T.astype(np.float32))
    assert {part.dtype for part in (cells.X, *cells.obsm.values())} == {np.dtype(np.float32)}
    assert cells.varm["programs"].dtype == bool


def test_distributions(cells):
    n, p = cells.obsm["activity"].shape
    rates = 1 + 0.1 * np.arange(p)
    activity = cells.obsm["activity"].astype(np.float64)
    np.testing.assert_allclose(activity.mean(axis=0), rates, atol=5 * np.sqrt(rates.max() / n))
    np.testing.assert_allclose(activity.var(axis=0), rates, rtol=0.1)

    covariate = cells.obs["covariate"].to_numpy()
    shift = (cells.obsm["programs_unmasked"] - cells.obsm["activity"])[:, 0]
    for level in range(3):
        inside = covariate == level
        assert inside.mean() == pytest.approx(1 / 3, abs=0.02)
        assert shift[inside].mean() == pytest.approx(level, abs=0.01)
        assert shift[inside].std() == pytest.approx(0.1, rel=0.05)

    types = cells.obs["cell_type"]
    assert list(types.cat.categories) == [f"type_{number}" for number in range(40)]
    assert types.value_counts(normalize=True).between(0.02, 0.03).all()
    assert cells.varm["programs"].mean() == pytest.approx(0.1, abs=0.01)
    assert cells.uns["simulation"]["type_programs"].mean() == pytest.approx(0.3, abs=0.03)
    # Programs are independent of each other, of the type and of the covariate.
    together = np.corrcoef(np.column_stack([activity, covariate, types.cat.codes]), rowvar=False)
    assert np.abs(together - np.eye(p + 2)).max() < 6 / np.sqrt(n)


def test_ceilings_of_linear_models(cells):
    """What the paper reports for 100,000 cells × 20,000 genes depends on neither: 1, 0.26 and 0.17."""
    assert np.linalg.matrix_rank(cells.X[:2000].astype(np.float64), rtol=1e-5) == 100
    np.testing.assert_allclose(share_explained(cells.X, cells.obsm["programs"]), 1, atol=1e-6)
    assert share_explained(cells.X, cells.obsm["programs_unmasked"]).mean() == pytest.approx(0.26, abs=0.03)
    assert share_explained(cells.X, cells.obsm["activity"]).mean() == pytest.approx(0.17, abs=0.03)
    assert share_explained(cells.X, cells.obs["covariate"]).item() == pytest.approx(0.79, abs=0.03)


def test_a_seed_makes_the_same_cells():
    one, other, third = (simulate_programs(50, 30, n_programs=8, n_types=4, rng=rng) for rng in (3, 3, 4))
    for part in ("X", "obsm", "varm"):
        values = [getattr(adata, part) for adata in (one, other)]
        if part != "X":
            assert set(values[0]) == set(values[1])
            values = [np.hstack([value[key] for key in sorted(value)]) for value in values]
        np.testing.assert_array_equal(*values)
    assert one.obs.equals(other.obs)
    assert (one.X != third.X).any()
    assert (one.varm["programs"] != third.varm["programs"]).any()


def test_a_generator_gives_a_seed_that_repeats_it():
    one = simulate_programs(50, 30, n_programs=8, rng=np.random.default_rng(1))
    other = simulate_programs(50, 30, n_programs=8, rng=one.uns["simulation"]["seed"])
    np.testing.assert_array_equal(one.X, other.X)


def test_graphs_do_not_depend_on_the_number_of_cells():
    one, other = (simulate_programs(n, 30, n_programs=8) for n in (20, 60))
    np.testing.assert_array_equal(one.varm["programs"], other.varm["programs"])
    np.testing.assert_array_equal(*(adata.uns["simulation"]["type_programs"] for adata in (one, other)))


@pytest.mark.parametrize("depth", [None, 300.0])
def test_counts(depth):
    expected = simulate_programs(5_000, 120, n_programs=20)
    counts = simulate_programs(5_000, 120, n_programs=20, noise="poisson", depth=depth)
    np.testing.assert_array_equal(counts.obsm["programs"], expected.obsm["programs"])
    x, mean = counts.X.astype(np.float64), np.maximum(expected.X, 0).astype(np.float64)
    assert counts.X.dtype == np.float32
    np.testing.assert_array_equal(x, x.round())
    depth = depth or 5_000
    assert x.sum(axis=1).mean() == pytest.approx(depth, rel=0.01)
    mean *= depth / mean.sum(axis=1).mean()
    assert (x[mean == 0] == 0).all()
    z = (x - mean)[mean > 0] / np.sqrt(mean[mean > 0])
    assert z.mean() == pytest.approx(0, abs=0.02)
    assert z.var() == pytest.approx(1, abs=0.02)


def test_rare_programs():
    arguments = {"n_cells": 20_000, "n_genes": 50, "n_programs": 12, "n_types": 6}
    usual, some = simulate_programs(**arguments), simulate_programs(**arguments, rare=0.02, n_rare=4)
    programs = some.obsm["programs"]
    np.testing.assert_array_equal(programs[:, :-4], usual.obsm["programs"][:, :-4])
    active = programs[:, -4:] != 0
    np.testing.assert_allclose(active.mean(axis=0), 0.02, atol=0.004)
    np.testing.assert_array_equal(programs[:, -4:][active], some.obsm["programs_unmasked"][:, -4:][active])
    share = some.obs["cell_type"].groupby(some.obs["cell_type"].to_numpy()).size() * 0.02
    for column in active.T:
        per_type = some.obs["cell_type"][column].value_counts()
        assert ((per_type - share).abs() < 5 * np.sqrt(share)).all()


def test_rare_programs_of_one_cell_in_a_thousand():
    adata = simulate_programs(50_000, 20, n_programs=10, n_types=4, rare=0.001, n_rare=3)
    n_active = (adata.obsm["programs"][:, -3:] != 0).sum(axis=0)
    assert ((n_active > 20) & (n_active < 90)).all()


def test_correlated_programs_keep_their_margins():
    n, p = 20_000, 8
    cells = simulate_programs(n, 20, n_programs=p, correlation=0.6, block_size=3)
    activity = cells.obsm["activity"].astype(np.float64)
    for j, column in enumerate(activity.T):
        observed = np.bincount(column.astype(int), minlength=12)[:12]
        expected = n * stats.poisson.pmf(np.arange(12), 1 + 0.1 * j)
        usual = expected > 5
        assert (np.abs(observed - expected) < 5 * np.sqrt(expected))[usual].all()
    r = np.corrcoef(activity, rowvar=False)
    block = np.arange(p) // 3
    inside = (block[:, None] == block) & ~np.eye(p, dtype=bool)
    assert ((r[inside] > 0.5) & (r[inside] < 0.6)).all()
    assert np.abs(r[block[:, None] != block]).max() < 5 / np.sqrt(n)


def test_correlation_is_that_of_the_copula():
    """Against its definition by numerical integration over the two normal variables."""
    rates, rho = (1.0, 1.1), 0.8
    cells = simulate_programs(100_000, 5, n_programs=2, correlation=rho)
    nodes = np.linspace(-6, 6, 301)
    weights = stats.norm.pdf(nodes)
    x, y = np.meshgrid(nodes, nodes)
    shared = np.clip(rho * x + np.sqrt(1 - rho**2) * y, -8, 8)
    of_one, of_other = (stats.poisson.ppf(stats.norm.cdf(z), rate) for z, rate in zip((x, shared), rates, strict=True))
    mean = (of_one * of_other * np.outer(weights, weights)).sum() / weights.sum() ** 2
    expected = (mean - rates[0] * rates[1]) / np.sqrt(rates[0] * rates[1])
    assert np.corrcoef(cells.obsm["activity"].T)[0, 1] == pytest.approx(expected, abs=0.01)


def test_dimensions_are_parameters():
    cells = simulate_programs(
        30_000, 12, n_programs=6, n_types=3, n_levels=5, lowest_rate=2, rate_step=0.5, shift_sd=0.4
    )
    assert sorted(cells.obs["covariate"].unique()) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(cells.obsm["activity"].mean(axis=0), 2 + 0.5 * np.arange(6), atol=0.08)
    shift = (cells.obsm["programs_unmasked"] - cells.obsm["activity"])[:, 0]
    assert (shift - cells.obs["covariate"]).std() == pytest.approx(0.4, rel=0.02)


def test_batches_multiply_genes():
    plain = simulate_programs(5_000, 60, n_programs=10)
    cells = simulate_programs(5_000, 60, n_programs=10, n_batches=3, batch_sd=0.5)
    for part in ("programs", "activity"):
        np.testing.assert_array_equal(plain.obsm[part], cells.obsm[part])
    assert cells.obs["batch"].value_counts(normalize=True).between(0.3, 0.37).all()
    factors = cells.varm["batch_factors"]
    np.testing.assert_allclose(cells.X, plain.X * factors[:, cells.obs["batch"].cat.codes].T, rtol=1e-6)
    assert np.log(factors).mean() == pytest.approx(0, abs=0.15)
    assert np.log(factors).std() == pytest.approx(0.5, abs=0.1)
    again = simulate_programs(70, 60, n_programs=10, n_batches=3, batch_sd=0.5, noise="nb")
    np.testing.assert_array_equal(again.varm["batch_factors"], factors)


@pytest.mark.parametrize("noise", ["poisson", "nb"])
def test_library_sizes(noise):
    expected = simulate_programs(20_000, 40, n_programs=10)
    counts = simulate_programs(20_000, 40, n_programs=10, noise=noise, library_sd=0.5)
    factor = counts.obs["size_factor"].to_numpy()
    assert factor.mean() == pytest.approx(1, abs=0.02)
    assert np.log(factor).std() == pytest.approx(0.5, abs=0.01)
    assert np.abs(np.corrcoef(factor, expected.X.sum(axis=1))[0, 1]) < 0.03
    y = np.maximum(expected.X, 0).sum(axis=1, dtype=np.float64)
    total = counts.X.sum(axis=1, dtype=np.float64)
    share = total[y > 0] / (5_000 * factor * y / y.mean())[y > 0]
    assert share.mean() == pytest.approx(1, abs=0.01)
    assert np.corrcoef(total, factor * y)[0, 1] > (0.95 if noise == "nb" else 0.995)


@pytest.mark.parametrize("dispersion", [None, 0.5])
def test_negative_binomial(dispersion):
    expected = simulate_programs(5_000, 120, n_programs=20)
    counts = simulate_programs(5_000, 120, n_programs=20, noise="nb", dispersion=dispersion)
    np.testing.assert_array_equal(counts.obsm["programs"], expected.obsm["programs"])
    phi = dispersion or 0.1
    assert counts.uns["simulation"]["dispersion"] == phi
    mean = np.maximum(expected.X, 0).astype(np.float64)
    mean *= 5_000 / mean.sum(axis=1).mean()
    x = counts.X.astype(np.float64)
    z = ((x - mean) / np.sqrt(mean + phi * mean**2, where=mean > 0, out=np.ones_like(mean)))[mean > 0]
    assert z.mean() == pytest.approx(0, abs=0.02)
    assert z.var() == pytest.approx(1, abs=0.03)
    # The share of zeros, where they are neither certain nor rare.
    some = (mean > 1) & (mean < 5)
    zero = stats.nbinom.pmf(0, 1 / phi, 1 / (1 + phi * mean[some]))
    assert (x[some] == 0).mean() == pytest.approx(zero.mean(), abs=0.01)


def test_options_change_only_their_part():
    """No option moves what others draw."""
    arguments = {"n_cells": 300, "n_genes": 40, "n_programs": 12}
    plain = simulate_programs(**arguments)
    for option in ({"correlation": 0.5}, {"n_batches": 2}, {"noise": "nb"}, {"rare": 0.1, "n_rare": 2}):
        other = simulate_programs(**arguments, **option)
        assert other.obs[["cell_type", "covariate"]].equals(plain.obs)
        np.testing.assert_array_equal(other.varm["programs"], plain.varm["programs"])
        np.testing.assert_array_equal(*(adata.uns["simulation"]["type_programs"] for adata in (other, plain)))


def test_every_parameter_is_recorded():
    recorded = set(simulate_programs(20, 10, n_programs=4).uns["simulation"])
    asked = set(inspect.signature(simulate_programs).parameters) - {"n_cells", "n_genes", "rng"}
    assert recorded == asked | {"simulator", "seed", "type_programs"}
    assert set(simulate_small(20).uns["simulation"]) == {"simulator", "rate", "gates", "seed"}


def test_the_data_of_a_seed_stay_as_they_are():
    """What releases have made of seed 0; benchmarks are reported on such data."""
    cells = simulate_programs(200, 50, n_programs=20)
    found = [cells.obsm["activity"].sum(), cells.obs["covariate"].sum(), (cells.obsm["programs"] != 0).sum()]
    found += [cells.varm["programs"].sum(), simulate_programs(200, 50, n_programs=20, noise="poisson").X[:5].sum()]
    assert found == DATA_OF_SEED_0
    small = simulate_small(200)
    assert [small.obs["activity"].sum(), small.obsm["gates"].sum()] == SMALL_OF_SEED_0


def test_nothing_at_all_can_be_counted():
    adata = simulate_programs(10, 5, n_programs=1, gene_density=1e-9, noise="poisson")
    assert (adata.X == 0).all()


# ---- Small: simulate_small


def test_small_follows_its_formulas():
    cells = simulate_small()
    assert cells.shape == (12_000, 5)
    activity, gates, programs = cells.obs["activity"].to_numpy(), cells.obsm["gates"], cells.obsm["programs"]
    assert activity.mean() == pytest.approx(2, abs=0.06)
    assert activity.var() == pytest.approx(2, abs=0.15)
    np.testing.assert_allclose(gates.mean(axis=0), [0.5, 0.1, 0.9], atol=0.02)
    np.testing.assert_array_equal(programs, activity[:, None] * gates)
    x1, x2, x3 = programs.T
    np.testing.assert_array_equal(cells.X, np.column_stack([x2, x1 + x2, x1, x2 + x3, x3]))
    np.testing.assert_array_equal(cells.X, programs @ cells.varm["programs"].T)
    assert cells.X.dtype == programs.dtype == np.float32


def test_small_ceilings_of_linear_models():
    cells = simulate_small(40_000)
    np.testing.assert_allclose(share_explained(cells.X, cells.obsm["programs"]), 1, atol=1e-6)
    assert share_explained(cells.X, cells.obs["activity"]).item() == pytest.approx(0.78, abs=0.02)
    np.testing.assert_allclose(share_explained(cells.X, cells.obsm["gates"]), [0.62, 0.66, 0.21], atol=0.03)


def test_small_repeats():
    one, other, third = (simulate_small(100, rng=rng) for rng in (1, 1, 2))
    np.testing.assert_array_equal(one.X, other.X)
    assert (one.X != third.X).any()


def test_small_of_other_dimensions():
    cells = simulate_small(20_000, rate=5, gates=[0.3, 0.8], graph=[[1, 1, 0, 0], [0, 1, 0, 1]])
    assert cells.obs["activity"].mean() == pytest.approx(5, abs=0.1)
    np.testing.assert_allclose(cells.obsm["gates"].mean(axis=0), [0.3, 0.8], atol=0.02)
    x1, x2 = cells.obsm["programs"].T
    np.testing.assert_array_equal(cells.X, np.column_stack([x1, x1 + x2, 0 * x1, x2]))
    np.testing.assert_array_equal(cells.varm["programs"], [[1, 0], [1, 1], [0, 0], [0, 1]])
    assert cells.uns["simulation"]["gates"].tolist() == [0.3, 0.8]


# ---- Both


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: simulate_programs(20, 10, n_programs=4), id="programs"),
        pytest.param(lambda: simulate_programs(20, 10, n_programs=4, noise="poisson", rare=0.5, n_rare=2), id="counts"),
        pytest.param(
            lambda: simulate_programs(
                20, 10, n_programs=4, noise="nb", library_sd=0.3, n_batches=2, correlation=0.5, block_size=2
            ),
            id="all options",
        ),
        pytest.param(lambda: simulate_small(20), id="small"),
    ],
)
@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_round_trip(make, kind, tmp_path, compare):
    adata = make()
    before = compare.state(adata)
    path = tmp_path / f"cells.{kind}"
    getattr(adata, f"write_{kind}")(path)
    compare.assert_same(before, compare.state(getattr(ad, f"read_{kind}")(path)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"n_cells": 0}, "n_cells=0 is below 1", id="no cells"),
        pytest.param({"n_types": -1}, "n_types=-1 is below 1", id="types"),
        pytest.param({"gene_density": 0}, "gene_density=0 is not a share", id="no graph"),
        pytest.param({"type_density": 1.5}, "type_density=1.5 is not a share", id="density"),
        pytest.param({"noise": "gaussian"}, "noise='gaussian' is neither None, 'poisson' nor 'nb'", id="noise"),
        pytest.param({"depth": 10.0}, "depth=10.0 is for counts", id="depth without noise"),
        pytest.param({"noise": "poisson", "depth": -1}, "depth=-1 must be above 0", id="depth"),
        pytest.param({"noise": "poisson", "depth": np.nan}, "depth=nan must be above 0", id="nan"),
        pytest.param({"noise": "poisson", "dispersion": 0.2}, "dispersion=0.2 is of the negative", id="dispersion"),
        pytest.param({"noise": "nb", "dispersion": 0.0}, "dispersion=0.0 must be above 0", id="no dispersion"),
        pytest.param({"library_sd": 0.3}, "library_sd=0.3 is for counts", id="libraries without noise"),
        pytest.param({"noise": "nb", "library_sd": -1}, "library_sd=-1 is not a number from 0", id="library_sd"),
        pytest.param({"correlation": 1.0}, "correlation=1.0 is not from 0 to 1", id="correlation"),
        pytest.param({"block_size": 0}, "block_size=0 is below 1", id="blocks"),
        pytest.param({"n_batches": 0}, "n_batches=0 is below 1", id="batches"),
        pytest.param({"batch_sd": np.inf}, "batch_sd=inf is not a number from 0", id="batch_sd"),
        pytest.param({"lowest_rate": -0.5}, "lowest_rate=-0.5 is not a number from 0", id="rate"),
        pytest.param({"rare": 1.2}, "rare=1.2 is not a share", id="rare"),
        pytest.param({"rare": 0.1, "n_programs": 5}, "n_rare=10 is more than n_programs=5", id="too many rare"),
        pytest.param({"rare": 0.1, "n_rare": 0}, "n_rare=0 is below 1", id="none rare"),
        pytest.param({"n_cells": 1e4}, "n_cells=10000.0 is a float; expected an integer", id="float"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        simulate_programs(**{"n_cells": 10, "n_genes": 10, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"n_cells": 0}, "n_cells=0 is below 1", id="no cells"),
        pytest.param({"n_cells": 1e4}, "n_cells=10000.0 is a float; expected an integer", id="float"),
        pytest.param({"rate": -1}, "rate=-1 is not a number from 0", id="rate"),
        pytest.param({"gates": [0.5, 0, 0.1]}, r"gates\[1\]=0.0 is not a share", id="gate"),
        pytest.param({"gates": [0.5, 0.2]}, r"graph has the shape \(3, 5\) and gates \(2,\)", id="other graph"),
        pytest.param({"graph": [1, 0, 1]}, r"graph has the shape \(3,\)", id="no graph"),
        pytest.param({"graph": [[2, 0], [1, 1], [0, 1]]}, "graph has values other than 0 and 1", id="weights"),
    ],
)
def test_bad_arguments_of_small(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        simulate_small(**{"n_cells": 10, **arguments})
