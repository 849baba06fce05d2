"""The weights of a Geneformer, from safetensors alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._data import listing
from ..core.untrusted import MOST_JSON_BYTES, content, strict_json


def load_bert(path: str | Path, subfolder: str, local_files_only: bool) -> Any:
    """Load a model, from safetensors alone."""
    import torch
    from transformers import BertForMaskedLM

    folder = Path(path, subfolder)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{str(folder)!r} has no model.safetensors; it has {listing(sorted(file.name for file in folder.iterdir()))}. "
            "Weights in a pickle (pytorch_model.bin) are not opened. Convert them once, in an environment where you trust them: "
            "transformers.BertForMaskedLM.from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)"
        )
    _check_shards(folder)
    try:
        with _quiet(bars=not local_files_only), torch.random.fork_rng(devices=[]):
            load: Any = BertForMaskedLM.from_pretrained
            bert, found = load(
                str(path),
                subfolder=subfolder,
                use_safetensors=True,
                local_files_only=local_files_only,
                output_loading_info=True,
            )
    except OSError as error:
        if not folder.is_dir():
            error.add_note(
                f"There is no folder {str(folder)!r}. Pass local_files_only=False to download a model of this name."
            )
        raise
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # of damaged files, transformers raises whatever comes first
        raise ValueError(
            f"The checkpoint in {str(path)!r} was damaged, or is not of a Geneformer (BertForMaskedLM): {error}"
        ) from error
    if found["missing_keys"]:
        raise ValueError(
            f"The checkpoint in {str(path)!r} lacks {len(found['missing_keys'])} weights of a Geneformer: "
            f"{listing(sorted(found['missing_keys']), 5)}. Pass the pretrained model (BertForMaskedLM)."
        )
    return bert.float().eval().requires_grad_(False)


def _check_shards(folder: Path) -> None:
    """Refuse an index of weights that leads to anything but safetensors beside it; transformers would unpickle others."""
    file = folder / "model.safetensors.index.json"
    if not file.exists():
        return
    index = strict_json(content(file, MOST_JSON_BYTES), str(file))
    shards = index.get("weight_map") if isinstance(index, dict) else None
    names = list(shards.values()) if isinstance(shards, dict) else [None]
    wrong = [name for name in names if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    if wrong:
        raise ValueError(f"{file} leads to {str(wrong[0])[:50]!r}; expected names of safetensors files beside it.")


@contextmanager
def _quiet(*, bars: bool) -> Iterator[None]:
    """Keep transformers from reporting on what it loads: missing weights are looked for here."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
