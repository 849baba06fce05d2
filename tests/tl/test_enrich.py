from __future__ import annotations

import anndata as ad
import decoupler as dc
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

import sae

COLUMNS = {
    "feature": "category",
    "collection": "category",
    "gene_set": "category",
    "direction": "category",
    "overlap": "int64",
    "size": "int64",
    "score": "float64",
    "pval": "float64",
    "padj": "float64",
    "padj_all": "float64",
    "fdr": "float64",
    "genes": "category",
}
FEATURES = ["sae_0", "sae_9", "sae_31"]


@pytest.fixture
def ranked(encoded):
    """Encoded cells, and the statistics of all genes of all features through `tl.rank_genes`."""
    other = encoded.copy()
    sae.tl.rank_genes(other, min_expected=0, n_genes=None)
    return encoded, other.uns["sae"]["genes"]


def standing_out(genes, feature, direction, max_padj=0.05, min_log2fc=0.5):
    part = genes[(genes["feature"] == feature) & (genes["padj"] <= max_padj)]
    sign = 1 if direction == "up" else -1
    part = part[sign * part["log2fc"] >= min_log2fc]
    return part.assign(strength=part["score"].abs()).sort_values("strength", ascending=False, kind="stable")["gene"]


def measured_sets(net, adata, min_size, max_size=np.inf):
    pairs = net[net["target"].isin(adata.var_names)].drop_duplicates(["source", "target"])
    sets = pairs.groupby("source")["target"].agg(set)
    return {name: members for name, members in sets.items() if min_size <= len(members) <= max_size}


def test_writes_the_table_and_nothing_else(encoded, net, compare):
    before = compare.state(encoded)
    given = net.copy()
    assert sae.tl.enrich(encoded, net) is None
    pd.testing.assert_frame_equal(net, given)
    table = encoded.uns["sae"].pop("enrichment")
    null = encoded.uns["sae"].pop("enrichment_null")
    status = encoded.uns["sae"]["features"].pop("enrichment_status")
    assert set(status) == {"tested"}
    compare.assert_same(before, compare.state(encoded))
    assert table.dtypes.astype(str).to_dict() == COLUMNS
    assert list(table) == list(COLUMNS)
    assert table.index.tolist() == [str(i) for i in range(len(table))]
    assert table["collection"].unique().tolist() == ["gene_sets"]
    shares = ["annotated", "annotated_fdr", "annotated_permuted", "annotated_random_sets"]
    assert null.columns.tolist() == ["collection", "method", "max_padj", *shares]
    assert null["collection"].tolist() == ["gene_sets"]
    assert not table.duplicated(["feature", "gene_set", "direction"]).any()


def test_fdr_is_that_of_permuted_cells(encoded, net):
    """Where every cell is its own batch nothing moves, so that the null is the data; else little is left of it."""
    encoded.obs["cell"] = encoded.obs_names
    for batch in ("cell", None):
        sae.tl.enrich(encoded, net, batch=batch, collection=str(batch), n_sets=None)
    summary = encoded.uns["sae"]["enrichment_null"].set_index("collection")
    same, permuted = summary.loc["cell"], summary.loc["None"]
    assert same["annotated"] == same["annotated_permuted"] == permuted["annotated"] > 0.5
    assert permuted["annotated"] > 3 * permuted["annotated_permuted"]
    for collection, row in (("cell", same), ("None", permuted)):
        table = sae.get.enrichment(encoded, collection=collection)
        assert row["annotated"] == table.loc[table["padj"] <= 0.05, "feature"].nunique() / 32
        assert row["annotated_fdr"] == table.loc[table["fdr"] <= 0.05, "feature"].nunique() / 32
    assert same["annotated_fdr"] == 0
    for _, found in sae.get.enrichment(encoded, collection="None").groupby("feature", observed=True):
        assert found.sort_values("pval")["fdr"].is_monotonic_increasing


def test_features_without_a_meaning_have_none_by_fdr(encoded, net):
    """Activations that were exchanged between cells before everything are as good as their null."""
    from sae.core.null import permuted_cells

    shares = []
    for seed in range(5):
        encoded.obsm["sae"] = permuted_cells(encoded.obsm["sae"], rng=seed)
        sae.tl.enrich(encoded, net, method="mannwhitney", rng=seed)
        shares.append(encoded.uns["sae"]["enrichment_null"]["annotated_fdr"].iloc[0])
    assert np.mean(shares) <= 0.05


def test_adjusted_over_everything(encoded, net):
    for method in ("mannwhitney", "ora"):
        sae.tl.enrich(encoded, net, min_expected=0, method=method, n_sets=None)
        table = encoded.uns["sae"]["enrichment"]
        n_sets, n_features = (
            len(measured_sets(net, encoded, 5)),
            (encoded.uns["sae"]["features"]["enrichment_status"] == "tested").sum(),
        )
        n_tests = n_sets * n_features * (2 if method == "ora" else 1)
        p = np.append(table["pval"], np.ones(n_tests - len(table)))
        np.testing.assert_allclose(table["padj_all"], stats.false_discovery_control(p)[: len(table)], rtol=1e-9)


