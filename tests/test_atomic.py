"""Every verb writes its whole result or nothing: faults at each step of each verb, and what they leave.

`sys.settrace` raises an error when a given line is reached: at the start of every function of the package that a verb
calls, at every line of the verb's own file, and at every line by which the result is put in place, down into anndata. A
random sample of these places is tried; `SAE_ALL_FAULTS=1` tries all, as `benchmarks/faults.py` does.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from linecache import getline
from pathlib import Path
from types import FrameType
from typing import Any

import anndata as ad
import mudata
import numba
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import sae
from sae import _schema
from sae._data import Holder
from sae._sparse_store import SparseStore
from sae.core import checkpoint, files, interrupts

PACKAGE = str(Path(sae.__file__).parent)
OBJECTS = tuple(str(Path(module.__file__).parent) for module in (ad, mudata))
ERRORS = (RuntimeError, MemoryError, KeyboardInterrupt)
ALL = bool(os.environ.get("SAE_ALL_FAULTS"))
SAMPLE = None if ALL else 8
MESSAGE = "a fault that a test makes"


# ---- Where a fault can be


@dataclass(frozen=True)
class Point:
    """A line of a file, or the start of a function there."""

    file: str
    line: int
    function: str
    start: bool

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line} {self.function}{'()' if self.start else ''}"


class Tracer:
    """Collects the places that a call comes by, or raises an error at one of them.

    Parameters
    ----------
    lines_of
        Files of which every line is a place.
    """

    def __init__(self, lines_of: tuple[str, ...], point: Point | None = None, error: type[BaseException] | None = None):
        self.lines_of, self.point, self.error = lines_of, point, error
        self.found: dict[Point, None] = {}
        self.writing: FrameType | None = None

    @contextmanager
    def on(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)

    def __call__(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        code = frame.f_code
        if code.co_qualname == "write" and code.co_filename == _schema.__file__:
            self.writing = frame
        ours = code.co_filename.startswith(PACKAGE)
        if not ours and not (self.writing is not None and code.co_filename.startswith(OBJECTS)):
            return None
        # What cleans up after a fault is no place for one of its own.
        if ours and code.co_name != "close":
            self._reached(Point(code.co_filename, code.co_firstlineno, code.co_qualname, True))
        return self._lines if self.writing is not None or code.co_filename in self.lines_of else None

    def _lines(self, frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        if frame is self.writing and event == "return":
            self.writing = None
        if event == "line" and not self._cleans_up(frame):
            self._reached(Point(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname, False))
        return self._lines

    @staticmethod
    def _cleans_up(frame: FrameType) -> bool:
        """Tell the lines that hold Ctrl-C back, and that which removes what is left of a file; what is between them is tried."""
        file = frame.f_code.co_filename
        return file == interrupts.__file__ or (file == files.__file__ and "unlink(" in getline(file, frame.f_lineno))

    def _reached(self, point: Point) -> None:
        if self.point is None:
            self.found.setdefault(point)
        elif point == self.point:
            assert self.error is not None
            self.point = Point("", 0, "", False)
            raise self.error(MESSAGE)


# ---- What is left


def identities(data: Any) -> dict[str, Any]:
    """The very objects that a verb must not replace by copies; for a view those it is made of."""
    if data.is_view:
        return dict(vars(data))
    kept = {slot: getattr(data, slot) or {} for slot in SLOTS}
    # anndata 0.13 lists X among the layers, as None.
    found = {f"{slot}[{name!r}]": value for slot in SLOTS for name, value in kept[slot].items() if name is not None}
    found |= {f"uns[{a!r}][{b!r}]": v for a, u in data.uns.items() if isinstance(u, Mapping) for b, v in u.items()}
    found |= {slot: getattr(data, slot) for slot in ("obs", "var")}
    if isinstance(data, mudata.MuData):
        return found | {f"{name}.{path}": v for name, part in data.mod.items() for path, v in identities(part).items()}
    return found | {"X": data.X}


SLOTS = ("uns", "obsm", "varm", "layers")


def process() -> tuple[Any, ...]:
    """What of the process a verb could leave changed."""
    return (
        signal.getsignal(signal.SIGINT),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        numba.get_num_threads(),
        np.geterr(),
        np.random.get_state()[1].tolist(),
        torch.random.get_rng_state().tolist(),
        list(warnings.filters),
    )


@dataclass(frozen=True)
class Case:
    """A verb in a situation.

    Attributes
    ----------
    start
        Which object it is called with.
    run
        The call; what it returns is compared, too.
    timed
        Columns of seconds are not compared.
    partly
        Tells whether something else than the whole result is one that the verb documents.
    """

    verb: str
    start: str
    run: Callable[[Any], Any]
    partly: Callable[[Any, Any], bool] = lambda data, whole: False


@dataclass(frozen=True)
class Trial:
    """A case with its object and all that is compared with."""

    case: Case
    data: Any
    compare: Any

    @property
    def fresh(self) -> Any:
        """The object; a view of another one."""
        copied = self.data.copy()
        return copied[2:] if self.case.start.endswith("view") else copied

    @property
    def lines_of(self) -> tuple[str, ...]:
        return (str(Path(PACKAGE, "tl", f"_{self.case.verb}.py")),)

    def points(self) -> list[Point]:
        """Run the verb twice, the second time to see which way it goes when everything is compiled and imported."""
        with quiet():
            self.case.run(self.fresh)
            tracer, data = Tracer(self.lines_of), self.fresh
            with tracer.on():
                self.case.run(data)
        return list(tracer.found)

    def whole(self) -> tuple[Any, Any]:
        """Run the verb undisturbed."""
        data = self.fresh
        with quiet():
            returned = self.case.run(data)
            return self.compare.state(data), returned

    def outcome(self, point: Point, error: type[BaseException], whole: tuple[Any, Any]) -> str:
        """Run the verb with a fault and say what is left: `"before"`, `"whole"`, `"partly"`, or else what is wrong."""
        data = self.fresh
        parent = (getattr(data, "_adata_ref", None) or getattr(data, "_mudata_ref", None)) if data.is_view else None
        with quiet():
            before, same = self.compare.state(data), identities(data)
            of_parent = None if parent is None else self.compare.state(parent)
            around, raised, returned = process(), None, None
            tracer = Tracer(self.lines_of, point, error)
            try:
                with tracer.on():
                    returned = self.case.run(data)
            except ERRORS as caught:
                raised = caught
            if left := [(was, is_now) for was, is_now in zip(around, process(), strict=True) if was != is_now]:
                return f"the process is not as before: {left}"
            if parent is not None and not self.same(of_parent, self.compare.state(parent)):
                return "the parent of the view was changed"
            now = self.compare.state(data)
            if raised is None and returned is not None and not self.same(whole[1], returned):
                return "partly" if self.case.partly(data, whole) else "it returned something else"
            if raised is not None and self.same(before, now):
                changed = {name for name, value in identities(data).items() if same.pop(name, None) is not value}
                if changed := changed | same.keys():
                    return f"copies instead of {changed}"
                return "before"
            if self.same(whole[0], now):
                return "whole"
            if self.case.partly(data, whole):
                return "partly"
            return f"something else, after {raised!r}: {self.difference(before, now)} {self.difference(whole[0], now)}"

    def same(self, a: object, b: object) -> bool:
        return not self.difference(a, b)

    def difference(self, a: object, b: object) -> str:
        # The quick way to find most that are the same.
        if pickle.dumps(a) == pickle.dumps(b):
            return ""
        try:
            self.compare.assert_same(untimed(a), untimed(b))
        except AssertionError as error:
            return str(error) or "different"
        return ""


def untimed(found: Any) -> Any:
    """Leave out seconds, which are others each time."""
    if isinstance(found, Mapping):
        return {name: untimed(value) for name, value in found.items()}
    if isinstance(found, pd.DataFrame) and "seconds" in found:
        return found.drop(columns="seconds")
    return found


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- The verbs


SMALL = {"n_features": 8, "k": 2, "steps": 12, "device": "cpu", "progress": False}
NET = {f"set {i}": [f"g{(i + j * j) % 20}" for j in range(4)] for i in range(40)}
PEAKS = pd.DataFrame(
    {"gene": ["A", "B"], "chrom": ["1", "1"], "start": [5, 300], "end": [90, 420], "strand": ["+", "-"]}
)


def linear(z: np.ndarray, data: Any) -> np.ndarray:
    return np.column_stack([z[:, 0] ** 2, z[:, 1] ** 2])


MODEL = sae.models.Functions(decode=linear, genes=["g0", "g1"], scale="linear")


def steered(data: Any, **more: Any) -> None:
    given = {"value": 1, "doses": [1], "n_controls": 2, "groupby": "group", "progress": False}
    sae.tl.steer(data, [1], model=MODEL, key_added="X_up", **given, **more)


def ablated(data: Any, **more: Any) -> None:
    sae.tl.ablate(data, [0], batch="batch", groupby="group", n_controls=2, n_neighbors=5, progress=False, **more)


def enriched(data: Any, **more: Any) -> None:
    sae.tl.enrich(data, NET, min_size=2, min_cells=3, progress=False, **more)


def trained_in_part(data: Any, whole: Any) -> bool:
    """Tell whether what is left after Ctrl-C is an SAE that was trained for fewer steps, or as many, and nothing else."""
    stored, wanted = data.uns["sae"], whole[0]["uns"]["sae"]
    weights, params = stored["weights"], stored["params"]
    return (
        stored.keys() == wanted.keys()
        and params["ended"] == "interrupted"
        and params["steps"] <= wanted["params"]["steps"]
        and {name: value.shape for name, value in weights.items()}
        == {name: value.shape for name, value in wanted["weights"].items()}
        and all(np.isfinite(value).all() for value in weights.values())
        and "sae" not in data.obsm
        and "sae" not in data.varm
        and sae.tl.encode(data, progress=False) is None
        and np.isfinite(data.uns["sae"]["encoded"]["fvu"])
    )


def swept_in_part(data: Any, whole: Any) -> bool:
    """Tell whether each run that is left is one of the whole sweep, or says how it failed."""
    runs, wanted = data.uns["sae_sweep"]["runs"], whole[0]["uns"]["sae_sweep"]["runs"]
    failed = runs["error"].notna() if "error" in runs else pd.Series(False, runs.index)
    there = runs[~failed].drop(columns=["pareto", "seconds", "error", "setting"], errors="ignore").astype(object)
    columns = [name for name in there if name in wanted]
    expected = wanted[columns].astype(object).values.tolist()
    return (
        (len(runs) < len(wanted) or failed.any() or data.uns["sae_sweep"]["params"]["ended"] == "interrupted")
        and all(MESSAGE in text for text in runs.get("error", failed)[failed].astype(str))
        and all(row in expected for row in there[columns].values.tolist())
    )


CASES = {
    "fit": Case("fit", "analysed", lambda data: sae.tl.fit(data, "X_pca", **SMALL), trained_in_part),
    "fit, the first": Case("fit", "bare", lambda data: sae.tl.fit(data, "X_pca", **SMALL), trained_in_part),
    "fit, k chosen": Case(
        "fit", "bare", lambda data: sae.tl.fit(data, "X_pca", **SMALL | {"k": "auto"}), trained_in_part
    ),
    "fit, torch": Case(
        "fit", "bare", lambda data: sae.tl.fit(data, "X_pca", architecture="gated", **SMALL | {"k": None, "l1": 1}), trained_in_part
    ),
    "fit, view": Case("fit", "bare view", lambda data: sae.tl.fit(data, "X_pca", **SMALL), trained_in_part),
    "encode": Case("encode", "analysed", lambda data: sae.tl.encode(data, progress=False)),
    "encode, view": Case("encode", "analysed view", lambda data: sae.tl.encode(data, progress=False)),
    "encode, MuData": Case("encode", "mudata", lambda data: sae.tl.encode(data, mod="rna", progress=False)),
    "rank_genes": Case("rank_genes", "analysed", lambda data: sae.tl.rank_genes(data, min_cells=3, progress=False)),
    "enrich": Case("enrich", "analysed", lambda data: enriched(data, n_null=0)),
    "enrich, nulls": Case("enrich", "analysed", lambda data: enriched(data, n_null=1)),
    "score_labels": Case(
        "score_labels", "analysed", lambda data: sae.tl.score_labels(data, "group", baselines=True, n_splits=1, progress=False)
    ),
    "name_features": Case("name_features", "analysed", lambda data: sae.tl.name_features(data)),
    "steer": Case("steer", "analysed", lambda data: steered(data, layer_added="up")),
    "steer, view": Case("steer", "analysed view", lambda data: steered(data, layer_added="up")),
    "steer, MuData": Case("steer", "mudata", lambda data: steered(data, mod="rna")),
    "perturbation": Case(
        "perturbation", "analysed",
        lambda data: sae.tl.perturbation(data, "group", "a", n_permutations=3, min_cells=3, progress=False),
    ),
    "ablate": Case("ablate", "analysed", ablated),
    "ablate, view": Case("ablate", "analysed view", ablated),
    "ablate, MuData": Case("ablate", "mudata", lambda data: ablated(data, mod="rna")),
    "feature_map": Case("feature_map", "analysed", lambda data: sae.tl.feature_map(data, n_neighbors=3)),
    "evaluate": Case(
        "evaluate", "analysed",
        lambda data: sae.tl.evaluate(
            data, "group", NET, min_size=2, baselines=["pca", "frozen_decoder"], n_splits=1, n_bootstrap=5, n_neighbors=5,
            progress=False,
        ),
    ),
    "stability": Case("stability", "analysed", lambda data: sae.tl.stability(data, n_seeds=1, device="cpu", progress=False)),
    "sweep": Case(
        "sweep", "analysed",
        lambda data: sae.tl.sweep(data, {"n_features": [8, 16], "k": 2, "steps": 5}, device="cpu", progress=False),
        swept_in_part,
    ),
    "recovery": Case("recovery", "analysed", lambda data: sae.tl.recovery(data, "X_truth")),
    "probe": Case("probe", "analysed", lambda data: sae.tl.probe(data, "X_pca", targets="X_truth", progress=False)),
    "match": Case("match", "analysed", lambda data: sae.tl.match(data, data, by="activations", n_permutations=2)),
    "compare_enrichment": Case(
        "compare_enrichment", "analysed", lambda data: sae.tl.compare_enrichment(data, data, max_padj=1, n_permutations=2)
    ),
    "peaks_to_genes": Case("peaks_to_genes", "peaks", lambda data: sae.tl.peaks_to_genes(data, PEAKS)),
}  # fmt: skip


def prepared(make_adata: Callable[..., ad.AnnData]) -> dict[str, Any]:
    """Make the objects that verbs are called with: with nothing, and with results of every verb that are replaced."""
    bare = make_adata(72, 8)
    bare.obs["batch"] = pd.Categorical(np.tile(["x", "y"], 36))
    bare.obsm["X_truth"] = bare.obsm["X_pca"][:, :3] ** 2
    bare.uns["log1p"] = {"base": None}
    full = bare.copy()
    with quiet():
        for name, case in CASES.items():
            if case.start == "analysed" and name != "fit, the first":
                if name == "enrich":
                    full.varm["sae"] = np.zeros((full.n_vars, 8))
                case.run(full)
                if name == "fit":
                    sae.tl.encode(full, progress=False)
        outdate(full.uns)
        proteins = make_adata(60, 4, 7, seed=1)
        proteins.var_names = [f"p{i}" for i in range(7)]
        joint = mudata.MuData({"rna": full.copy(), "adt": proteins})
    peaks = ad.AnnData(np.ones((3, 2), np.float32), var=pd.DataFrame(index=["chr1-1-50", "chr1-400-500"]))
    return {
        "bare": bare, "bare view": bare, "analysed": full, "analysed view": full, "mudata": joint, "peaks": peaks,
    }  # fmt: skip


def outdate(tables: dict[str, Any]) -> None:
    """Change a number in each table, and each name, so that results are not what is there already."""
    for name, value in tables.items():
        if isinstance(value, dict) and name not in ("weights", "log1p"):
            outdate(value)
        elif isinstance(value, pd.DataFrame):
            numbers = value.columns[value.dtypes == np.float64]
            tables[name] = value.assign(**{column: value[column] + 1 for column in numbers[:1]})
            if "name" in value and name == "features":
                tables[name]["name"] = "outdated"


def sampled(points: list[Point], n: int | None) -> list[tuple[Point, type[BaseException]]]:
    """Choose places at random, each with the next kind of error; None for all."""
    if n is not None and n < len(points):
        points = [points[i] for i in np.sort(np.random.default_rng(0).choice(len(points), n, replace=False))]
    return [(point, ERRORS[number % len(ERRORS)]) for number, point in enumerate(points)]


# A generator that fails when it is thrown away cannot raise; Python tells, and pytest makes it a warning.
DISCARDED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def objects(make_adata):
    # A number that was never set is another one when more libraries are loaded.
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield prepared(make_adata)
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
@DISCARDED
def test_a_fault_anywhere_leaves_the_object_as_it_was_or_the_whole_result(objects, compare, name):
    faults(Trial(CASES[name], objects[CASES[name].start], compare), SAMPLE)


def faults(trial: Trial, n: int | None) -> None:
    """Try n places, and see that nothing but what is wanted is left, in the object and the process."""
    points, whole = trial.points(), trial.whole()
    found = {(point, error): trial.outcome(point, error, whole) for point, error in sampled(points, n)}
    assert {f"{p} {e.__name__}": o for (p, e), o in found.items() if o not in ("before", "whole", "partly")} == {}
    assert "before" in found.values()
    assert all(map(trial.same, whole, trial.whole()))


@pytest.mark.parametrize("name", ["fit, k chosen", "evaluate", "stability"])
def test_ctrl_c_in_training_that_is_a_part_of_something_else(objects, compare, name):
    """Only what was trained so far of the very SAE that was asked for is of use."""
    trial = Trial(CASES[name], objects[CASES[name].start], compare)
    [step] = [point for point in trial.points() if point.function == "NumbaBackend.step"]
    assert trial.outcome(step, KeyboardInterrupt, trial.whole()) == "before"


# ---- The one place where objects are changed


def put(data: Any) -> None:
    """Write a new SAE with its activations, and all else that a verb could write with it."""
    part = data.mod["rna"] if isinstance(data, mudata.MuData) else data
    also = [
        _schema.Change(data, "obsm", "X_up", np.ones((data.n_obs, 3))),
        _schema.Change(part, "layers", "up", np.ones(part.shape)),
    ]
    activations = sparse.csr_matrix((data.n_obs, 8), dtype=np.float32)
    _schema.write(Holder(data, "data"), "sae", {"weights": {}}, activations, anew=True, also=also)


WRITES = {
    start: Case("", start, put) for start in ("bare", "bare view", "analysed", "analysed view", "mudata", "mudata view")
}


@pytest.mark.parametrize("start", WRITES)
def test_a_fault_while_writing(objects, compare, start):
    data = objects[start.replace("mudata view", "mudata")]
    if start.startswith("mudata"):
        data = data.copy()
        data.obsm["X_up"], data.uns["sae"] = np.zeros((data.n_obs, 2)), {"weights": {"W_dec": np.ones(3)}}
        data.varm["sae"] = np.zeros((data.n_vars, 2))
    faults(Trial(WRITES[start], data, compare), None if ALL else 15 if start.startswith("mudata") else 60)


def test_a_value_that_anndata_refuses(objects, compare):
    for data in (objects["analysed"].copy(), objects["analysed"][3:]):
        before, same = compare.state(data), identities(data)
        also = [
            _schema.Change(data, "obsm", "X_up", np.ones((data.n_obs, 3))),
            _schema.Change(data, "layers", "up", np.ones((5, 5))),
        ]
        with quiet(), pytest.raises(ValueError, match="up' is of incorrect shape"):
            _schema.write(Holder(data, "adata"), "sae", {"weights": {}}, also=also)
        compare.assert_same(before, compare.state(data))
        assert all(value is same[name] for name, value in identities(data).items())


class Refusing(dict):
    """An `uns` that does not take another SAE."""

    def __setitem__(self, name, value):
        if name == "sae":
            raise OSError("read-only")
        super().__setitem__(name, value)


@pytest.mark.parametrize("verb", ["fit", "encode", "steer", "ablate"])
def test_an_object_that_refuses_a_part_of_the_result(objects, compare, verb):
    data = objects["analysed"].copy()
    before, same = compare.state(data), identities(data)
    data.uns = Refusing(data.uns)
    with quiet(), pytest.raises(OSError, match="read-only"):
        CASES[verb].run(data)
    data.uns = dict(data.uns)
    compare.assert_same(before, compare.state(data))
    assert all(value is same[name] for name, value in identities(data).items())


class Interrupting(dict):
    """An `uns` at whose change Ctrl-C is pressed."""

    def __setitem__(self, name, value):
        signal.raise_signal(signal.SIGINT)
        super().__setitem__(name, value)


def test_ctrl_c_waits_until_all_is_written(objects, compare):
    data, whole = objects["analysed"].copy(), objects["analysed"].copy()
    CASES["encode"].run(whole)
    data.uns = Interrupting(data.uns)
    with pytest.raises(KeyboardInterrupt):
        CASES["encode"].run(data)
    data.uns = dict(data.uns)
    compare.assert_same(compare.state(whole), compare.state(data))


def test_a_file_that_is_open(objects, compare, tmp_path):
    """Of a backed object everything but X is in memory."""
    objects["analysed"].write_h5ad(tmp_path / "cells.h5ad")
    content = (tmp_path / "cells.h5ad").read_bytes()
    data = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    expected, same = objects["analysed"].copy(), identities(data)
    for verb in ("encode", "ablate"):
        uns = data.uns
        data.uns = Refusing(uns)
        with quiet(), pytest.raises(OSError, match="read-only"):
            CASES[verb].run(data)
        data.uns = uns
        assert all(value is same[name] for name, value in identities(data).items() if name != "X")
    for verb in ("encode", "ablate"):
        CASES[verb].run(data)
        CASES[verb].run(expected)
    compare.assert_same(dict(expected.obsm), dict(data.obsm))
    data.file.close()
    assert (tmp_path / "cells.h5ad").read_bytes() == content


# ---- Faults as they happen


def test_a_model_that_fails_at_any_call(objects, compare):
    data, calls = objects["analysed"].copy(), 0
    before, same = compare.state(data), identities(data)
    for last in range(1, 100):
        calls = 0

        def decode(z: np.ndarray, cells: Any, last: int = last) -> np.ndarray:
            nonlocal calls
            calls += 1
            if calls == last:
                raise OSError("the model has gone")
            return linear(z, cells)

        model = sae.models.Functions(decode=decode, genes=["g0", "g1"], scale="linear")
        given = {"value": 1, "doses": [1], "n_controls": 1, "key_added": "X_up", "layer_added": "up", "progress": False}
        try:
            sae.tl.steer(data, [1], model=model, **given)
        except OSError:
            compare.assert_same(before, compare.state(data))
            assert all(value is same[name] for name, value in identities(data).items())
        else:
            break
    assert 3 < last < 99
    assert data.uns["sae"]["steering"]["params"]["n_cells"] == 72


def test_a_latent_that_cannot_be_read_at_any_time(objects, compare):
    array = pytest.importorskip("dask.array")
    data, reads, last = objects["analysed"].copy(), 0, 0
    x = data.obsm["X_pca"].copy()

    def read(block: np.ndarray) -> np.ndarray:
        nonlocal reads
        reads += 1
        if reads == last:
            raise OSError("the disk has gone")
        return block

    data.obsm["X_pca"] = array.from_array(x, chunks=(40, 8)).map_blocks(
        read, dtype=x.dtype, meta=np.empty((0, 0), x.dtype)
    )
    same = identities(data)
    for verb in ("fit", "encode"):
        last, uns = 0, dict(data.uns["sae"])
        while True:
            last, reads = last + 1, 0
            try:
                with quiet():
                    CASES[verb].run(data)
            except OSError:
                assert all(data.uns["sae"][name] is value for name, value in uns.items())
                assert all(value is same[name] for name, value in identities(data).items())
            else:
                break
        assert last > 1
        same = identities(data)


# A progress bar that is interrupted while it is made has nothing to close when it is thrown away.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("verb", ["encode", "put"])
def test_ctrl_c_at_any_time(objects, compare, verb):
    """A timer sends it; the object is as before or the result is whole."""
    start, sent = objects["analysed"], []

    def many(data: Any) -> None:
        also = [_schema.Change(data, "obsm", f"X_{i}", data.obsm["X_truth"]) for i in range(30)]
        _schema.write(Holder(data, "adata"), "sae", {"weights": {}}, anew=True, also=also)

    def interrupt(number: int, frame: Any) -> None:
        sent.append(number)
        signal.raise_signal(signal.SIGINT)

    run = many if verb == "put" else CASES[verb].run
    whole, before = start.copy(), compare.state(start)
    begun = time.perf_counter()
    run(whole)
    seconds = time.perf_counter() - begun
    whole, found = compare.state(whole), {"before": 0, "whole": 0}
    waits = np.random.default_rng(0).uniform(0, 1.2 * seconds, 100)
    usual = signal.signal(signal.SIGALRM, interrupt)
    try:
        for wait in [1e-6, *waits, 2 * seconds + 1]:
            data = start.copy()
            sent.clear()
            with suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, wait)
                run(data)
                while not sent:
                    time.sleep(1e-4)
            now = compare.state(data)
            is_whole = now["uns"]["sae"].keys() != before["uns"]["sae"].keys()
            compare.assert_same(whole if is_whole else before, now)
            found["whole" if is_whole else "before"] += 1
    finally:
        signal.signal(signal.SIGALRM, usual)
    assert min(found.values()) > 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# The column is of categories, since pandas ends the process where it has no memory to look for them.
LITTLE_MEMORY = """
import resource, sys
import anndata as ad, numpy as np, pandas as pd
import sae

