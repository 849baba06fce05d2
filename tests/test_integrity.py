"""What others made of an SAE in an object: every verb and getter says what is wrong with it, and leaves it as it is."""

from __future__ import annotations

import copy
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import sae

USES = {
    "encode": lambda a: sae.tl.encode(a, progress=False),
    "encode, reference": lambda a: sae.tl.encode(a.copy(), reference=a, progress=False),
    "rank_genes": lambda a: sae.tl.rank_genes(a, progress=False),
    "score_labels": lambda a: sae.tl.score_labels(a, "phase", progress=False),
    "feature_map": sae.tl.feature_map,
    "name_features": sae.tl.name_features,
    "evaluate": lambda a: sae.tl.evaluate(a, "phase", n_splits=2, n_bootstrap=2, progress=False),
    "get.features": sae.get.features,
    "get.model": sae.get.model,
    "get.decoder": sae.get.decoder,
    "get.genes": sae.get.genes,
    "get.params": sae.get.params,
    "get.activations": sae.get.activations,
}
OF_ACTIVATIONS = ("rank_genes", "score_labels", "feature_map", "evaluate", "get.activations")


def without(mapping, name):
    return {other: value for other, value in mapping.items() if other != name}


def part(*path, value=None, of=None):
    """Put something in the place of an entry of `uns["sae"]`, or what is made of it."""

    def change(adata):
        slot = adata.uns["sae"]
        for name in path[:-1]:
            slot = slot[name]
        slot[path[-1]] = value if of is None else of(slot[path[-1]])

    return change


def activations(of):
    return lambda adata: adata.obsm.update(sae=of(adata.obsm["sae"]))


SPOILT = {
    "version as text": (part("schema_version", value="1"), "schema version '1'"),
    "version as a fraction": (part("schema_version", value=1.5), "schema version '1.5'"),
    "version missing": (part("schema_version"), "schema version 'None'"),
    "version 0": (part("schema_version", value=0), "schema version '0'"),
    "version to come": (part("schema_version", value=10**30), "Update sae"),
    "several versions": (part("schema_version", value=np.array([1, 2])), "expected a number from 1 on"),
    "no params": (part("params"), r"\['params'\] is a NoneType"),
    "params without architecture": (part("params", of=lambda p: without(p, "architecture")), "architecture none"),
    "an unknown architecture": (part("params", "architecture", value="evil"), "architecture 'evil'; known are"),
    "variance as text": (part("params", "variance", value="83"), "variance '83'; expected a number"),
    "variance 0": (part("params", "variance", value=0.0), "expected a number above 0"),
    "k above the features": (part("params", "k", value=10**9), "as k 1000000000"),
    "other n_features": (part("params", "n_features", value=25), r"shape \(20, 24\); expected \(20, 25\)"),
    "n_features yes": (part("params", "n_features", value=True), "n_features True; expected an integer"),
    "weights are a list": (part("weights", value=["weights"]), r"has no SAE|\['weights'\] is a list"),
    "weights are none": (part("weights", of=lambda w: {}), "has no matrix 'W_enc'"),
    "fewer biases": (part("weights", "b_enc", of=lambda b: b[:-1]), r"'b_enc' of the shape \(23,\)"),
    "weights turned round": (part("weights", "W_dec", of=np.transpose), r"'W_dec' of the shape \(20, 24\)"),
    "text for weights": (part("weights", "b_dec", of=lambda b: b.astype(str).astype(object)), "of the type object"),
    "no threshold": (part("weights", of=lambda w: without(w, "threshold")), "expected .*'threshold'"),
    "a sparse encoder": (part("weights", "W_enc", of=sparse.csr_matrix), "has no matrix 'W_enc'"),
    "scaling of another width": (part("weights", "scaling", of=lambda s: s[:3]), r"'scaling' of the shape \(3, 20\)"),
    "fewer names": (
        part("weights", of=lambda w: w | {"input_names": ["a", "b"]}),
        "2 names of inputs; the SAE reads 20",
    ),
    "no history": (part("history"), "no table 'history'"),
    "features are none": (part("features"), "no table of 24 features"),
    "fewer features": (part("features", of=lambda f: f.iloc[:-1]), "no table of 24 features"),
    "a feature twice": (part("features", of=lambda f: f.iloc[[0] * len(f)]), "no table of 24 features"),
    "features as text": (part("features", of=lambda f: f.astype(str)), "no table of 24 features"),
    "encoded is text": (part("encoded", value="X_pca"), r"\['encoded'\] is a str"),
    "encoded without cells": (part("encoded", of=lambda e: without(e, "n_obs")), "n_obs none"),
}
SPOILT_WEIGHTS = {
    "NaN": (part("weights", "b_enc", of=lambda b: b * np.nan), "24 NaN or infinite values in 'b_enc'"),
    "thresholds below 0": (part("weights", "threshold", of=lambda t: t - 1000), "thresholds below 0"),
}
SPOILT_ACTIVATIONS = {
    "of another SAE": (activations(lambda a: a[:, :5]), "has 5 columns; the SAE 'sae' has 24 features"),
    "negative": (activations(lambda a: -a), "values below 0"),
    "NaN": (activations(lambda a: a * np.nan), "or NaN"),
    "text": (activations(lambda a: a.toarray().astype(str)), "expected numbers"),
}


