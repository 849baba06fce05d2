from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import anndata as ad
import numpy as np
import pandas as pd

from .._data import Holder, holder, is_mudata, listing, representation
from .._expression import recognised_scale
from .._progress import progress_bar
from ._model import Scale, check_latent, prediction
from ._reading import genes_in

if TYPE_CHECKING:
    from ..core.dense_autoencoder import Network


class Autoencoder:
    r"""A plain autoencoder, trained on the cells at hand: the models of the simulations of arXiv:2410.11468.

    Fully connected layers map expression x to a latent z of few dimensions and back,

    .. math::
        z = W_l \, \mathrm{ReLU}(\dots W_1 x + b_1 \dots) + b_l, \qquad \hat{x} = V_l \, \mathrm{ReLU}(\dots V_1 z + c_1 \dots) + c_l

    with as many layers on either side. It is made by :meth:`fit`. For real cells there are better models: this one knows
    nothing of counts, library sizes or batches. It is here to see what an SAE finds in latents of known cells.

    Parameters
    ----------
    network
        The trained layers.
    genes
        What the columns of the expression are.
    layer
        The layer that expression is read from, by default `X`.
    scale
        What the values are, as for :class:`sae.models.Functions`.
    log_base
        Of the logarithm in log1p values; by default e.
    r2
        The share of the variance of x that x̂ explains in the cells that it was trained on.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.simulate_small(2_000)
    >>> model = sae.models.Autoencoder.fit(adata, n_latent=4, depth=1, learning_rate=0.003, progress=False)
    >>> bool(model.r2 > 0.99)
    True
    >>> adata.obsm["X_ae"] = model.embed(adata)
    >>> model.decode(adata.obsm["X_ae"], adata).shape
    (2000, 5)
    """

    def __init__(
        self,
        network: Network,
        genes: pd.Index,
        *,
        layer: str | None = None,
        scale: Scale | None = None,
        log_base: float | None = None,
        r2: float = math.nan,
    ) -> None:
        self._network, self._genes, self._layer = network, genes, layer
        self._scale, self._log_base = scale, log_base
        self.r2 = r2

    @classmethod
    def fit(
        cls,
        data: ad.AnnData,
        *,
        n_latent: int,
        depth: int = 2,
        width: int | Literal["narrow", "wide"] = "narrow",
        layer: str | None = None,
        epochs: int = 50,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        rng: int | np.random.Generator | None = 0,
        device: str = "auto",
        progress: bool = True,
    ) -> Autoencoder:
        r"""Train an autoencoder with Adam on the mean of (x − x̂)² over cells and genes.

        Values are taken as they are. Where none is negative, the output is rectified: ReLU(x̂).

        Parameters
        ----------
        data
            The cells. Expression may be on disk; it is read in shuffled blocks of rows.
        n_latent
            Dimensions of the latent.
        depth
            Layers of the encoder, and of the decoder; 1 for a linear model.
        width
            Of the depth − 1 hidden layers. `"wide"`: falling linearly from half the genes to the latent (5,075 for two
            layers, 20,000 genes and a latent of 150). `"narrow"`: 150 units or twice the latent, if that is more; of several
            hidden layers, the first has at least 1,000. Or a number, for all of them.
        layer
            Train on this layer instead of `X`.
        epochs
            Passes over the cells.
        batch_size
            Cells per step.
        learning_rate
            The highest rate. It warms up over the first 5 % of the steps and decays over the last 20 %.
        rng
            Seed or generator.
        device
            `"cpu"`, `"cuda"`, `"mps"`, or `"auto"` for the fastest there is. The trained model is on the CPU.
        progress
            Show a progress bar when training takes more than a second.

        Returns
        -------
        The trained model, whose `r2` says how well it reconstructs. Nothing is written to `data`.

        Raises
        ------
        KeyError
            `data` has no such layer.
        TypeError
            Something else than an AnnData.
        ValueError
            A size below 1, another `width`, NaN, or no cells.
        FloatingPointError
            Training diverged.

        Examples
        --------
        >>> import sae
        >>> adata = sae.datasets.simulate_programs(500, 60, n_programs=10)
        >>> model = sae.models.Autoencoder.fit(adata, n_latent=10, width="wide", epochs=5, progress=False)
        >>> model.embed(adata).shape
        (500, 10)
        """
        from scanpy import logging as logg

        from ..core.dense_autoencoder import explained, hidden_widths, train
        from ..core.moments import scan
        from ..core.train import choose_device

        _check(width, learning_rate, n_latent=n_latent, depth=depth, epochs=epochs, batch_size=batch_size)
        held = _of_cells(data)
        found = representation(held, "X" if layer is None else None, layer)
        n, g = found.matrix.shape
        if n == 0:
            raise ValueError(f"{found.where} has no cells to train on.")
        summary = scan(found.matrix)
        batch_size = min(batch_size, n)
        steps = epochs * -(-n // batch_size)
        start = logg.info(f"training an autoencoder with a latent of {n_latent} on {found.where} ({n} × {g})")
        with progress_bar(steps, "fit", "step", shown=progress) as bar:
            network = train(
                found.matrix,
                summary.mean,
                hidden_widths(g, n_latent, depth, width),
                n_latent,
                rectified=bool(summary.lowest.min() >= 0),
                steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                rng=np.random.default_rng(rng),
                device=choose_device(device),
                on_step=bar.update,
            )
        r2 = explained(network, found.matrix, summary.mean)
        logg.info(f"    finished: R² {r2:.3f}", time=start)
        recognised = recognised_scale(summary)
        scale: Scale | None = None if recognised == "scaled" else "log1p" if recognised == "log1p" else "linear"
        base = (data.uns.get("log1p") or {}).get("base")
        return cls(network, data.var_names.copy(), layer=layer, scale=scale, log_base=base, r2=r2)

    def embed(self, data: ad.AnnData) -> np.ndarray:
        """Return the latent (n, d) of the cells in `data`, as float32.

        Genes are found by name, in any order.

        Raises
        ------
        ValueError
            Genes are missing; NaN.
        KeyError
            `data` has no such layer.
        TypeError
            Something else than an AnnData.
        """
        from ..core.dense_autoencoder import encode

        held = _of_cells(data)
        columns = genes_in(data.var_names, self._genes, held.where, "genes", "the autoencoder reads")
        found = representation(held, "X" if self._layer is None else None, self._layer)
        return encode(self._network, found.matrix, columns)

    def decode(self, z: np.ndarray, data: ad.AnnData) -> ad.AnnData:
        """Return the expression at the latent `z` (n, d), for all genes that the model was trained on.

        Raises
        ------
        ValueError
            `z` has another shape than the latent of the cells in `data`, or NaN.
        """
        from ..core.dense_autoencoder import decode

        z = check_latent(z, data, self._network.n_latent, "The autoencoder")
        found = prediction(decode(self._network, z), data.obs_names, self._genes, self._scale or "linear")
        if self._scale == "log1p":
            found.uns["log1p"] = {"base": self._log_base}
        elif self._scale is None:
            del found.uns["scale"]
        return found


def _of_cells(data: ad.AnnData) -> Holder:
    if is_mudata(data):
        raise TypeError(f"An autoencoder is of one modality. Pass mdata.mod[...], with one of {listing(data.mod)}.")
    return holder(data, None)


def _check(width: int | str, learning_rate: float, **sizes: int) -> None:
    if isinstance(width, str):
        if width not in ("narrow", "wide"):
            raise ValueError(f"width={width!r} is neither 'narrow', 'wide' nor a number of units.")
    else:
        sizes["width"] = width
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer):
            raise TypeError(f"{name}={size!r} is a {type(size).__name__}; expected an integer.")
        if size < 1:
            raise ValueError(f"{name}={size} is below 1.")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate={learning_rate} is not above 0.")
