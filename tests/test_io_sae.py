"""SAEs as folders: what was written is what is read, to the last bit, and nothing else is read."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save

import sae
from sae.core import untrusted
from sae.io import _folder, _sae

ARCHIVE = Path(__file__).parent / "archives" / "schema_1.h5ad"
PARTS = ("schema_version", "params", "weights", "history", "features")
TYPED = (ValueError, TypeError, KeyError, OSError)
"""What a reader may raise."""
FUZZ = 300 * int(os.environ.get("SAE_FUZZ") or 1)


def parts(data, key="sae"):
    return {name: value for name, value in data.uns[key].items() if name in PARTS}


def same_activations(a, b, key="sae"):
    for part in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(a.obsm[key], part), getattr(b.obsm[key], part))


@pytest.fixture(scope="module")
def archived():
    return ad.read_h5ad(ARCHIVE)


@pytest.fixture
def folder(archived, tmp_path):
    """An SAE that was written."""
    sae.io.write(archived, tmp_path / "written")
    return tmp_path / "written"


def document(folder) -> dict:
    return json.loads((folder / "sae.json").read_text())


def sign(folder, said: dict) -> None:
    """Write a description with the checksum that it should have, as somebody would who wants it to be believed."""
    said["sha256"] = _sae.digest(said)
    (folder / "sae.json").write_bytes(_sae.lines(said))


def with_weights(folder, content: bytes, shapes: dict | None = None) -> None:
    (folder / "weights.safetensors").write_bytes(content)
    said = document(folder)
    said["weights"]["sha256"] = hashlib.sha256(content).hexdigest()
    if shapes is not None:
        said["weights"]["shapes"] = shapes
    sign(folder, said)


def changed_weights(folder, **changes) -> None:
    weights = load_file(folder / "weights.safetensors") | changes
    weights = {name: value for name, value in weights.items() if value is not None}
    with_weights(folder, save(weights), {name: list(value.shape) for name, value in weights.items()})


def raw_file(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# ---- There and back


@pytest.mark.parametrize("architecture", ["topk", "matryoshka", "vanilla", "gated"])
@pytest.mark.parametrize("preprocess", ["center", "standardize", "whiten"])
def test_there_and_back(architecture, preprocess, make_adata, compare, tmp_path):
    adata = make_adata()
    sae.tl.fit(adata, architecture=architecture, preprocess=preprocess, n_features=16, steps=30, progress=False)
    before = compare.state(adata)
    sae.io.write(adata, tmp_path / "a")
    compare.assert_same(before, compare.state(adata))
    found = sae.io.read(tmp_path / "a")
    assert found.shape == (0, 0)
    compare.assert_same(parts(adata), parts(found))
    new, reference = make_adata(), make_adata()
    sae.tl.encode(new, reference=found, progress=False)
    sae.tl.encode(reference, reference=adata, progress=False)
    same_activations(new, reference)
    compare.assert_same(reference.uns["sae"], new.uns["sae"])


def test_everything_that_verbs_write_to_features(analysed, compare, tmp_path):
    sae.io.write(analysed, tmp_path / "a")
    found = sae.io.read(tmp_path / "a")
    compare.assert_same(parts(analysed), parts(found))
    pd.testing.assert_frame_equal(sae.get.features(found), sae.get.features(analysed))
    pd.testing.assert_frame_equal(sae.get.history(found), sae.get.history(analysed))
    pd.testing.assert_frame_equal(sae.get.decoder(found), sae.get.decoder(analysed))


def test_what_older_versions_stored(archived, compare, tmp_path):
    sae.io.write(archived, tmp_path / "a")
    compare.assert_same(parts(archived), parts(sae.io.read(tmp_path / "a")))


@pytest.mark.filterwarnings("ignore:Writing zarr v2:UserWarning")
@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_what_was_read_is_an_object_like_others(form, make_adata, tmp_path):
    adata = make_adata()
    sae.tl.fit(adata, use_rep="X", n_features=16, steps=30, validation=0, progress=False)
    sae.io.write(adata, tmp_path / "a")
    found = sae.io.read(tmp_path / "a")
    getattr(found, f"write_{form}")(tmp_path / f"b.{form}")
    sae.io.write(getattr(ad, f"read_{form}")(tmp_path / f"b.{form}"), tmp_path / "c")
    said, again = document(tmp_path / "a"), document(tmp_path / "c")
    assert said.pop("weights")["shapes"] == again.pop("weights")["shapes"]
    assert said | {"sha256": None} == again | {"sha256": None}
    a, c = (load_file(tmp_path / name / "weights.safetensors") for name in "ac")
    for name, values in a.items():
        np.testing.assert_array_equal(values, c[name])


def test_columns_are_found_by_name(make_adata, tmp_path):
    adata = make_adata()
    sae.tl.fit(adata, use_rep="X", n_features=16, steps=30, progress=False)
    sae.tl.encode(adata, progress=False)
    sae.io.write(adata, tmp_path / "a")
    shuffled = make_adata()[:, ::-1].copy()
    sae.tl.encode(shuffled, reference=sae.io.read(tmp_path / "a"), progress=False)
    same_activations(adata, shuffled)
    assert sae.io.read(tmp_path / "a").uns["sae"]["weights"]["input_names"].tolist() == list(adata.var_names)


def test_a_modality(make_mudata, compare, tmp_path):
    mdata = make_mudata()
    sae.tl.fit(mdata, mod="adt", n_features=16, steps=30, progress=False)
    sae.tl.fit(mdata, "X_joint", n_features=16, steps=30, progress=False)
    sae.io.write(mdata, tmp_path / "adt", mod="adt")
    sae.io.write(mdata, tmp_path / "joint")
    compare.assert_same(parts(mdata.mod["adt"]), parts(sae.io.read(tmp_path / "adt")))
    new = make_mudata()
    sae.tl.encode(new, mod="adt", reference=sae.io.read(tmp_path / "adt"), progress=False)
    sae.tl.encode(new, reference=sae.io.read(tmp_path / "joint"), progress=False)
    for data, where in ((mdata.mod["adt"], {"mod": "adt"}), (mdata, {})):
        sae.tl.encode(mdata, progress=False, **where)
        same_activations(data, new.mod["adt"] if where else new)


def test_it_gets_the_name_that_one_gives(encoded, tmp_path):
    sae.io.write(encoded, tmp_path / "a")
    found = sae.io.read(tmp_path / "a", key_added="other")
    assert list(found.uns) == ["other"]
    assert list(sae.get.features(found, key="other").index[:2]) == ["other_0", "other_1"]
    with pytest.raises(ValueError, match="cannot name an SAE"):
        sae.io.read(tmp_path / "a", key_added="a/b")
    with pytest.raises(KeyError, match="no SAE 'other'"):
        sae.io.write(encoded, tmp_path / "b", key="other")
    assert not (tmp_path / "b").exists()


def test_all_kinds_of_settings_and_columns(fitted, compare, tmp_path):
    stored = fitted.uns["sae"]
    stored["params"] |= {
        "val_fvu": math.nan,
        "nothing": None,
        "text": 'λ "quoted" \\ \n\u2028',
        "zero": -0.0,
        "tiny": 5e-324,
        "third": 1 / 3,
        "inf": -math.inf,
        "large": 2**63 - 1,
        "yes": np.True_,
        "single": np.float32(0.1),
        "counts": np.array([1, 5, 9]),
        "shares": np.array([[0.1, np.nan], [np.inf, -np.inf]]),
        "half": np.array([0.1], np.float16),
        "none of them": np.empty((0,)),
        "flags": np.array([True, False]),
        "names": np.array(["a", "ü"], dtype=object),
    }
    n = stored["params"]["n_features"]
    stored["features"] = pd.DataFrame(
        {
            **dict.fromkeys(("n_cells", "density", "mean", "max", "dead"), np.zeros(n)),
            "floats": np.where(np.arange(n) % 2, np.nan, np.linspace(-1, 1e300, n)),
            "singles": np.linspace(0, 1, n, dtype=np.float32),
            "bytes": np.arange(n, dtype=np.uint8),
            "flags": np.arange(n) % 2 == 0,
            "kinds": pd.Categorical(["b", None] * (n // 2), categories=["c", "b", "a"], ordered=True),
            "no kinds": pd.Categorical([None] * n, categories=[]),
            "text": np.array([["x", None][i % 2] for i in range(n)], dtype=object),
        },
        index=[f"sae_{i}" for i in range(n)],
    )
    sae.io.write(fitted, tmp_path / "a")
    found = sae.io.read(tmp_path / "a")
    compare.assert_same(parts(fitted), parts(found))
    assert math.copysign(1, found.uns["sae"]["params"]["zero"]) == -1
    assert found.uns["sae"]["params"]["single"] == np.float32(0.1)
    assert found.uns["sae"]["params"]["yes"] is True


def test_statistics_are_of_the_cells_that_are_there(encoded, tmp_path):
    some = encoded[:100].copy()
    sae.io.write(some, tmp_path / "a")
    found = sae.get.features(sae.io.read(tmp_path / "a"))
    assert found["n_cells"].tolist() == some.obsm["sae"].getnnz(axis=0).tolist()


def test_others_can_read_it(encoded, tmp_path):
    sae.io.write(encoded, tmp_path / "a")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["sae.json", "weights.safetensors"]
    weights, said = load_file(tmp_path / "a" / "weights.safetensors"), document(tmp_path / "a")
    for name, values in weights.items():
        np.testing.assert_array_equal(values, encoded.uns["sae"]["weights"][name])
    assert said["weights"]["shapes"] == {name: list(values.shape) for name, values in weights.items()}
    assert (
        said["weights"]["sha256"] == hashlib.sha256((tmp_path / "a" / "weights.safetensors").read_bytes()).hexdigest()
    )
    rest = {name: value for name, value in said.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert said["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert said["history"]["fvu"]["values"] == encoded.uns["sae"]["history"]["fvu"].tolist()


# ---- What is refused, and where


def odd_column(adata):
    adata.uns["sae"]["features"]["when"] = pd.Timestamp("2020-01-01")


UNWRITABLE = {
    "a column of dates": (odd_column, TypeError, r"\['features'\] 'when' has the type"),
    "a table in params": (lambda a: a.uns["sae"]["params"].update(x={"y": 1}), TypeError, "'x' is a dict"),
    "a path in params": (lambda a: a.uns["sae"]["params"].update({"../x": 1}), ValueError, "without '/'"),
    "a half letter": (lambda a: a.uns["sae"]["params"].update(x="\ud800"), ValueError, "surrogates"),
    "a NaN": (lambda a: a.uns["sae"]["weights"]["W_dec"].__setitem__((0, 0), np.nan), ValueError, "1 NaN or infinite"),
    "double": (
        lambda a: a.uns["sae"]["weights"].update(b_dec=np.zeros(50)),
        ValueError,
        "'b_dec' of the type float64; expected float32",
    ),
    "a shape": (
        lambda a: a.uns["sae"]["weights"].update(b_dec=np.zeros(49, np.float32)),
        ValueError,
        r"'b_dec' of the shape \(49,\); expected \(50,\)",
    ),
}


@pytest.mark.parametrize(("spoil", "error", "message"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_unwritable(spoil, error, message, encoded, tmp_path):
    spoil(encoded)
    with pytest.raises(error, match=message):
        sae.io.write(encoded, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_where_nothing_is_overwritten(encoded, tmp_path):
    with pytest.raises(FileNotFoundError, match="Make it first"):
        sae.io.write(encoded, tmp_path / "no" / "a")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not a folder"):
        sae.io.write(encoded, tmp_path / "file", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an SAE's folder: it has 'thesis.txt'"):
        sae.io.write(encoded, tmp_path / "mine", overwrite=True)
    (tmp_path / "deep" / "sae.json").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="not an SAE's folder"):
        sae.io.write(encoded, tmp_path / "deep", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="not a folder"):
        sae.io.write(encoded, tmp_path / "link", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "file", "link", "mine"]


def test_overwriting(encoded, folder, compare):
    earlier = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(FileExistsError, match="overwrite=True"):
        sae.io.write(encoded, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == earlier
    sae.io.write(encoded, folder, overwrite=True)
    compare.assert_same(parts(encoded), parts(sae.io.read(folder)))
    assert [path.name for path in folder.parent.iterdir()] == ["written"]


def test_an_empty_folder_is_free(encoded, tmp_path):
    sae.io.write(encoded, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert sae.io.read(tmp_path).uns.keys() == {"sae"}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt(), MemoryError()], ids=repr
)
@pytest.mark.parametrize(
    ("there", "at"),
    [(True, "write"), (True, "rename"), (True, "second rename"), (False, "write"), (False, "rename")],
)
def test_what_goes_wrong_leaves_the_folder_before(error, there, at, encoded, archived, tmp_path, monkeypatch):
    place = tmp_path / "a"
    if there:
        sae.io.write(archived, place)
    earlier = {file.name: file.read_bytes() for file in place.iterdir()} if there else None
    countdown = [{"write": 2, "rename": 1, "second rename": 2}[at]]

    def fails(function):
        def fail(*arguments):
            countdown[0] -= 1
            if countdown[0] == 0:
                raise error
            return function(*arguments)

        return fail

    if at == "write":
        monkeypatch.setattr(_folder.os, "fsync", fails(os.fsync))
    else:
        monkeypatch.setattr(Path, "rename", fails(Path.rename))
    with pytest.raises(type(error)):
        sae.io.write(encoded, place, overwrite=True)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if there else [])
    if there:
        assert {file.name: file.read_bytes() for file in place.iterdir()} == earlier


# ---- Files that are not what they should be


def without(name):
    return lambda folder: (folder / name).unlink()


def edited(change: Callable[[dict], object], *, signed: bool = True):
    def edit(folder):
        said = document(folder)
        change(said)
        if signed:
            sign(folder, said)
        else:
            (folder / "sae.json").write_bytes(_sae.lines(said))

    return edit


def text(content: bytes | str):
    def write(folder):
        (folder / "sae.json").write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def weights(content: bytes | Callable[[bytes], bytes], *, signed: bool = True):
    def write(folder):
        file = folder / "weights.safetensors"
        new = content(file.read_bytes()) if callable(content) else content
        if signed:
            with_weights(folder, new)
        else:
            file.write_bytes(new)

    return write


def in_place_of(name, make):
    def replace(folder):
        (folder / name).rename(folder.parent / "moved")
        make(folder / name)

    return replace


def twice(content: bytes) -> bytes:
    """Repeat an entry of the header."""
    n = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + n].strip()
    first = json.dumps(json.loads(header)["b_dec"])
    return raw_file(header[:-1] + f',"b_dec":{first}}}'.encode(), content[8 + n :])


def flipped(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


BOMB = b'{"format":' + b"[" * 100_000
HOSTILE = {
    "no description": (without("sae.json"), FileNotFoundError, "has no 'sae.json'; it has 'weights.safetensors'"),
    "no weights": (without("weights.safetensors"), FileNotFoundError, "There is no file .*weights.safetensors"),
    "a folder for the description": (in_place_of("sae.json", Path.mkdir), OSError, "is a folder, not a file"),
    "a folder for the weights": (in_place_of("weights.safetensors", Path.mkdir), OSError, "is a folder, not a file"),
    "a pipe for the weights": (
        in_place_of("weights.safetensors", os.mkfifo),
        OSError,
        "a device or a pipe, not a file",
    ),
    "a device": (
        in_place_of("sae.json", lambda path: path.symlink_to("/dev/zero")),
        OSError,
        "a device or a pipe, not a file",
    ),
    "a link to nothing": (
        in_place_of("weights.safetensors", lambda path: path.symlink_to("nowhere")),
        FileNotFoundError,
        "There is no file",
    ),
    "empty": (text(""), ValueError, "is not JSON"),
    "truncated": (text('{"format": "sae", "format_ver'), ValueError, "is not JSON"),
    "not text": (text(b'\xff\xfe{"'), ValueError, "is not JSON: 'utf-8' codec"),
    "a list": (text("[]"), ValueError, "does not describe an SAE"),
    "another JSON": (text('{"architecture": "topk"}'), ValueError, "does not describe an SAE"),
    "a name twice": (text('{"format": "sae", "format": "sae"}'), ValueError, "the name 'format' occurs twice"),
    "NaN": (text('{"format": NaN}'), ValueError, "not JSON compliant"),
    "beyond all numbers": (text('{"format": 1e999}'), ValueError, "not JSON compliant"),
    "ten thousand digits": (text('{"format": ' + "9" * 10_000 + "}"), ValueError, "is not JSON"),
    "half a letter": (text('{"format": "\\ud800"}'), ValueError, "surrogates not allowed"),
    "nested deeply": (text(BOMB), ValueError, "nested too deeply"),
    "many lists": (text("[" + "[]," * 10**6 + "[]]"), ValueError, "lists and objects; more than .* are not read"),
    "changed by hand": (edited(lambda said: said["params"].update(k=7), signed=False), ValueError, "was changed after"),
    "another order": (edited(lambda said: said["params"].update(k=7)), None, None),
    "newer format": (
        edited(lambda said: said.update(format_version=2)),
        ValueError,
        "format_version 2; this .* Update sae",
    ),
    "newer schema": (
        edited(lambda said: said.update(schema_version=99)),
        ValueError,
        "schema_version 99; .* Update sae",
    ),
    "no version": (edited(lambda said: said.pop("schema_version")), ValueError, "the schema_version 'None'"),
    "version 1.0": (edited(lambda said: said.update(schema_version=1.0)), ValueError, "the schema_version '1.0'"),
    "version true": (edited(lambda said: said.update(schema_version=True)), ValueError, "the schema_version 'True'"),
    "version 0": (edited(lambda said: said.update(schema_version=0)), ValueError, "the schema_version '0'"),
    "an entry more": (edited(lambda said: said.update(code="import os")), ValueError, "has the entries"),
    "an entry less": (edited(lambda said: said.pop("history")), ValueError, "has the entries"),
    "one flipped bit": (weights(flipped, signed=False), ValueError, "does not have the checksum"),
    "weights cut off": (weights(lambda c: c[:-100], signed=False), ValueError, "does not have the checksum"),
    "weights of another": (weights(b"", signed=False), ValueError, r"\(0 bytes\) does not have the checksum"),
    "no checksum": (edited(lambda said: said.update(weights=None)), ValueError, "does not have the checksum"),
    "signed, cut off": (weights(lambda c: c[:-100]), ValueError, "not a safetensors file, or was damaged"),
    "signed, longer": (weights(lambda c: c + b"0000"), ValueError, "not a safetensors file, or was damaged"),
    "signed, no file": (weights(b""), ValueError, "(?i)header ?too ?small"),
    "a huge header": (weights(b"\xff" * 7 + b"\x00{}"), ValueError, "(?i)header ?too ?large"),
    "a huge tensor": (
        weights(raw_file({"W_enc": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 4]}}, b"0000")),
        ValueError,
        "not a safetensors file, or was damaged",
    ),
    "tensors that overlap": (
        weights(raw_file({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, b"0000")),
        ValueError,
        "not a safetensors file, or was damaged",
    ),
    "a header of lists": (weights(raw_file(b"[" * 50_000, b"")), ValueError, "not a safetensors file, or was damaged"),
    "a tensor twice": (weights(twice), ValueError, "the name 'b_dec' occurs twice"),
    "integers": (
        lambda folder: changed_weights(folder, b_dec=np.zeros(20, np.int32)),
        ValueError,
        r"has 'b_dec' \(I32\); expected tensors of F16",
    ),
    "double": (
        lambda folder: changed_weights(folder, b_dec=np.zeros(20, np.float64)),
        ValueError,
        "has tensors of 'F32', 'F64'; expected F32",
    ),
    "other shapes than said": (
        lambda folder: with_weights(folder, save(load_file(folder / "weights.safetensors")), {"W_enc": [1, 1]}),
        ValueError,
        "other shapes than sae.json says",
    ),
    "another number of features": (
        edited(lambda said: said["params"].update(n_features=23)),
        ValueError,
        "of the shape",
    ),
    "a bias of another width": (
        lambda folder: changed_weights(folder, b_dec=np.zeros(19, np.float32)),
        ValueError,
        r"'b_dec' of the shape \(19,\); expected \(20,\)",
    ),
    "a vector for a matrix": (
        lambda folder: changed_weights(folder, W_enc=np.zeros(20, np.float32)),
        ValueError,
        "no matrix 'W_enc'",
    ),
    "a missing bias": (lambda folder: changed_weights(folder, b_enc=None), ValueError, "has the weights .*; expected"),
    "no threshold": (lambda folder: changed_weights(folder, threshold=None), ValueError, "has the weights"),
    "a tensor more": (lambda folder: changed_weights(folder, x=np.ones(1, np.float32)), ValueError, "has the weights"),
    "NaN weights": (
        lambda folder: changed_weights(folder, b_dec=np.full(20, np.nan, np.float32)),
        ValueError,
        "has 20 NaN or infinite values in 'b_dec'",
    ),
    "a negative threshold": (
        lambda folder: changed_weights(folder, threshold=np.full(24, -1, np.float32)),
        ValueError,
        "thresholds below 0",
    ),
    "an unknown architecture": (
        edited(lambda said: said["params"].update(architecture="__import__('os')")),
        ValueError,
        "the architecture",
    ),
    "a list of architectures": (
        edited(lambda said: said["params"].update(architecture=[])),
        ValueError,
        "'architecture'",
    ),
    "no architecture": (edited(lambda said: said["params"].pop("architecture")), ValueError, "architecture none"),
    "TopK without k": (
        lambda folder: (
            changed_weights(folder, threshold=None),
            edited(lambda said: (said["params"].update(architecture="topk"), said["params"].pop("k")))(folder),
        ),
        ValueError,
        "topk SAE without k",
    ),
    "k above h": (edited(lambda said: said["params"].update(k=25)), ValueError, "as k 25"),
    "k true": (edited(lambda said: said["params"].update(k=True)), ValueError, "as k True"),
    "no variance": (edited(lambda said: said["params"].update(variance=0.0)), ValueError, "as variance 0.0"),
    "a large integer": (edited(lambda said: said["params"].update(seed=2**70)), ValueError, "more than 64 bits"),
    "a path as name": (edited(lambda said: said["params"].update({"../../x": 1})), ValueError, "without '/'"),
    "a path as column": (edited(lambda said: said["history"].update({"..": 1})), ValueError, "without '/'"),
    "no name": (edited(lambda said: said["params"].update({"": 1})), ValueError, "without '/'"),
    "a name too few": (edited(lambda said: said.update(input_names=["a"])), ValueError, "1 names of inputs"),
    "names that are numbers": (
        edited(lambda said: said.update(input_names=[1] * 20)),
        ValueError,
        "not a list of names",
    ),
    "names that are text": (edited(lambda said: said.update(input_names="a" * 20)), ValueError, "not a list of names"),
    "settings in a list": (edited(lambda said: said.update(params=[])), ValueError, "params is a list"),
    "columns in a list": (edited(lambda said: said.update(history=[])), ValueError, "history is a list"),
    "columns of other lengths": (
        edited(lambda said: said["history"]["fvu"]["values"].pop()),
        ValueError,
        "columns of 49 and 50 rows",
    ),
    "features too few": (
        edited(lambda said: [column["values"].pop() for column in said["features"].values()]),
        ValueError,
        "columns of 23 and 24 rows; expected 24",
    ),
    "text among numbers": (
        edited(lambda said: said["history"]["fvu"]["values"].__setitem__(0, "0.5")),
        ValueError,
        "'0.5' among values of type float64",
    ),
    "a float among integers": (
        edited(lambda said: said["history"]["step"]["values"].__setitem__(0, 1.5)),
        ValueError,
        "'1.5' among values of type int64",
    ),
    "too large for its type": (
        edited(lambda said: said["history"].update(x={"type": "int8", "values": [300] * 50})),
        ValueError,
        "'300' among values of type int8",
    ),
    "too precise for its type": (
        edited(lambda said: said["history"].update(x={"type": "float16", "values": [1e300] * 50})),
        ValueError,
        "none of type float16",
    ),
    "an unknown type": (
        edited(lambda said: said["history"].update(x={"type": "object", "values": [0] * 50})),
        ValueError,
        "'object', which is none that sae writes",
    ),
    "a value of no category": (
        edited(lambda said: said["features"]["name_from"]["values"].__setitem__(0, "magic")),
        ValueError,
        "'magic', none of its categories",
    ),
    "a category twice": (
        edited(lambda said: said["features"]["name_from"].update(categories=["gene set", "gene set"])),
        ValueError,
        "categories that occur twice",
    ),
    "a shape that is none": (
        edited(lambda said: said["params"].update(x={"type": "int64", "values": [1], "shape": [2**40, 2**40]})),
        ValueError,
        "which its 1 values do not have",
    ),
    "a negative shape": (
        edited(lambda said: said["params"].update(x={"type": "int64", "values": [1], "shape": [-1]})),
        ValueError,
        "which its 1 values do not have",
    ),
}


@pytest.mark.parametrize(("spoil", "error", "message"), HOSTILE.values(), ids=HOSTILE)
def test_files_that_are_not_what_they_should_be(spoil, error, message, folder):
    spoil(folder)
    if error is None:
        sae.io.read(folder)
        return
    with pytest.raises(error, match=message) as raised:
        sae.io.read(folder)
    assert len(str(raised.value)) < 2_000


def test_what_is_too_large_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(_sae, "MOST_TENSOR_BYTES", 1_000)
    with pytest.raises(ValueError, match="bytes; more than 1,000 are not read"):
        sae.io.read(folder)
    with (folder / "sae.json").open("ab") as file:
        # Takes no room on the disk.
        file.truncate(10**12)
    with pytest.raises(ValueError, match="1,000,000,000,000 bytes"):
        sae.io.read(folder)


def test_paths_that_are_no_folder(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        sae.io.read(tmp_path / "nothing")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        sae.io.read(folder / "sae.json")


def test_links_to_files_are_followed(folder, tmp_path, compare):
    """As downloads are kept by a hub's cache."""
    (tmp_path / "links").mkdir()
    for file in folder.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    compare.assert_same(parts(sae.io.read(folder)), parts(sae.io.read(tmp_path / "links")))


