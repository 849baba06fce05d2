from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

import sae

NAMES = {"sae": "SAE", "cells": "random cells", "random": "random directions"}


@pytest.mark.parametrize("measure", ["decoder", "activation"])
def test_a_curve_per_source(archived, measure):
    ax = sae.pl.stability(archived, measure=measure)
    assert len(ax.lines) == len(NAMES)
    for source, name in NAMES.items():
        (line,) = [line for line in ax.lines if line.get_label().startswith(name)]
        expected = sae.get.stability(archived, table="curve", source=source, measure=measure)
        np.testing.assert_allclose(line.get_xydata(), expected[["threshold", "share"]])
    assert len({line.get_linestyle() for line in ax.lines}) == 3
    assert ("cosine" in ax.get_xlabel()) == (measure == "decoder")


def test_found_again_is_told(archived):
    found = sae.get.stability(archived).set_index("source")["stability_found"]
    texts = [text.get_text() for text in sae.pl.stability(archived).get_legend().get_texts()]
    assert texts == [f"{name} ({round(100 * found[source])} %)" for source, name in NAMES.items()]


def test_given_axes_and_size(archived):
    assert sae.pl.stability(archived).figure.get_size_inches()[0] == pytest.approx(3.35)
    plt.close("all")
    figure, (given, other) = plt.subplots(1, 2)
    assert sae.pl.stability(archived, ax=given) is given
    assert not other.has_data() and plt.get_fignums() == [figure.number]


def test_mudata(make_mudata):
    mdata = make_mudata()
    sae.tl.fit(mdata, mod="rna", n_features=8, k=2, steps=20, progress=False)
    sae.tl.encode(mdata, mod="rna")
    sae.tl.stability(mdata, n_seeds=1, mod="rna", progress=False)
    assert len(sae.pl.stability(mdata, mod="rna").lines) == 3


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"measure": "gene"}, KeyError, "no results for the measure 'gene'"),
        ({"key": "other"}, KeyError, "no SAE 'other'"),
        ({"mod": "rna"}, ValueError, "the data is an AnnData"),
    ],
)
def test_bad_input(archived, settings, error, message):
    with pytest.raises(error, match=message):
        sae.pl.stability(archived, **settings)
    assert plt.get_fignums() == []


def test_all_dead(archived):
    summary = archived.uns["sae"]["stability"]["summary"]
    summary.loc[summary["source"] == "sae", "n_features"] = 0
    with pytest.raises(ValueError, match="All features of 'sae' are dead"):
        sae.pl.stability(archived)
