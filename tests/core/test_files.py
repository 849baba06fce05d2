from __future__ import annotations

import stat
import subprocess
import sys

import pytest

from sae.core import files
from sae.core.files import replacing


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("there", [True, False], ids=["earlier", "none"])
def test_a_failure_leaves_what_was_there(tmp_path, error, there):
    path = tmp_path / "a.txt"
    if there:
        path.write_text("earlier")
    with pytest.raises(error), replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == (
        [("a.txt", "earlier")] if there else []
    )


def test_nothing_written_is_an_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("earlier")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "earlier"


def test_two_that_write_the_same_file_do_not_meet(tmp_path, monkeypatch):
    """As in containers that share a folder: one ends while the other writes."""
    monkeypatch.setattr("os.getpid", lambda: 1)
    path = tmp_path / "a.txt"
    with replacing(path) as slow, replacing(path) as fast:
        fast.write_text("fast")
        slow.write_text("slow")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("a.txt", "slow")]


def test_permissions_are_those_of_the_earlier_file_or_of_any_new_one(tmp_path):
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    other.touch()
    with replacing(path) as partial:
        partial.write_text("first")
    assert path.stat().st_mode == other.stat().st_mode
    path.chmod(0o640)
    with replacing(path) as partial:
        partial.write_text("second")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_stays_one(tmp_path):
    (tmp_path / "far").mkdir()
    path = tmp_path / "a.txt"
    path.symlink_to(tmp_path / "far" / "b.txt")
    with replacing(path) as partial:
        partial.write_text("new")
    assert path.is_symlink() and (tmp_path / "far" / "b.txt").read_text() == "new"
    assert [found.name for found in (tmp_path / "far").iterdir()] == ["b.txt"]


WRITER = """
import pathlib, runpy, sys
replacing = runpy.run_path(sys.argv[2])["replacing"]
path, number = pathlib.Path(sys.argv[1]), 0
while True:
    with replacing(path) as partial:
        partial.write_text(f"{number % 10}" * 2_000_000)
    print(flush=True)
    number += 1
"""


def test_a_process_that_is_killed_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a.txt"
    for wait in range(5):
        with subprocess.Popen([sys.executable, "-c", WRITER, path, files.__file__], stdout=subprocess.PIPE) as process:
            for _ in range(wait + 1):
                process.stdout.readline()
            process.kill()
        text = path.read_text()
        assert len(text) == 2_000_000 and text == text[0] * len(text)
