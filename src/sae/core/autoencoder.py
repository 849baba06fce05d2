"""A trained sparse autoencoder as plain arrays: encode and decode, one cell or a million alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from .architectures import Activation
from .cluster import cluster_of, folded
from .rows import Matrix, dense_rows, pieces, row_blocks, spans
from .workers import Workers, available_threads

BLOCK_ROWS = 512
"""Rows that are encoded at a time."""
BLOCKS_PER_THREAD = 8
"""Of the blocks that are in memory at a time."""


@dataclass(frozen=True)
class Encoded:
    """Activations of some cells and how well they reconstruct the input."""

    activations: sparse.csr_matrix
    """(n, h), float32."""
    squared_error: np.ndarray
    """(n,), ‖x − x̂‖² of each cell, float64."""


@dataclass(frozen=True)
class Autoencoder:
    """Weights that act on the raw representation: `a = activation(x @ W_enc + b_enc)`, `x̂ = a @ W_dec + b_dec`.

    Attributes
    ----------
    W_enc
        (d, h)
    b_enc
        (h,)
    W_dec
        (h, d)
    b_dec
        (d,)
    activation
        `"relu"`; `"topk"`: the `k` largest pre-activations of a cell, if positive; `"threshold"`: those above the
        feature's `threshold`, which is at least 0.
    k
        Number of active features per cell for `"topk"`.
    threshold
        (h,), for `"threshold"`.
    """

    W_enc: np.ndarray
    b_enc: np.ndarray
    W_dec: np.ndarray
    b_dec: np.ndarray
    activation: Activation = "relu"
    k: int | None = None
    threshold: np.ndarray | None = None

    @property
    def n_inputs(self) -> int:
        """Width d of the representation."""
        return self.W_enc.shape[0]

    @property
    def n_features(self) -> int:
        """Width h of the dictionary."""
        return self.W_enc.shape[1]

    def encode(self, x: Matrix, *, on_block: Callable[[int], object] | None = None) -> Encoded:
        """Encode cells; each sum has one fixed order, so that no cell's result depends on its neighbours.

        Parameters
        ----------
        x
            (n, d), dense, CSR or on disk.
        on_block
            Called with the number of cells of each finished block.

        Returns
        -------
        Activations (n, h) as CSR and the squared reconstruction error of each cell.
        """
        parts = list(self.encode_blocks(x, on_block=on_block))
        empty = sparse.csr_matrix((0, self.n_features), dtype=np.float32)
        activations = sparse.vstack([part.activations for part in parts], format="csr") if parts else empty
        return Encoded(activations, np.concatenate([np.empty(0), *(part.squared_error for part in parts)]))

    def encode_blocks(self, x: Matrix, *, on_block: Callable[[int], object] | None = None) -> Iterator[Encoded]:
        """Encode cells and yield the result in blocks, in order; those of a dask array on a cluster by its workers."""
        client = cluster_of(x)
        if client is None:
            blocks = self._encode_here(x)
        else:
            parts = ([rows] for rows in spans(x, BLOCK_ROWS * BLOCKS_PER_THREAD))
            blocks = folded(client, _encode_there, [x], parts, self)
        for block in blocks:
            yield block
            if on_block is not None:
                on_block(len(block.squared_error))

    def _encode_here(self, x: Matrix) -> Iterator[Encoded]:
        from . import kernels

        # The kernel takes two rows and four inputs at a time; zeros change no sum.
        W_enc = np.zeros((-(-self.n_inputs // 4) * 4, self.n_features), np.float32)
        W_enc[: self.n_inputs] = self.W_enc
        b_enc, b_dec = self.b_enc.astype(np.float32), self.b_dec.astype(np.float32)
        W_dec = np.ascontiguousarray(self.W_dec, np.float32)
        k = min(self.k or self.n_features, self.n_features)
        thresholds = np.zeros(self.n_features, np.float32) if self.threshold is None else self.threshold
        workers = Workers(available_threads())
        search = 0.0

        def encode(worker: int, rows: Matrix) -> Encoded:
            nonlocal search
            n = rows.shape[0]
            block = np.zeros((n + n % 2, len(W_enc)), np.float32)
            block[:n, : self.n_inputs] = dense_rows(rows, slice(None))
            pre = np.empty((len(block), self.n_features), np.float32)
            kernels.products(block, W_enc, b_enc, pre)
            words = np.zeros(-(-self.n_features // 8), np.uint64)
            marks = words.view(np.uint8)
            starts = np.empty(n + 1, np.int64)
            most = n * (k if self.activation == "topk" else self.n_features) + 8
            columns, values = np.empty(most, np.int32), np.empty(most, np.float32)
            if self.activation == "topk":
                norm = np.sqrt(np.einsum("nd,nd->n", block[:n], block[:n]))
                scratch = np.empty((2, self.n_features + 32), np.int32)
                bits = pre[:n].view(np.int32)
                found = kernels.select_top(
                    bits, 0, norm, search, k, starts, columns, values, marks, words, scratch[0], scratch[1]
                )
                search = 0.85 * found
            else:
                kernels.select_over(pre[:n], thresholds, starts, columns, values, marks, words)
            errors = np.empty(n)
            kernels.squared_errors(block, W_dec, b_dec, starts, columns, values, errors)
            parts = values[: starts[-1]].copy(), columns[: starts[-1]].copy(), starts
            return Encoded(sparse.csr_matrix(parts, shape=(n, self.n_features)), errors)

        try:
            for _, part in pieces(x, BLOCK_ROWS * BLOCKS_PER_THREAD * workers.n):
                yield from workers.each(encode, [part[rows] for rows in row_blocks(part.shape[0], BLOCK_ROWS)])
        finally:
            workers.close()

    def decode(self, activations: Matrix) -> np.ndarray:
        """Map activations (n, h) back to the representation (n, d)."""
        return activations @ self.W_dec + self.b_dec


def _encode_there(_: None, x: Matrix, sae: Autoencoder) -> Encoded:
    return sae.encode(x)
