"""The Gene Ontology's own files: terms and their relations (OBO), annotations of genes (GAF), and propagation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from ._data import listing
from ._genesets import open_text

ASPECTS = {"biological_process": "P", "molecular_function": "F", "cellular_component": "C"}
KINDS = {"regulates": ("positively_regulates", "negatively_regulates")}
"""Relations that are kinds of another, and followed with it."""
RELATIONS = ("is_a", "part_of", "regulates", *KINDS["regulates"])
"""Those of go-basic.obo, which may be asked for also where a file has none."""
RELATED = ("is_a", "relationship")
USED = {"id", "name", "namespace", "alt_id", "is_obsolete", *RELATED}
TERM = re.compile(r"GO:\d{7}")
COMMENT = re.compile(r"(?<!\\)!.*")
ESCAPED = re.compile(r"\\(.)")
COLUMNS = range(15, 18)
"""GAF 2.x has 17 columns, of which the last two may be empty; GAF 1.0 has 15."""
GENE_COLUMN = {"id": 1, "symbol": 2}


@dataclass(frozen=True)
class Ontology:
    """The terms of a file that are in use, by id.

    Attributes
    ----------
    names, aspects
        Of every term in use; aspects are "P", "F" and "C".
    primary
        The id of every term in use by each of its ids, alternative ones included.
    obsolete
        Terms no longer in use.
    relations
        The relation and the other term, of every term.
    """

    names: Mapping[str, str]
    aspects: Mapping[str, str]
    primary: Mapping[str, str]
    obsolete: Collection[str]
    relations: Mapping[str, list[tuple[str, str]]]

    def parents(self, relations: Iterable[str]) -> dict[str, set[str]]:
        """Find the terms that each term leads to over some relations; `is_a` stays within an aspect."""
        followed = {kind for relation in relations for kind in (relation, *KINDS.get(relation, ()))}
        found: dict[str, set[str]] = {term: set() for term in self.names}
        for term, related in self.relations.items():
            for relation, other in related:
                parent = self.primary.get(other)
                if parent is None or relation not in followed:
                    continue
                if relation != "is_a" or self.aspects[parent] == self.aspects[term]:
                    found[term].add(parent)
        return found


def read_obo(path: str | Path) -> Ontology:
    """Read an OBO file, plain or gzipped."""
    names, aspects, relations = {}, {}, {}
    alternatives: dict[str, str] = {}
    obsolete, seen = set(), set()
    with open_text(path) as lines:
        for number, tags in _term_stanzas(path, lines):
            values = dict(tags)
            term = values.get("id")
            if not term:
                raise ValueError(f"{path}, line {number}: this [Term] has no id. Download the file again.")
            if term in seen:
                raise ValueError(f"{path}, line {number}: the term {term!r} occurs twice. Download the file again.")
            seen.add(term)
            if values.get("is_obsolete") == "true":
                obsolete.add(term)
            elif values.get("namespace") in ASPECTS:
                names[term] = values.get("name", "")
                aspects[term] = ASPECTS[values["namespace"]]
                alternatives |= {value: term for tag, value in tags if tag == "alt_id"}
                relations[term] = [_relation(path, number, tag, value) for tag, value in tags if tag in RELATED]
    if not names:
        raise ValueError(
            f"{path} has no terms of the Gene Ontology. Pass its OBO file, such as go-basic.obo, as obo=; the GAF file is gaf=."
        )
    primary = alternatives | {term: term for term in names}
    return Ontology(names, aspects, primary, obsolete, relations)


def _term_stanzas(path: str | Path, lines: Iterable[str]) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """Yield the line number and the tags with their values of each term."""
    stanza, start = "header", 0
    tags: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith("!"):
            continue
        if line.startswith("[") and line.endswith("]"):
            if stanza == "[Term]":
                yield start, tags
            stanza, start, tags = line, number, []
            continue
        tag, colon, value = line.partition(":")
        if not colon:
            raise ValueError(
                f"{path}, line {number} is {line[:60]!r}; a line of an OBO file is 'tag: value'. "
                "Is it an OBO file, and the download complete?"
            )
        if tag in USED:
            tags.append((tag, ESCAPED.sub(r"\1", COMMENT.sub("", value).strip())))
    if stanza == "[Term]":
        yield start, tags


def _relation(path: str | Path, number: int, tag: str, value: str) -> tuple[str, str]:
    # What may follow the id, in braces, is of no concern here.
    words = [tag, *value.split()] if tag == "is_a" else value.split()
    if len(words) < 2:
        raise ValueError(
            f"{path}, line {number}: this [Term] has the line '{tag}: {value}', which names no other term. "
            "Download the file again."
        )
    return words[0], words[1]


@dataclass(frozen=True)
class Annotations:
    """The genes of each term, and how many lines of the file were not used, by reason and for unknown terms by term.

    Attributes
    ----------
    members
        Genes by primary id of the term.
    n_lines
        Annotations in the file.
    left_out
        Lines by reason: `"NOT"`, `"evidence"`, `"blank"`.
    unknown, obsolete
        Lines by term that the ontology lacks, or has as obsolete.
    """

    members: Mapping[str, set[str]]
    n_lines: int
    left_out: Counter[str]
    unknown: Counter[str]
    obsolete: Counter[str]


def read_gaf(
    path: str | Path, ontology: Ontology, *, evidence: Collection[str] | None, exclude: Collection[str], genes: str
) -> Annotations:
    """Read a GAF file, plain or gzipped."""
    column = GENE_COLUMN[genes]
    members: dict[str, set[str]] = {}
    left_out, unknown, obsolete = Counter[str](), Counter[str](), Counter[str]()
    n_lines = 0
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.startswith("!") or not line.strip():
                continue
            n_lines += 1
            fields = line.rstrip("\r\n").split("\t")
            _check_fields(path, number, fields)
            term, code, gene = fields[4], fields[6], fields[column].strip()
            primary = ontology.primary.get(term)
            if "NOT" in fields[3].upper().split("|"):
                left_out["NOT"] += 1
            elif code in exclude or (evidence is not None and code not in evidence):
                left_out["evidence"] += 1
            elif not gene:
                left_out["blank"] += 1
            elif primary is None:
                (obsolete if term in ontology.obsolete else unknown)[term] += 1
            else:
                members.setdefault(primary, set()).add(gene)
    return Annotations(members, n_lines, left_out, unknown, obsolete)


def _check_fields(path: str | Path, number: int, fields: list[str]) -> None:
    where = f"{path}, line {number}"
    if len(fields) not in COLUMNS:
        raise ValueError(
            f"{where} has {len(fields)} fields separated by tabs; a GAF line has 17. "
            "Is it a GAF file (not GPAD), and the download complete?"
        )
    if not TERM.fullmatch(fields[4]):
        raise ValueError(
            f"{where} has {fields[4]!r} in column 5, where a GAF file has the term, such as 'GO:0030218'. "
            "Correct the line or download the file again."
        )
    if fields[8] not in ASPECTS.values():
        raise ValueError(
            f"{where} has {fields[8]!r} in column 9, where a GAF file has the aspect: {listing(ASPECTS.values())}. "
            "Correct the line or download the file again."
        )


def propagate(members: Mapping[str, Iterable[str]], parents: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """Give the genes of each term to all its ancestors.

    Parameters
    ----------
    members
        Genes by term.
    parents
        The terms that each term leads to.

    Raises
    ------
    ValueError
        The terms go round in a circle.
    """
    try:
        parents_first = list(TopologicalSorter(parents).static_order())
    except CycleError as error:
        circle = error.args[1]
        raise ValueError(
            f"The terms {' → '.join(reversed(circle))} go round in a circle, so genes cannot be propagated. "
            "Use go-basic.obo, which has none, or fewer relations=."
        ) from None
    everything = {term: set(genes) for term, genes in members.items()}
    for term in reversed(parents_first):
        if term in everything:
            for parent in parents.get(term, ()):
                everything.setdefault(parent, set()).update(everything[term])
    return everything
