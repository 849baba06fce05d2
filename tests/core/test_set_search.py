from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from sae.core import set_search as module
from sae.core.groups import active_groups
from sae.core.moments import scan
from sae.core.null import matched_sets
from sae.core.set_methods import StandingOut
from sae.core.set_search import Method, list_hits, search

N_CELLS, N_GENES, N_FEATURES, N_SETS = 120, 60, 6, 25


def data(*, seed=0):
    """Activations and expression with 20 genes for each feature but the last two."""
    rng = np.random.default_rng(seed)
    a = np.where(rng.random((N_CELLS, N_FEATURES)) < 0.3, rng.uniform(0.5, 1, (N_CELLS, N_FEATURES)), 0)
    x = rng.exponential(size=(N_CELLS, N_GENES))
    for feature in range(N_FEATURES - 2):
        x[:, 10 * feature : 10 * feature + 20] += 1.5 * (a[:, [feature]] > 0)
    members = rng.random((N_SETS, N_GENES)) < 0.2
    members[0] = np.arange(N_GENES) < 12
    return sparse.csr_matrix(a), x, sparse.csr_matrix(members.astype(np.float64))


def method(name="ora", **settings):
    given = {
        "directions": ("up", "down"),
        "log_base": None,
        "pseudocount": 0.1,
        "min_cells": 3,
        "min_expected": 0,
        "seed": 0,
    }
    return Method(name, StandingOut(0.05, 0.2), **given | settings)


def found(collections, *, how=None, n_stored=None):
    a, x, _ = data()
    return list(
        search(
            active_groups(a), x, scan(x), np.ones(N_GENES, dtype=bool), collections, how or method(), n_stored=n_stored
        )
    )


def joined(parts):
    return {name: np.concatenate([part.rows[name] for part in parts]) for name in parts[0].rows}


@pytest.mark.parametrize("name", ["ora", "mannwhitney", "scfeaturelens"])
def test_blocks_of_features_give_the_same_as_all_at_once(name, monkeypatch):
    sets = data()[2]
    collections = [sets, *matched_sets(sets, np.ones(N_GENES), 3, n_bins=1)]
    whole = found(collections, how=method(name))
    monkeypatch.setattr(module, "BLOCK_VALUES", 2 * sets.shape[0] * 4)
    parts = found(collections, how=method(name))
    assert (len(whole), len(parts)) == (1, 3)
    order, other = (
        np.lexsort((rows["gene_set"], rows["direction"], rows["feature"])) for rows in (joined(whole), joined(parts))
    )
    for column in ("feature", "gene_set", "direction", "overlap", "size", "score", "pval", "padj", "fdr"):
        np.testing.assert_array_equal(joined(whole)[column][order], joined(parts)[column][other], err_msg=column)
    assert sum(part.n_tests for part in parts) == whole[0].n_tests
    np.testing.assert_array_equal(sum(part.annotated for part in parts), whole[0].annotated)


def test_random_collections_are_counted_apart_from_the_real_one():
    sets = data()[2]
    alone, same = found([sets])[0], found([sets, sets])[0]
    np.testing.assert_array_equal(same.annotated, np.repeat(alone.annotated, 2))
    assert same.n_tests == alone.n_tests == 2 * N_FEATURES * N_SETS
    np.testing.assert_array_equal(same.log_pval, alone.log_pval)
    assert "fdr" not in alone.rows
    assert (same.rows["fdr"] == 1).all(), "as many of the same p-values by chance"


def test_rate_of_a_row_is_that_of_the_formula_over_the_sets_of_its_feature():
    sets, n_random = data()[2], 40
    drawn = list(matched_sets(sets, np.ones(N_GENES), n_random, n_bins=1))
    rows = found([sets, *drawn])[0].rows
    null = [found([collection])[0].rows for collection in drawn]
    assert len(rows["fdr"]) > 20
    for feature in range(N_FEATURES):
        mine = rows["log_pval"][rows["feature"] == feature]
        chance = np.concatenate([other["log_pval"][other["feature"] == feature] for other in null])
        rate = {p: (1 + (chance <= p).sum()) / n_random / (mine <= p).sum() for p in mine}
        expected = [min(1, *(rate[q] for q in mine if q >= p)) for p in mine]
        np.testing.assert_allclose(rows["fdr"][rows["feature"] == feature], expected, rtol=1e-9)
    assert rows["fdr"].min() < 0.2


def test_adjusted_over_the_sets_of_a_feature_in_each_direction():
    rows = found([data()[2]])[0].rows
    for feature, direction in {*zip(rows["feature"].tolist(), rows["direction"].tolist(), strict=True)}:
        mine = (rows["feature"] == feature) & (rows["direction"] == direction)
        p = np.append(rows["pval"][mine], np.ones(N_SETS - mine.sum()))
        np.testing.assert_allclose(rows["padj"][mine], stats.false_discovery_control(p)[: mine.sum()], rtol=1e-9)


def test_only_the_best_sets_are_stored_best_first():
    every, best = (found([data()[2]], n_stored=n)[0].rows for n in (None, 2))
    for feature, direction in {*zip(every["feature"].tolist(), every["direction"].tolist(), strict=True)}:
        all_p, p = (
            rows["pval"][(rows["feature"] == feature) & (rows["direction"] == direction)] for rows in (every, best)
        )
        assert (np.diff(all_p) >= 0).all()
        np.testing.assert_array_equal(p, all_p[:2])
    assert found([data()[2]], n_stored=0)[0].rows == {}


def test_hits_are_the_genes_of_the_set_that_stand_out_strongest_first():
    rng = np.random.default_rng(0)
    study, strength = rng.random((3, N_GENES)) < 0.4, rng.integers(0, 5, (3, N_GENES)).astype(float)
    sets, rows = data()[2], [(0, 3), (2, 3), (1, 0), (0, 7)]
    expected = []
    for f, s in rows:
        genes = [gene for gene in sets[s].indices if study[f, gene]]
        expected += sorted(genes, key=lambda gene, f=f: -strength[f, gene])
    hits = np.empty(len(expected), np.int64)
    list_hits(*np.array(rows).T.copy(), sets.indptr, sets.indices, study, strength, hits)
    np.testing.assert_array_equal(hits, expected)
