from __future__ import annotations

import inspect

import anndata as ad
import numpy as np
import pytest

import sae


def test_verbs_are_those_of_the_package(pbmc, compare):
    by_function = pbmc.copy()
    sae.tl.fit(by_function, n_features=16, steps=50, progress=False)
    sae.tl.encode(by_function)
    assert pbmc.sae.fit(n_features=16, steps=50, progress=False) is None
    pbmc.sae.encode()
    compare.assert_same(compare.state(by_function), compare.state(pbmc))


def test_results_and_figures_are_under_their_names(analysed):
    assert analysed.sae.get.genes("sae_0", n=3).equals(sae.get.genes(analysed, "sae_0", n=3))
    assert analysed.sae.pl.history("fvu").get_ylabel() == sae.pl.history(analysed, "fvu").get_ylabel()


def test_two_objects_are_compared(encoded):
    pairs = encoded.sae.match(encoded.copy(), n_permutations=0)
    assert (pairs["feature"] == pairs["feature_b"]).all()


@pytest.mark.parametrize("part", ["tl", "get", "pl"])
def test_every_function_on_data_is_there_with_its_docs(part):
    adata = ad.AnnData(np.ones((3, 2)))
    methods = adata.sae if part == "tl" else getattr(adata.sae, part)
    module = getattr(sae, part)
    for name in module.__all__:
        function = getattr(module, name)
        if not callable(function) or next(iter(inspect.signature(function).parameters)) not in ("data", "a"):
            continue
        method = getattr(methods, name)
        assert method.__doc__ == function.__doc__
        first, *rest = inspect.signature(function).parameters.values()
        assert list(inspect.signature(method).parameters.values()) == rest


def test_what_is_there_is_told(encoded):
    assert repr(ad.AnnData(np.ones((3, 2))).sae) == "No SAEs: adata.sae.fit() trains one."
    assert repr(encoded.sae).startswith("SAEs:\n    'sae': 32 features; ")


def test_errors_are_those_of_the_functions():
    adata = ad.AnnData(np.ones((3, 2)))
    with pytest.raises(KeyError, match="Run sae.tl.fit"):
        adata.sae.encode()
