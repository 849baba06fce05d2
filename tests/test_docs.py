"""The docs: every public name is listed, the gallery is made of the tutorials, and what a newcomer is told to run runs."""

from __future__ import annotations

import base64
import importlib.util
import inspect
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

import sae

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LISTED = re.compile(r"^   ((?:\w+\.)?\w+)$", flags=re.MULTILINE)

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="the docs are not part of the source distribution")


def gallery():
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "_ext" / "gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- The list of functions


def public_names() -> set[str]:
    modules = (sae.tl, sae.pl, sae.get, sae.io, sae.models, sae.datasets)
    names = {f"{module.__name__.removeprefix('sae.')}.{name}" for module in modules for name in module.__all__}
    return names | {name for name in sae.__all__ if not inspect.ismodule(getattr(sae, name))}


def test_every_public_name_is_listed_once():
    tables = re.findall(
        r"^\.\. autosummary::\n(?:   :.*\n)+\n((?:   .+\n)+)", (DOCS / "api.md").read_text(), re.MULTILINE
    )
    listed = [name for table in tables for name in LISTED.findall(table)]
    assert sorted(listed) == sorted(public_names())


# ---- The gallery of tutorials


def png(width: int = 30, height: int = 60, color: str = "red") -> str:
    written = io.BytesIO()
    Image.new("RGB", (width, height), color).save(written, "png")
    return base64.b64encode(written.getvalue()).decode()


def cell(kind: str, source: str = "", *, tags: tuple[str, ...] = (), pictures: tuple[str, ...] = ()) -> dict:
    made = {"cell_type": kind, "source": source.splitlines(keepends=True), "metadata": {"tags": list(tags)}}
    outputs = [{"output_type": "display_data", "data": {"image/png": picture}} for picture in pictures]
    return made | ({"outputs": outputs} if kind == "code" else {})


TITLE = cell(
    "markdown",
    "# On [cells](x.md)\n\nAre there, e.g. in *blood*,\nfew [kinds](https://a.b) of cells? Yes. No.\n\nMore.",
)
FIGURE = cell("code", "plot()", tags=("thumbnail",), pictures=(png(), png(90, 30, "blue")))


@pytest.fixture
def notebooks(tmp_path):
    """Write notebooks from cells, and return their folder."""

    def write(**named) -> Path:
        for name, cells in named.items():
            (tmp_path / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))
        return tmp_path

    return write


def test_a_card_is_read_from_a_notebook(notebooks):
    card = gallery().read_card(notebooks(one=[TITLE, cell("code"), FIGURE]) / "one.ipynb")
    assert card.title == "On cells"
    assert card.description == "Are there, e.g. in *blood*, few kinds of cells?"
    assert Image.open(io.BytesIO(card.png)).size == (90, 30)


def test_a_gallery_becomes_cards_in_its_order(notebooks):
    folder = notebooks(one=[TITLE, FIGURE], two=[TITLE, FIGURE])
    page = "# T\n\n```{gallery}\ntwo\none\n```\n\n```python\nx\n```\n"
    made = gallery().expand(page, folder, folder / "pictures")
    assert re.findall(r":link: (\S+)", made) == ["tutorials/two", "tutorials/one"]
    assert re.findall(r"^tutorials/\S+$", made, re.MULTILINE) == ["tutorials/two", "tutorials/one"]
    assert made.startswith("# T\n") and made.endswith("```python\nx\n```\n") and "{gallery}" not in made
    picture = Image.open(folder / "pictures" / "one.png").convert("RGB")
    assert picture.size == gallery().SIZE
    corner, middle = picture.getpixel((0, 0)), picture.getpixel((picture.width // 2, picture.height // 2))
    assert (corner, middle) == ((255, 255, 255), (0, 0, 255))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([cell("code"), FIGURE], "has to be Markdown and start with a title"),
        ([cell("markdown", "Words."), FIGURE], "has to be Markdown and start with a title"),
        ([cell("markdown", "# Title\n"), FIGURE], "needs a sentence"),
        ([TITLE, cell("code", pictures=(png(),))], "0 cells are tagged 'thumbnail'"),
        ([TITLE, FIGURE, FIGURE], "2 cells are tagged 'thumbnail'"),
        ([TITLE, cell("code", tags=("thumbnail",))], "has no picture. Run the notebook"),
    ],
    ids=["no-text", "no-title", "no-description", "no-tag", "two-tags", "not-run"],
)
def test_what_a_card_lacks_is_said(notebooks, cells, message):
    with pytest.raises(ValueError, match=rf"one\.ipynb: .*{re.escape(message)}"):
        gallery().read_card(notebooks(one=cells) / "one.ipynb")