rng = np.random.default_rng(0)
adata = ad.AnnData(obs={"batch": pd.Categorical(np.tile(["x", "y"], 25_000))}, shape=(50_000, 0))
adata.obsm["X_pca"] = rng.normal(size=(50_000, 20)).astype(np.float32)
given = {"n_features": 16, "k": 4, "steps": 20, "progress": False}
verbs = {
    "encode": lambda data: sae.tl.encode(data, progress=False),
    "ablate": lambda data: sae.tl.ablate(data, [0], batch="batch", n_controls=1, max_cells=1_000, progress=False),
}
sae.tl.fit(adata, **given)
sae.tl.encode(adata, progress=False)
warm = adata[:2_000].copy()
for verb in verbs.values():
    verb(warm)
unlimited = resource.getrlimit(resource.RLIMIT_AS)
for name, verb in verbs.items():
    failed, megabytes = 0, 1
    while True:
        entries = {**adata.uns, **adata.obsm}
        content = {key: value for key, value in adata.uns["sae"].items()}
        sums = [adata.obsm["X_pca"].sum(), adata.obsm["sae"].sum()]
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(megabytes * 1_000_000), unlimited[1]))
        try:
            verb(adata)
        except (MemoryError, RuntimeError) as error:
            resource.setrlimit(resource.RLIMIT_AS, unlimited)
            failed += isinstance(error, MemoryError) or "memory" in str(error) or "thread" in str(error)
            now = {**adata.uns, **adata.obsm}
            assert now.keys() == entries.keys() and all(now[key] is entries[key] for key in now)
            assert all(adata.uns["sae"][key] is content[key] for key in content) and len(adata.uns["sae"]) == len(content)
            assert sums == [adata.obsm["X_pca"].sum(), adata.obsm["sae"].sum()]
            megabytes *= 2
        else:
            resource.setrlimit(resource.RLIMIT_AS, unlimited)
            break
    print(name, failed)
