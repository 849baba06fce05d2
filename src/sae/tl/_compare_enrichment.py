from __future__ import annotations

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data
from .._pairs import Terms, holders, terms


def compare_enrichment(
    a: Data,
    b: Data,
    *,
    key: str = "sae",
    key_b: str | None = None,
    mod: str | None = None,
    mod_b: str | None = None,
    collection: str | None = None,
    max_padj: float = 0.05,
    published: bool = False,
    n_permutations: int = 20,
    rng: int | np.random.Generator | None = 0,
) -> pd.DataFrame:
    r"""Compare what the features of two SAEs stand for, by their gene sets: two models of the same cells, say.

    A term is a gene set in one direction; a feature has those with `padj` ≤ `max_padj`. The measures are

    * `"features"` in all, and `"annotated_features"`: those with a term;
    * `"terms"`, those of any feature, and `"terms_per_feature"`, the mean over annotated features;
    * `"shared_terms"`: those of any feature on both sides. By chance, n_a n_b / N of the N terms that either table lists;
      p-value P(X ≥ x), X ~ Hypergeometric(N, n_a, n_b);
    * `"spearman"`: rank correlation of the number of features that have each term, over the terms of either side. By
      chance: the features of `b` have other terms, a term in `b` being renamed to any of the N;
    * `"matched_jaccard"`: features are matched one to one for the highest sum of Jaccard indices :math:`|A ∩ B| / |A ∪ B|`, of which this is the
      mean over the annotated features of the side with fewer. By chance: the features of `b` exchange terms at random, each keeping
      as many, and each term its number of features (Strona et al. 2014, doi:10.1038/ncomms5114). What is above
      that is in which terms go together, not in which are frequent.

    Parameters
    ----------
    a, b
        AnnData or MuData, after :func:`sae.tl.enrich` with the same gene sets and `n_sets=None`, so that no feature has terms cut
        off. May be the same object.
    key
        Name of the SAE of `a`.
    key_b
        Name of the SAE of `b`, by default `key`.
    mod
        The modality that holds the SAE of `a`.
    mod_b
        The modality that holds the SAE of `b`, by default `mod` where `b` is a MuData.
    collection
        Only gene sets of this collection.
    max_padj
        Which gene sets a feature has.
    published
        Count as arXiv:2410.11468 does, for `method="scfeaturelens"` of `enrich`: a feature has all sets that are stored, whatever their
        `padj` and direction, and `"spearman"` is over shared terms.
    n_permutations
        Draws for what is by chance; 0 for none.
    rng
        Seed or generator, for these draws.

    Returns
    -------
    A row per measure: `measure`, `a` and `b` (what each side has by itself), `value` (what both have together), `chance`, the mean of
    what it is by chance, and `pval`, the share of draws that reach it, (1 + their number) / (1 + all). NaN where a measure
    has none; of shared terms also where the tables list none that was not found.

    Raises
    ------
    KeyError
        There is no such SAE, no table of gene sets or no such collection.
    ValueError
        No gene set is in both tables; a setting out of range.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> for seed in (0, 1):
    ...     key = f"seed{seed}"
    ...     sae.tl.fit(adata, n_features=32, steps=200, rng=seed, key_added=key)
    ...     sae.tl.encode(adata, key=key)
    ...     sae.tl.enrich(adata, sae.datasets.immune_markers(), key=key, n_sets=None)
    >>> table = sae.tl.compare_enrichment(adata, adata, key="seed0", key_b="seed1")
    >>> table["measure"].tolist()[-3:]
    ['shared_terms', 'spearman', 'matched_jaccard']
    """
    from ..core.overlap import overlap

    if not 0 < max_padj <= 1:
        raise ValueError(f"max_padj={max_padj} is not a probability above 0 and up to 1.")
    if isinstance(n_permutations, bool) or not isinstance(n_permutations, int | np.integer) or n_permutations < 0:
        raise ValueError(f"n_permutations={n_permutations!r} is not a number of draws. Pass 1 or more, or 0 for none.")
    left, right = holders(a, b, mod, mod_b)
    found = terms(
        left,
        key,
        right,
        key if key_b is None else key_b,
        collection=collection,
        max_padj=None if published else max_padj,
        signed=not published,
    )
    alike = overlap(
        found.a,
        found.b,
        np.random.default_rng(rng),
        counted="both" if published else "either",
        n_permutations=n_permutations,
    )
    rows = {
        **_each(found),
        "shared_terms": {"value": alike.shared, **_shared_by_chance(found, alike.shared)},
        "spearman": {"value": alike.spearman, **_by_chance(alike.spearman, alike.spearman_by_chance)},
        "matched_jaccard": {"value": alike.jaccard, **_by_chance(alike.jaccard, alike.jaccard_by_chance)},
    }
    columns = ["a", "b", "value", "chance", "pval"]
    values = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns).astype(np.float64)
    measure = pd.DataFrame({"measure": pd.Categorical(list(rows), categories=list(rows))}, index=values.index)
    return _schema.plain_index(measure.join(values))


def _each(found: Terms) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {
        name: {} for name in ("features", "annotated_features", "terms", "terms_per_feature")
    }
    for side, members in (("a", found.a), ("b", found.b)):
        annotated = int((members.getnnz(axis=1) > 0).sum())
        rows["features"][side] = members.shape[0]
        rows["annotated_features"][side] = annotated
        rows["terms"][side] = int((members.getnnz(axis=0) > 0).sum())
        rows["terms_per_feature"][side] = members.nnz / annotated if annotated else np.nan
    return rows


def _shared_by_chance(found: Terms, shared: int) -> dict[str, float]:
    from scipy import stats

    if found.all_found:
        return {}
    n_terms = found.a.shape[1]
    n_a, n_b = (int((members.getnnz(axis=0) > 0).sum()) for members in (found.a, found.b))
    return {"chance": n_a * n_b / n_terms, "pval": float(stats.hypergeom.sf(shared - 1, n_terms, n_a, n_b))}


def _by_chance(value: float, drawn: np.ndarray) -> dict[str, float]:
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(value) or not len(drawn):
        return {}
    return {"chance": float(drawn.mean()), "pval": float((1 + np.sum(drawn >= value)) / (1 + len(drawn)))}