def test_random_sets_are_found_less_often_than_real_ones(encoded, net):
    sae.tl.enrich(encoded, net, n_null=5)
    summary = encoded.uns["sae"]["enrichment_null"].iloc[0]
    assert 0 < summary["annotated_random_sets"] < summary["annotated"]


def test_what_random_sets_give_as_well_is_not_found(encoded):
    """Sets drawn at random, for features with many genes that stand out."""
    rng = np.random.default_rng(0)
    sets = {f"random {i}": rng.choice(encoded.var_names, 20, replace=False).tolist() for i in range(200)}
    sae.tl.enrich(encoded, sets)
    summary = encoded.uns["sae"]["enrichment_null"].iloc[0]
    assert summary["annotated_permuted"] < summary["annotated_random_sets"]
    assert summary["annotated_fdr"] <= 0.05
    assert (sae.get.enrichment(encoded)["overlap"] > 3).any()


def test_genes_outside_of_the_background_do_not_exist(encoded, net):
    background = encoded.var_names[::2]
    part = encoded[:, background].copy()
    sae.tl.enrich(part, net, min_size=2, use_raw=False)
    sae.tl.enrich(encoded, net, min_size=2, use_raw=False, background=[*background, "no such gene"])
    pd.testing.assert_frame_equal(sae.get.enrichment(part), sae.get.enrichment(encoded))
    assert sae.get.enrichment(part)["size"].max() < 60


def test_both_directions_at_once(ranked, net):
    adata, genes = ranked
    sae.tl.enrich(adata, net, min_expected=0, directions=["both"], n_sets=None)
    table = sae.get.enrichment(adata)
    assert table["direction"].unique().tolist() == ["both"]
    universe, sets = adata.n_vars, measured_sets(net, adata, 5)
    for feature in FEATURES:
        study = {*standing_out(genes, feature, "up"), *standing_out(genes, feature, "down")}
        for row in table[table["feature"] == feature].itertuples():
            members = sets[row.gene_set]
            hits = len(study & members)
            assert row.overlap == hits == len(row.genes.split(";"))
            assert row.pval == pytest.approx(stats.hypergeom.sf(hits - 1, universe, len(members), len(study)), rel=1e-9)


def test_gsea_is_that_of_decoupler(ranked, net):
    adata, genes = ranked
    few = sae.get.features(adata)["n_cells"].nlargest(6).index
    adata.obsm["sae"] = adata.obsm["sae"].multiply(np.isin(adata.uns["sae"]["features"].index, few)).tocsr()
    sae.tl.enrich(adata, net, min_expected=0, method="gsea", n_sets=None, n_null=0)
    found = sae.get.enrichment(adata)
    t = genes[genes["feature"].isin(few)].pivot(index="feature", columns="gene", values="score").dropna()
    t = t.set_axis(t.columns.astype(str), axis=1).set_axis(t.index.astype(str))
    pairs = net[["source", "target"]].drop_duplicates().assign(weight=1.0)
    scores, _ = dc.mt.gsea(t, pairs, tmin=5, times=1000)
    for row in found.itertuples():
        assert row.score == pytest.approx(scores.loc[row.feature, row.gene_set], rel=0.2, abs=0.1)
        assert row.direction == ("up" if row.score > 0 else "down")
    assert found["pval"].between(1 / 1001, 1).all()
    assert found["pval"].nunique() > 20


def test_aucell_is_the_area_under_the_recovery_curve(ranked, net):
    adata, genes = ranked
    sae.tl.enrich(adata, net, min_expected=0, method="aucell", n_sets=None)
    found = sae.get.enrichment(adata)
    sets, n_up = measured_sets(net, adata, 5), int(np.ceil(0.05 * adata.n_vars))
    t = genes.pivot(index="feature", columns="gene", values="score")
    for direction, sign in (("up", -1), ("down", 1)):
        for feature in FEATURES:
            ranks = pd.Series(stats.rankdata(sign * t.loc[feature], method="ordinal"), index=t.columns)
            rows = found[(found["feature"] == feature) & (found["direction"] == direction)].set_index("gene_set")
            for name, members in sets.items():
                recovered = [sum(ranks[list(members)] <= r) for r in range(1, n_up)]
                best = [min(len(members), r) for r in range(1, n_up)]
                area = sum(recovered) / sum(best)
                assert (area > 0) == (name in rows.index)
                if area > 0:
                    assert rows.loc[name, "score"] == pytest.approx(area, rel=1e-9)
    assert ((found["pval"] < 0.5) == (found["pval"] < 0.5)).all()


