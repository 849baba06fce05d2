"""Files that are there in whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give another path to write a file to, and put that file in place of `path` at the end of the block.

    Whatever goes wrong, `path` is the earlier file or the new one, and after an exception the other path is gone.
    """
    # A link stays one: the file that it leads to is replaced.
    path = Path(os.path.realpath(path))
    # Not by the number of the process: in containers that share a folder all may have the same.
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            # Else, when the machine goes down, the name may be there before the content.
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
