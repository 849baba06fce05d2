"""Folders of known files that are there in whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from uuid import uuid4

from .._data import listing
from ..core.interrupts import deferred_interrupts


def checked_place(path: str | os.PathLike[str], files: Collection[str], *, overwrite: bool) -> Path:
    """Return where a folder may be written: where nothing is, an empty folder, or on request one of the same files."""
    # Without links and "..", so that what is written beside it is on the same disk.
    place = Path(os.path.abspath(path))
    if not place.parent.is_dir():
        raise FileNotFoundError(
            f"There is no folder {str(place.parent)!r} to write {place.name!r} into. Make it first."
        )
    if not os.path.lexists(place):
        return place
    if place.is_symlink() or not place.is_dir():
        raise FileExistsError(f"{place} exists and is not a folder. Choose another path, or remove it first.")
    found = sorted(entry.name for entry in place.iterdir())
    other = [name for name in found if name not in files or (place / name).is_dir()]
    if other:
        raise FileExistsError(
            f"{place} exists and is not an SAE's folder: it has {listing(other, 5)}. It is not overwritten. Choose another path."
        )
    if found and not overwrite:
        raise FileExistsError(f"{place} holds an SAE. Choose another path, or pass overwrite=True to replace it.")
    return place


def write_folder(place: Path, contents: Mapping[str, bytes], files: Collection[str]) -> None:
    """Write files to a folder beside `place`, which then takes its name; what goes wrong leaves the folder before.

    Parameters
    ----------
    place
        As :func:`checked_place` returned it.
    files
        What an earlier folder may have, and is removed with it.
    """
    mark = uuid4().hex
    partial, old = (place.with_name(f".{place.name}.{mark}.{kind}") for kind in ("partial", "old"))
    partial.mkdir()
    try:
        for name, content in contents.items():
            with (partial / name).open("xb") as file:
                file.write(content)
                file.flush()
                # Else, when the machine goes down, the folder may be there before what is in it.
                os.fsync(file.fileno())
        with deferred_interrupts():
            _swap(partial, place, old)
    finally:
        _remove(partial, contents)
    _remove(old, files)


def _swap(partial: Path, place: Path, old: Path) -> None:
    if not place.is_dir():
        partial.rename(place)
        return
    place.rename(old)
    try:
        partial.rename(place)
    except BaseException:
        old.rename(place)
        raise


def _remove(folder: Path, files: Collection[str]) -> None:
    """Remove a folder and these files in it; one that has others is left."""
    if folder.is_dir():
        for name in files:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