def test_published_procedure(encoded, net):
    """From the percentile to the stored sets; the procedure itself is tested where it is."""
    from sae.core.groups import percentile_groups
    from sae.core.moments import group_moments, scan
    from sae.core.scfeaturelens import concepts

    sae.tl.enrich(encoded, net, min_expected=0, method="scfeaturelens", n_sets=None)
    table = sae.get.enrichment(encoded)
    assert table["direction"].unique().tolist() == ["both"]
    assert (table["pval"] < 0.05).all()
    x, sets = encoded.X, measured_sets(net, encoded, 5)
    genes = scan(x)
    members = np.array([encoded.var_names.isin(some) for some in sets.values()])[:, genes.varies]
    groups = percentile_groups(encoded.obsm["sae"], 99)
    features = np.flatnonzero((groups.n_positive >= 3) & (groups.n_reference >= 3))
    (block,) = group_moments(groups, features, x, genes, block=len(features))
    positive, reference = block.moments()
    found = concepts(
        positive.of_genes(genes.varies), reference.of_genes(genes.varies), sparse.csr_matrix(members.astype(float))
    )
    expected = {(f"sae_{features[f]}", [*sets][s]) for f, s in zip(*np.nonzero(found.kept), strict=True)}
    assert {*zip(table["feature"], table["gene_set"], strict=True)} == expected
    summary = encoded.uns["sae"]["enrichment_null"].iloc[0]
    assert summary["annotated"] == table["feature"].nunique() / 32


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"n_null": -1}, ValueError, "n_null=-1 is not a number of permutations"),
        ({"directions": []}, ValueError, "directions=\\[\\] is not a list of some of 'up', 'down', 'both'"),
        ({"directions": ["up", "up"]}, ValueError, "is not a list of some of"),
        ({"directions": ["left"]}, ValueError, "directions=\\['left'\\] is not a list of some of"),
        ({"directions": ["up"], "method": "ulm"}, ValueError, "is for method='ora'; 'ulm' has its own"),
        ({"background": ["ENSG1"]}, ValueError, "background= has no gene of adata"),
        ({"background": ["CD79A"]}, ValueError, "1 genes of adata.X vary over the cells and are in background="),
        ({"background": "CD19"}, TypeError, "background is the string 'CD19'; expected a list"),
        ({"batch": "run"}, KeyError, "adata.obs has no column 'run'; it has"),
    ],
)
def test_bad_settings(encoded, net, compare, how, error, message):
    before = compare.state(encoded)
    with pytest.raises(error, match=message):
        sae.tl.enrich(encoded, net, **how)
    compare.assert_same(before, compare.state(encoded))


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_padj": 0.01, "min_log2fc": 1.0, "min_size": 3, "max_size": 12}],
    ids=["defaults", "stricter"],
)
def test_ora_is_fishers_exact_test(ranked, net, settings):
    adata, genes = ranked
    sae.tl.enrich(adata, net, min_expected=0, n_sets=None, **settings)
    table = adata.uns["sae"]["enrichment"]
    limits = {"min_size": 5, "max_size": 500, "max_padj": 0.05, "min_log2fc": 0.5} | settings
    sets = measured_sets(net, adata, limits["min_size"], limits["max_size"])
    universe = set(adata.var_names)
    directions = set()
    for feature in FEATURES:
        for direction in ("up", "down"):
            listed = list(standing_out(genes, feature, direction, limits["max_padj"], limits["min_log2fc"]))
            study = set(listed)
            rows = []
            for name, members in sets.items():
                counts = [
                    [len(study & members), len(study - members)],
                    [len(members - study), len(universe - study - members)],
                ]
                pval = stats.fisher_exact(counts, alternative="greater").pvalue
                (a, b), (c, d) = np.array(counts) + 0.5
                hits = ";".join(gene for gene in listed if gene in members)
                rows.append((name, counts[0][0], len(members), np.log2(a * d / (b * c)), pval, hits))
            oracle = pd.DataFrame(rows, columns=["gene_set", "overlap", "size", "score", "pval", "genes"])
            oracle["padj"] = stats.false_discovery_control(oracle["pval"])
            oracle = oracle[oracle["overlap"] > 0].set_index("gene_set").sort_index()
            found = table[(table["feature"] == feature) & (table["direction"] == direction)]
            assert found["pval"].is_monotonic_increasing, "best first"
            found = found.set_index(found["gene_set"].astype(str)).sort_index()
            assert found.index.tolist() == oracle.index.tolist()
            for name in ("overlap", "size", "score", "pval", "padj"):
                np.testing.assert_allclose(found[name], oracle[name], rtol=1e-9, err_msg=name)
            assert found["genes"].tolist() == oracle["genes"].tolist()
            directions |= set(found["direction"])
    assert directions == {"up", "down"}


