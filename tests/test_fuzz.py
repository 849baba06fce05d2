"""Files that others wrote, whole and damaged: the readers of gene sets give a result, or an error of ours.

`SAE_FUZZ=20` reads twenty times as many.
"""

from __future__ import annotations

import gzip
import linecache
import os
import re
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import sae
from sae import _genesets
from sae._genesets import match, read_net

FUZZ = int(os.environ.get("SAE_FUZZ", "1"))
PACKAGE = str(Path(sae.__file__).parent)
COUNTS: Counter[tuple[str, str]] = Counter()


def few(n: int) -> settings:
    return settings(
        max_examples=n * FUZZ,
        derandomize=FUZZ == 1,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


GMT = b"GO:0030218\terythrocyte differentiation\tGATA1\tKLF1\nT cell\thttp://x.org\tCD3D\tCD3E\n\nB cell\t\tMS4A1\n"
OBO = b"""format-version: 1.2

[Term]
id: GO:0030218
name: erythrocyte differentiation
namespace: biological_process
alt_id: GO:0000001
is_a: GO:0030099 ! myeloid cell differentiation
relationship: part_of GO:0008150 {source="x"} ! biological_process

[Term]
id: GO:0030099
name: myeloid cell differentiation
namespace: biological_process
is_a: GO:0008150 ! biological_process

[Term]
id: GO:0008150
name: biological_process
namespace: biological_process

[Term]
id: GO:0000002
name: obsolete
is_obsolete: true

[Typedef]
id: part_of
"""
GAF = b"!gaf-version: 2.2\n" + b"".join(
    b"\t".join(
        [b"UniProtKB", b"P1", gene, b"enables", term, b"PMID:1", b"IDA", b"", b"P"]
        + [b"", b"", b"protein", b"taxon:9606", b"20200101", b"UniProt", b"", b""]
    )
    + b"\n"
    for gene, term in [
        (b"GATA1", b"GO:0030218"),
        (b"KLF1", b"GO:0000001"),
        (b"X", b"GO:0000002"),
        (b"Y", b"GO:9999999"),
    ]
)
GTF = (
    b'#!genome\nchr1\tHAVANA\tgene\t100\t200\t.\t+\t.\tgene_id "G1"; gene_name "A";\n'
    b'chr1\tHAVANA\texon\t100\t200\t.\t+\t.\tgene_id "G1";\n'
)


def read_go(obo: Path, gaf: Path) -> pd.DataFrame:
    return sae.io.read_go(obo, gaf)


def with_good(reader: Callable[[Path, Path], Any], *, obo: bytes | None = None, gaf: bytes | None = None) -> Any:
    """Read one file with a good one for the other."""

    def read(path: Path) -> Any:
        other = path.with_name("other")
        other.write_bytes(gaf if obo is None else obo)  # type: ignore[arg-type]
        return reader(path, other) if obo is None else reader(other, path)

    return read


READERS: dict[str, tuple[Callable[[Path], Any], bytes]] = {
    "read_gmt": (sae.io.read_gmt, GMT),
    "read_go, OBO": (with_good(read_go, gaf=GAF), OBO),
    "read_go, GAF": (with_good(read_go, obo=OBO), GAF),
    "read_go_terms": (sae.io.read_go_terms, OBO),
    "read_net": (read_net, GMT),
    "read_genes": (lambda path: sae._peaks.read_genes(path), GTF),
}


def result_or_typed_error(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Call; an error must be raised by a statement of ours, with a message that says something."""
    try:
        return call(), None
    except (ValueError, TypeError, KeyError, FileNotFoundError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        line = linecache.getline(frame.filename, frame.lineno or 0).strip()
        if not (frame.filename.startswith(PACKAGE) and line.startswith("raise") and len(str(error)) > 20):
            raise AssertionError(f"not an error of ours: {type(error).__name__}: {error}") from error
        return None, error


def read(name: str, content: bytes, folder: Path) -> tuple[Any, Exception | None]:
    reader, _ = READERS[name]
    path = folder / "file"
    path.write_bytes(content)
    result, error = result_or_typed_error(partial(reader, path))
    COUNTS[name, type(error).__name__] += 1
    if error is None and name in ("read_gmt", "read_net", "read_go, OBO", "read_go, GAF"):
        assert {"source", "target"} <= set(result.columns) and len(result)
        assert result[["source", "target"]].map(lambda text: isinstance(text, str) and text != "").all(axis=None)
        assert not result.duplicated().any()
    return result, error


# ---- damage ------------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Draw a good file with a few changes of bytes, pieces and line ends, perhaps gzipped and damaged again."""
    content = good
    for _ in range(draw(st.integers(1, 4))):
        content = draw(st.sampled_from(DAMAGE))(draw, content)
    if draw(st.booleans()):
        content = gzip.compress(content, mtime=0)
        for _ in range(draw(st.integers(0, 2))):
            content = draw(st.sampled_from(DAMAGE))(draw, content)
    return content


def _place(draw: st.DrawFn, content: bytes) -> int:
    return draw(st.integers(0, len(content)))


def _flip(draw: st.DrawFn, content: bytes) -> bytes:
    at = _place(draw, content)
    return (
        content[:at] + bytes(byte ^ (1 << draw(st.integers(0, 7))) for byte in content[at : at + 1]) + content[at + 1 :]
    )


def _cut(draw: st.DrawFn, content: bytes) -> bytes:
    return content[: _place(draw, content)]


def _without_start(draw: st.DrawFn, content: bytes) -> bytes:
    return content[_place(draw, content) :]


PIECES = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n", b"\t", b"\t\t\t", b":", b"[Term]\n", b"is_a: \n", b"is_a: GO:0030218\n", b"id: \n", b"relationship: part_of\n", b"!", b"\\", b"\xe2\x80\xa8", b"\x1f\x8b", b"\xc3", "é".encode(), b"x" * 5000, b" ", b"\x85", b"\x1c", b"gene\t-1\t1e3\t"]  # fmt: skip


def _insert(draw: st.DrawFn, content: bytes) -> bytes:
    at = _place(draw, content)
    return content[:at] + draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=12))) + content[at:]


