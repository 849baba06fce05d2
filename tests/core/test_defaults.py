from __future__ import annotations

import pytest

from sae.core.defaults import nested_groups


@pytest.mark.parametrize("n_features", [1, 8, 15, 16, 64, 100, 1024])
@pytest.mark.parametrize("n_effective", [1.0, 5.9, 20.0, 200.0])
def test_nested_groups_double_from_what_the_inputs_need(n_features, n_effective):
    *inner, last = nested_groups(n_features, n_effective)
    assert last == n_features
    assert all(2 * one == other for one, other in zip(inner[:-1], inner[1:], strict=True))
    if inner:
        assert n_effective < inner[0]
        assert inner[-1] < n_features <= 2 * inner[-1]
    else:
        assert n_features <= 2 * n_effective + 16