@pytest.mark.parametrize("weighted", [False, True])
def test_ulm_is_the_slope_of_a_regression(ranked, net, weighted):
    adata, genes = ranked
    rng = np.random.default_rng(0)
    net = net.drop_duplicates(["source", "target"])
    if weighted:
        net = net.assign(weight=rng.normal(size=len(net)))
    sae.tl.enrich(adata, net, min_expected=0, method="ulm", n_sets=None)
    table = adata.uns["sae"]["enrichment"]
    assert table.dtypes.astype(str).to_dict() == COLUMNS
    sets = measured_sets(net, adata, 5)
    t = genes.pivot(index="gene", columns="feature", values="score")
    for feature in FEATURES:
        found = table[table["feature"] == feature].set_index("gene_set")
        assert sorted(found.index) == sorted(sets)
        pvals = {}
        for name in sets:
            weight = net[net["source"] == name].set_index("target").get("weight", pd.Series(dtype=float))
            member = t.index.isin(sets[name]).astype(float)
            x = weight.reindex(t.index).fillna(0).to_numpy() if weighted else member
            line = stats.linregress(x, t[feature])
            assert found.loc[name, "score"] == pytest.approx(line.slope / line.stderr, rel=1e-4)
            assert found.loc[name, "pval"] == pytest.approx(line.pvalue, rel=1e-3, abs=1e-300)
            pvals[name] = found.loc[name, "pval"]
            direction = "up" if line.slope > 0 else "down"
            assert found.loc[name, "direction"] == direction
            hits = [gene for gene in standing_out(genes, feature, direction) if gene in sets[name]]
            assert found.loc[name, "genes"] == ";".join(hits)
            assert found.loc[name, "overlap"] == len(hits)
            assert found.loc[name, "size"] == len(sets[name])
        adjusted = stats.false_discovery_control(list(pvals.values()))
        np.testing.assert_allclose(found.loc[list(pvals), "padj"], adjusted, rtol=1e-9)


def test_mannwhitney_agrees_with_scipy(ranked, net):
    adata, genes = ranked
    sae.tl.enrich(adata, net, min_expected=0, method="mannwhitney", n_sets=None)
    table = adata.uns["sae"]["enrichment"]
    assert table.dtypes.astype(str).to_dict() == COLUMNS
    sets = measured_sets(net, adata, 5)
    t = genes.pivot(index="gene", columns="feature", values="score")
    for feature in FEATURES:
        found = table[table["feature"] == feature].set_index("gene_set")
        assert sorted(found.index) == sorted(sets)
        for name, members in sets.items():
            inside = t.index.isin(members)
            test = stats.mannwhitneyu(t[feature][inside], t[feature][~inside], method="asymptotic")
            assert found.loc[name, "pval"] == pytest.approx(test.pvalue, rel=1e-6)
            higher = test.statistic > inside.sum() * (~inside).sum() / 2
            assert found.loc[name, "direction"] == ("up" if higher else "down")
            assert (found.loc[name, "score"] > 0) == higher


def test_ulm_agrees_with_decoupler(ranked, net):
    adata, genes = ranked
    sae.tl.enrich(adata, net, min_expected=0, method="ulm", n_sets=None)
    found = adata.uns["sae"]["enrichment"].pivot(index="feature", columns="gene_set", values="score")
    t = genes.pivot(index="feature", columns="gene", values="score")
    t.columns = t.columns.astype(str)
    pairs = net[["source", "target"]].drop_duplicates()
    scores, _ = dc.mt.ulm(t.set_axis(t.index.astype(str)), pairs.assign(weight=1.0), tmin=5)
    assert sorted(scores.columns) == sorted(found.columns)
    np.testing.assert_allclose(found.loc[scores.index, scores.columns], scores, rtol=1e-4)


def test_infinite_t_does_not_break_ulm(make_adata):
    """A gene that is on in all active and off in all inactive cells has an infinite t."""
    adata = make_adata(g=30)
    sae.tl.fit(adata, n_features=8, steps=30)
    sae.tl.encode(adata)
    n_active = adata.obsm["sae"].getnnz(axis=0)
    feature = int(np.flatnonzero((n_active > 5) & (n_active < 75))[0])
    adata.X[:, 0] = adata.obsm["sae"][:, [feature]].toarray().ravel() > 0
    sae.tl.enrich(adata, {"set": [f"g{i}" for i in range(6)], "rest": [f"g{i}" for i in range(6, 20)]}, method="ulm")
    table = sae.get.enrichment(adata, feature)
    assert np.isfinite(table[["score", "pval", "padj"]]).all(axis=None)
    assert len(table) == 2


def test_only_the_best_sets_are_stored(encoded, net):
    sae.tl.enrich(encoded, net, n_sets=None, collection="all")
    sae.tl.enrich(encoded, net, n_sets=2, collection="best")
    every, best = (sae.get.enrichment(encoded, collection=name) for name in ("all", "best"))
    sizes = best.groupby(["feature", "direction"], observed=True).size()
    assert sizes.max() == 2
    for (feature, direction), part in best.groupby(["feature", "direction"], observed=True):
        whole = every[(every["feature"] == feature) & (every["direction"] == direction)]
        np.testing.assert_array_equal(part["padj"].sort_values(), np.sort(whole["padj"])[: len(part)])


