"""The rules of the house: what the public API looks like, who may import whom, and that every example runs."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import sae

SOURCE = Path(sae.__file__).parent
PUBLIC = {
    f"{module.__name__.removeprefix('sae.')}.{name}": getattr(module, name)
    for module in (sae.tl, sae.pl, sae.get, sae.io, sae.datasets, sae.models)
    for name in module.__all__
} | {"report": sae.report}
ON_TABLES = {"pl.recovery"}
ON_DATA = {
    name: function
    for name, function in PUBLIC.items()
    if not name.startswith(("datasets.", "io.read", "models.")) and name not in ON_TABLES
}
MOST_POSITIONAL = 3
NAMES_A_REPRESENTATION = {"tl.ablate", "tl.steer", "get.ablation", "pl.steer"}
"""With `key_added=`, which elsewhere names an SAE."""
OF_SWEEPS = {"tl.sweep", "get.sweep", "pl.sweep"}
"""With keys of sweeps."""
OF_TWO = {"tl.compare_enrichment", "tl.match"}
"""Verbs that compare two objects."""


# ---- What the API looks like


def sections(docstring: str) -> dict[str, list[str]]:
    """Split a numpydoc docstring into its sections; what comes before the first is the summary."""
    lines = inspect.cleandoc(docstring).splitlines()
    found: dict[str, list[str]] = {"Summary": []}
    current = "Summary"
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line and re.fullmatch("-+", below) and len(below) == len(line):
            current = line
            found[current] = []
        elif not (re.fullmatch("-+", line) and not found[current]):
            found[current].append(line)
    return found


def documented(docstring: str) -> dict[str, str]:
    """Return what a docstring says of each parameter; names that share a description ("layer, use_raw") each count."""
    described: dict[str, str] = {}
    names: list[str] = []
    for line in sections(docstring).get("Parameters", []):
        if line and not line[0].isspace():
            names = [name.strip() for name in line.split(",")]
            described |= dict.fromkeys(names, "")
        else:
            described |= {name: f"{described[name]} {line.strip()}".strip() for name in names}
    return described


def parameters(function) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def test_the_api_is_what_is_promised():
    verbs = {
        "fit",
        "encode",
        "rank_genes",
        "enrich",
        "score_labels",
        "name_features",
        "steer",
        "ablate",
        "perturbation",
        "evaluate",
        "stability",
        "match",
        "sweep",
        "recovery",
        "probe",
        "feature_map",
    }
    assert verbs <= set(sae.tl.__all__)
    figures = {
        "density",
        "enrichment",
        "feature_card",
        "feature_map",
        "feature_umap",
        "genes",
        "history",
        "labels",
        "lineage",
        "recovery",
        "stability",
        "steer",
        "sweep",
    }
    assert figures == set(sae.pl.__all__)
    assert {"activations", "features", "model", "decoder", "genes", "enrichment", "labels", "neighbors"} <= set(
        sae.get.__all__
    )
    assert {"immune_markers", "pbmc68k", "simulate_programs", "simulate_small"} <= set(sae.datasets.__all__)
    assert {"read", "read_gmt", "read_go", "read_saelens", "write", "write_saelens"} <= set(sae.io.__all__)
    assert {"Autoencoder", "PCA", "SCVI", "MultiDGD", "Geneformer", "Functions", "activations"} <= set(
        sae.models.__all__
    )
    for module in (sae, sae.tl, sae.pl, sae.get, sae.io, sae.datasets, sae.models):
        assert module.__all__ == sorted(module.__all__)


@pytest.mark.parametrize("name", ON_DATA)
def test_data_first(name):
    expected = ["a", "b"] if name in OF_TWO else ["data"]
    assert [parameter.name for parameter in parameters(ON_DATA[name])[: len(expected)]] == expected


@pytest.mark.parametrize("name", PUBLIC)
def test_few_positional_parameters(name):
    kinds = [parameter.kind for parameter in parameters(PUBLIC[name])]
    assert set(kinds) <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= MOST_POSITIONAL


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_has_a_type(name):
    signature = inspect.signature(PUBLIC[name])
    assert signature.return_annotation is not inspect.Signature.empty
    untyped = [p.name for p in signature.parameters.values() if p.annotation is inspect.Parameter.empty]
    assert untyped == []


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_is_documented(name):
    described = documented(PUBLIC[name].__doc__)
    assert sorted(described) == sorted(parameter.name for parameter in parameters(PUBLIC[name]))
    assert all(described.values())


@pytest.mark.parametrize("name", PUBLIC)
def test_every_docstring_has_a_summary_and_an_example(name):
    parts = sections(PUBLIC[name].__doc__)
    assert re.fullmatch(r".+\.", parts["Summary"][0]) or parts["Summary"][1] != ""
    assert any(line.startswith(">>> ") for line in parts.get("Examples", []))


@pytest.mark.parametrize("name", PUBLIC)
def test_common_parameters_have_common_defaults(name):
    given = (parameter for parameter in parameters(PUBLIC[name]) if parameter.default is not inspect.Parameter.empty)
    defaults = {parameter.name: parameter.default for parameter in given}
    expected = {
        "key": "sae_sweep" if name in OF_SWEEPS else "sae",
        "key_added": "sae_sweep" if name in OF_SWEEPS else None if name in NAMES_A_REPRESENTATION else "sae",
        "mod": None,
        "var_mod": None,
        "layer": None,
        "rng": 0,
        "progress": True,
    }
    assert {key: defaults[key] for key in expected if key in defaults} == {
        key: value for key, value in expected.items() if key in defaults
    }


@pytest.mark.parametrize(
    ("docstring", "names"),
    [
        (
            "Do.\n\nParameters\n----------\na\n    One.\nb, c\n    Two.\n\n    More.\n\nReturns\n-------\nd",
            ["a", "b", "c"],
        ),
        ("Do.", []),
    ],
    ids=["grouped", "none"],
)
def test_the_lint_reads_docstrings(docstring, names):
    described = documented(docstring)
    assert list(described) == names
    assert all(described.values())


# ---- Who may import whom


ALLOWED = {
    "core": {"core"},
    "_integrity": {"core", "_data", "_lazy"},
    "_schema": {"core", "_data", "_genesets", "_integrity", "_lazy"},
    "_data": {"core", "_schema", "_genesets"},
    "_genesets": {"core", "_schema", "_data"},
    "get": {"_schema", "_data", "_design", "_lazy", "core", "get"},
    "_names": {"get", "_schema", "_data"},
    "_lazy": {"core"},
    "_sparse_store": {"core"},
    "_ontology": {"_data", "_genesets"},
    "_design": {"_data", "_lazy"},
    "io": {"_schema", "_data", "_genesets", "_integrity", "_ontology", "core", "io"},
    "datasets": {"core", "datasets"},
    "models": {"_data", "_expression", "_progress", "core", "models"},
    "_prediction": {"_data", "core"},
    "_expression": {"_data", "_prediction", "core"},
    "_steering": {"_prediction", "_schema", "core"},
    "_intervention": {"_data", "_design", "_schema", "_steering", "core"},
    "_steered": {"_data", "_prediction", "_schema", "core"},
    "_perturbed": {"_data", "_design", "_expression", "_lazy"},
    "_pairs": {"_data", "_schema"},
    "_evaluation": {"_schema", "_data", "_design", "_expression", "_prediction", "core"},
    "_scoring": {"_schema", "_data", "_evaluation", "_genesets", "core"},
    "_variables": {"_data", "_lazy", "core"},
    "_peaks": {"_data", "_expression", "_genesets", "core"},
    "tl": {
        "_schema",
        "_data",
        "_design",
        "_evaluation",
        "_expression",
        "_genesets",
        "_intervention",
        "_lazy",
        "_pairs",
        "_peaks",
        "_perturbed",
        "_prediction",
        "_progress",
        "_scoring",
        "_sparse_store",
        "_steered",
        "_steering",
        "_variables",
        "_names",
        "get",
        "io",
        "datasets",
        "models",
        "core",
    },
    "pl": {"get", "_names", "pl"},
    "report": {"get", "_names", "core", "report"},
}
TYPES_FOR_ALL = {"_data", "_schema"}
"""What may also be imported where only the type checker looks."""
FREE = {"__init__", "_accessor", "demo"}


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Yield each module of ours that is imported anywhere in a file, and whether only for types.

    Parameters
    ----------
    package
        The package that the file is in, which relative imports start from.
    """

    def walk(node: ast.AST, types_only: bool) -> Iterator[tuple[tuple[str, ...], bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = tuple(alias.name.split("."))
                if parts[0] == "sae":
                    yield parts, types_only
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            if base[:1] == ("sae",):
                # `from ..core import train`: the names may be modules themselves.
                yield from (((*base, alias.name), types_only) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            guarded = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and child in node.body
            yield from walk(child, types_only or guarded)

    yield from walk(tree, False)


def violations(path: Path, text: str) -> list[str]:
    """List the imports in one source file (path relative to the package) that the rules do not allow."""
    parts = path.with_suffix("").parts
    home = parts[0]
    if home in FREE:
        return []
    package = ("sae", *parts[:-1])
    wrong = []
    for imported, types_only in imports(ast.parse(text), package):
        part = imported[1] if len(imported) > 1 else "__init__"
        allowed = ALLOWED[home] | (TYPES_FOR_ALL if types_only and home != "core" else set())
        gathered = path.name == "__init__.py" and part == home
        if part not in allowed and not gathered:
            wrong.append(f"{path.as_posix()} imports {'.'.join(imported)}")
    return wrong


@pytest.mark.parametrize("path", sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py")), ids=str)
def test_imports(path):
    assert violations(path, (SOURCE / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "line", "allowed"),
    [
        ("core/train.py", "from .rows import Matrix", True),
        ("core/train.py", "from .._data import Data", False),
        ("core/train.py", "def f():\n    from sae import get", False),
        ("core/train.py", "if TYPE_CHECKING:\n    from .._data import Data", False),
        ("tl/_fit.py", "from .. import _schema", True),
        ("tl/_fit.py", "def f():\n    from ..core.train import train", True),
        ("tl/_fit.py", "from ._encode import encode", False),
        ("tl/_fit.py", "from . import encode", False),
        ("tl/_fit.py", "from ..pl import history", False),
        ("tl/_fit.py", "import sae", False),
        ("tl/__init__.py", "from ._fit import fit", True),
        ("tl/__init__.py", "from ..pl import history", False),
        ("pl/_history.py", "from .. import get", True),
        ("pl/_history.py", "from ._titles import titles", True),
        ("pl/_titles.py", "from .._names import names", True),
        ("get/_cells.py", "from .._names import names", False),
        ("pl/_history.py", "from .._data import Data", False),
        ("pl/_history.py", "if TYPE_CHECKING:\n    from .._data import Data", True),
        ("pl/_history.py", "if TYPE_CHECKING:\n    pass\nelse:\n    from .._data import Data", False),
        ("pl/_history.py", "from ..tl import fit", False),
        ("get/_model.py", "from ..core.autoencoder import Autoencoder", True),
        ("get/_cells.py", "from ..tl import fit", False),
        ("io/_sae.py", "from .._genesets import read_gmt", True),
        ("io/_sae.py", "from ..tl import enrich", False),
        ("_data.py", "from . import _schema", True),
        ("_data.py", "from .get import model", False),
        ("datasets/_a.py", "from .._data import listing", False),
        ("demo.py", "import sae", True),
        ("tl/_fit.py", "import numpy", True),
    ],
)
def test_the_rules_bite(path, line, allowed):
    assert (violations(Path(path), line) == []) is allowed


def test_import_is_light():
    """What takes seconds to load is loaded by the verb that needs it."""
    heavy = {
        "torch",
        "scanpy",
        "decoupler",
        "mudata",
        "matplotlib",
        "seaborn",
        "tqdm",
        "sklearn",
        "numba",
        "umap",
        "scvi",
        "transformers",
    }
    code = "import sys, anndata; before = set(sys.modules); import sae; print(*set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) & heavy == set()
    assert "sae.tl" in result.stdout.split()


# ---- Examples


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tests = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs={})
    assert len(tests) == 1 and tests[0].examples
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    result = runner.run(tests[0], out=report.append)
    plt.close("all")
    assert result.failed == 0, "".join(report)
    assert not list(tmp_path.iterdir()), "an example leaves no files behind"
