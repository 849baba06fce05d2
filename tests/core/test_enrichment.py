from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from sae.core.enrichment import over_representation

N_GENES = 40


def draw(n, share, *, seed):
    """Random membership (n, genes)."""
    return np.random.default_rng(seed).random((n, N_GENES)) < share


def enriched(study, sets):
    return over_representation(study, sparse.csr_matrix(sets.astype(np.float64)))


def each_table(study, sets):
    """Yield feature, set and their 2 × 2 table."""
    for feature, chosen in enumerate(study):
        for place, members in enumerate(sets):
            counts = [[(chosen == one) & (members == other) for other in (True, False)] for one in (True, False)]
            yield feature, place, np.sum(counts, axis=-1)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_p_value_is_that_of_fishers_exact_test(share):
    study, sets = draw(6, share, seed=0), draw(8, 0.25, seed=1)
    found = enriched(study, sets)
    for feature, place, table in each_table(study, sets):
        assert found.overlap[feature, place] == table[0, 0]
        expected = stats.fisher_exact(table, alternative="greater").pvalue
        np.testing.assert_allclose(found.pval[feature, place], expected, rtol=1e-10)


def test_score_is_the_log_odds_ratio_with_a_half_added_to_each_count():
    study, sets = draw(6, 0.3, seed=0), draw(8, 0.25, seed=1)
    found = enriched(study, sets)
    for feature, place, table in each_table(study, sets):
        (a, b), (c, d) = table + 0.5
        np.testing.assert_allclose(found.log2_odds[feature, place], np.log2(a * d / (b * c)), rtol=1e-12)


def test_p_values_are_adjusted_over_the_sets_of_a_feature():
    found = enriched(draw(6, 0.3, seed=0), draw(8, 0.25, seed=1))
    np.testing.assert_allclose(found.padj, stats.false_discovery_control(found.pval, axis=1), rtol=1e-12)


def test_exact_overlap_is_as_unlikely_as_one_draw_in_all():
    chosen = np.arange(N_GENES)[None] < 5
    found = enriched(chosen, chosen)
    np.testing.assert_allclose(found.pval, stats.hypergeom.pmf(5, N_GENES, 5, 5), rtol=1e-12)
    assert found.log2_odds > 5


@pytest.mark.parametrize(
    ("study", "sets"),
    [
        pytest.param(np.zeros((1, N_GENES), dtype=bool), draw(3, 0.3, seed=2), id="empty study set"),
        pytest.param(np.ones((1, N_GENES), dtype=bool), draw(3, 0.3, seed=2), id="study set of all genes"),
        pytest.param(draw(1, 0.3, seed=2), np.ones((3, N_GENES), dtype=bool), id="gene set of all genes"),
        pytest.param(draw(1, 0.3, seed=2), ~draw(1, 0.3, seed=2), id="nothing in common"),
    ],
)
def test_what_could_not_be_otherwise_is_no_evidence(study, sets):
    found = enriched(study, sets)
    np.testing.assert_allclose(found.pval, 1, rtol=1e-12)
    np.testing.assert_allclose(found.padj, 1, rtol=1e-12)
    np.testing.assert_array_equal(found.overlap, (study.astype(int) @ sets.T.astype(int)))
    assert np.isfinite(found.log2_odds).all()