def test_known_biology(encoded, net):
    sae.tl.score_labels(encoded, "bulk_labels")
    sae.tl.enrich(encoded, net)
    feature = sae.get.labels(encoded, label="CD19+ B")["feature"].iloc[0]
    best = sae.get.enrichment(encoded, feature, direction="up").iloc[0]
    assert "B" in best["gene_set"].split()[0] and best["padj"] < 1e-3
    assert "CD79A" in best["genes"].split(";")


def test_collections_replace_only_their_own_rows(encoded, net):
    small = {"t": ["CD3D", "CD3E", "IL7R", "CCR7", "CD27"], "b": ["CD79A", "CD79B", "MS4A1", "HLA-DRA", "TCL1A"]}
    sae.tl.enrich(encoded, net, collection="immune")
    first = encoded.uns["sae"]["enrichment"]
    sae.tl.enrich(encoded, small, collection="small", min_size=2)
    both = encoded.uns["sae"]["enrichment"]
    assert both["collection"].unique().tolist() == ["immune", "small"]
    assert both.dtypes.astype(str).to_dict() == COLUMNS
    assert both.index.tolist() == [str(i) for i in range(len(both))]
    kept = both[both["collection"] == "immune"].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, first.reset_index(drop=True), check_categorical=False)

    sae.tl.enrich(encoded, small, collection="immune", min_size=2)
    last = encoded.uns["sae"]["enrichment"]
    assert last.loc[last["collection"] == "immune", "gene_set"].isin(["t", "b"]).all()
    columns = ["feature", "gene_set", "direction", "overlap", "score", "pval", "padj", "genes"]
    a, b = (last[last["collection"] == name][columns].reset_index(drop=True) for name in ("immune", "small"))
    pd.testing.assert_frame_equal(a, b, check_categorical=False)


def test_runs_without_and_does_not_touch_rank_genes(encoded, net):
    sae.tl.enrich(encoded, net)
    assert "genes" not in encoded.uns["sae"]
    sae.tl.rank_genes(encoded)
    genes = encoded.uns["sae"]["genes"].copy()
    sae.tl.enrich(encoded, net)
    pd.testing.assert_frame_equal(genes, encoded.uns["sae"]["genes"])


def test_net_as_frame_dict_and_file(encoded, net, tmp_path):
    sets = net.drop_duplicates(["source", "target"]).groupby("source", sort=False)["target"].agg(list)
    path = tmp_path / "markers.gmt"
    path.write_text("".join("\t".join([name, "", *genes]) + "\n" for name, genes in sets.items()))
    tables = []
    for given, collection in (
        (net, "gene_sets"),
        (sets.to_dict(), "gene_sets"),
        (path, "markers"),
        (str(path), "markers"),
    ):
        sae.tl.enrich(encoded, given)
        tables.append(sae.get.enrichment(encoded, collection=collection).drop(columns="collection"))
    for table in tables[1:]:
        pd.testing.assert_frame_equal(tables[0], table)


def test_too_rare_features_are_left_out(encoded, net):
    n_cells = sae.get.features(encoded)["n_cells"]
    limit = int(n_cells.median())
    sae.tl.enrich(encoded, net, min_cells=limit)
    tested = set(encoded.uns["sae"]["enrichment"]["feature"])
    status = sae.get.features(encoded)["enrichment_status"]
    assert (status[n_cells < limit] == f"fewer than {limit} active cells").all()
    assert (status[list(tested)] == "tested").all()
    assert tested <= set(n_cells.index[(n_cells >= limit) & (700 - n_cells >= limit)])
    assert 0 < len(tested) < 32


@pytest.mark.parametrize("method", ["ora", "mannwhitney", "ulm", "gsea", "aucell", "scfeaturelens"])
def test_nothing_to_test_gives_an_empty_table(encoded, net, method):
    sae.tl.enrich(encoded, net, method=method, min_cells=10_000)
    table = encoded.uns["sae"]["enrichment"]
    assert table.empty
    assert table.dtypes.astype(str).to_dict() == COLUMNS
    assert sae.get.enrichment(encoded).empty
    sae.tl.enrich(encoded, net, collection="more")
    assert encoded.uns["sae"]["enrichment"].dtypes.astype(str).to_dict() == COLUMNS
    sae.tl.enrich(encoded, net, method=method, min_cells=10_000, collection="none")
    assert encoded.uns["sae"]["enrichment"].dtypes.astype(str).to_dict() == COLUMNS


def test_counts_are_logged(make_adata, log):
    adata = make_adata(layout="csr")
    adata.X = adata.X.rint()
    sae.tl.fit(adata, n_features=8, steps=30)
    sae.tl.encode(adata)
    sae.tl.enrich(adata, {"set": [f"g{i}" for i in range(8)]})
    assert "probably counts" in log()


