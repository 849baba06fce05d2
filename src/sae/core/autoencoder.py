"""A trained sparse autoencoder as plain arrays: encode and decode, one cell or a million alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from .architectures import Activation
from .rows import Matrix, dense_rows, row_blocks

BLOCK_ROWS = 512
"""Rows of one encoder product.

It never changes with the data: a product of another shape may add up in another order, and then a cell's activations
would depend on the cells that happen to be encoded with it.
"""


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
        `"relu"`, or `"topk"`: the `k` largest pre-activations of a cell, if positive.
    k
        Number of active features per cell for `"topk"`.
    """

    W_enc: np.ndarray
    b_enc: np.ndarray
    W_dec: np.ndarray
    b_dec: np.ndarray
    activation: Activation = "relu"
    k: int | None = None

    @property
    def n_inputs(self) -> int:
        """Width d of the representation."""
        return self.W_enc.shape[0]

    @property
    def n_features(self) -> int:
        """Width h of the dictionary."""
        return self.W_enc.shape[1]

    def encode(self, x: Matrix, *, on_block: Callable[[int], object] | None = None) -> Encoded:
        """Encode cells in blocks of a fixed shape, so that no cell's result depends on its neighbours.

        Parameters
        ----------
        x
            (n, d), dense or CSR.
        on_block
            Called with the number of cells of each finished block.

        Returns
        -------
        Activations (n, h) as CSR and the squared reconstruction error of each cell.
        """
        n = x.shape[0]
        block = np.zeros((BLOCK_ROWS, self.n_inputs), dtype=np.float32)
        pre = np.empty((BLOCK_ROWS, self.n_features), dtype=np.float32)
        parts: list[sparse.csr_matrix] = []
        squared_error = np.empty(n, dtype=np.float64)
        for rows in row_blocks(n, BLOCK_ROWS):
            size = rows.stop - rows.start
            block[:size] = dense_rows(x, rows)
            block[size:] = 0
            # Not matmul: BLAS kernels for AVX2 add up in an order that depends on the place of the row in the block.
            np.einsum("nd,dh->nh", block, self.W_enc, out=pre, casting="same_kind")
            pre += self.b_enc
            part = self._activate(pre[:size])
            squared_error[rows] = np.square(block[:size] - self.decode(part), dtype=np.float64).sum(axis=1)
            parts.append(part)
            if on_block is not None:
                on_block(size)
        empty = sparse.csr_matrix((0, self.n_features), dtype=np.float32)
        activations = sparse.vstack(parts, format="csr") if parts else empty
        return Encoded(activations, squared_error)

    def decode(self, activations: Matrix) -> np.ndarray:
        """Map activations (n, h) back to the representation (n, d)."""
        return activations @ self.W_dec + self.b_dec

    def _activate(self, pre: np.ndarray) -> sparse.csr_matrix:
        """Turn pre-activations (n, h) into activations with the columns of each row in order."""
        if self.activation == "topk" and self.k is not None and self.k < self.n_features:
            columns = np.argpartition(pre, -self.k, axis=1)[:, -self.k :]
            columns.sort(axis=1)
            values = np.take_along_axis(pre, columns, axis=1)
            kept = values > 0
            indices, data, counts = columns[kept], values[kept], kept.sum(axis=1)
        else:
            rows, indices = np.nonzero(pre > 0)
            data, counts = pre[rows, indices], np.bincount(rows, minlength=len(pre))
        indptr = np.concatenate([[0], np.cumsum(counts)])
        return sparse.csr_matrix((data, indices.astype(np.int32), indptr), shape=pre.shape)
