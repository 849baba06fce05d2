"""Nothing in a file is ever run: all readers, on good files and on hostile ones, under an audit hook.

Run as a script, this file reads them in a process of its own (a hook cannot be taken away) and prints what happened.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RUNS_CODE = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.mkdir",
    "subprocess.Popen",
    "marshal.load",
    "marshal.loads",
    "code.__new__",
    "exec",
    "ctypes.dlopen",
    "socket.connect",
    "socket.getaddrinfo",
    "urllib.Request",
    "webbrowser.open",
)
TYPED = ("ValueError", "TypeError", "KeyError", "OSError")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@dataclass
class Read:
    """What reading one file came to."""

    reader: str
    what: str
    hostile: bool
    error: str = ""
    """The name of the error, and of all its bases."""
    message: str = ""
    ran: list[str] = field(default_factory=list)
    """What the hook saw that runs code."""


@dataclass
class Case:
    """A reader, files that it can read, and others to put in their place."""

    reader: str
    read: Callable[[Path], object]
    good: Path
    """A file or a folder."""
    spoil: dict[str, Callable[[Path], object]]
    """What is done to a copy of it."""
    harmless: tuple[str, ...] = ()
    """What need not be noticed, since it is never opened."""


# ---- Files


def bombs(folder: Path) -> dict[str, bytes]:
    """Content that runs something where it is unpickled, in the forms that readers could meet it in."""
    import io

    import numpy as np
    import torch

    bomb = Bomb(folder / "exploded")
    found = {f"pickle {protocol}": pickle.dumps(bomb, protocol) for protocol in (0, 2, 5)}
    found["gzipped pickle"] = gzip.compress(pickle.dumps(bomb))
    objects = np.empty(3, dtype=object)
    objects[:] = bomb
    for name, save in {"npy of objects": np.save, "npz of objects": lambda file, x: np.savez(file, x=x)}.items():
        save(file := io.BytesIO(), objects)
        found[name] = file.getvalue()
    for name, new in {"torch": True, "old torch": False}.items():
        torch.save(bomb, file := io.BytesIO(), _use_new_zipfile_serialization=new)
        found[name] = file.getvalue()
    header = b'{"W_enc":{"dtype":"F32","shape":[99999999,99999999],"data_offsets":[0,4]}}'
    found["safetensors that lies"] = len(header).to_bytes(8, "little") + header + bytes(4)
    found["a header without end"] = (2**62).to_bytes(8, "little") + b"{" * 1000
    found["nothing"] = b""
    found["nested JSON"] = b'{"a":' + b"[" * 100_000
    return found


def in_place_of(name: str, contents: dict[str, bytes]) -> dict[str, Callable[[Path], object]]:
    """Put each content in the place of a file in a folder, or of the file itself for no name."""

    def put(content: bytes) -> Callable[[Path], object]:
        return lambda path: (path / name if name else path).write_bytes(content)

    return {f"{what} in place of {name or 'it'}": put(content) for what, content in contents.items()}


def cases(folder: Path) -> list[Case]:
    hostile = bombs(folder)
    return [*io_cases(folder, hostile), *core_cases(folder, hostile), *model_cases(folder, hostile)]


def io_cases(folder: Path, hostile: dict[str, bytes]) -> list[Case]:
    import anndata as ad

    import sae

    adata = ad.read_h5ad(HERE / "archives" / "schema_1.h5ad")
    sae.io.write(adata, folder / "ours")
    sae.io.write_saelens(adata, folder / "saelens")
    gmt, obo, gaf = folder / "sets.gmt", folder / "go.obo", folder / "go.gaf"
    gmt.write_text("a set\tof genes\tGATA1\tKLF1\n")
    obo.write_text("[Term]\nid: GO:0000001\nname: a\nnamespace: biological_process\n")
    fields = [
        "U",
        "P1",
        "GATA1",
        "involved_in",
        "GO:0000001",
        "PMID:1",
        "IDA",
        "",
        "P",
        "",
        "",
        "protein",
        "t",
        "1",
        "U",
    ]
    gaf.write_text("\t".join([*fields, "", ""]))
    text = in_place_of("", hostile)
    return [
        Case(
            "io.read",
            sae.io.read,
            folder / "ours",
            in_place_of("sae.json", hostile) | in_place_of("weights.safetensors", hostile),
        ),
        Case(
            "io.read_saelens",
            sae.io.read_saelens,
            folder / "saelens",
            in_place_of("cfg.json", hostile) | in_place_of("sae_weights.safetensors", hostile),
        ),
        Case("io.read_gmt", sae.io.read_gmt, gmt, text),
        Case("io.read_go, terms", lambda path: sae.io.read_go(path, gaf), obo, text),
        Case("io.read_go, annotations", lambda path: sae.io.read_go(obo, path), gaf, text),
        Case("io.read_go_terms", sae.io.read_go_terms, obo, text),
    ]


def core_cases(folder: Path, hostile: dict[str, bytes]) -> list[Case]:
    import numpy as np

    from sae.core.architectures import ARCHITECTURES
    from sae.core.backend import Settings
    from sae.core.backend_numba import NumbaBackend
    from sae.core.checkpoint import Checkpoint
    from sae.core.fitting import Options
    from sae.core.schedule import Schedule
    from sae.core.sweep import Outcome, Run, Store

    rng = np.random.default_rng(0)
    weights = {
        "W_enc": rng.normal(size=(4, 3)),
        "W_dec": rng.normal(size=(4, 3)),
        "b_enc": np.zeros(4),
        "b_dec": np.zeros(3),
    }
    settings = Settings("topk", 4, (4,), 2, None, None, 0.01, 10, 2, 0, "cpu")

    def backend():
        return NumbaBackend(weights, ARCHITECTURES["topk"], settings)

    checkpoint = folder / "checkpoint.npz"
    Checkpoint(checkpoint, settings, "cells").save(backend(), Schedule(10), [[1.0, 2.0]], 3)

    def resume(path):
        return Checkpoint(path, settings, "cells").resume(backend(), Schedule(10))

    def member(name, content):
        def replace(path):
            with zipfile.ZipFile(path) as archive:
                members = {entry: archive.read(entry) for entry in archive.namelist()}
            assert name in members
            with zipfile.ZipFile(path, "w") as archive:
                for entry, value in (members | {name: content}).items():
                    archive.writestr(entry, value)

        return replace

    members = ("state.W_enc.npy", "signature.npy", "progress.npy", "history.npy")
    in_archive = {
        f"{what} in place of {name}": member(name, content) for what, content in hostile.items() for name in members
    }
    store = Store(folder / "sweep", "cells")
    run = Run(0, Options(n_features=8, steps=10), 0)
    store.save(run, Outcome({"fvu": 0.5, "k": None}, np.eye(3, dtype=np.float32)))

    def find(path):
        found = Store(path, "cells").find(run)
        if found is None:
            raise ValueError("It is taken for none, and trained anew.")
        return found, Store(path, "cells").directions(run)

    record, directions = store.path(run).name, store.path(run, ".npy").name
    return [
        Case("core.checkpoint", resume, checkpoint, in_place_of("", hostile) | in_archive),
        Case(
            "core.sweep",
            find,
            folder / "sweep",
            in_place_of(record, hostile) | in_place_of(directions, hostile),
        ),
    ]


def model_cases(folder: Path, hostile: dict[str, bytes]) -> list[Case]:
    import torch
    from transformers import BertConfig, BertForMaskedLM

    import sae

    tokens = {name: i for i, name in enumerate(["<pad>", "<mask>", "<cls>", "<eos>", "ENSG00000000001"])}
    medians = {"ENSG00000000001": 1.0}
    (folder / "tokens.json").write_text(json.dumps(tokens))
    (folder / "medians.json.gz").write_bytes(gzip.compress(json.dumps(medians).encode()))
    config = BertConfig(
        vocab_size=5,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForMaskedLM(config).save_pretrained(folder / "bert")

    def geneformer(path=folder / "bert", tokens=tokens, medians=medians):
        return sae.models.Geneformer(path, tokens, medians, hidden_state=1, device="cpu", progress=False)

    def shards(path):
        """An index that leads to a pickle beside it."""
        names = list(BertForMaskedLM(config).state_dict())
        (path / "model.safetensors").rename(path / "other.safetensors")
        (path / "weights.bin").write_bytes(hostile["torch"])
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "weights.bin")}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))

    def code(path):
        """A configuration that asks for code beside it."""
        said = json.loads((path / "config.json").read_text())
        said["auto_map"] = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil", "BertForMaskedLM": "evil.Evil"}
        (path / "config.json").write_text(json.dumps(said))
        (path / "evil.py").write_text(f"import os\nos.mkdir({str(folder / 'exploded')!r})\n")

    def wide(path):
        said = json.loads((path / "dgd_hyperparameters.json").read_text())
        (path / "dgd_hyperparameters.json").write_text(json.dumps(said | {"n_hidden": 10**12}))

    def pickled_weights(path):
        (path / "model.safetensors").unlink()
        (path / "pytorch_model.bin").write_bytes(hostile["torch"])

    def beside(path):
        (path / "pytorch_model.bin").write_bytes(hostile["torch"])

    # What is read as text may be any text.
    not_text = {what: content for what, content in hostile.items() if what != "nothing"}
    dgd = HERE / "models" / "multidgd" / "rna"
    return [
        Case(
            "models.MultiDGD",
            lambda path: sae.models.MultiDGD(path, progress=False),
            dgd,
            in_place_of("dgd.pt", hostile)
            | in_place_of("dgd_hyperparameters.json", hostile)
            | in_place_of("_obs.csv", not_text)
            | {"more layers than there is memory": wide},
        ),
        Case(
            "models.Geneformer, tokens",
            lambda path: geneformer(tokens=path),
            folder / "tokens.json",
            in_place_of("", hostile),
        ),
        Case(
            "models.Geneformer, medians",
            lambda path: geneformer(medians=path),
            folder / "medians.json.gz",
            in_place_of("", hostile),
        ),
        Case(
            "models.Geneformer, weights",
            geneformer,
            folder / "bert",
            in_place_of("model.safetensors", hostile)
            | in_place_of("config.json", hostile)
            | {"shards": shards, "code": code, "pickled weights": pickled_weights, "a pickle beside": beside},
            harmless=("code", "a pickle beside"),
        ),
    ]


# ---- The process that reads them


def attempt(case: Case, path: Path, what: str, hostile: bool, seen: list[str]) -> Read:
    result = Read(case.reader, what, hostile)
    seen.clear()
    try:
        case.read(path)
    except BaseException as error:  # noqa: BLE001 - also what is no Exception is to be seen
        result.error = " ".join(kind.__name__ for kind in type(error).__mro__)
        result.message = str(error)[:300]
    result.ran = list(seen)
    return result


def spoilt(case: Case, what: str, folder: Path) -> Path:
    path = folder / "spoilt" / case.good.name
    shutil.rmtree(path.parent, ignore_errors=True)
    path.parent.mkdir()
    (shutil.copytree if case.good.is_dir() else shutil.copyfile)(case.good, path)
    case.spoil[what](path)
    return path


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    seen: list[str] = []
    on = [False]

    def hook(event: str, arguments: tuple) -> None:
        # Readers of sweeps make the folder that they are to read, if it is not there; torch with CUDA asks for devices.
        harmless = {"os.mkdir": "sweep", "ctypes.dlopen": "libnvidia-ml.so.1"}.get(event)
        if on[0] and event in RUNS_CODE and not (harmless and str(arguments[0]).endswith(harmless)):
            seen.append(f"{event} {arguments!r}"[:300])

    found = cases(folder)
    # Once without the hook: modules that are loaded at the first use are not loaded again.
    for case in found:
        attempt(case, case.good, "", False, seen)
    sys.addaudithook(hook)
    results = []
    for case in found:
        for what in ["", *case.spoil]:
            path = spoilt(case, what, folder) if what else case.good
            on[0] = True
            result = attempt(case, path, what, bool(what) and what not in case.harmless, seen)
            on[0] = False
            results.append(result)
    # The hook sees what it is there for.
    on[0] = True
    try:
        pickle.loads(pickle.dumps(Bomb(folder / "by ourselves")))
    finally:
        on[0] = False
    report = {
        "reads": [asdict(result) for result in results],
        "exploded": (folder / "exploded").exists(),
        "control": seen,
    }
    (folder / "report.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("readers")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


def test_the_hook_sees_what_a_pickle_does(report):
    assert any(event.startswith("pickle.find_class") for event in report["control"])
    assert any(event.startswith("os.mkdir") for event in report["control"])


def test_nothing_is_run(report):
    assert not report["exploded"]
    assert {f"{read['reader']}: {read['what']}": read["ran"] for read in report["reads"] if read["ran"]} == {}


def test_good_files_are_read(report):
    assert {read["reader"]: read["message"] for read in report["reads"] if not read["hostile"] and read["error"]} == {}
    assert len({read["reader"] for read in report["reads"]}) == 12


def test_hostile_files_get_a_typed_error(report):
    wrong = {
        f"{read['reader']}: {read['what']}": read["error"].partition(" ")[0] + " " + read["message"]
        for read in report["reads"]
        if read["hostile"] and (not set(read["error"].split()) & set(TYPED) or not read["message"])
    }
    assert wrong == {}


def test_weights_that_an_index_leads_to_are_no_pickle(report):
    """They would not be run, but transformers advises to let them."""
    (message,) = (read["message"] for read in report["reads"] if read["what"] == "shards")
    assert "leads to 'weights.bin'; expected names of safetensors files" in message


def test_a_dictionary_is_not_unpacked_without_end(tmp_path, monkeypatch):
    from sae.models import _tokens

    (tmp_path / "tokens.json").write_bytes(gzip.compress(b" " * 2_000))
    monkeypatch.setattr(_tokens, "MOST_BYTES", 1_000)
    with pytest.raises(ValueError, match="more than 1,000 bytes once it is decompressed"):
        _tokens.read_dictionary(tmp_path / "tokens.json", "tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