@pytest.mark.parametrize(
    ("plain", "scaled"),
    [
        pytest.param({"min_log2fc": 0}, {"min_log2fc": 0}, id="ora"),
        pytest.param({"method": "mannwhitney", "min_log2fc": 0}, {"method": "mannwhitney"}, id="mannwhitney"),
        pytest.param({"method": "ulm", "min_log2fc": 0}, {"method": "ulm"}, id="ulm"),
    ],
)
def test_scaled_values_are_tested_by_their_t_alone(encoded, net, log, plain, scaled):
    x = encoded.X.toarray().astype(np.float64)
    encoded.layers["log"], encoded.layers["scaled"] = x, x - 1
    sae.tl.enrich(encoded, net, min_expected=0, n_sets=None, layer="log", **plain)
    expected = sae.get.enrichment(encoded)
    assert log() == ""
    sae.tl.enrich(encoded, net, min_expected=0, n_sets=None, layer="scaled", **scaled)
    assert log().count("WARNING") == 1
    assert "adata.layers['scaled'] looks scaled: it has negative values (down to -1" in log()
    assert expected["overlap"].sum() > 100
    pd.testing.assert_frame_equal(sae.get.enrichment(encoded), expected, rtol=1e-6)


def test_layer_and_raw(make_adata):
    adata = make_adata(g=30)
    sae.tl.fit(adata, n_features=8, steps=30)
    sae.tl.encode(adata)
    sets = {"early": [f"g{i}" for i in range(8)], "late": [f"g{i}" for i in range(22, 30)]}
    sae.tl.enrich(adata, sets, max_padj=1, min_log2fc=0, collection="X")
    adata.raw = adata.copy()
    adata.layers["log"] = adata.X.copy()
    adata.X = -adata.X
    sae.tl.enrich(adata, sets, max_padj=1, min_log2fc=0, collection="raw")
    sae.tl.enrich(adata, sets, max_padj=1, min_log2fc=0, collection="layer", layer="log")
    tables = [sae.get.enrichment(adata, collection=name).drop(columns="collection") for name in ("X", "raw", "layer")]
    assert len(tables[0]) > 0
    for table in tables[1:]:
        pd.testing.assert_frame_equal(tables[0], table)


def test_mudata(make_mudata):
    mdata = make_mudata()
    alone = mdata["rna"].copy()
    genes, proteins = {"g": [f"g{i}" for i in range(8)]}, {"p": [f"p{i}" for i in range(5)]}
    loose = {"max_padj": 1, "min_log2fc": 0, "min_size": 3}
    for data, where in ((mdata, {"mod": "rna"}), (alone, {})):
        sae.tl.fit(data, n_features=8, steps=30, **where)
        sae.tl.encode(data, **where)
        sae.tl.enrich(data, genes, **where, **loose)
    table = sae.get.enrichment(mdata, mod="rna")
    assert table.pop("modality").unique().tolist() == ["rna"]
    pd.testing.assert_frame_equal(table, sae.get.enrichment(alone))

    sae.tl.enrich(mdata, proteins, mod="rna", var_mod="adt", collection="proteins", **loose)
    table = sae.get.enrichment(mdata, mod="rna")
    assert table.groupby("collection", observed=True)["modality"].unique().map(list).to_dict() == {
        "gene_sets": ["rna"],
        "proteins": ["adt"],
    }
    # A table from before the modality was in a MuData has no such column.
    mixed = make_mudata()
    mixed.mod["rna"].uns["sae"], mixed.mod["rna"].obsm["sae"] = alone.uns["sae"], alone.obsm["sae"]
    sae.tl.enrich(mixed, proteins, mod="rna", var_mod="adt", collection="proteins", **loose)
    table = sae.get.enrichment(mixed, mod="rna")
    assert table.loc[table["collection"] == "gene_sets", "modality"].isna().all()
    assert (table.loc[table["collection"] == "proteins", "modality"] == "adt").all()


@pytest.mark.parametrize("direction", ["up", "both"])
def test_one_direction_may_be_a_string(encoded, net, direction):
    sae.tl.enrich(encoded, net, directions=direction)
    assert sae.get.enrichment(encoded)["direction"].unique().tolist() == [direction]


def test_gsea_of_a_set_of_all_genes(encoded):
    genes = encoded.var_names[:20].tolist()
    sae.tl.enrich(encoded, {"all": genes, "half": genes[:10]}, method="gsea", background=genes, n_null=0)
    assert set(sae.get.enrichment(encoded)["gene_set"]) == {"half"}


def test_that_nothing_was_tested_is_said(encoded, net, log):
    sae.tl.enrich(encoded, net, percentile=99)
    assert "no feature has 10 cells on both sides" in log()
    assert set(sae.get.features(encoded)["enrichment_status"]) == {"fewer than 10 cells above the percentile"}
    sae.tl.rank_genes(encoded, percentile=99)
    assert "no feature was tested" in log()