def _repeat(draw: st.DrawFn, content: bytes) -> bytes:
    at, end = sorted([_place(draw, content), _place(draw, content)])
    return content[:end] + content[at:end] + content[end:]


def _replace(draw: st.DrawFn, content: bytes) -> bytes:
    old, new = draw(st.sampled_from(SWAPS))
    return content.replace(old, new)


SWAPS = [(b"\n", b"\r\n"), (b"\n", b"\r"), (b"\t", b" "), (b"\n", b""), (b"\t", b"\n"), (b"GO:00", b"GO:"), (b"GATA1", b""), (b"namespace", b"namespaces"), (b"GO:0008150", b"GO:0030218"), (b"is_a", b"part_of"), (b"P\t", b"\t"), (b"100", b"99999999999999999999"), (b"200", b"0"), (b"200", b"\xc2\xb2")]  # fmt: skip
DAMAGE = [_flip, _flip, _cut, _without_start, _insert, _insert, _repeat, _replace]


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name, tmp_path):
    @few(150)
    @given(content=damaged(READERS[name][1]))
    def property_(content):
        read(name, content, tmp_path)

    property_()


@few(300)
@given(name=st.sampled_from(sorted(READERS)), content=st.one_of(st.binary(max_size=400), st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))))  # fmt: skip
@example(name="read_gmt", content=b"")
@example(name="read_gmt", content=b"\x1f\x8b")
@example(name="read_gmt", content=b"\xff\xfea\0\t\0b\0\t\0c\0")
@example(name="read_gmt", content=b"\0\t\0\t\0")
@example(name="read_go_terms", content=b"[Term]\nid: a\nnamespace: biological_process\nis_a: a\n")
@example(name="read_go, OBO", content=b"[Term]\nid: GO:0030218\nnamespace: biological_process\nis_a: GO:0030218\n")
def test_files_of_anything(name, content, tmp_path):
    read(name, content, tmp_path)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("packed", [False, True])
def test_good_files_are_good(name, packed, tmp_path):
    """Else the damaged ones could be refused for another reason."""
    content = READERS[name][1]
    _, error = read(name, gzip.compress(content) if packed else content, tmp_path)
    assert error is None


