from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from .._data import listing
from .._progress import progress_bar
from ..core.files import replacing

if TYPE_CHECKING:
    import torch


def activations(
    module: torch.nn.Module,
    layer: str,
    batches: Iterable[Any],
    *,
    pool: Literal["mean"] | int | None = None,
    mask: str | int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Collect what a layer of any PyTorch model outputs, to train an SAE on it.

    Batches run through the model as it is for prediction (no dropout, no gradients), on the device that it is on. The
    model is afterwards as before.

    Parameters
    ----------
    module
        The model.
    layer
        Name of the layer, as `module.named_modules()` has it, `"encoder.layer.2"` for example. Its output is an array
        batch × d or batch × tokens × d, or a tuple or mapping whose first entry is one, as in the models of transformers.
    batches
        What to call the model with, in order: tensors or arrays; tuples of them, which are its positional arguments; or
        mappings, its arguments by name.
    pool
        What becomes of tokens: None keeps each as a row, one batch item after the other; `"mean"` averages over the tokens of
        an item; an integer takes one of them, 0 the first (CLS of most models), −1 the last.
    mask
        The entry of a batch (a name, or a position) that is 1 for tokens and 0 for padding, batch × tokens. Padding is left out
        before anything else. By default `"attention_mask"` where batches are mappings that have it.
    out
        Write to this .npy file, one batch after the other, rather than keep everything in memory. It appears when all is done.
    progress
        Show a progress bar when it takes more than a second.

    Returns
    -------
    Float32 array with a row per batch item, or per token: in memory, or a memory map of the file `out`.

    Raises
    ------
    ValueError
        No such layer (the nearest names are listed); no batches; an output of another shape; a layer that runs not once for
        a batch; an item that has too few tokens for `pool`.
    KeyError
        A batch that lacks the entry named by `mask`.
    TypeError
        A layer whose output is no tensor; one batch instead of several; no module.

    Examples
    --------
    >>> import torch
    >>> import sae
    >>> model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> cells = torch.ones(10, 5)
    >>> sae.models.activations(model, "1", cells.split(4)).shape
    (10, 3)
    """
    found = _submodule(module, layer)
    if pool not in (None, "mean") and not isinstance(pool, Integral):
        raise ValueError(f"pool={pool!r} is not None, 'mean' or the number of a token (0 for CLS).")
    if isinstance(batches, Mapping) or hasattr(batches, "shape"):
        raise TypeError(
            f"batches= is a {type(batches).__name__}, which is one batch and not several. Pass a list of them: [batch], or "
            "tensor.split(256)."
        )
    outputs: list[Any] = []
    # A copy: the next layer may change this in place.
    hook = found.register_forward_hook(lambda _module, _inputs, output: outputs.append(_tensor(output, layer).clone()))
    try:
        with predicting(module), _rows(out) as rows:
            total = len(batches) if isinstance(batches, Sized) else 0
            with progress_bar(total, f"activations of {layer!r}", "batch", shown=progress) as bar:
                for batch in batches:
                    inputs = _on_device(batch, module)
                    outputs.clear()
                    _call(module, inputs)
                    if len(outputs) != 1:
                        raise ValueError(
                            f"The layer {layer!r} ran {len(outputs)} times for one batch; it must run once. Pass a layer that "
                            "is used once, the one that contains it for example."
                        )
                    rows.add(_pooled(outputs[0].float(), _mask(inputs, mask), pool, layer).cpu().numpy())
                    bar.update()
    finally:
        hook.remove()
    return np.concatenate(rows.parts) if out is None else np.load(out, mmap_mode="r")


@contextmanager
def predicting(module: torch.nn.Module) -> Iterator[None]:
    """Run a model for prediction, without gradients; each of its parts is afterwards in the mode it was in."""
    import torch

    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for part in training:
            part.training = True


class _Rows:
    """Rows of float32, in memory or in a .npy file whose header gets their number at the end."""

    def __init__(self, file: BinaryIO | None) -> None:
        self.file = file
        self.parts: list[np.ndarray] = []
        self.n, self.d = 0, -1

    def add(self, rows: np.ndarray) -> None:
        if self.d not in (-1, rows.shape[1]):
            raise ValueError(f"The layer has {rows.shape[1]} dimensions in one batch and {self.d} in those before.")
        first, self.d = self.d == -1, rows.shape[1]
        self.n += len(rows)
        if self.file is None:
            self.parts.append(rows)
            return
        if first:
            self._header(self.file)
        self.file.write(rows.tobytes())

    def _header(self, file: BinaryIO) -> None:
        # NumPy leaves room in the header for a larger number of rows.
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.n, self.d)}
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)

    def finish(self) -> None:
        if self.d == -1:
            raise ValueError("There are no batches: `batches` is empty, or an iterator that was used up before.")
        if self.file is not None:
            self._header(self.file)


@contextmanager
def _rows(out: str | Path | None) -> Iterator[_Rows]:
    """Collect rows in memory, or in a file that takes its name when it is complete."""
    with ExitStack() as opened:
        file = None
        if out is not None:
            file = opened.enter_context(opened.enter_context(replacing(Path(out))).open("wb"))
        rows = _Rows(file)
        yield rows
        rows.finish()


def _submodule(module: torch.nn.Module, layer: str) -> torch.nn.Module:
    import torch

    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module= is a {type(module).__name__}; expected a torch.nn.Module.")
    names = dict(module.named_modules())
    if layer not in names:
        nearest = difflib.get_close_matches(str(layer), list(names), n=5, cutoff=0)
        raise ValueError(
            f"The {type(module).__name__} has no layer {layer!r}; the nearest names are {listing(nearest)}. "
            "[name for name, _ in module.named_modules()] lists all."
        )
    return names[layer]


def _tensor(output: Any, layer: str) -> torch.Tensor:
    """Find the hidden state in what a layer returns."""
    import torch

    while isinstance(output, Mapping | tuple | list) and len(output):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    if not isinstance(output, torch.Tensor):
        raise TypeError(
            f"The layer {layer!r} outputs a {type(output).__name__}; expected a tensor, or a tuple or mapping whose first "
            "entry is one."
        )
    return output


def _on_device(batch: Any, module: torch.nn.Module) -> Any:
    """Move a batch to where the model is; whatever is no array stays as it is."""
    import torch

    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor | np.ndarray):
            return torch.as_tensor(value, device=device)
        return value

    if isinstance(batch, Mapping):
        return {name: moved(value) for name, value in batch.items()}
    return tuple(map(moved, batch if isinstance(batch, tuple | list) else (batch,)))


def _call(module: torch.nn.Module, inputs: dict[str, Any] | tuple[Any, ...]) -> None:
    if isinstance(inputs, dict):
        module(**inputs)
    else:
        module(*inputs)


def _mask(inputs: Any, mask: str | int | None) -> torch.Tensor | None:
    if mask is None:
        return inputs.get("attention_mask") if isinstance(inputs, dict) else None
    try:
        return inputs[mask]
    except (KeyError, IndexError, TypeError):
        there = listing(inputs) if isinstance(inputs, dict) else f"{len(inputs)} arguments without names"
        raise KeyError(f"A batch has no entry {mask!r} to use as mask=; it has {there}.") from None


def _pooled(
    hidden: torch.Tensor, mask: torch.Tensor | None, pool: Literal["mean"] | int | None, layer: str
) -> torch.Tensor:
    """Reduce a hidden state to rows × d."""
    import torch

    shape = tuple(hidden.shape)
    if hidden.ndim == 2 and pool is None:
        return hidden
    if hidden.ndim != 3:
        expected = "batch × d or batch × tokens × d" if pool is None else f"batch × tokens × d for pool={pool!r}"
        raise ValueError(f"The layer {layer!r} outputs an array of shape {shape}; expected {expected}.")
    if mask is None:
        kept = torch.ones(shape[:2], dtype=torch.bool, device=hidden.device)
    elif tuple(mask.shape) != shape[:2]:
        raise ValueError(
            f"The mask has the shape {tuple(mask.shape)}, and the layer {layer!r} outputs batch × tokens × d of {shape}."
        )
    else:
        kept = mask.bool()
    if pool is None:
        return hidden[kept]
    n_tokens = kept.sum(dim=1)
    least = 1 if pool == "mean" else (pool + 1 if pool >= 0 else -pool)
    if (n_tokens < least).any():
        raise ValueError(
            f"pool={pool!r} needs {least} tokens; {int((n_tokens < least).sum())} items of a batch have fewer."
        )
    if pool == "mean":
        # Not a product with the mask: padding may be NaN.
        return hidden.masked_fill(~kept[:, :, None], 0).sum(dim=1) / n_tokens[:, None]
    number = kept.cumsum(dim=1) - 1
    wanted = n_tokens + pool if pool < 0 else torch.full_like(n_tokens, pool)
    return hidden[kept & (number == wanted[:, None])]