def test_genes_that_are_not_tested_are_not_at_the_top_for_aucell(encoded):
    """A set of genes too rare for most features."""
    rare = np.asarray((encoded.X > 0).sum(axis=0)).ravel().argsort()[:10]
    sae.tl.enrich(encoded, {"rare": encoded.var_names[rare].tolist()}, method="aucell", n_null=0)
    sae.tl.rank_genes(encoded, n_genes=None)
    assert sae.get.enrichment(encoded).empty


def test_cells_that_cannot_be_exchanged_are_spoken_of(encoded, net, log):
    encoded.obs["cell"] = encoded.obs_names
    sae.tl.enrich(encoded, net, batch="cell")
    assert "most cells have a batch (adata.obs['cell']) of their own" in log()


# ---- Peaks, or other variables that belong to genes


@pytest.fixture
def opened(make_adata):
    """80 cells with 90 peaks in `X`, 1 to 8 of each of 20 genes and 5 of none, and an SAE; and which are of which gene."""
    rng = np.random.default_rng(0)
    gene = np.repeat(np.arange(20), rng.integers(1, 8, size=20))
    adata = make_adata(g=len(gene) + 5)
    group = adata.obs["group"].cat.codes.to_numpy()
    rate = np.exp(rng.normal(-0.5, 0.3, size=adata.n_vars) + (rng.random((3, adata.n_vars)) < 0.3)[group])
    counts = rng.poisson(rate).astype(np.float32)
    adata.X = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 100)
    adata.var_names = [f"chr1-{1000 * i}-{1000 * i + 500}" for i in range(adata.n_vars)]
    sae.tl.fit(adata, n_features=8, steps=100)
    sae.tl.encode(adata)
    pairs = pd.DataFrame({"peak": adata.var_names[: len(gene)], "gene": [f"g{i}" for i in gene]})
    shared = pd.DataFrame({"peak": adata.var_names[[0, 9]], "gene": ["g19", "g3"]})
    return adata, pd.concat([pairs, shared], ignore_index=True)


PEAK_SETS = {"first": [f"g{i}" for i in range(7)], "last": [f"g{i}" for i in range(12, 20)]}
LOOSE = {"max_padj": 0.5, "min_log2fc": 0, "min_expected": 0, "n_sets": None, "n_null": 0}


def accessibility(adata, pairs):
    """Cells with genes in place of peaks, by a loop over the genes."""
    genes = list(dict.fromkeys(pairs["gene"]))
    values = np.expm1(np.asarray(adata.X, dtype=np.float64))
    summed = [values[:, adata.var_names.isin(pairs["peak"][pairs["gene"] == gene])].sum(axis=1) for gene in genes]
    by_gene = ad.AnnData(np.log1p(np.column_stack(summed)), obs=adata.obs, var=pd.DataFrame(index=genes))
    by_gene.obsm["sae"], by_gene.uns["sae"] = adata.obsm["sae"], adata.uns["sae"].copy()
    by_gene.obsm["X_pca"] = adata.obsm["X_pca"]
    return by_gene


@pytest.mark.parametrize("method", ["ora", "mannwhitney", "ulm"])
def test_peaks_are_tested_as_the_accessibility_of_genes(opened, method):
    adata, pairs = opened
    by_gene = accessibility(adata, pairs)
    settings = LOOSE | {"method": method, "n_null": int(method == "ora")}
    sae.tl.enrich(by_gene, PEAK_SETS, **settings)
    sae.tl.enrich(adata, PEAK_SETS, var_to_gene=pairs, **settings)
    found = sae.get.enrichment(adata)
    assert len(found) and found["overlap"].max() > 1
    assert set(";".join(found["genes"]).split(";")) - {""} <= set(pairs["gene"])
    pd.testing.assert_frame_equal(found, sae.get.enrichment(by_gene), rtol=1e-6)
    pd.testing.assert_frame_equal(adata.uns["sae"]["enrichment_null"], by_gene.uns["sae"]["enrichment_null"])


