from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from .._data import Data, holder, is_mudata, listing, representation
from .._progress import progress_bar
from ..core.rows import row_blocks
from ._model import prediction
from ._pretrained import load_bert
from ._reading import refuse_fractions
from ._tokens import Batch, Dictionary, Vocabulary, rank

if TYPE_CHECKING:
    from torch import Tensor

Pool = Literal["mean", "cls"]
Change = Callable[["Tensor"], "Tensor | None"]


class Geneformer:
    """Geneformer: a cell as its genes in the order of their rank, read by a transformer.

    The counts of a cell are divided by the median that each gene has among the cells where it is found, over the whole corpus
    of training, and the genes are read from the highest quotient down (Theodoris et al. 2023): as they stand in V1, between
    `<cls>` and `<eos>` in V2, whichever `tokens` has. The depth of a cell changes no rank. Of genes that tie, the one with the
    lower token comes first. What exceeds the positions of the model is left out.

    Pass raw counts of all genes, not of the variable ones alone: the rank of a gene depends on which others there are.

    Parameters
    ----------
    path
        Folder with `config.json` and `model.safetensors` as transformers writes them, or the name of a model on the Hugging
        Face hub.
    tokens
        Ensembl id → token, the model's own dictionary; or its JSON file, which may be compressed (`.gz`).
    medians
        Ensembl id → median, likewise.
    hidden_state
        Which state the embedding is taken from, as transformers numbers them: 0 the input embeddings, i the output of
        layer i; −1 the last, −2 the one before (which the authors' own extractor calls layer −1, its default).
    pool
        `"mean"`: the mean over the genes, without special tokens. `"cls"`: the state of `<cls>` (V2).
    gene_names
        Other names → Ensembl id, a dictionary or JSON file, for genes that `tokens` does not have under the name in `data`.
    gene_ids
        Column of `var` with the genes' Ensembl ids. By default `"ensembl_id"` where there is one, else `var_names`.
        Versions (`.14`) are ignored, and columns of the same gene added up.
    layer
        Layer with raw counts. By default `X`.
    min_share
        Refuse cells when fewer of their genes are known. The share is of the genes in `data`, or of those that the model knows
        where these are fewer.
    mask_share
        Share of a cell's genes that :meth:`intervene` masks.
    batch_size
        Cells that the model reads at a time.
    subfolder
        Folder within `path` that has the model.
    local_files_only
        Look for a name among the models downloaded earlier; False downloads it.
    device
        `"cpu"`, `"cuda"`, `"mps"`, or `"auto"` for the fastest there is.
    rng
        Seed or generator for the masks. A cell's mask depends on the seed and its tokens alone.
    progress
        Show a progress bar when the work takes more than a second.

    Attributes
    ----------
    hidden_state
        Counted from 0, also where it was given from the end.
    n_latent
        Dimensions of the embedding.
    vocabulary
        Names of all tokens, by their number.

    Raises
    ------
    ValueError
        A pickle in place of a dictionary or of `model.safetensors`; weights that the checkpoint lacks; dictionaries that do not
        fit the model or each other; a hidden state that it does not have; `pool="cls"` without `<cls>`.
    OSError
        There is no such folder, and no such model among those downloaded.

    Examples
    --------
    A model of random weights, to show what it takes:

    >>> import tempfile
    >>> import anndata as ad
    >>> import numpy as np
    >>> import sae
    >>> from transformers import BertConfig, BertForMaskedLM
    >>> genes = [f"ENSG{i:011}" for i in range(20)]
    >>> tokens = {name: i for i, name in enumerate(["<pad>", "<mask>", "<cls>", "<eos>", *genes])}
    >>> medians = dict.fromkeys(genes, 1.5)
    >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     BertForMaskedLM(BertConfig(vocab_size=24, **sizes)).save_pretrained(folder)
    ...     model = sae.models.Geneformer(folder, tokens, medians, hidden_state=-2)
    >>> counts = np.random.default_rng(0).poisson(1.0, (3, 20)).astype("float32")
    >>> adata = ad.AnnData(counts, var={"ensembl_id": genes})
    >>> adata.obsm["X_geneformer"] = model.embed(adata)
    >>> adata.obsm["X_geneformer"].shape
    (3, 16)
    """

    def __init__(
        self,
        path: str | Path,
        tokens: Dictionary,
        medians: Dictionary,
        *,
        hidden_state: int,
        pool: Pool = "mean",
        gene_names: Dictionary | None = None,
        gene_ids: str | None = None,
        layer: str | None = None,
        min_share: float = 0.5,
        mask_share: float = 0.15,
        batch_size: int = 16,
        subfolder: str = "",
        local_files_only: bool = True,
        device: str = "auto",
        rng: int | np.random.Generator | None = 0,
        progress: bool = True,
    ) -> None:
        from scanpy import logging as logg

        from ..core.train import choose_device

        self._known = Vocabulary.read(tokens, medians, gene_names)
        before, after = self._known.frame
        _check_settings(pool, min_share, mask_share, batch_size, cls=len(before) > 0)
        self._device = choose_device(device)
        self._bert = load_bert(path, subfolder, local_files_only).to(self._device)
        config, n_tokens = self._bert.config, len(self._known.names)
        if config.vocab_size != n_tokens:
            raise ValueError(
                f"The model in {str(path)!r} has {config.vocab_size} tokens, and the dictionary {n_tokens}. Pass as tokens= the "
                "dictionary of the same version of Geneformer."
            )
        self.hidden_state = _resolved(hidden_state, config.num_hidden_layers)
        self.n_latent = int(config.hidden_size)
        self.vocabulary = self._known.names
        self._context = config.max_position_embeddings - len(before) - len(after)
        self._pool, self._gene_ids, self._layer, self._min_share = pool, gene_ids, layer, min_share
        self._mask_share, self._batch_size, self._progress = mask_share, batch_size, progress
        self._seed = int(rng) if isinstance(rng, int | np.integer) else int(np.random.default_rng(rng).integers(2**31))
        logg.info(
            f"Geneformer in {str(path)!r}: hidden state {self.hidden_state} of 0 to {config.num_hidden_layers}, "
            f"{self.n_latent} dimensions, the {self._context} highest ranks of {self._known.n_genes} genes"
        )

    def tokenize(self, data: Data) -> list[np.ndarray]:
        """Return the tokens of every cell, as the model reads them.

        Parameters
        ----------
        data
            AnnData with raw counts, which may be backed.

        Returns
        -------
        An array per cell, in their order: `<cls>` (V2), genes from the highest rank down, `<eos>` (V2). `vocabulary[tokens]`
        are their names.

        Raises
        ------
        ValueError
            Values that are not counts, too few known genes, cells without any.
        KeyError
            The layer or the column of ids is not there.
        """
        before, after = self._known.frame
        return [np.concatenate([before, genes, after]) for genes in self._genes(data)[0]]

    @overload
    def embed(self, data: Data, *, embed_genes: Literal[False] = False, out: None = None) -> np.ndarray: ...
    @overload
    def embed(
        self, data: Data, *, embed_genes: Literal[True], out: str | Path | None = None
    ) -> tuple[np.ndarray, ad.AnnData]: ...
    def embed(
        self, data: Data, *, embed_genes: bool = False, out: str | Path | None = None
    ) -> np.ndarray | tuple[np.ndarray, ad.AnnData]:
        """Return the latent (n, d) of every cell, in their order.

        Parameters
        ----------
        data
            AnnData with raw counts, which may be backed.
        embed_genes
            Return the states of the genes as well, to train an SAE on: `sae.tl.fit(genes, use_rep="X")`.
        out
            File (`.npy`) to keep those in, instead of memory. An existing one is replaced.

        Returns
        -------
        The latent, float32; with `embed_genes` also an AnnData with a row per gene of each cell, from the highest rank down:
        `X` (rows, d) its state, float32; `obs` with `cell`, `gene` (as `data` calls it) and `rank` (from 0).

        Raises
        ------
        ValueError
            As in :meth:`tokenize`; `out` without `embed_genes`.
        """
        if out is not None and not embed_genes:
            raise ValueError(f"out={str(out)!r} is where genes are kept. Pass embed_genes=True with it.")
        from scanpy import logging as logg

        cells, tokens = self._genes(data)
        n_found = np.count_nonzero(tokens >= 0)
        logg.info(f"{n_found} of {len(tokens)} genes are among the {self._known.n_genes} that Geneformer knows")
        latent = np.empty((len(cells), self.n_latent), dtype=np.float32)
        starts = np.concatenate([[0], np.cumsum([len(genes) for genes in cells], dtype=np.int64)])
        states = _matrix((int(starts[-1]), self.n_latent), out) if embed_genes else None
        for batch in self._batches(cells, "embed"):
            kept: list[Tensor] = []
            self._run(batch.ids, batch, kept.append)
            pooled = self._tensor(self._pooled(batch))[:, :, None]
            latent[batch.rows] = ((kept[0] * pooled).sum(1) / pooled.sum(1)).cpu().numpy()
            if states is not None:
                for row, state, genes in zip(batch.rows, kept[0].cpu().numpy(), batch.genes, strict=True):
                    states[starts[row] : starts[row + 1]] = state[genes]
        return latent if states is None else (latent, _of_genes(states, cells, tokens, data))

    def decode(self, z: np.ndarray, data: Data) -> NoReturn:
        """Raise an error: nothing leads from a pooled state to expression.

        Parameters
        ----------
        z, data
            Not used.

        Raises
        ------
        NotImplementedError
            Always. :meth:`intervene` says what Geneformer predicts when its hidden state is changed.
        """
        raise NotImplementedError(
            "Geneformer has no decoder: a pooled hidden state cannot be turned into expression. model.intervene(step, data) adds "
            "a step to the hidden state inside the model and gives log p(gene); sae.tl.steer does so by itself."
        )

    def intervene(self, step: np.ndarray, data: Data) -> ad.AnnData:
        """Return the log-probability of each gene at masked positions, with a step added to the hidden state.

        Some genes of each cell are masked. The step is added to the hidden state where it is made: with `pool="mean"` at all
        genes, masked or not, which moves their mean by the step; with `pool="cls"` at `<cls>`. The layers above go on from there.

        Parameters
        ----------
        step
            (n, d), what to add to the latent of each cell. Zeros give the baseline, with the same masks.
        data
            AnnData with raw counts of the n cells.

        Returns
        -------
        AnnData (n, genes in `data`), float32: ln of the mean of p(gene) over the masked positions of the cell, where p is
        over all tokens of the model; `uns["scale"]` is `"log"`. NaN for genes that the model does not know.

        Raises
        ------
        ValueError
            A step of another shape; `pool="cls"` at the last hidden state, from which no layer leads to the genes; as in
            :meth:`tokenize`.
        """
        import torch

        if self._pool == "cls" and self.hidden_state == self._bert.config.num_hidden_layers:
            raise ValueError(
                f"hidden_state={self.hidden_state} is the last: no layer leads from its '<cls>' to the genes, which a step there "
                "cannot change. Take an earlier hidden state, or pool='mean'."
            )
        cells, tokens = self._genes(data)
        step = np.asarray(step, dtype=np.float32)
        if step.shape != (len(cells), self.n_latent):
            raise ValueError(
                f"step has the shape {step.shape}; expected {len(cells)} cells × the {self.n_latent} dimensions of the hidden state."
            )
        known = np.flatnonzero(tokens >= 0)
        log_p = np.full((len(cells), len(tokens)), np.nan, dtype=np.float32)
        for batch in self._batches(cells, "intervene"):
            masked = np.zeros_like(batch.genes)
            for place, row in enumerate(batch.rows):
                masked[place, self._masked(cells[row])] = True
            added = self._tensor(self._pooled(batch)[:, :, None] * step[batch.rows][:, None])
            last = self._run(np.where(masked, self._known.mask, batch.ids), batch, partial(torch.add, added))
            for row, state, where in zip(batch.rows, last, self._tensor(masked), strict=True):
                log_p[row, known] = self._mean_log_p(state[where])[tokens[known]]
        return prediction(log_p, data.obs_names, data.var_names, "log")

    def _genes(self, data: Data) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the tokens of every cell's genes, from the highest rank down, and those of the columns of `data`."""
        from ..core.moments import chunks

        if is_mudata(data):
            raise TypeError(f"Geneformer reads one modality: pass mdata[name], of {listing(data.mod)}.")
        found = representation(holder(data, None), "X" if self._layer is None else None, self._layer)
        tokens = self._tokens(data)
        cells: list[np.ndarray] = []
        for _, part in chunks(found.matrix):
            counts = sparse.csr_matrix(part)
            refuse_fractions(counts, data.var_names, found.where, "Geneformer", "Pass layer= with the raw counts.")
            cells += rank(counts, tokens, self._known.medians, self._context)
        empty = [name for name, genes in zip(data.obs_names, cells, strict=True) if len(genes) == 0]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(cells)} cells have no count in a gene that the model knows: {listing(empty, 5)}. "
                "Remove them: sc.pp.filter_cells."
            )
        return cells, tokens

    def _tokens(self, data: ad.AnnData) -> np.ndarray:
        """Return the token of each gene in `data`, −1 for those that are not known, unless these are too many."""
        column = "ensembl_id" if self._gene_ids is None and "ensembl_id" in data.var else self._gene_ids
        if column is not None and column not in data.var:
            raise KeyError(f"adata.var has no {column!r}; it has {listing(data.var)}. Pass one of them as gene_ids=.")
        names, where = (data.var_names, "var_names") if column is None else (data.var[column], f"var[{column!r}]")
        tokens = self._known.find(names)
        n_found, n = int((tokens >= 0).sum()), min(len(tokens), self._known.n_genes)
        if n_found < self._min_share * n:
            raise ValueError(
                f"{n_found} of the {len(tokens)} genes in adata.{where} ({listing(names, 3)}) are among the {self._known.n_genes} "
                f"that the model knows by Ensembl ids: {n_found / n:.0%} of what could be, less than min_share={self._min_share}. "
                "Pass gene_ids=, the column of var with Ensembl ids, or gene_names=, a dictionary from these names to them."
            )
        return tokens

    def _batches(self, cells: Sequence[np.ndarray], what: str) -> Iterator[Batch]:
        """Yield cells of like length together, the longest first, so that memory runs out at once if at all."""
        order = np.argsort([-len(genes) for genes in cells], kind="stable")
        with progress_bar(len(cells), what, "cell", shown=self._progress) as bar:
            for rows in row_blocks(len(order), self._batch_size):
                yield self._known.batch(order[rows], [cells[row] for row in order[rows]])
                bar.update(len(order[rows]))

    def _pooled(self, batch: Batch) -> np.ndarray:
        """Tell at which positions the states are that the latent is the mean of."""
        if self._pool == "mean":
            return batch.genes
        return np.broadcast_to(np.arange(batch.ids.shape[1]) == 0, batch.ids.shape)

    def _run(self, ids: np.ndarray, batch: Batch, change: Change) -> Tensor:
        """Return the last hidden state; `change` sees the chosen one, and what it returns takes its place."""
        bert = self._bert.bert
        module = bert.embeddings if self.hidden_state == 0 else bert.encoder.layer[self.hidden_state - 1]

        def hook(module: object, inputs: object, output: Any) -> Any:
            # Before version 5 of transformers, layers returned tuples.
            if not isinstance(output, tuple):
                return change(output)
            changed = change(output[0])
            return None if changed is None else (changed, *output[1:])

        handle = module.register_forward_hook(hook)
        try:
            return bert(
                input_ids=self._tensor(ids), attention_mask=self._tensor(batch.filled.astype(np.int64))
            ).last_hidden_state
        finally:
            handle.remove()

    def _masked(self, genes: np.ndarray) -> np.ndarray:
        """Draw the positions to mask in a cell: at least one."""
        rng = np.random.default_rng([self._seed, zlib.crc32(genes.astype("<i4").tobytes())])
        n_masked = max(1, round(self._mask_share * len(genes)))
        return len(self._known.frame[0]) + rng.choice(len(genes), n_masked, replace=False)

    def _mean_log_p(self, states: Tensor) -> np.ndarray:
        """Return ln of the mean probability of each token over some positions (m, d)."""
        log_p = self._bert.cls(states).log_softmax(1)
        return (log_p.logsumexp(0) - np.log(len(states))).cpu().numpy()

    def _tensor(self, values: np.ndarray) -> Tensor:
        import torch

        return torch.tensor(values, device=self._device)