@pytest.mark.parametrize(
    ("named", "message"),
    [("one", "has two, which no gallery names"), ("one\ntwo\nsix", "name six"), ("one\ntwo\none", "name one")],
)
def test_a_notebook_outside_of_the_gallery_is_an_error(notebooks, named, message):
    folder = notebooks(one=[TITLE, FIGURE], two=[TITLE, FIGURE])
    with pytest.raises(ValueError, match=message):
        gallery().expand(f"```{{gallery}}\n{named}\n```\n", folder, folder / "pictures")


def test_every_tutorial_has_a_card(tmp_path):
    made = gallery().expand((DOCS / "tutorials.md").read_text(), ROOT / "tutorials", tmp_path)
    assert made.count("{grid-item-card}") == len(list((ROOT / "tutorials").glob("*.ipynb"))) > 0
    assert all(path.stat().st_size < 200_000 for path in tmp_path.iterdir())


def test_sphinx_renders_the_gallery(notebooks, tmp_path):
    pytest.importorskip("sphinx_design", reason="needs the doc extra")
    pytest.importorskip("myst_nb", reason="needs the doc extra")
    source = tmp_path / "docs"
    (source / "tutorials").mkdir(parents=True)
    figure = FIGURE | {"execution_count": 1, "outputs": [{**out, "metadata": {}} for out in FIGURE["outputs"]]}
    notebook = {
        "cells": [{"id": "a", **cell("markdown", "# One\n\nA sentence.")}, {"id": "b", **figure}],
        "metadata": {"language_info": {"name": "python", "pygments_lexer": "ipython3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (source / "tutorials" / "one.ipynb").write_text(json.dumps(notebook))
    (source / "index.md").write_text("# Top\n\n```{gallery}\none\n```\n")
    (source / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(DOCS / '_ext')!r})\n"
        "extensions = ['gallery', 'myst_nb', 'sphinx_design']\nmyst_enable_extensions = ['colon_fence']\n"
        "nb_execution_mode = 'off'\n"
    )
    command = [sys.executable, "-m", "sphinx", "-W", "-q", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "index.html").read_text()
    assert 'href="tutorials/one.html"' in page and "A sentence." in page and "_images/one.png" in page


# ---- Getting started


def test_the_first_page_to_follow_can_be_followed(tmp_path, monkeypatch):
    """Run the blocks of docs/start.md, one after the other, on a file of counts with labels."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 400)
    means = rng.gamma(1.0, 1.0, (3, 200))
    cells = ad.AnnData(rng.poisson(3 * means[kind]).astype(np.float32))
    cells.var_names = [f"G{i}" for i in range(200)]
    cells.obs["cell_type"] = np.array(["T", "B", "NK"])[kind]
    monkeypatch.chdir(tmp_path)
    cells.write_h5ad("my_cells.h5ad")
    highest = means.argmax(axis=0)
    sets = [f"SET_{k}\t\t" + "\t".join(cells.var_names[(highest == k)][:30]) for k in range(3)]
    Path("my_sets.gmt").write_text("\n".join(sets))

    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / "start.md").read_text(), re.DOTALL | re.MULTILINE)
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)
    plt.close("all")
    written = ad.read_h5ad("my_features.h5ad")
    assert len(blocks) >= 5 and {"genes", "enrichment", "labels", "steering"} <= set(written.uns["sae"])
    assert sae.get.features(written).loc[namespace["feature"], "name_from"] == "label"
    assert sae.get.enrichment(written, namespace["feature"])["gene_set"].str.startswith("SET_").any()