assert "X_pca_ablated" in adata.obsm and "ablation" in adata.uns["sae"]
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory and /proc are Linux's")
def test_too_little_memory():
    # What is freed goes back to the system, so that it does not serve for the next try.
    given = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True, check=False, env=given
    )
    assert found.returncode == 0, found.stderr
    failed = dict(line.split() for line in found.stdout.splitlines())
    assert failed.keys() == {"encode", "ablate"} and "0" not in failed.values()


# ---- Files


def test_ctrl_c_while_activations_on_disk_come_into_use(objects, compare, tmp_path):
    """What is in the object is in the folder."""
    data, whole = objects["analysed"].copy(), objects["analysed"].copy()
    CASES["encode"].run(whole)
    data.uns = Interrupting(data.uns)
    with pytest.raises(KeyboardInterrupt):
        sae.tl.encode(data, out=tmp_path / "a.zarr", progress=False)
    compare.assert_same(whole.obsm["sae"], sparse.csr_matrix(data.obsm["sae"].compute()))
    compare.assert_same(whole.uns["sae"], data.uns["sae"])


@DISCARDED
def test_activations_on_disk_and_the_object_stay_together(objects, compare, tmp_path):
    path = tmp_path / "a.zarr"
    start = objects["analysed"].copy()
    older = sparse.random(start.n_obs, 8, 0.3, "csr", np.float32, random_state=0)

    def run() -> None:
        nonlocal data
        data = start.copy()
        shutil.rmtree(path, ignore_errors=True)
        with SparseStore(path, "sae", older.shape) as store:
            store.append(older)
            data.obsm["sae"] = store.publish()
        data.uns["sae"]["encoded"]["fvu"] = -1.0
        sae.tl.encode(data, out=path, progress=False)

    data = start
    run()
    new = data.obsm["sae"].compute()
    seen = set()
    for place in after_faults(run, (sys.modules["sae.tl._encode"], sys.modules["sae._schema"]), 25):
        if sparse.issparse(data.obsm["sae"]):
            continue  # the fault came before there was an earlier folder
        wanted = older if data.uns["sae"]["encoded"]["fvu"] == -1 else new
        assert (data.obsm["sae"].compute() != wanted).nnz == 0, place
        assert [file.name for file in tmp_path.iterdir()] == ["a.zarr"], place
        seen.add(wanted is new)
    assert len(seen) == 2


