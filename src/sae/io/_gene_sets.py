"""Read gene sets from the files that others publish."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import pandas as pd

from .. import _genesets, _ontology
from .._data import listing
from .._ontology import ASPECTS, GENE_COLUMN, RELATIONS, Annotations, Ontology

__all__ = ["read_gmt", "read_go", "read_go_terms"]


def read_gmt(path: str | Path) -> pd.DataFrame:
    r"""Read the gene sets of a GMT file, such as those of MSigDB or Enrichr.

    A line is the name of a set, a description and the genes, separated by tabs. Where the name is an identifier and the
    description is none ("GO:0030218", "erythrocyte differentiation"), the set is called
    "erythrocyte differentiation (GO:0030218)".

    Parameters
    ----------
    path
        The file; may be gzipped, whatever its name.

    Returns
    -------
    A table with a row per gene set and gene, `source` (set) and `target` (gene), in the order of the file. It goes as it is
    into :func:`sae.tl.enrich`, or into decoupler.

    Raises
    ------
    ValueError
        A line has fewer than three fields, a set occurs twice, or there are no sets; the file is no text in UTF-8, its gzip is
        damaged, or it never ends.
    FileNotFoundError
        There is no such file.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import sae
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "sets.gmt")
    ...     _ = path.write_text("GO:0030218\terythrocyte differentiation\tGATA1\tKLF1\n")
    ...     net = sae.io.read_gmt(path)
    >>> net.values.tolist()
    [['erythrocyte differentiation (GO:0030218)', 'GATA1'], ['erythrocyte differentiation (GO:0030218)', 'KLF1']]
    """
    net = _long(_genesets.read_gmt(path))
    if net.empty:
        raise ValueError(f"{path} has no gene sets. A GMT line is name, description, genes, separated by tabs.")
    return net


def read_go(
    obo: str | Path,
    gaf: str | Path,
    *,
    aspect: Literal["P", "F", "C"] | None = "P",
    propagate: bool = True,
    relations: Sequence[str] = ("is_a", "part_of"),
    evidence: Sequence[str] | None = None,
    exclude_evidence: Sequence[str] = ("ND",),
    genes: Literal["symbol", "id"] = "symbol",
) -> pd.DataFrame:
    r"""Make gene sets from the files of the Gene Ontology, as it publishes them at https://geneontology.org.

    A gene annotated with a term belongs to it, and to every term that it leads to: the "true path rule" (Ashburner et al. 2000,
    doi:10.1038/75556). Annotations with the qualifier NOT and obsolete terms are left out; alternative ids stand for the
    term they were merged into.

    Parameters
    ----------
    obo
        The ontology, such as go-basic.obo; may be gzipped.
    gaf
        The annotations in GAF 2.x, such as goa_human.gaf.gz; may be gzipped. Best of the same release.
    aspect
        Whose terms to return: `"P"`, biological process, `"F"`, molecular function, `"C"`, cellular component; None for all.
    propagate
        Add the genes of each term to its ancestors; False for the annotations as they stand.
    relations
        Relations to propagate over. The default are the two that are safe according to the Gene Ontology
        (https://geneontology.org/docs/ontology-relations). Add `"regulates"` (which
        includes `"positively_regulates"` and `"negatively_regulates"`) for sets as Bioconductor's annotation packages
        have them: whoever regulates a process then belongs to it. goatools follows `("is_a",)` unless told otherwise. `"is_a"` stays within an aspect; where the file has the others between aspects
        (go.obo has, go-basic.obo has not), genes follow them. Relations to terms that are not in the file are not followed.
    evidence
        Only annotations with these evidence codes; None for all.
    exclude_evidence
        No annotations with these evidence codes; `"ND"` says that nothing is known, and `"IEA"` are those that nobody checked.
    genes
        What to call a gene: `"symbol"` (column 3) or `"id"` (column 2, a UniProt accession in human files). Lines where it is
        blank are left out, and counted in a warning.

    Returns
    -------
    A table with a row per gene set and gene: `source`, such as "erythrocyte differentiation (GO:0030218)", and `target`,
    ordered by id and gene. It goes as it is into :func:`sae.tl.enrich`, which leaves out terms with few or very many
    genes, or into decoupler.

    Raises
    ------
    ValueError
        A line is not OBO or GAF, terms go round in a circle, an option is none of the above, or no gene is left; a file is no
        text in UTF-8, its gzip is damaged, or it never ends.
    FileNotFoundError
        There is no such file.

    Examples
    --------
    Files of one gene and two terms, in place of the real ones:

    >>> import tempfile
    >>> from pathlib import Path
    >>> import sae
    >>> terms = '''
    ... [Term]
    ... id: GO:0030218
    ... name: erythrocyte differentiation
    ... namespace: biological_process
    ... is_a: GO:0030099 ! myeloid cell differentiation
    ...
    ... [Term]
    ... id: GO:0030099
    ... name: myeloid cell differentiation
    ... namespace: biological_process
    ... '''
    >>> start = [
    ...     "UniProtKB",
    ...     "P15976",
    ...     "GATA1",
    ...     "involved_in",
    ...     "GO:0030218",
    ...     "PMID:1",
    ...     "IDA",
    ...     "",
    ...     "P",
    ...     "",
    ...     "",
    ...     "protein",
    ... ]
    >>> annotation = "\t".join([*start, "taxon:9606", "20200101", "UniProt", "", ""])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     obo, gaf = Path(folder, "go-basic.obo"), Path(folder, "goa_human.gaf")
    ...     _ = obo.write_text(terms), gaf.write_text(annotation)
    ...     net = sae.io.read_go(obo, gaf)
    >>> net.values.tolist()
    [['myeloid cell differentiation (GO:0030099)', 'GATA1'], ['erythrocyte differentiation (GO:0030218)', 'GATA1']]
    """
    _check_aspect(aspect)
    if genes not in GENE_COLUMN:
        raise ValueError(f"genes={genes!r} is neither 'symbol' nor 'id'.")
    ontology = _ontology.read_obo(obo)
    followed = _several(relations)
    _check_relations(obo, ontology, followed)
    annotations = _ontology.read_gaf(
        gaf,
        ontology,
        evidence=None if evidence is None else _several(evidence),
        exclude=_several(exclude_evidence),
        genes=genes,
    )
    _warn_of_missing(obo, gaf, annotations)
    members = annotations.members
    if propagate:
        members = _ontology.propagate(members, ontology.parents(followed))
    wanted = [term for term in sorted(members) if aspect in (None, ontology.aspects[term])]
    if not wanted:
        raise ValueError(
            f"None of the {annotations.n_lines} annotations of {gaf} is left: {annotations.left_out['NOT']} have the qualifier "
            f"NOT, {annotations.left_out['evidence']} other evidence, {annotations.left_out['blank']} no {genes}, "
            f"{annotations.unknown.total() + annotations.obsolete.total()} terms not in use, and the others another aspect. "
            "Change aspect=, evidence= or exclude_evidence=, or pass another file."
        )
    return _long({_name(term, ontology): sorted(members[term]) for term in wanted})


def read_go_terms(
    obo: str | Path,
    *,
    aspect: Literal["P", "F", "C"] | None = "P",
    relations: Sequence[str] = ("is_a", "part_of"),
) -> pd.DataFrame:
    r"""Read the terms of the Gene Ontology, and what lies above each.

    Parameters
    ----------
    obo
        The ontology, such as go-basic.obo; may be gzipped.
    aspect
        `"P"` (biological process), `"F"` (molecular function), `"C"` (cellular component), or None for all. Parents of another
        aspect are left out.
    relations
        What leads to a parent; `"regulates"` includes its positive and negative kinds.

    Returns
    -------
    A table with a row per term and parent, ordered by id: `term`, `name` (of the term) and `parent`. A term without a parent, such as
    the top of the ontology, has one row, where it is missing. The table goes as it is into :func:`sae.get.parent_terms`.

    Raises
    ------
    ValueError
        A line is not OBO, or an option is none of the above; the file is no text in UTF-8, its gzip is damaged, or it never ends.
    FileNotFoundError
        There is no such file.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import sae
    >>> terms = '''
    ... [Term]
    ... id: GO:0008150
    ... name: biological_process
    ... namespace: biological_process
    ...
    ... [Term]
    ... id: GO:0008152
    ... name: metabolic process
    ... namespace: biological_process
    ... is_a: GO:0008150 ! biological_process
    ... '''
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     obo = Path(folder, "go-basic.obo")
    ...     _ = obo.write_text(terms)
    ...     parents = sae.io.read_go_terms(obo)
    >>> parents.values.tolist()
    [['GO:0008150', 'biological_process', None], ['GO:0008152', 'metabolic process', 'GO:0008150']]
    """
    _check_aspect(aspect)
    ontology = _ontology.read_obo(obo)
    followed = _several(relations)
    _check_relations(obo, ontology, followed)
    above = ontology.parents(followed)
    rows: list[tuple[str, str, str | None]] = []
    for term in sorted(ontology.names):
        if aspect in (None, ontology.aspects[term]):
            parents = [parent for parent in sorted(above[term]) if aspect in (None, ontology.aspects[parent])]
            rows += [(term, ontology.names[term], parent) for parent in parents]
            if not parents:
                rows.append((term, ontology.names[term], None))
    return pd.DataFrame(rows, columns=["term", "name", "parent"], dtype=object)


def _check_aspect(aspect: str | None) -> None:
    if aspect is not None and aspect not in ASPECTS.values():
        raise ValueError(f"aspect={aspect!r} is not one of {listing(ASPECTS.values())}, nor None for all.")


def _several(values: Iterable[str]) -> tuple[str, ...]:
    """Take one name for a list of one: a string would else be a list of letters."""
    return (values,) if isinstance(values, str) else tuple(values)


def _check_relations(obo: str | Path, ontology: Ontology, relations: Sequence[str]) -> None:
    known = dict.fromkeys(RELATIONS)
    known |= dict.fromkeys(relation for related in ontology.relations.values() for relation, _ in related)
    unknown = [relation for relation in relations if relation not in known]
    if unknown:
        raise ValueError(f"relations= has {listing(unknown)}, which {obo} lacks; it may have {listing(known)}.")


def _warn_of_missing(obo: str | Path, gaf: str | Path, annotations: Annotations) -> None:
    from scanpy import logging as logg

    if annotations.left_out["blank"]:
        logg.warning(f"{annotations.left_out['blank']} annotations of {gaf} name no gene; they are left out.")
    for terms, fate in ((annotations.unknown, "are not in"), (annotations.obsolete, "are obsolete in")):
        if terms:
            logg.warning(
                f"{len(terms)} terms of {gaf} {fate} {obo}; their {terms.total()} annotations are left out "
                f"({listing(terms, 3)}). Take both files from the same release."
            )


def _name(term: str, ontology: Ontology) -> str:
    return f"{ontology.names[term]} ({term})" if ontology.names[term] else term


def _long(sets: Mapping[str, Iterable[str]]) -> pd.DataFrame:
    return pd.DataFrame(((name, gene) for name, genes in sets.items() for gene in genes), columns=["source", "target"])
