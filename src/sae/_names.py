"""Short names of features: one rule, for the verb that stores them and for the titles of figures."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from . import _schema, get
from ._data import Data, holder, listing

SOURCES = ("label", "gene set", "genes")
WIDTH = 40
LONG = 22
"""A meaning of more characters is followed by one gene instead of two."""
N_GENES = 10
"""Genes that are listed for a feature, and that can be in its name."""

PREFIX = re.compile(r"^(?:HALLMARK|REACTOME|GO(?:BP|CC|MF)?|KEGG(?:_LEGACY|_MEDICUS)?|WP|PID|BIOCARTA|HP)_")
IDENTIFIER = re.compile(r"\s*(?:\([A-Za-z_]+:\w+\)|\bR-[A-Z]{3}-\d+|\bWP\d+)$")
ENSEMBL = re.compile(r"(?<=\w)[_.|]ENS[A-Z]*G\d+.*$")
EVERYWHERE = re.compile(r"^(?:MT-|RP[LS](?:\d+(?![\dK])|P\d|A$)|MALAT1$)", re.IGNORECASE)
"""Mitochondrial transcripts, ribosomal proteins (not their kinases, RPS6KA1 and so on) and MALAT1."""
PEAK = re.compile(r"^\S+[:_-]\d{3,}[-_]\d{3,}$")
"""A peak of open chromatin, "chr1-1000-2000"."""
ABBREVIATED = {"ositive regulation": "os. reg.", "egative regulation": "eg. reg.", "egulation of": "eg. of"}
ACRONYMS = {
    word.upper(): word
    for word in (
        "DNA RNA mRNA rRNA tRNA miRNA snRNA ncRNA ATP ATPase GTPase ADP AMP cAMP cGMP NAD NADH NADPH CoA ER ERAD SUMO UV ROS "
        "GABA AMPA NMDA HIV SARS AKT ALK AMPK AP APC ERK IKK JAK JUN KRAS MAP MAPK MTOR MYC NFAT RAB RAC RAF RAS RHO STAT TOR "
        "EGF EGFR IFN IGA IGE IGF IGG TNFA VEGF TCA GPI II III IV VI"
    ).split()
}


def names(
    data: Data,
    *,
    key: str,
    mod: str | None,
    modality: str | None = None,
    collection: str | None = None,
    groupby: str | None = None,
    by: str | Sequence[str] = SOURCES,
    max_padj: float = 0.05,
    min_auroc: float = 0.8,
    min_f1: float = 0.5,
) -> pd.DataFrame:
    """Make the columns that :func:`sae.tl.name_features` describes, a row per feature, from whatever tables there are."""
    preferred = [by] if isinstance(by, str) else list(by)
    if not preferred or not set(preferred) <= set(SOURCES):
        raise ValueError(
            f"by={by!r} is not a choice from {listing(SOURCES)}. Pass some of them, the preferred one first."
        )
    features = get.features(data, key=key, mod=mod)
    stored = _schema.read(holder(data, mod), key)
    tables = [name for name in ("enrichment", "genes") if name in stored]
    if modality is not None and tables and not any(_has(stored[name], modality) for name in tables):
        getattr(get, tables[0])(data, modality=modality, key=key, mod=mod)
    sets, labels = pd.DataFrame(columns=_schema.ENRICHMENT), pd.DataFrame(columns=_schema.LABELS)
    if _has(stored.get("enrichment"), modality) or collection is not None:
        sets = get.enrichment(
            data, direction="up", collection=collection, modality=modality, max_padj=max_padj, key=key, mod=mod
        )
        sets = sets[~(sets["fdr"] > max_padj)]
    if "labels" in stored or groupby is not None:
        labels = get.labels(data, groupby=groupby, max_padj=max_padj, key=key, mod=mod)
        known = (labels["held_out_auroc"] >= min_auroc) & (labels["held_out_f1"] >= min_f1)
        labels = labels[known & (labels["auroc"] > 0.5)]
    sets, labels = _best(sets), _best(labels)
    if _has(stored.get("genes"), modality):
        raised = get.genes(data, direction="up", modality=modality, max_padj=max_padj, key=key, mod=mod)
        genes = raised["gene"].astype(str).groupby(raised["feature"].astype(str)).agg(list)
    else:
        genes = sets.loc[sets["genes"] != "", "genes"].astype(str).str.split(";")

    meanings = {
        "label": {name: label_text(*row) for name, *row in labels[["label", "groupby"]].itertuples()},
        "gene set": {name: set_text(gene_set) for name, gene_set in sets["gene_set"].items()},
        "genes": dict.fromkeys(genes.index, ""),
    }
    strongest = features["mean"].sort_values(ascending=False, kind="stable").index
    source = {name: next((kind for kind in preferred if name in meanings[kind]), "none") for name in strongest}
    texts = {
        name: [name] if kind == "none" else list(_texts(meanings[kind][name], shown_genes(genes.get(name, []))))
        for name, kind in source.items()
    }
    columns = {
        "name": pd.Series(_distinct(texts)),
        "name_from": pd.Series(source),
        "name_gene_set": sets["gene_set"],
        "name_gene_set_padj": sets["padj"].astype(np.float64),
        "name_gene_set_fdr": sets["fdr"].astype(np.float64),
        "name_label": labels["label"],
        "name_groupby": labels["groupby"],
        "name_label_auroc": labels["held_out_auroc"].astype(np.float64),
        "name_genes": genes.str[:N_GENES].str.join(";"),
    }
    return pd.DataFrame(
        {name: _storable(values.reindex(features.index)) for name, values in columns.items()}, index=features.index
    )


def set_text(name: str) -> str:
    """Write the name of a gene set as a phrase: without collection and identifier, in sentence case."""
    plain = PREFIX.sub("", name)
    words = IDENTIFIER.sub("", plain).replace("_", " ").split()
    if plain.isupper() and (plain != name or "_" in plain):
        words = [_cased(word) for word in words]
    if words and words[0].islower():
        words[0] = words[0][0].upper() + words[0][1:]
    return " ".join(words) or name


def label_text(label: str, groupby: str) -> str:
    """Write a label as it is, and with its column where it says nothing alone: "leiden 7"."""
    alone = any(character.isalpha() for character in label) and label not in ("True", "False")
    return (label if alone else f"{groupby} {label}").replace("_", " ")


def shown_genes(genes: Sequence[str]) -> list[str]:
    """Choose the genes that can be in a name: those that are not in every cell, and no peaks, if there are any, as symbols."""
    telling = [gene for gene in genes if not (EVERYWHERE.match(gene) or PEAK.match(gene))]
    return list(dict.fromkeys(ENSEMBL.sub("", gene) for gene in telling or genes))[:N_GENES]


def shorten(text: str, width: int = WIDTH) -> str:
    """Abbreviate a long text, and cut what is still too long, at a word where it has several."""
    if len(text) > width:
        for word, short in ABBREVIATED.items():
            text = text.replace(word, short)
    if len(text) <= width:
        return text
    return (text[:width].rpartition(" ")[0].rstrip() or text[: width - 1]) + "…"


def _cased(word: str) -> str:
    """Bring a word of a name in capitals into lower case, unless it is a symbol or an acronym."""
    symbol = len(word) == 1 or any(c.isdigit() for c in word) or not any(c in "AEIOUY" for c in word)
    return word if symbol else ACRONYMS.get(word, word.lower())


def _texts(meaning: str, genes: list[str]) -> Iterator[str]:
    """Yield names, the best first: with the top genes, then with another gene in place of the last one."""
    n = 3 if not meaning else 2 if len(meaning) <= LONG else 1
    for last in range(n, max(len(genes), n) + 1):
        shown = ", ".join(genes[: n - 1] + genes[last - 1 : last])
        room = max(WIDTH - len(" · ") - len(shown), LONG) if shown else WIDTH
        yield " · ".join(part for part in (shorten(meaning, room), shown) if part)


def _distinct(texts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Give each feature, in this order, the first text that none before it has, numbered where there is no other."""
    named: dict[str, str] = {}
    taken: set[str] = set()
    for feature, own in texts.items():
        numbered = (f"{own[0]} ({i})" for i in itertools.count(2))
        named[feature] = next(text for text in itertools.chain(own, numbered) if text not in taken)
        taken.add(named[feature])
    return named


def _has(table: pd.DataFrame | None, modality: str | None) -> bool:
    """Tell whether there is a table, with rows of the modality if one is asked for."""
    if table is None or modality is None:
        return table is not None
    return "modality" in table and bool((table["modality"] == modality).any())


def _best(table: pd.DataFrame) -> pd.DataFrame:
    """Keep the first row of each feature."""
    first = table.drop_duplicates("feature")
    return first.set_index(first["feature"].astype(str))


def _storable(values: pd.Series) -> pd.Series | pd.Categorical:
    """Make text categorical."""
    return values if values.dtype == np.float64 else pd.Categorical(values.to_numpy(dtype=object))
