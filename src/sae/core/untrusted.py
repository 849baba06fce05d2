"""Reading files that anybody may have made: nothing in them is run, and nothing is believed before it is checked."""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MOST_JSON_BYTES = 2**26
MOST_BRACKETS = 10**6
"""Lists and objects in one JSON file: each takes a hundred bytes of memory for two in the file."""
MOST_TENSOR_BYTES = 2**34
TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}
AGAIN = "Get it again from where it was made."


@dataclass(frozen=True)
class Tensors:
    """The content of a safetensors file."""

    arrays: dict[str, np.ndarray]
    """Copies; bfloat16 as float32."""
    types: dict[str, str]
    """As the file names them: F32, BF16, ..."""


def content(path: Path, most: int) -> bytes:
    """Return the bytes of a file; folders, devices and pipes are refused, and what is larger than `most`."""
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {str(path)!r}.") from error
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is {'a folder' if stat.S_ISDIR(found.st_mode) else 'a device or a pipe'}, not a file.")
    if found.st_size > most:
        raise ValueError(f"{path} has {found.st_size:,} bytes; more than {most:,} are not read.")
    with path.open("rb") as file:
        return file.read(found.st_size)


def strict_json(text: bytes, where: str, *, finite: bool = True) -> Any:
    """Read JSON in which no name occurs twice.

    Parameters
    ----------
    finite
        Refuse NaN and infinite numbers, and halves of letters: as the standard has it, but not all who write JSON.
    """
    if len(text) > MOST_JSON_BYTES or text.count(b"[") + text.count(b"{") > MOST_BRACKETS:
        raise ValueError(
            f"{where} has {len(text):,} bytes and {text.count(b'[') + text.count(b'{'):,} lists and objects; more than "
            f"{MOST_JSON_BYTES:,} or {MOST_BRACKETS:,} are not read."
        )
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if finite:
            as_json(found)
    except RecursionError as error:
        raise ValueError(f"{where} is not read: its lists or objects are nested too deeply. {AGAIN}") from error
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}. {AGAIN}") from error
    return found


def as_json(value: Any) -> bytes:
    """Write a value in the one way that gives equal bytes for equal values; ValueError for what is not JSON."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name[:50]!r} occurs twice in an object")
        found[name] = value
    return found


def tensors(read: bytes, where: str) -> Tensors:
    """Return all tensors of a safetensors file that was read; those of floating-point numbers alone are allowed."""
    import safetensors

    try:
        found = safetensors.deserialize(read)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{where} is not a safetensors file, or was damaged: {error}. {AGAIN}") from error
    # The library lets names occur twice.
    strict_json(read[8 : 8 + int.from_bytes(read[:8], "little")], f"The header of {where}")
    types = {name: view["dtype"] for name, view in found}
    other = sorted(f"{name[:50]!r} ({kind})" for name, kind in types.items() if kind not in TYPES)
    if other:
        raise ValueError(f"{where} has {', '.join(other[:5])}; expected tensors of {', '.join(TYPES)} alone.")
    return Tensors({name: _array(view) for name, view in found}, types)


def _array(view: dict[str, Any]) -> np.ndarray:
    values = np.frombuffer(view["data"], TYPES[view["dtype"]]).reshape(view["shape"])
    if view["dtype"] == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(values.dtype.newbyteorder("="))
