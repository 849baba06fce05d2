from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.files import replacing
from ._compact import packed, packed_json
from ._contents import Contents, contents

if TYPE_CHECKING:
    from .._data import Data
    from .._schema import Features


def report(
    data: Data,
    path: str | Path,
    *,
    key: str = "sae",
    mod: str | None = None,
    features: Features = None,
    basis: str | None = None,
    n_genes: int = 15,
    n_sets: int = 10,
    max_cells: int = 100_000,
) -> Path:
    """Write one HTML file to browse all features: a table to search, sort and filter, and a card per feature.

    The page shows whatever is stored: the card of a feature has the cells on an embedding coloured by its activation, a histogram,
    and, of the verbs that were run, labels, genes, gene sets, perturbations and similar features (those of `tl.feature_map`, else by
    the cosine of activations). The file needs no network and nothing else on disk; it opens in browsers from 2023 on.
    `report.html#sae_12` opens the card of a feature.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, after `tl.encode`.
    path
        The file to write, in a folder that is there. A file of this name is replaced once the new one is complete.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE and the embedding.
    features
        Only these, by name or number.
    basis
        Key of `obsm` to draw the cells on, with or without `X_`; by default the UMAP, else the t-SNE, else there is no map.
    n_genes
        Genes a card lists per direction.
    n_sets
        Gene sets a card lists per direction.
    max_cells
        Cells on the maps, half of them the strongest of their features and half drawn at random. Of one feature the 2,000 most active
        are drawn in colour. Numbers and histograms are of all cells.

    Returns
    -------
    The path.

    Raises
    ------
    KeyError
        There are no activations, or no such feature or embedding.
    FileNotFoundError
        The folder is not there.
    IsADirectoryError
        The path is a folder.
    ValueError
        `n_genes`, `n_sets` or `max_cells` is below 1; there are no cells.

    Notes
    -----
    The file holds no names of cells and no expression values, but the place of each drawn cell on the map, and the labels that features
    were scored against. Think of that before passing it on.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = sae.report(adata, Path(folder, "features.html"))
    ...     path.stat().st_size < 1_000_000
    True
    """
    from scanpy import logging as logg

    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Pass the name of a file in it, such as {path / 'report.html'}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent}. Make it first, or choose another path.")
    for name, value in (("n_genes", n_genes), ("n_sets", n_sets), ("max_cells", max_cells)):
        if value < 1:
            raise ValueError(f"{name}={value} is below 1.")
    start = logg.info(f"writing the report of {key!r}")
    found = contents(
        data, key=key, mod=mod, features=features, basis=basis, n_genes=n_genes, n_sets=n_sets, max_cells=max_cells
    )
    with replacing(path) as partial:
        partial.write_text(_page(found), encoding="utf-8", newline="\n")
    logg.info("    finished", time=start, deep=f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


def _page(found: Contents) -> str:
    """Fill the template; the page may run its own script and style, and reach nothing else."""
    from jinja2 import Environment
    from markupsafe import Markup

    texts = {name: resources.files(__package__).joinpath(name).read_text("utf-8") for name in PARTS}
    blobs = {"main": packed_json(found.main)}
    if found.cells is not None:
        blobs["cells"] = packed(found.cells)
    blobs |= {f"block{i}": packed_json(block) for i, block in enumerate(found.blocks)}
    blobs |= {f"points{i}": packed(points) for i, points in enumerate(found.points)}
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(texts["page.html"])
    return template.render(
        key=found.main["key"],
        facts=found.facts,
        notices=found.notices,
        has_map=found.main["map"] is not None,
        blobs=blobs,
        style=Markup(texts["page.css"]),
        script=Markup(texts["page.js"]),
        style_hash=_hash(texts["page.css"]),
        script_hash=_hash(texts["page.js"]),
    )


PARTS = ("page.html", "page.css", "page.js")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