def _of_genes(states: np.ndarray, cells: Sequence[np.ndarray], tokens: np.ndarray, data: ad.AnnData) -> ad.AnnData:
    """Say whose states these are."""
    known = np.flatnonzero(tokens >= 0)
    token, first = np.unique(tokens[known], return_index=True)
    lengths = [len(genes) for genes in cells]
    gene = np.searchsorted(token, np.concatenate([token[:0], *cells]))
    obs = {
        "cell": _labels(data.obs_names, np.repeat(np.arange(len(cells)), lengths)),
        "gene": _labels(data.var_names, known[first[gene]]),
        "rank": np.concatenate([token[:0], *map(np.arange, lengths)]),
    }
    return ad.AnnData(states, obs=pd.DataFrame(obs, index=np.arange(len(states)).astype(str)))


def _labels(names: pd.Index, positions: np.ndarray) -> pd.Categorical:
    codes, categories = pd.factorize(names)
    return pd.Categorical.from_codes(codes[positions], categories)


def _matrix(shape: tuple[int, int], out: str | Path | None) -> np.ndarray:
    """Make room in memory, or in a file."""
    if out is None:
        return np.empty(shape, dtype=np.float32)
    return np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=shape)


def _check_settings(pool: str, min_share: float, mask_share: float, batch_size: int, *, cls: bool) -> None:
    if pool not in ("mean", "cls"):
        raise ValueError(f"pool={pool!r} is neither 'mean' nor 'cls'.")
    if pool == "cls" and not cls:
        raise ValueError("pool='cls', but tokens has no '<cls>': this is a V1 model. Pass pool='mean'.")
    if not 0 <= min_share <= 1:
        raise ValueError(f"min_share={min_share} is not a share from 0 to 1.")
    if not 0 < mask_share <= 1:
        raise ValueError(f"mask_share={mask_share} is not a share above 0, up to 1.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is below 1.")


def _resolved(hidden_state: int, n_layers: int) -> int:
    """Count a hidden state from 0."""
    if not -n_layers - 1 <= hidden_state <= n_layers:
        raise ValueError(
            f"hidden_state={hidden_state}, but the model has {n_layers + 1}: 0 (the embeddings) to {n_layers} (the output of the "
            f"last layer), or −1 to {-n_layers - 1} from the end."
        )
    return hidden_state % (n_layers + 1)