def after_faults(run: Callable[[], object], modules: tuple[Any, ...], n: int) -> Iterator[str]:
    """Run with a fault at places of some files, and give each place when it has happened."""
    lines_of = tuple(module.__file__ for module in (files, *modules))
    tracer = Tracer(lines_of)
    with tracer.on():
        run()
    places = [point for point in tracer.found if point.file in lines_of]
    for point, error in sampled(places, None if ALL else n):
        try:
            with quiet(), Tracer(lines_of, point, error).on():
                run()
        except (*ERRORS, ValueError):
            pass
        yield f"{point} {error.__name__}"


@DISCARDED
def test_activations_in_a_file(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.ReLU())
    path, old = tmp_path / "a.npy", np.ones((2, 3), np.float32)

    def run() -> np.ndarray:
        np.save(path, old)
        return np.array(sae.models.activations(module, "1", torch.ones(9, 5).split(4), out=path, progress=False))

    new = run()
    seen = set()
    for place in after_faults(run, (sys.modules["sae.models._activations"],), 25):
        found = np.load(path)
        assert np.array_equal(found, old) or np.array_equal(found, new), place
        assert [file.name for file in tmp_path.iterdir()] == ["a.npy"], place
        seen.add(len(found))
    assert 2 in seen


@DISCARDED
def test_a_report(objects, tmp_path):
    path = tmp_path / "a.html"

    def run() -> str:
        path.write_text("older")
        sae.report(objects["analysed"], path, basis="X_pca", max_cells=20)
        return path.read_text()

    new = run()
    seen = set()
    for place in after_faults(run, (sys.modules["sae.report._report"],), 12):
        assert path.read_text() in ("older", new), place
        assert [file.name for file in tmp_path.iterdir()] == ["a.html"], place
        seen.add(path.read_text())
    assert "older" in seen


