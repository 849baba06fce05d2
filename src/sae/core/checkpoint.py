"""A file that training can go on from."""

from __future__ import annotations

import json
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from .backend import Arrays, Backend, Settings
from .files import replacing
from .schedule import Schedule

SECONDS_BETWEEN = 60.0
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    ValueError,
    AttributeError,
    TypeError,
    OverflowError,
    RuntimeError,
    MemoryError,
    OSError,
    TokenError,
)
"""What NumPy raises for archives that are damaged or were never checkpoints."""


class CheckpointError(ValueError):
    """A file that is no checkpoint, or one of other settings or other data."""


class Checkpoint:
    """State of one training run on disk: what its next step depends on, its schedule and its history.

    Parameters
    ----------
    path
        Where it is kept; nothing is written until `save`.
    settings, identity
        Of the run and of its data: a file written with others is refused.
    """

    def __init__(self, path: Path, settings: Settings, identity: str):
        self.path = path
        self._signature = json.dumps({**asdict(settings), "data": identity}, sort_keys=True)
        self._saved_at = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last one is a minute old."""
        return time.monotonic() - self._saved_at > SECONDS_BETWEEN

    def save(self, backend: Backend, schedule: Schedule, history: Sequence[Sequence[float]], done: int) -> None:
        """Write the state after `done` steps; a crash while writing leaves the file before."""
        arrays: dict[str, Any] = {f"state.{name}": value for name, value in backend.state().items()}
        arrays["signature"] = np.array(self._signature)
        arrays["progress"] = np.array([done, schedule.steps, schedule.decay])
        arrays["history"] = np.array(history)
        with replacing(self.path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
        self._saved_at = time.monotonic()

    def resume(self, backend: Backend, schedule: Schedule) -> tuple[int, list[list[float]]]:
        """Bring a run to the saved state; return its number of steps and its history, none where there is no file."""
        if not self.path.exists():
            return 0, []
        if not self.path.is_file():
            raise self._damaged(OSError("it is a folder, a device or a pipe"))
        with self.path.open("rb") as file:
            try:
                with np.load(file, allow_pickle=False) as archive:
                    saved = {name: archive[name] for name in archive.files}
                signature = str(saved["signature"])
            except UNREADABLE as error:
                raise self._damaged(error) from error
        if signature != self._signature:
            raise CheckpointError(
                f"The checkpoint {self.path} was written with other settings or other data. Repeat the settings, or choose "
                "another file."
            )
        state = {name[len("state.") :]: value for name, value in saved.items() if name.startswith("state.")}
        try:
            _check_state(state, backend.state())
            done, steps, decay = map(int, saved["progress"])
            history = saved["history"].tolist()
            backend.load(state)
        except UNREADABLE as error:
            raise self._damaged(error) from error
        schedule.steps, schedule.decay = steps, decay
        return done, history

    def _damaged(self, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a checkpoint of sae, or was damaged ({error}). Remove it to train from the start, or choose "
            "another file."
        )


def _check_state(found: Arrays, expected: Arrays) -> None:
    """Refuse arrays of other shapes: some would be broadcast."""
    for name, value in expected.items():
        if found[name].shape != value.shape or found[name].dtype != value.dtype:
            raise ValueError(f"{name} is {found[name].shape} {found[name].dtype}, not {value.shape} {value.dtype}")
