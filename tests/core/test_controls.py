import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from sae.core.controls import (
    Measures,
    Sample,
    alike_in_activity,
    effect_size,
    exceeds,
    few_of_each,
    random_directions,
    set_auroc,
)
from sae.core.neighbours import Reference
from sae.core.steering import Steps


def test_features_of_similar_activity():
    pool = np.array([100, 0, 55, 10, 45, 50, 1000])
    cosine = np.array([0, 0, 0, 0, 0.2, 0.95, -1])
    assert alike_in_activity(50, pool, cosine, 2).tolist() == [2, 4]
    assert alike_in_activity(50, pool, cosine, 99).tolist() == [0, 2, 3, 4, 6]
    assert alike_in_activity(50, pool, cosine, 0).tolist() == []
    assert alike_in_activity(0, pool, cosine, 1).tolist() == [3]
    # By ratio: 75 is nearer to 40 than 10 is, though it is farther away.
    assert alike_in_activity(40, np.array([10, 75]), np.zeros(2), 1).tolist() == [1]


def test_directions_are_uniform():
    found = random_directions(4000, 3, np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    # A coordinate of a uniform point on the sphere in three dimensions is uniform.
    assert stats.kstest(found[:, 0], stats.uniform(-1, 2).cdf).pvalue > 0.01


@pytest.mark.parametrize("seed", range(3))
def test_auroc_of_a_set(seed):
    rng = np.random.default_rng(seed)
    change, members = np.round(rng.normal(size=50), 1), rng.random(50) < 0.2
    np.testing.assert_allclose(set_auroc(change, members), roc_auc_score(members, change))
    with_gaps = np.where(np.arange(50) % 7 == 0, np.nan, change)
    known = np.isfinite(with_gaps)
    np.testing.assert_allclose(set_auroc(with_gaps, members), roc_auc_score(members[known], change[known]))


def test_a_set_needs_genes_on_both_sides():
    assert np.isnan(set_auroc(np.arange(4.0), np.ones(4, bool)))
    assert np.isnan(set_auroc(np.arange(4.0), np.zeros(4, bool)))


def test_effect_size():
    assert effect_size([np.array([3.0, np.nan]), np.array([4.0])]) == pytest.approx(np.sqrt(12.5))


def test_few_cells_of_each_group():
    codes = np.repeat([0, 1, 2], [5, 100, 30])
    found = few_of_each(codes, 20, np.random.default_rng(0))
    assert np.bincount(codes[found]).tolist() == [5, 20, 20]
    assert (np.diff(found) > 0).all()
    drawn = [few_of_each(codes, 20, np.random.default_rng(seed)) for seed in range(300)]
    shares = np.bincount(np.concatenate(drawn), minlength=135)[5:105] / 300
    np.testing.assert_allclose(shares, 0.2, atol=0.1)


def test_measures_of_a_step():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(40, 3)).astype(np.float32)
    codes = (z[:, 0] > 0).astype(int)
    reference = Reference(z, codes, 2, 3)
    at = np.arange(0, 20, 2)
    sample = Sample(at, at + 1, z[at + 1], at + 1, reference.place(z[at + 1], at + 1))
    loadings = rng.normal(size=(3, 8))

    def decode(rows, some, step):
        return [some @ loadings if step is None else (some + step) @ loadings]

    sets = np.arange(8) < np.array([[2], [3]])
    measures = Measures(sample, reference, decode(sample.cells, sample.z, None), sets, 0, decode)
    # In the first half of the 20 cells the feature is off, so that an ablation leaves them.
    activation = np.where(np.arange(20) < 10, 0, 2).astype(np.float32)
    step = Steps(np.array([1.0, 0, -0.5]), activation, "ablate", np.nan, 1.0)
    found = measures.of_steps([step, step.along(np.array([0.0, 1.0, 0.0]))])
    alone = measures.of_steps([step.along(np.array([0.0, 1.0, 0.0]))])
    np.testing.assert_allclose(found[1], alone[0])
    found = found[0]

    change = np.where(at < 10, 0, -2)[:, None] * step.direction
    mean = (change @ loadings).mean(axis=0)
    after = reference.place(z[at + 1] + change, at + 1)
    np.testing.assert_allclose(found[0], np.sqrt((mean**2).mean()), rtol=1e-5)
    np.testing.assert_allclose(found[1], after.distance.mean(), rtol=1e-5)
    np.testing.assert_allclose(found[2:4], (after.shares - sample.before.shares).mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found[4:], [roc_auc_score(members, mean) for members in sets])

    nothing = measures.of_steps([Steps(step.direction, activation, "scale", np.nan, 1.0)])[0]
    assert nothing[0] == 0 and nothing[2:4].tolist() == [0, 0] and nothing[4:].tolist() == [0.5, 0.5]
    few = sample.select(np.array([1, 3]))
    assert few.cells.tolist() == [3, 7] and len(few.before.distance) == 2


def test_share_that_is_exceeded():
    others = np.array([[1.0, 2.0, 0.0, np.nan], [3.0, 2.0 + 1e-9, -1.0, 1.0]])
    np.testing.assert_array_equal(exceeds(np.array([2.0, 2.0 + 2e-9, 0.0, 1.0]), others), [0.5, 0, 0.5, np.nan])