@DISCARDED
@pytest.mark.parametrize("architecture", ["topk", "gated"])
def test_training_goes_on_from_a_checkpoint_after_any_fault(objects, tmp_path, monkeypatch, compare, architecture):
    path = tmp_path / "state.npz"
    given = {**SMALL, "architecture": architecture, "steps": 6} | ({"k": None} if architecture == "gated" else {})
    whole = objects["bare"].copy()
    sae.tl.fit(whole, "X_pca", **given)
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", -1)

    def run() -> None:
        path.unlink(missing_ok=True)
        sae.tl.fit(objects["bare"].copy(), "X_pca", checkpoint=path, **given)

    kept = 0
    for place in after_faults(run, (checkpoint,), 15):
        assert {file.name for file in tmp_path.iterdir()} <= {"state.npz"}, place
        kept += path.exists()
        data = objects["bare"].copy()
        sae.tl.fit(data, "X_pca", checkpoint=path, **given)
        compare.assert_same(whole.uns["sae"], data.uns["sae"])
    assert kept


@DISCARDED
def test_a_sweep_goes_on_from_its_folder_after_any_fault(objects, tmp_path):
    given = {"device": "cpu", "progress": False, "n_seeds": 2}
    grid = {"n_features": 8, "k": 2, "steps": 3}
    whole = untimed(sae.tl.sweep(objects["bare"].copy(), grid, **given))

    def run() -> None:
        for file in tmp_path.iterdir():
            file.unlink()
        sae.tl.sweep(objects["bare"].copy(), grid, path=tmp_path, **given)

    for place in after_faults(run, (sys.modules["sae.core.sweep"],), 15):
        assert not list(tmp_path.glob("*.partial")), place
        with quiet():
            pd.testing.assert_frame_equal(
                untimed(sae.tl.sweep(objects["bare"].copy(), grid, path=tmp_path, **given)), whole
            )
