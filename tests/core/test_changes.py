import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sae.core import changes as changes_module
from sae.core.changes import Changes, group_means, paired_test, summed_changes
from sae.core.steering import Steps

N, D, G = 150, 4, 17


@pytest.fixture
def setting():
    """Cells in three groups, a nonlinear model of two modalities, and four interventions on two features."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(N + 30, D)).astype(np.float32)
    cells = np.sort(rng.permutation(N + 30)[:N])
    codes = rng.integers(3, size=N)
    loadings = rng.normal(size=(D, G))

    def decode(rows, some, step):
        moved = some if step is None else some + step
        assert np.array_equal(some, z[rows])
        x = np.log1p(np.exp(moved @ loadings)) + 0.1 * np.sin(rows)[:, None]
        return [x[:, :10].astype(np.float32), x[:, 10:]]

    activation = np.maximum(rng.normal(size=(2, N)), 0).astype(np.float32)
    directions = rng.normal(size=(2, D))
    steps = [
        Steps(directions[f], activation[f], intervention, 1.3, dose)
        for f in range(2)
        for intervention, dose in (("set", 1.0), ("ablate", 1.0))
    ]
    return z, cells, codes, steps, decode


def plain(setting, number):
    """Expression before and after, (n, genes), decoded all at once."""
    z, cells, _, steps, decode = setting
    before = np.hstack(decode(cells, z[cells], None))
    return before, np.hstack(decode(cells, z[cells], steps[number].of(slice(None))))


@pytest.mark.parametrize("chunk_values", [8_000_000, 40 * G], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("sum_bytes", [256_000_000, 1], ids=["together", "one by one"])
def test_changes_are_those_of_a_loop(setting, monkeypatch, chunk_values, sum_bytes):
    monkeypatch.setattr("sae.core.steering.CHUNK_VALUES", chunk_values)
    monkeypatch.setattr(changes_module, "SUM_BYTES", sum_bytes)
    z, cells, codes, steps, decode = setting
    done = []
    found = list(summed_changes(z, cells, codes, steps, decode, [10, 7], on_chunk=done.append))
    assert len(found) == len(steps)
    assert sum(done) == len(steps) * (1 if chunk_values > 1000 else -(-N // 40))
    for number, parts in enumerate(found):
        before, after = plain(setting, number)
        for group in range(3):
            inside = codes == group
            difference = (after - before)[inside]
            one = [np.concatenate([getattr(part, name)[group] for part in parts]) for name in ("total", "before")]
            np.testing.assert_allclose(one[0], difference.sum(axis=0), atol=1e-4)
            np.testing.assert_allclose(one[1], before[inside].sum(axis=0), rtol=1e-6)
            squares = np.concatenate([part.squares[group] for part in parts])
            np.testing.assert_allclose(squares, (difference**2).sum(axis=0), rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(parts[0].n, np.bincount(codes))


def test_unmoved_cells_are_not_decoded(setting):
    z, cells, codes, steps, decode = setting
    asked = []

    def watched(rows, some, step):
        if step is not None:
            asked.append(len(rows))
        return decode(rows, some, step)

    list(summed_changes(z, cells, codes, steps[1:2], watched, [10, 7]))
    assert asked == [np.count_nonzero(steps[1].activation)]


@given(st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_paired_test_against_scipy(n, seed):
    rng = np.random.default_rng(seed)
    before, after = rng.gamma(1, size=(n, 5)), rng.gamma(2, size=(n, 5))
    after[:, 4] = before[:, 4]
    difference = after - before
    sums = Changes(
        np.array([n]), before.sum(axis=0)[None], difference.sum(axis=0)[None], (difference**2).sum(axis=0)[None]
    )
    found = paired_test(sums, log_base=None, pseudocount=0.1)
    expected = stats.ttest_rel(after[:, :4], before[:, :4])
    np.testing.assert_allclose(found.score[0, :4], expected.statistic, rtol=1e-6)
    np.testing.assert_allclose(found.pval[0, :4], expected.pvalue, rtol=1e-6)
    np.testing.assert_allclose(found.padj[0, :4], stats.false_discovery_control(expected.pvalue), rtol=1e-6)
    np.testing.assert_allclose(found.change[0], difference.mean(axis=0))
    ratio = (after.mean(axis=0) + 0.1) / (before.mean(axis=0) + 0.1)
    np.testing.assert_allclose(found.log2fc[0], np.log2(ratio), atol=1e-9)
    assert np.isnan(found.score[0, 4]) and np.isnan(found.pval[0, 4]) and np.isnan(found.padj[0, 4])


def one_gene(n, before, after, **units):
    difference = np.asarray(after) - before
    sums = [np.array([[np.sum(values)]]) for values in (before, difference, difference**2)]
    found = paired_test(Changes(np.array([n]), *sums), **{"log_base": None, "pseudocount": 0.1, **units})
    return {name: float(getattr(found, name)[0, 0]) for name in ("change", "log2fc", "score", "pval")}


def test_equal_changes_are_certain():
    found = one_gene(3, np.array([1.0, 2.0, 3.0]), np.array([1.1, 2.1, 3.1]))
    assert found["score"] == np.inf and found["pval"] == 0


def test_changes_that_cancel_are_no_change():
    found = one_gene(2, np.array([1.0, 2.0]), np.array([2.0, 1.0]))
    assert found["change"] == 0 and found["score"] == 0 and found["pval"] == 1


def test_one_cell_has_no_p():
    found = one_gene(1, np.array([1.0]), np.array([2.0]))
    assert found["change"] == 1 and np.isnan(found["score"]) and np.isnan(found["pval"])


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ({"log_base": np.e}, np.log2((np.expm1(2.5) + 0.1) / (np.expm1(1.5) + 0.1))),
        ({"log_base": 2.0}, np.log2((2**2.5 - 1 + 0.1) / (2**1.5 - 1 + 0.1))),
        ({"log_base": None}, np.log2(2.6 / 1.6)),
        ({"log_base": None, "log": True}, 1 / np.log(2)),
        ({"log_base": np.nan}, np.nan),
    ],
    ids=["ln", "log2", "linear", "log", "scaled"],
)
def test_fold_changes(units, expected):
    found = one_gene(2, np.array([1.0, 2.0]), np.array([2.0, 3.0]), **units)
    np.testing.assert_allclose(found["log2fc"], expected)


def test_predictions_below_zero_count_as_zero():
    found = one_gene(2, np.array([-0.2, -0.1]), np.array([1.0, 2.0]), log_base=np.e)
    np.testing.assert_allclose(found["log2fc"], np.log2((np.expm1(1.5) + 0.1) / 0.1))


def test_genes_without_a_prediction_stay_without():
    found = one_gene(2, np.array([np.nan, np.nan]), np.array([np.nan, np.nan]))
    assert all(np.isnan(value) for value in found.values())


def test_group_means():
    rng = np.random.default_rng(0)
    z, codes = rng.normal(size=(40, 3)), rng.integers(2, size=25)
    cells = rng.permutation(40)[:25]
    found = group_means(z, cells, codes, 3)
    for group in range(2):
        np.testing.assert_allclose(found[group], z[cells[codes == group]].mean(axis=0))
    assert np.isnan(found[2]).all()