VARIANTS = {
    "byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "Windows line ends": lambda content: content.replace(b"\n", b"\r\n"),
    "old Mac line ends": lambda content: content.replace(b"\n", b"\r"),
    "mixed line ends": lambda content: content.replace(b"\n", b"\r\n", 2),
    "no last line end": lambda content: content.rstrip(b"\n"),
    "gzipped": gzip.compress,
    "gzipped in two parts": lambda content: gzip.compress(content[:40]) + gzip.compress(content[40:]),
    "zeros after the gzip": lambda content: gzip.compress(content) + bytes(100),
}


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("name", READERS)
def test_what_means_the_same_is_read_the_same(name, change, tmp_path):
    plain, _ = read(name, READERS[name][1], tmp_path)
    other, error = read(name, change(READERS[name][1]), tmp_path)
    assert error is None
    if isinstance(plain, pd.DataFrame):
        pd.testing.assert_frame_equal(plain, other)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"a\t\xe9\tb\n", r"not readable as text in UTF-8.*Is the download complete\?", id="latin-1"),
        pytest.param(gzip.compress(os.urandom(500))[:-300], r"not readable as text.*Is the download complete\?", id="cut gzip"),
        pytest.param(b"\x1f\x8bnone", r"not readable as text", id="no gzip"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused(name, content, message, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        READERS[name][0](path)


@pytest.mark.parametrize("name", READERS)
def test_something_after_the_gzip_is_refused(name, tmp_path):
    reader, good = READERS[name]
    (tmp_path / "file").write_bytes(gzip.compress(good) + b"more")
    with pytest.raises(ValueError, match="not readable as text"):
        reader(tmp_path / "file")


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused(name, tmp_path):
    reader, _ = READERS[name]
    with pytest.raises(FileNotFoundError, match=r"There is no file '.*missing'"):
        reader(tmp_path / "missing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder' cannot be read as a file"):
        reader(tmp_path / "folder")


@pytest.mark.parametrize("bad", ["", ".", "a\0b", "x" * 5000, "a\t\tg1\tg2\n" * 100])
def test_paths_that_are_none(bad):
    for reader in (sae.io.read_gmt, read_net, sae.io.read_go_terms):
        _, error = result_or_typed_error(partial(reader, bad))
        assert error is not None


@pytest.mark.parametrize("name", READERS)
def test_files_that_never_end_are_refused(name, tmp_path, monkeypatch):
    """A few kilobytes of gzip unpack to gigabytes: one endless line, or endless lines."""
    monkeypatch.setattr(_genesets, "MAX_LINE", 100_000)
    monkeypatch.setattr(_genesets, "MAX_TEXT", 500_000)
    reader, good = READERS[name]
    for content, message in [
        (b"!" * 300_000, r"a line of 100,000 characters or more"),
        (good + b"\n" * 600_000, r"more than 500,000 characters"),
    ]:
        path = tmp_path / "bomb.gz"
        path.write_bytes(gzip.compress(content))
        assert path.stat().st_size < 20_000
        with pytest.raises(ValueError, match=message):
            reader(path)


# ---- gene sets given to enrich -------------------------------------------------------------------------------------------

NAMES = st.one_of(
    st.sampled_from(
        ["g0", "g1", "g2", "g3", "G1", "", " ", "a/b", "nan", None, 1, 2.5, float("nan"), pd.NA, True, b"g1"]
    ),
    st.text(max_size=4),
)
GENES = st.one_of(st.lists(NAMES, max_size=6), st.lists(NAMES, max_size=4).map(tuple), NAMES, st.just({"g1": 1.0}))
WEIGHTS = st.sampled_from([1, -2.5, 0, 1e300, float("nan"), float("inf"), "1", "a", None, True])
DICTS = st.dictionaries(st.one_of(st.text(max_size=3), st.integers(0, 2), st.none()), GENES, max_size=4)


@st.composite
def tables(draw: st.DrawFn) -> pd.DataFrame:
    rows = draw(st.lists(st.tuples(NAMES, NAMES, WEIGHTS), max_size=8))
    table = pd.DataFrame(rows, columns=["source", "target", "weight"], dtype=object)
    columns = draw(st.sampled_from([["source", "target", "weight"], ["target", "source"], ["source"], ["source", "source", "target"], []]))  # fmt: skip
    table = table[columns]
    if columns and draw(st.booleans()):
        table = table.astype(dict.fromkeys(set(columns) & {"source", "target"}, "string"), errors="ignore")
    return table


@few(400)
@given(net=st.one_of(DICTS, tables(), NAMES, st.lists(NAMES, max_size=2)), min_size=st.sampled_from([1, 1, 2, 5]))
@example(net={"s": 3}, min_size=1)
@example(net={"s": b"g1"}, min_size=1)
@example(net=pd.DataFrame([["s", "g1", "g2"]], columns=["source", "target", "target"]), min_size=1)
@example(net=pd.DataFrame({"source": ["s"], "target": ["g1"], "weight": ["a"]}), min_size=1)
@example(net=pd.DataFrame({"source": ["s"], "target": ["g1"], "weight": [float("inf")]}), min_size=1)
def test_nets_of_anything(net, min_size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    genes = pd.Index([f"g{i}" for i in range(5)], dtype=object)
    found, error = result_or_typed_error(lambda: match(net, genes, min_size=min_size, max_size=None))
    COUNTS["match", type(error).__name__] += 1
    if error is None:
        sizes = found.weights.getnnz(axis=1)
        assert found.weights.shape == (len(found.names), 5) and (sizes >= min_size).all() and found.names.is_unique
    else:
        assert re.search(r"net|gene set|file", str(error))


def test_missing_genes_of_a_dict_are_none():
    assert read_net({"s": [None, "g1", float("nan"), pd.NA]})["target"].tolist() == ["g1"]


def test_a_pipe_is_refused(tmp_path):
    """Without a writer, it would be waited for without end."""
    import os

    from sae._genesets import read_gmt

    os.mkfifo(tmp_path / "sets.gmt")
    with pytest.raises(ValueError, match="cannot be read as a file: it is a pipe"):
        read_gmt(tmp_path / "sets.gmt")
