"""Each kind of bad input: a clear error, and the object is left exactly as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import sae

SETS = {"early": [f"g{i}" for i in range(8)], "late": [f"g{i}" for i in range(12, 20)]}


@dataclass(frozen=True)
class Case:
    call: Callable[[Any], object]
    error: type[Exception] | tuple[type[Exception], ...]
    message: str
    prepare: Callable[[Any], object] | None = None
    """Changes the object (or returns another) before the call."""
    start: str = "small"
    """`small`: 60 cells with an SAE, encoded. `multimodal`: a MuData with one in `rna` and a joint one."""


def put(slot: str, key: str | None, value: Callable[[Any], object]) -> Callable[[Any], None]:
    """Prepare by setting `adata.slot[key]` (or `adata.slot`) to something made from the object."""

    def prepare(adata: Any) -> None:
        if key is None:
            setattr(adata, slot, value(adata))
        else:
            getattr(adata, slot)[key] = value(adata)

    return prepare


def with_values(matrix, positions, value):
    matrix = matrix.copy()
    for position in positions:
        matrix[position] = value
    return matrix


def without_pca(adata):
    del adata.obsm["X_pca"]


def without_sae(adata):
    del adata.uns["sae"], adata.obsm["sae"]


def refitted(adata):
    sae.tl.fit(adata, n_features=8, steps=1)


def from_the_future(adata):
    adata.uns["sae"]["schema_version"] = 99


def fit(*args, **kwargs):
    return lambda data: sae.tl.fit(data, *args, **({"steps": 2} | kwargs))


def rank_genes(**kwargs):
    return lambda data: sae.tl.rank_genes(data, **kwargs)


def enrich(net=SETS, **kwargs):
    return lambda data: sae.tl.enrich(data, net, **kwargs)


def score_labels(groupby="group", **kwargs):
    return lambda data: sae.tl.score_labels(data, groupby, **kwargs)


@dataclass(frozen=True)
class Decoder:
    """A model that predicts the expression there is, made wrong."""

    wrong: Callable[[Any], object] = lambda x: x

    def decode(self, z, data):
        assert len(z) == data.n_obs
        return self.wrong(data.X)


CASES = {
    # ---- fit: where to read
    "fit: no default embedding": Case(
        fit(), KeyError, r"adata\.obsm has no 'X_pca'; it has 'sae'\. Pass one of them as use_rep=", without_pca
    ),
    "fit: missing use_rep": Case(
        fit("X_scVI"), KeyError, r"adata\.obsm has no 'X_scVI'; it has 'X_pca', 'sae'\. Pass one of them"
    ),
    "fit: missing layer": Case(fit(layer="log"), KeyError, r"adata\.layers has no 'log'; it has none"),
    "fit: use_rep with layer": Case(
        fit("X_pca", layer="log"), ValueError, r"use_rep='X_pca' and layer='log' were given\. Pass one"
    ),
    "fit: X is None": Case(fit("X"), ValueError, r"adata\.X is None", put("X", None, lambda _: None)),
    "fit: mod of an AnnData": Case(fit(mod="rna"), ValueError, r"mod='rna' .* is an AnnData\. Leave mod= out"),
    "fit: MuData without mod": Case(
        fit(), ValueError, r"Pass mod= \(one of 'rna', 'adt'\), or use_rep=.*'X_joint'", start="multimodal"
    ),
    "fit: layer of a MuData": Case(fit(layer="log"), ValueError, r"Pass mod=", start="multimodal"),
    "fit: missing modality": Case(
        fit(mod="atac"), ValueError, r"no modality 'atac'; it has 'rna', 'adt'", start="multimodal"
    ),
    "fit: missing joint embedding": Case(
        fit("X_wnn"), KeyError, r"mdata\.obsm has no 'X_wnn'; it has 'X_joint', 'sae'", start="multimodal"
    ),
    "fit: missing use_rep of a modality": Case(
        fit("X_wnn", mod="adt"),
        KeyError,
        r"mdata\.mod\['adt'\]\.obsm has no 'X_wnn'; it has 'X_pca'",
        start="multimodal",
    ),
    "fit: key of an embedding": Case(
        fit(key_added="X_pca"), ValueError, r"adata\.obsm\['X_pca'\] exists and is not an SAE's.*another key_added="
    ),
    "fit: key of something in uns": Case(
        fit(key_added="log1p"), ValueError, r"adata\.uns\['log1p'\] exists", put("uns", "log1p", lambda a: {})
    ),
    "fit: key is what is read": Case(
        fit("sae"), ValueError, r"key_added='sae' is also the representation to train on", start="small"
    ),
    "fit: n_features is no integer": Case(fit(n_features=2.5), TypeError, r"n_features=2\.5 is a float"),
    "fit: steps is a string": Case(fit(steps="10"), TypeError, r"steps='10' is a str; expected an integer"),
    # ---- fit: what is read
    "fit: NaN": Case(
        fit(),
        ValueError,
        r"adata\.obsm\['X_pca'\] has 3 NaN or infinite values in 2 of 60 rows \(rows 4, 7\)\. Remove",
        put("obsm", "X_pca", lambda a: with_values(a.obsm["X_pca"], [(4, 0), (4, 2), (7, 1)], np.nan)),
    ),
    "fit: both infinities": Case(
        fit(),
        ValueError,
        r"has 2 NaN or infinite values in 2 of 60 rows \(rows 0, 59\)",
        put("obsm", "X_pca", lambda a: with_values(with_values(a.obsm["X_pca"], [(0, 0)], np.inf), [(59, 0)], -np.inf)),
    ),
    "fit: NaN in many rows": Case(
        fit(),
        ValueError,
        r"has 20 NaN .* \(rows 0, 1, 2, 3, 4, \.\.\.\)",
        put("obsm", "X_pca", lambda a: with_values(a.obsm["X_pca"], [(i, 0) for i in range(20)], np.nan)),
    ),
    "fit: NaN in sparse X": Case(
        fit("X"),
        ValueError,
        r"adata\.X has 1 NaN or infinite values in 1 of 60 rows \(rows 5\)",
        put("X", None, lambda a: sparse.csr_matrix(with_values(a.X, [(5, 3)], np.nan))),
    ),
    "fit: NaN in a DataFrame": Case(
        fit(),
        ValueError,
        r"1 NaN or infinite values in 1 of 60 rows \(rows 2\)",
        put("obsm", "X_pca", lambda a: pd.DataFrame(with_values(a.obsm["X_pca"], [(2, 0)], np.nan), index=a.obs_names)),
    ),
    "fit: words": Case(
        fit(),
        TypeError,
        r"adata\.obsm\['X_pca'\] holds object values; expected numbers",
        put("obsm", "X_pca", lambda a: pd.DataFrame({"a": ["b"] * 60}, index=a.obs_names, dtype=object)),
    ),
    "fit: no columns": Case(
        fit(), ValueError, r"has the shape \(60, 0\)", put("obsm", "X_pca", lambda a: np.zeros((60, 0)))
    ),
    "fit: constant": Case(
        fit(), ValueError, r"All 6 columns .* are constant", put("obsm", "X_pca", lambda a: np.ones((60, 6)))
    ),
    "fit: fewer than 10 cells": Case(
        fit(), ValueError, r"adata\.obsm\['X_pca'\] has 9 cells; .* at least 10", lambda a: a[:9].copy()
    ),
    "fit: no cells": Case(fit(), ValueError, r"has 0 cells; .* at least 10", lambda a: a[:0].copy()),
    # ---- fit: settings
    "fit: k > n_features": Case(fit(k=9, n_features=8), ValueError, r"k=9 is larger than n_features=8\. Choose"),
    "fit: k > default n_features": Case(fit(k=65), ValueError, r"k=65 is larger than n_features=64"),
    "fit: n_features = 0": Case(fit(n_features=0), ValueError, r"n_features=0 is below 1\. Leave it out"),
    "fit: n_features < 0": Case(fit(n_features=-4), ValueError, r"n_features=-4 is below 1"),
    "fit: k = 0": Case(fit(k=0), ValueError, r"k=0 is below 1"),
    "fit: steps = 0": Case(fit(steps=0), ValueError, r"steps=0 is below 1"),
    "fit: steps < 0": Case(fit(steps=-5), ValueError, r"steps=-5 is below 1"),
    "fit: batch_size = 0": Case(fit(batch_size=0), ValueError, r"batch_size=0 is below 1"),
    "fit: learning_rate = 0": Case(fit(learning_rate=0), ValueError, r"learning_rate=0 is not above 0"),
    "fit: learning_rate < 0": Case(fit(learning_rate=-0.1), ValueError, r"learning_rate=-0\.1 is not above 0"),
    "fit: l1 < 0": Case(fit(architecture="vanilla", l1=-1), ValueError, r"l1=-1 is negative"),
    "fit: k of vanilla": Case(
        fit(architecture="vanilla", k=4), ValueError, r"'vanilla' is made sparse by l1=, not by k="
    ),
    "fit: l1 of topk": Case(fit(architecture="topk", l1=0.1), ValueError, r"'topk' is made sparse by k=, not by l1="),
    "fit: l0 of topk": Case(fit(architecture="topk", l0=0.1), ValueError, r"'topk' is made sparse by k=, not by l0="),
    "fit: l0 of vanilla": Case(
        fit(architecture="vanilla", l0=0.1), ValueError, r"'vanilla' is made sparse by l1=, not by l0="
    ),
    "fit: l1 of batchtopk": Case(
        fit(architecture="batchtopk", l1=1), ValueError, r"'batchtopk' is made sparse by k=, not by l1="
    ),
    "fit: l1 of matryoshka with k": Case(
        fit(architecture="matryoshka", k=2, l1=1), ValueError, r"'matryoshka' is made sparse by k=, not by l1="
    ),
    "fit: k of relu": Case(fit(architecture="relu", k=4), ValueError, r"'relu' is made sparse by l1=, not by k="),
    "fit: k of gated": Case(fit(architecture="gated", k=4), ValueError, r"'gated' is made sparse by l1=, not by k="),
    "fit: l1 of jumprelu": Case(
        fit(architecture="jumprelu", l1=1), ValueError, r"'jumprelu' is made sparse by l0=, not by l1="
    ),
    "fit: l0 < 0": Case(fit(architecture="jumprelu", l0=-1), ValueError, r"l0=-1 is negative"),
    "fit: k is a word": Case(fit(k="many"), (TypeError, ValueError), r"k='many'"),
    "fit: unknown architecture": Case(
        fit(architecture="sparse"), ValueError, r"'sparse' is not one of 'topk', 'batchtopk', 'matryoshka', 'vanilla'"
    ),
    "fit: unknown recipe": Case(fit(recipe="book"), ValueError, r"recipe='book' is not one of 'default', 'paper'"),
    "fit: paper with batchtopk": Case(
        fit(recipe="paper", architecture="batchtopk"),
        ValueError,
        r"recipe='paper' trains 'vanilla', 'relu' or 'topk', not architecture='batchtopk'",
    ),
    "fit: paper with jumprelu": Case(
        fit(recipe="paper", architecture="jumprelu"), ValueError, r"not architecture='jumprelu'"
    ),
    "fit: early_stopping = 0": Case(fit(early_stopping=0), ValueError, r"early_stopping=0 is below 1"),
    "fit: early_stopping is no integer": Case(fit(early_stopping=2.5), TypeError, r"early_stopping=2\.5 is a float"),
    "fit: unknown preprocess": Case(fit(preprocess="zscore"), ValueError, r"'zscore' is not one of .*'center'"),
    "fit: whiten with few cells": Case(
        fit(preprocess="whiten"),
        ValueError,
        r"30 × 30 covariance from 60 cells.*Use preprocess=\"center\"",
        put("obsm", "X_pca", lambda a: np.random.default_rng(0).normal(size=(60, 30))),
    ),
    "fit: validation = 1": Case(fit(validation=1), ValueError, r"validation=1 is not a share"),
    "fit: validation < 0": Case(fit(validation=-0.1), ValueError, r"validation=-0\.1 is not a share"),
    "fit: everything held out": Case(fit(validation=0.999), ValueError, r"validation=0\.999 holds out all 60 cells"),
    "fit: empty key": Case(fit(key_added=""), ValueError, r"key_added='' cannot name an SAE"),
    "fit: key with a slash": Case(fit(key_added="a/b"), ValueError, r"key_added='a/b' .* without '/'"),
    "fit: key that is no string": Case(fit(key_added=3), ValueError, r"key_added=3 cannot name"),
    "fit: key of a modality": Case(
        fit("X_joint", key_added="rna"), ValueError, r"key_added='rna' is the name of a modality", start="multimodal"
    ),
    # ---- encode
    "encode: before fit": Case(
        sae.tl.encode, KeyError, r"adata\.uns has no SAE 'sae' \(there is none\)\. Run sae\.tl\.fit", without_sae
    ),
    "encode: another key": Case(
        lambda a: sae.tl.encode(a, key="atlas"),
        KeyError,
        r"has no SAE 'atlas' \(adata\.uns holds the SAEs 'sae'\)\. Run sae\.tl\.fit\(\.\.\., key_added='atlas'\)",
    ),
    "encode: in the other modality": Case(
        lambda m: sae.tl.encode(m, mod="adt"),
        KeyError,
        r"mdata\.mod\['adt'\]\.uns has no SAE 'sae'",
        start="multimodal",
    ),
    "encode: on the MuData": Case(
        lambda m: sae.tl.encode(m, key="only_rna"),
        KeyError,
        r"mdata\.uns has no SAE 'only_rna'.*Modalities with an SAE: 'rna'; pass mod=",
        start="multimodal",
    ),
    "encode: another dimension": Case(
        sae.tl.encode,
        ValueError,
        r"adata\.obsm\['X_pca'\] has 5 columns; the SAE 'sae' reads 6 \(it was trained on 'X_pca'\)",
        put("obsm", "X_pca", lambda a: a.obsm["X_pca"][:, :5]),
    ),
    "encode: embedding gone": Case(sae.tl.encode, KeyError, r"adata\.obsm has no 'X_pca'; it has 'sae'", without_pca),
    "encode: use_rep with layer": Case(
        lambda a: sae.tl.encode(a, use_rep="X_pca", layer="log"), ValueError, r"Pass one of them"
    ),
    "encode: NaN": Case(
        sae.tl.encode,
        ValueError,
        r"1 NaN or infinite values in 1 of 60 rows \(rows 1\)",
        put("obsm", "X_pca", lambda a: with_values(a.obsm["X_pca"], [(1, 0)], np.nan)),
    ),
    "encode: reference without SAE": Case(
        lambda a: sae.tl.encode(a, reference=a[:, :3].copy(), key="x"), KeyError, r"has no SAE 'x'"
    ),
    "encode: key with a slash": Case(
        lambda a: sae.tl.encode(a, reference=a, key="a/b"), ValueError, r"'a/b' cannot name an SAE"
    ),
    "encode: newer schema": Case(
        sae.tl.encode, ValueError, r"schema version 99; this version of sae reads up to 1\. Update sae", from_the_future
    ),
    # ---- rank_genes
    "rank_genes: before fit": Case(rank_genes(), KeyError, r"Run sae\.tl\.fit", without_sae),
    "rank_genes: before encode": Case(
        rank_genes(), KeyError, r"adata\.obsm has no activations 'sae'\. Run sae\.tl\.encode", refitted
    ),
    "rank_genes: NaN": Case(
        rank_genes(),
        ValueError,
        r"adata\.X has 1 NaN or infinite values in 1 of 60 rows \(rows 3\)",
        put("X", None, lambda a: with_values(a.X, [(3, 0)], np.nan)),
    ),
    "rank_genes: words": Case(
        rank_genes(layer="words"),
        TypeError,
        r"adata\.layers\['words'\] holds object values; expected numbers",
        put("layers", "words", lambda a: np.full(a.shape, "word", dtype=object)),
    ),
    "rank_genes: complex numbers": Case(
        rank_genes(), TypeError, r"adata\.X holds complex64 values", put("X", None, lambda a: a.X.astype(np.complex64))
    ),
    "rank_genes: model without decode": Case(
        rank_genes(model=np.zeros(3)),
        TypeError,
        r"model= is a ndarray, which has no method decode\(z, data\)\. Pass a model, such as sae\.models\.PCA",
    ),
    "rank_genes: model with layer": Case(
        rank_genes(model=Decoder(), layer="log"), ValueError, r"Both model= and layer='log' were given\. Pass one"
    ),
    "rank_genes: model with use_raw": Case(
        rank_genes(model=Decoder(), use_raw=True), ValueError, r"Both model= and use_raw=True were given\. Pass one"
    ),
    "rank_genes: model of other genes": Case(
        rank_genes(model=Decoder(lambda x: x[:, :7])),
        ValueError,
        r"the prediction of Decoder has the shape \(1, 7\) for 1 cells and 20 genes\. decode\(z, data\) must return",
    ),
    "rank_genes: model of other cells": Case(
        rank_genes(model=Decoder(lambda x: x[:1])),
        ValueError,
        r"the prediction of Decoder has the shape \(1, 20\) for 60 cells",
    ),
    "rank_genes: model that returns words": Case(
        rank_genes(model=Decoder(lambda x: "words")),
        TypeError,
        r"the prediction of Decoder is a builtins\.str; expected a NumPy array",
    ),
    "rank_genes: model of changing genes": Case(
        rank_genes(
            model=Decoder(lambda x: ad.AnnData(x, var=pd.DataFrame(index=[f"{len(x)}-{i}" for i in range(20)])))
        ),
        ValueError,
        r"the prediction of Decoder has 20 genes \('60-0', .*\) for 60 cells, and 20 \('1-0', .*\) for the first one",
    ),
    "rank_genes: model of repeated genes": Case(
        rank_genes(model=Decoder()),
        ValueError,
        r"1 gene names of the prediction of Decoder occur more than once \('g1'\)",
        put("var_names", None, lambda a: ["g1", *a.var_names[1:]]),
    ),
    "rank_genes: model with some NaN": Case(
        rank_genes(model=Decoder(lambda x: np.where(np.arange(len(x))[:, None] == 7, np.nan, x))),
        ValueError,
        r"the prediction of Decoder has 20 NaN or infinite values in 1 of 60 rows \(rows 7\)",
    ),
    "rank_genes: model with NaN only": Case(
        rank_genes(model=Decoder(lambda x: x * np.nan)), ValueError, r"1200 NaN or infinite values in 60 of 60 rows"
    ),
    "rank_genes: NaN throughout a gene": Case(
        rank_genes(),
        ValueError,
        r"adata\.X has 60 NaN or infinite values in 60 of 60 rows",
        put("X", None, lambda a: with_values(a.X, [(slice(None), 3)], np.nan)),
    ),
    "rank_genes: X is None": Case(rank_genes(), ValueError, r"adata\.X is None", put("X", None, lambda _: None)),
    "rank_genes: missing layer": Case(rank_genes(layer="log"), KeyError, r"adata\.layers has no 'log'; it has none"),
    "rank_genes: no raw": Case(rank_genes(use_raw=True), ValueError, r"use_raw=True, but adata\.raw is not set"),
    "rank_genes: layer with use_raw": Case(
        rank_genes(layer="log", use_raw=True), ValueError, r"layer='log' and use_raw=True were given\. Pass one"
    ),
    "rank_genes: repeated genes": Case(
        rank_genes(),
        ValueError,
        r"1 gene names of adata\.X occur more than once \('g1'\).*var_names_make_unique",
        put("var_names", None, lambda a: ["g1", *a.var_names[1:]]),
    ),
    "rank_genes: n_genes = 0": Case(rank_genes(n_genes=0), ValueError, r"n_genes=0 is below 1"),
    "rank_genes: pseudocount = 0": Case(rank_genes(pseudocount=0), ValueError, r"pseudocount=0 must be positive"),
    "rank_genes: var_mod of an AnnData": Case(rank_genes(var_mod="adt"), ValueError, r"Leave var_mod= out"),
    "rank_genes: missing var_mod": Case(
        rank_genes(mod="rna", var_mod="atac"),
        ValueError,
        r"no modality 'atac'; it has 'rna', 'adt'",
        start="multimodal",
    ),
    "rank_genes: joint without var_mod": Case(
        rank_genes(), ValueError, r"var_mod= \(one of 'rna', 'adt'\)", start="multimodal"
    ),
    # ---- enrich
    "enrich: before encode": Case(enrich(), KeyError, r"Run sae\.tl\.encode", refitted),
    "enrich: no such columns": Case(
        enrich(pd.DataFrame({"set": ["a"], "genesymbol": ["g1"]})),
        ValueError,
        r"net has the columns 'set', 'genesymbol'; it lacks 'source', 'target'\. A net is a table",
    ),
    "enrich: other identifiers": Case(
        enrich({"set": [f"ENSG{i}" for i in range(7)]}),
        ValueError,
        r"no gene in common\. The net has ('ENSG\d', ){4}'ENSG\d'; the data has ('g\d', ){4}'g\d'\..*Ensembl",
    ),
    "enrich: sets too small": Case(
        enrich({"set": ["g1", "g2", "g3"]}),
        ValueError,
        r"None of the 1 gene sets has 5 to 500 measured genes; the largest has 3\. Lower min_size=",
    ),
    "enrich: no sets": Case(enrich({}), ValueError, r"net has no gene sets"),
    "enrich: string for a set": Case(
        enrich({"set": "g1"}), TypeError, r"gene set 'set' is the string 'g1'; expected a list"
    ),
    "enrich: no net": Case(enrich(3), TypeError, r"net is a int; expected a DataFrame"),
    "enrich: no such file": Case(enrich("no_such_file.gmt"), FileNotFoundError, r"no_such_file\.gmt"),
    "enrich: two weights": Case(
        enrich(pd.DataFrame({"source": "a", "target": ["g1", "g1"], "weight": [1, 2]})),
        ValueError,
        r"1 genes two weights in one set \('g1' in 'a', for one\)\. Keep one row",
    ),
    "enrich: collection is no string": Case(enrich(collection=3), ValueError, r"collection=3 cannot name"),
    "enrich: max_padj above 1": Case(enrich(max_padj=2), ValueError, r"max_padj=2 is not a probability"),
    "enrich: min_log2fc < 0": Case(enrich(min_log2fc=-1), ValueError, r"min_log2fc=-1 is negative"),
    "enrich: sizes crossed": Case(enrich(min_size=9, max_size=3), ValueError, r"max_size=3 is below min_size=9"),
    "enrich: n_sets < 1": Case(enrich(n_sets=0), ValueError, r"n_sets=0 is below 1"),
    "enrich: min_cells < 2": Case(enrich(min_cells=1), ValueError, r"min_cells=1 is below 2"),
    "enrich: unknown method": Case(
        enrich(method="viper"), ValueError, r"method='viper' is not one of 'ora', 'mannwhitney', 'ulm'"
    ),
    "enrich: repeated genes": Case(
        enrich(), ValueError, r"occur more than once", put("var_names", None, lambda a: ["g1", *a.var_names[1:]])
    ),
    "enrich: ora of scaled X": Case(
        enrich(),
        ValueError,
        r"adata\.X has negative values, .* min_log2fc=0\.5\. Pass layer= with log-normalised values, or min_log2fc=0\.",
        put("X", None, lambda a: a.X - a.X.mean(axis=0)),
    ),
    "enrich: pseudocount < 0": Case(enrich(pseudocount=-1), ValueError, r"pseudocount=-1 must be positive"),
    # ---- score_labels
    "score_labels: before encode": Case(score_labels(), KeyError, r"Run sae\.tl\.encode", refitted),
    "score_labels: missing column": Case(
        score_labels("cell_type"), KeyError, r"adata\.obs has no column 'cell_type'; it has 'group'"
    ),
    "score_labels: continuous": Case(
        score_labels("depth"),
        ValueError,
        r"adata\.obs\['depth'\] is continuous \(float64\)\. Pass a column of labels, or make one with pd\.cut",
        put("obs", "depth", lambda _: np.linspace(0, 1, 60)),
    ),
    "score_labels: one label": Case(
        score_labels("same"),
        ValueError,
        r"has only one label \('only'\).*two are needed",
        put("obs", "same", lambda _: "only"),
    ),
    "score_labels: no label": Case(
        score_labels("none"),
        ValueError,
        r"has no labels.*two are needed",
        put("obs", "none", lambda _: pd.Categorical([None] * 60, categories=["a", "b"])),
    ),
    "score_labels: scopes": Case(score_labels(scopes="4-way"), ValueError, r"scopes='4-way' is neither '3-way' nor"),
    "score_labels: no splits": Case(score_labels(n_splits=0), ValueError, r"n_splits=0 is below 1"),
    "score_labels: missing donor column": Case(
        score_labels(donor="patient"), KeyError, r"obs has no column 'patient'; it has 'group'.*donor="
    ),
    "score_labels: cells without a donor": Case(
        score_labels(donor="donor"),
        ValueError,
        r"adata\.obs\['donor'\] is missing for 20 of the 60 labelled cells\. Fill it in",
        put("obs", "donor", lambda _: [None, "x", "y"] * 20),
    ),
    "score_labels: one donor": Case(
        score_labels(donor="donor"),
        ValueError,
        r"only one donor \('x'\).*two are needed\. Leave donor= out",
        put("obs", "donor", lambda _: ["x"] * 60),
    ),
    "score_labels: unknown labels in the order": Case(
        score_labels(order=["a", "z", "b"]),
        ValueError,
        r"order= has labels that no cell has: 'z'\. .* has 'a', 'b', 'c'",
    ),
    "score_labels: a label twice in the order": Case(
        score_labels(order=["a", "b", "a"]), ValueError, r"order= has 'a' more than once"
    ),
    "score_labels: an order of one": Case(score_labels(order=["a"]), ValueError, r"not a list of two or more labels"),
    "score_labels: an order that is a string": Case(
        score_labels(order="ab"), ValueError, r"order='ab' is not a list of two or more labels"
    ),
    "score_labels: column with a slash": Case(
        score_labels("a/b"), ValueError, r"'a/b' cannot name .* Rename", put("obs", "a/b", lambda _: ["x", "y"] * 30)
    ),
    # ---- get
    "get: before fit": Case(sae.get.model, KeyError, r"Run sae\.tl\.fit", without_sae),
    "get: before encode": Case(
        sae.get.features, KeyError, r"adata\.uns\['sae'\] has no 'features'\. Run sae\.tl\.encode", refitted
    ),
    "get: activations before encode": Case(sae.get.activations, KeyError, r"Run sae\.tl\.encode", refitted),
    "get: before rank_genes": Case(
        sae.get.genes, KeyError, r"has no 'genes'\. Run sae\.tl\.rank_genes\(.*'sae'\) first"
    ),
    "get: before enrich": Case(sae.get.enrichment, KeyError, r"Run sae\.tl\.enrich"),
    "get: before score_labels": Case(sae.get.labels, KeyError, r"Run sae\.tl\.score_labels"),
    "get: unknown feature": Case(
        lambda a: sae.get.labels(a, "sae_71"),
        KeyError,
        r"no feature 'sae_71': the SAE has 8 features, 'sae_0' to 'sae_7'. Did you mean 'sae_[17]', ",
        score_labels(),
    ),
    "get: number too high": Case(
        lambda a: sae.get.labels(a, [0, 8]), KeyError, r"no feature 8: the SAE has 8 features, 0 to 7", score_labels()
    ),
    "get: negative number": Case(lambda a: sae.get.activations(a, -1), KeyError, r"no feature -1"),
    "get: no features": Case(lambda a: sae.get.activations(a, []), ValueError, r"No features were given"),
    "pl: no metrics": Case(lambda a: sae.pl.history(a, []), ValueError, r"No metrics were given"),
    "get: True": Case(lambda a: sae.get.activations(a, [True]), KeyError, r"no feature True"),
    "get: unknown direction": Case(
        lambda a: sae.get.genes(a, direction="left"), ValueError, r"direction='left' is neither 'up' nor 'down'"
    ),
    "get: unknown collection": Case(
        lambda a: sae.get.enrichment(a, collection="go"),
        KeyError,
        r"no results for the collection 'go'; there are for 'gene_sets'",
        enrich(max_padj=1, min_log2fc=0),
    ),
    "get: unknown groupby": Case(
        lambda a: sae.get.labels(a, groupby="louvain"),
        KeyError,
        r"groupby 'louvain'; there are for 'group'",
        score_labels(),
    ),
    "get: unknown label": Case(
        lambda a: sae.get.labels(a, label="d"), KeyError, r"label 'd'; there are for 'a', 'b', 'c'", score_labels()
    ),
    "get: unknown embedding": Case(
        lambda a: sae.get.embedding(a, "tsne"), KeyError, r"adata\.obsm has no 'tsne' or 'X_tsne'; it has 'X_pca'"
    ),
}


@pytest.fixture(scope="module")
def starts(make_adata, make_mudata):
    small = make_adata(n=60, d=6, g=20)
    sae.tl.fit(small, n_features=8, steps=30)
    sae.tl.encode(small)
    multimodal = make_mudata(n=60)
    for key, rep, mod in (("sae", None, "rna"), ("only_rna", None, "rna"), ("sae", "X_joint", None)):
        sae.tl.fit(multimodal, rep, mod=mod, n_features=8, steps=5, key_added=key)
        sae.tl.encode(multimodal, mod=mod, key=key)
    return {"small": small, "multimodal": multimodal}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_clear_error_and_nothing_changed(starts, compare, case):
    data = starts[case.start].copy()
    if case.prepare is not None:
        prepared = case.prepare(data)
        data = data if prepared is None else prepared
    before = compare.state(data)
    with pytest.raises(case.error, match=case.message):
        case.call(data)
    compare.assert_same(before, compare.state(data))


@pytest.mark.parametrize("call", [fit(), sae.tl.encode, rank_genes(), enrich(), score_labels(), sae.get.features])
def test_neither_anndata_nor_mudata(call):
    with pytest.raises(TypeError, match=r"Expected an AnnData or a MuData, got ndarray"):
        call(np.zeros((20, 3)))
    for path in ("cells.h5ad", Path("sae")):
        with pytest.raises(
            TypeError, match=r"got (str|PosixPath)\. Read a file with .*, and the folder of an SAE with sae.io.read"
        ):
            call(path)


def test_columns_on_disk(starts, tmp_path):
    """Rows of a CSC matrix cannot be read without all of it."""
    adata = starts["small"].copy()
    adata.X = sparse.csc_matrix(adata.X)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    opened = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for call in (rank_genes(), enrich(), score_labels(baselines=True)):
        with pytest.raises(
            ValueError, match=r"adata\.X is stored by columns \(CSC\) on disk.*Store it by rows: .*\.tocsr\(\)"
        ):
            call(opened)
    assert set(opened.uns["sae"]) & {"genes", "enrichment", "labels"} == set()
    opened.file.close()


def test_gmt_that_is_none(make_adata, tmp_path):
    adata = make_adata()
    sae.tl.fit(adata, n_features=8, steps=5)
    sae.tl.encode(adata)
    path = tmp_path / "sets.gmt"
    path.write_text("a\tb\tg1\nc d e\n")
    with pytest.raises(ValueError, match=r"sets\.gmt, line 2 has 1 fields separated by tabs; a GMT line is"):
        sae.tl.enrich(adata, path)
    assert "enrichment" not in adata.uns["sae"]


def test_every_case_starts_from_an_object_that_works(starts):
    """Else a case could raise its error for another reason."""
    adata, mdata = (starts[name].copy() for name in ("small", "multimodal"))
    assert isinstance(mdata, mudata.MuData)
    for call in (fit(steps=100), sae.tl.encode, rank_genes(), enrich(), score_labels()):
        call(adata)
    for call in (
        fit("X_joint", steps=100),
        sae.tl.encode,
        rank_genes(var_mod="rna"),
        enrich(var_mod="rna"),
        score_labels(),
    ):
        call(mdata)