@pytest.fixture(scope="module")
def archive():
    return ad.read_h5ad(Path(__file__).parent / "archives" / "schema_1.h5ad")


@pytest.fixture
def adata(archive):
    copied = archive.copy()
    copied.uns = copy.deepcopy(archive.uns)
    return copied


def refused(adata, spoil, message, uses, compare):
    spoil(adata)
    before = {"uns": copy.deepcopy(dict(adata.uns)), "activations": adata.obsm["sae"].copy()}
    for name in uses:
        with pytest.raises((ValueError, TypeError), match=message):
            USES[name](adata)
    compare.assert_same(before, {"uns": dict(adata.uns), "activations": adata.obsm["sae"]})


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_parts_that_are_no_sae(adata, spoil, message, compare):
    refused(adata, spoil, message, USES, compare)


@pytest.mark.parametrize(("spoil", "message"), SPOILT_WEIGHTS.values(), ids=SPOILT_WEIGHTS)
def test_weights_that_are_of_no_use(adata, spoil, message, compare):
    refused(adata, spoil, message, ("encode", "encode, reference", "get.model"), compare)


@pytest.mark.parametrize(("spoil", "message"), SPOILT_ACTIVATIONS.values(), ids=SPOILT_ACTIVATIONS)
def test_activations_that_no_sae_gives(adata, spoil, message, compare):
    refused(adata, spoil, message, OF_ACTIVATIONS, compare)


def test_a_table_that_is_none(adata):
    adata.uns["sae"]["genes"] = {"gene": "GATA1"}
    with pytest.raises(ValueError, match=r"\['genes'\] is a dict; expected a table. Run sae.tl.rank_genes again"):
        sae.get.genes(adata)


def test_what_was_encoded_is_lost(adata):
    del adata.uns["sae"]["encoded"]
    for name in ("rank_genes", "evaluate", "get.activations"):
        with pytest.raises(KeyError, match=r"Run sae.tl.encode"):
            USES[name](adata)
    sae.tl.encode(adata, progress=False)
    assert len(sae.get.features(adata)) == 24


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_numbers_of_any_kind(adata, kind):
    """As files give them."""
    adata.uns["sae"]["schema_version"] = kind(1)
    adata.uns["sae"]["params"] |= {"k": kind(6), "n_features": kind(24), "variance": np.float32(83)}
    adata.uns["sae"]["weights"]["b_dec"] = adata.uns["sae"]["weights"]["b_dec"].astype(np.float64)
    sae.tl.encode(adata, progress=False)
    assert isinstance(sae.get.features(adata), pd.DataFrame)
