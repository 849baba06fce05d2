"""Figures beside the pictures they had before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from matplotlib.testing.compare import compare_images

ARCHIVE = Path(__file__).parents[1] / "archives" / "schema_1.h5ad"
PICTURES = Path(__file__).with_name("pictures")
MADE_WITH = "3.11"
"""The version of matplotlib, also in constraints.txt: others set text a little differently."""
DPI = 100
TOLERANCE = 1.5
"""Root mean square of the difference of pixels, of 255."""


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="session")
def _archived():
    return ad.read_h5ad(ARCHIVE)


@pytest.fixture
def archived(_archived):
    """350 real cells with stored results of every verb, the same on every machine."""
    return _archived.copy()


@pytest.fixture
def as_before(tmp_path) -> Callable[[str], None]:
    """Compare the current figure with its picture; `SAE_WRITE_PICTURES=1` makes it the picture instead."""

    if not mpl.__version__.startswith(MADE_WITH + "."):
        pytest.skip(
            f"the pictures are of matplotlib {MADE_WITH}, this is {mpl.__version__}; install with -c constraints.txt"
        )

    def check(name: str) -> None:
        expected, actual = PICTURES / f"{name}.png", tmp_path / f"{name}.png"
        plt.savefig(actual, dpi=DPI)
        if os.environ.get("SAE_WRITE_PICTURES"):
            PICTURES.mkdir(exist_ok=True)
            shutil.copyfile(actual, expected)
        assert expected.exists(), f"There is no picture {expected}. Look at the figure, then set SAE_WRITE_PICTURES=1."
        difference = compare_images(str(expected), str(actual), TOLERANCE)
        assert difference is None, difference

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.use("agg")
        yield check