@pytest.mark.parametrize("kind", ["CSR", "backed", "MuData", "counts", "dict", "other spelling"])
def test_peaks_in_any_form(opened, kind, tmp_path, log):
    adata, pairs = opened
    sae.tl.enrich(adata, PEAK_SETS, var_to_gene=pairs, **LOOSE)
    expected, given = sae.get.enrichment(adata), pairs
    del adata.uns["sae"]["enrichment"]
    data, where = adata.copy(), {}
    if kind in ("CSR", "backed"):
        data.X = sparse.csr_matrix(data.X)
    if kind == "backed":
        data.write_h5ad(tmp_path / "peaks.h5ad")
        data = ad.read_h5ad(tmp_path / "peaks.h5ad", backed="r")
    if kind == "MuData":
        rna = data[:, :3].copy()
        del rna.obsm["sae"], rna.uns["sae"]
        rna.var_names = ["a", "b", "c"]
        data, where = mudata.MuData({"rna": rna, "atac": data[::-1].copy()}), {"mod": "atac"}
    if kind == "counts":
        data.layers["counts"] = (data.X > 0).astype(np.float32)
        where = {"layer": "counts"}
    if kind == "dict":
        given = pairs.groupby("peak", sort=False)["gene"].agg(list).to_dict()
    if kind == "other spelling":
        # Twice, and each peak counts once.
        given = pd.concat([pairs.assign(peak=pairs["peak"].str.replace("chr1-", name)) for name in ("1:", "Chr1:")])
    sae.tl.enrich(data, PEAK_SETS, var_to_gene=given, **LOOSE, **where)
    found = sae.get.enrichment(data, **({} if kind == "counts" else where))
    if kind == "MuData":
        assert (found.pop("modality") == "atac").all()
    if kind == "counts":
        assert "probably counts" in log() and len(found)
    else:
        columns = ["feature", "gene_set", "direction"]
        a, b = (t.drop(columns="fdr").sort_values(columns, ignore_index=True) for t in (found, expected))
        pd.testing.assert_frame_equal(a, b, rtol=1e-6, check_categorical=False)


def test_genes_of_many_peaks_are_not_found_for_having_them():
    """Peaks that differ are drawn at random: sets of genes with many peaks stand out no more than others."""
    rng = np.random.default_rng(0)
    n_peaks = 1 + rng.negative_binomial(0.8, 0.1, size=1000)
    gene = np.repeat(np.arange(1000), n_peaks)
    active = rng.random((600, 8)) < 0.25
    effect = np.where(rng.random((8, len(gene))) < 0.08, rng.choice([-1.2, 1.2], size=(8, len(gene))), 0)
    rate = np.exp(rng.normal(-2, 1, size=len(gene)) + np.clip(active @ effect, -3, 3))
    adata = ad.AnnData(np.log1p(rng.poisson(rate).astype(np.float32)))
    adata.obsm["X_pca"] = rng.normal(size=(600, 8)).astype(np.float32)
    sae.tl.fit(adata, n_features=8, steps=2)
    sae.tl.encode(adata)
    adata.obsm["sae"] = sparse.csr_matrix(active.astype(np.float32))
    weight = n_peaks / n_peaks.sum()
    sets = {f"set {i}": [f"g{g}" for g in rng.choice(1000, 30, replace=False, p=weight)] for i in range(50)}
    pairs = pd.DataFrame({"peak": adata.var_names, "gene": [f"g{g}" for g in gene]})
    sae.tl.enrich(adata, sets, var_to_gene=pairs, directions="up", min_log2fc=0.25, n_sets=None)
    found = sae.get.enrichment(adata)
    assert (found["fdr"] > 0.05).all()

    sae.tl.rank_genes(adata, n_genes=None)
    raised = sae.get.genes(adata, direction="up", max_padj=0.05)
    p = []
    for _, part in raised.groupby("feature", observed=True):
        hits = set(pairs["gene"][pairs["peak"].isin(part["gene"])])
        p += [stats.hypergeom.sf(len(hits & set(some)) - 1, 1000, 30, len(hits)) for some in sets.values()]
    # The test that fails: a gene is a hit if any of its peaks is one.
    by_chance = np.mean(np.array(p) < 0.05)
    assert by_chance > 0.4
    assert (found["pval"] < 0.05).sum() / (8 * 50) < by_chance / 3


def test_sets_of_peaks_need_no_genes(opened):
    adata, _ = opened
    sae.tl.enrich(adata, {"motif": adata.var_names[:20].tolist()}, **LOOSE)
    assert sae.get.enrichment(adata)["genes"].str.startswith("chr1-").all()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, ValueError, r"the data has 'chr1-0-500'.* say which peaks belong to which gene: var_to_gene=sae\.tl\.peaks_to_genes"),
        ({"chr1-7-9": "g1"}, ValueError, r"var_to_gene= and adata\.X have no variable in common: it has 'chr1-7-9'; the data has"),
        (pd.DataFrame({"peak": ["a"], "symbol": ["b"]}), ValueError, r"var_to_gene= has the columns 'peak', 'symbol'; it lacks 'gene'"),
        ({"chr1-0-500": None}, ValueError, r"var_to_gene= has no pair of a variable and a gene"),
        ("genes.tsv", TypeError, r"var_to_gene= is a str; expected a table with the columns 'peak' and 'gene'"),
        ({"chr1-0-500": ["x", "y"]}, ValueError, r"net and data have no gene in common\. .* the data has 'x', 'y'"),
    ],
)  # fmt: skip
def test_bad_genes_of_peaks(opened, compare, given, error, message):
    adata, _ = opened
    before = compare.state(adata)
    with pytest.raises(error, match=message):
        sae.tl.enrich(adata, PEAK_SETS, var_to_gene=given)
    compare.assert_same(before, compare.state(adata))