def test_bfloat16():
    torch = pytest.importorskip("torch")
    from safetensors.torch import save as save_torch

    values = torch.randn(1000).to(torch.bfloat16)
    found = untrusted.tensors(save_torch({"x": values}), "it")
    np.testing.assert_array_equal(found.arrays["x"], values.float().numpy())
    assert found.types == {"x": "BF16"}


# ---- Anything at all


ODD = [
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**70,
    0.5,
    -1e308,
    "",
    "x",
    "NaN",
    "../..",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    [0] * 24,
]


def places(value, path=()):
    """List all places in nested JSON, of long lists the first two."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for name, part in inside:
        yield from places(part, (*path, name))


def swapped(value: object, rng: np.random.Generator) -> object:
    """Put something odd in the place of some value, take it away, or put it there again."""
    value = json.loads(json.dumps(value))
    found = [path for path in places(value) if path]
    path = found[rng.integers(len(found))]
    parent = value
    for name in path[:-1]:
        parent = parent[name]
    odd = ODD[rng.integers(len(ODD))]
    action = rng.integers(4)
    if action == 0:
        del parent[path[-1]]
    elif action == 1 and isinstance(parent, list):
        parent.insert(0, odd)
    elif action == 1:
        parent[f"{path[-1]} again"] = odd
    else:
        parent[path[-1]] = odd
    return value


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Flip, cut off, cut out, insert or repeat."""
    place, n = int(rng.integers(len(content))), int(rng.integers(1, 30))
    match rng.integers(6):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + content[place + n :]
        case 2:
            return content[:place] + rng.bytes(n) + content[place:]
        case 3:
            return content[:place] + content[place : place + n] + content[place:]
        case 4:
            return rng.bytes(len(content) // 8)
    changed = bytearray(content)
    for position in rng.integers(min(len(content), rng.choice([300, 10**9])), size=rng.integers(1, 9)):
        changed[position] ^= 1 << int(rng.integers(8))
    return bytes(changed)


@pytest.fixture(scope="module")
def contents(archived, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    sae.io.write(archived, folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def restored(folder, contents):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def test_damage_is_found(contents, archived, compare, tmp_path):
    """Whatever happens to the bytes, either an error says so or what is read is what was written."""
    expected, rng, refused = parts(archived), np.random.default_rng(0), 0
    restored(tmp_path, contents)
    for _ in range(FUZZ):
        name = list(contents)[rng.integers(2)]
        new = damaged(contents[name], rng)
        (tmp_path / name).write_bytes(new)
        try:
            found = sae.io.read(tmp_path)
        except TYPED as error:
            assert str(error)
            refused += 1
        else:
            compare.assert_same(expected, parts(found))
        (tmp_path / name).write_bytes(contents[name])
    assert refused > 0.9 * FUZZ


def test_lies_are_refused_or_do_no_harm(contents, archived, tmp_path):
    """Of files with the right checksums and the wrong content, an error tells, or cells can be encoded."""
    cells = ad.AnnData(np.zeros((3, 0)), obsm={"X_pca": np.asarray(archived.obsm["X_pca"][:3])})
    said, weights = json.loads(contents["sae.json"]), contents["weights.safetensors"]
    n = int.from_bytes(weights[:8], "little")
    header, rng, refused = json.loads(weights[8 : 8 + n]), np.random.default_rng(1), 0
    restored(tmp_path, contents)
    for _ in range(FUZZ):
        try:
            if rng.integers(3):
                sign(tmp_path, swapped(said, rng))
            else:
                with_weights(tmp_path, raw_file(swapped(header, rng), weights[8 + n :]))
            found = sae.io.read(tmp_path)
            sae.tl.encode(cells.copy(), reference=found, use_rep="X_pca", progress=False)
        except TYPED as error:
            assert str(error)
            refused += 1
        (tmp_path / "sae.json").write_bytes(contents["sae.json"])
        (tmp_path / "weights.safetensors").write_bytes(weights)
    assert refused > 0.3 * FUZZ
