from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._data import Data
from ..core.rows import row_blocks
from ._activations import predicting
from ._model import Prediction, check_latent, check_library_size, prediction
from ._scvi_fields import columns, counts

if TYPE_CHECKING:
    import torch

BLOCK_VALUES = 16_000_000
"""Cells × genes that go through a model at a time (64 MB in float32)."""
SUPPORTED = ("SCVI", "SCANVI", "LinearSCVI", "MULTIVI")


class SCVI:
    r"""A trained model of scvi-tools: the latent of cells, and the expression that a latent stands for.

    For `scvi.model.SCVI`, `SCANVI`, `LinearSCVI` and, with two modalities, `MULTIVI`. The decoder turns the latent z and the
    batch s of a cell into the share ρ of each gene g in its RNA; predicted are

    .. math::
        \hat{x}_g = \ell \, \rho_g(z, s) \qquad \text{or} \qquad \ln(1 + \ell \, \rho_g(z, s))

    with a library size ℓ: the mean of the model's distribution of counts (of its negative binomial part where zeros are inflated).
    MULTIVI also predicts the probability that each region is accessible, not multiplied by the factors of cell and region.

    Parameters
    ----------
    model
        The trained model. Nothing is written to it or to data, and it runs on the device that it is on.
    library_size
        ℓ: counts that every cell shall have; or `"observed"` for those of the cell itself, as the model takes them: the sum of
        its counts, its size factor, or what the model infers from its counts. Models with size factors have unnormalised ρ,
        which is brought to a sum of one unless `"observed"`.
    batch
        Decode all cells as if they were of this batch (a category of the model's batch key); by default each as of its own.
    log1p
        Predict ln(1 + x), of scale `"log1p"`, else x, of scale `"linear"`. Accessibility is always a probability, `"linear"`.

    Raises
    ------
    TypeError
        A model of another class.
    ValueError
        A model that is not trained, or has proteins; an unknown batch; a library size that is none.

    Notes
    -----
    The latent is the mean of the posterior. Where scvi-tools draws samples to estimate it, for a logistic normal latent, it is
    the softmax of the mean, so that a cell always has the same. Covariates, categorical or continuous, are those of each
    cell. Labels of SCANVI are not needed.

    Examples
    --------
    >>> import sae
    >>> import scvi
    >>> adata = sae.datasets.simulate_programs(200, 50, n_programs=10, noise="poisson")
    >>> scvi.model.SCVI.setup_anndata(adata)
    >>> trained = scvi.model.SCVI(adata, n_latent=5)
    >>> trained.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, log_every_n_steps=1)
    >>> model = sae.models.SCVI(trained)
    >>> z = model.embed(adata)
    >>> z.shape, model.decode(z, adata).shape
    ((200, 5), (200, 50))
    """

    def __init__(
        self,
        model: Any,
        *,
        library_size: float | Literal["observed"] = 1e4,
        batch: str | None = None,
        log1p: bool = True,
    ) -> None:
        self._multi = _check(model)
        check_library_size(library_size)
        self._name, self._module = type(model).__name__, model.module
        self._library_size, self._log1p = library_size, log1p
        fields = model.registry["field_registries"]
        self._blocks = counts(fields, self._name, whole=self._module.gene_likelihood != "normal")
        self._batches, self._categories, self._numbers, self._size_factor = columns(fields)
        self._batch = None if batch is None else self._batches.code(batch)

    def embed(self, data: Data) -> np.ndarray:
        """Return the latent (n, d) of the cells in `data`: the mean of the posterior.

        Genes are found by name, in any order. Batches and covariates are read if the encoder reads them. In a MuData, cells that
        a modality lacks, or has no counts of, are embedded from the other, as MULTIVI does.

        Raises
        ------
        ValueError
            Genes are missing; values that are not counts; an unknown category; a MULTIVI with modality weights of each training
            cell, which no other cell has.
        KeyError
            `data` lacks a layer or a column that the model reads.
        TypeError
            An AnnData where the model reads a MuData, or the reverse.
        """
        if not self._multi:
            transform = self._module.z_encoder.z_transformation
            return self._infer(data, lambda found: transform(found["qz"].loc))
        if self._module.modality_weights == "cell":
            raise ValueError(
                "This MULTIVI has modality weights of each training cell (modality_weights='cell'), and none for the cells in "
                "data. Keep the latent that model.get_latent_representation() returns, or train with other weights."
            )
        transform = self._module.z_encoder_accessibility.z_transformation
        return self._infer(data, lambda found: transform(found["qz_m"]))

    def decode(self, z: np.ndarray, data: Data) -> Prediction:
        """Return the expression at the latent `z` (n, d) of the cells in `data`; a dict of modalities for MULTIVI.

        These are named as in the MuData that the model was set up with. Of `data`, batches and covariates of the cells are read,
        and counts only if `library_size="observed"`.

        Raises
        ------
        ValueError
            `z` has another shape than the latent of the cells, or NaN; an unknown category.
        KeyError
            `data` lacks a layer or a column that the model reads.
        """
        import torch

        z = check_latent(z, data, self._module.n_latent, self._name)
        covariates, library = self._covariates(data, self._batch), self._library(data)
        values: dict[str, list[np.ndarray]] = {block.name: [] for block in self._blocks}
        with predicting(self._module):
            for rows in self._row_blocks(len(z)):
                inputs, codes = self._decoder_inputs(torch.from_numpy(z[rows]), [part[rows] for part in covariates])
                for block in self._blocks:
                    found = self._rna(inputs, codes, library[rows]) if block.rna else self._atac(inputs, codes)
                    values[block.name].append(found.float().cpu().numpy())
        named = {
            block.name: prediction(
                _joined(values[block.name]),
                data.obs_names,
                block.genes,
                "log1p" if block.rna and self._log1p else "linear",
            )
            for block in self._blocks
        }
        return named if self._multi else named["rna"]

    def _row_blocks(self, n: int) -> list[slice]:
        size = max(1, BLOCK_VALUES // sum(len(block.genes) for block in self._blocks))
        return list(row_blocks(n, size)) or [slice(0, 0)]

    def _covariates(self, data: Data, batch: int | None) -> list[torch.Tensor]:
        """Read the codes of batches (n, 1), of categorical covariates (n, c), and the continuous ones (n, c')."""
        import torch

        n = data.n_obs
        batches = self._batches.read(data) if batch is None else np.full(n, batch)
        categories = [column.read(data) for column in self._categories]
        numbers = [column.read(data) for column in self._numbers]
        return [
            torch.from_numpy(np.array(columns, dtype).reshape(len(columns), n).T.copy())
            for columns, dtype in (([batches], np.int64), (categories, np.int64), (numbers, np.float32))
        ]

    def _decoder_inputs(
        self, z: torch.Tensor, covariates: list[torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return what the decoders are called with: the latent with continuous covariates, and codes."""
        import torch

        z, batches, categories, numbers = (part.to(self._module.device) for part in (z, *covariates))
        inputs = torch.cat([z, numbers], dim=1)
        codes = categories.split(1, dim=1) if categories.shape[1] else ()
        if getattr(self._module, "batch_representation", "one-hot") == "embedding":
            return torch.cat([inputs, self._module.compute_embedding("batch", batches)], dim=1), codes
        return inputs, (batches, *codes)

    def _rna(self, inputs: torch.Tensor, codes: tuple[torch.Tensor, ...], library: torch.Tensor) -> torch.Tensor:
        """Decode expression: the shares of genes, of all that the decoder could give."""
        decoder = self._module.z_decoder_expression if self._multi else self._module.decoder
        if hasattr(decoder, "factor_regressor"):
            values = decoder.factor_regressor(inputs, *codes).softmax(dim=-1)
        else:
            values = decoder.px_scale_decoder(decoder.px_decoder(inputs, *codes))
        library = library.to(values.device)
        if self._size_factor is not None and self._library_size != "observed":
            library = library / values.sum(dim=1, keepdim=True)
        values.mul_(library)
        return values.log1p_() if self._log1p else values

    def _atac(self, inputs: torch.Tensor, codes: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self._module.z_decoder_accessibility(inputs, *codes)

    def _library(self, data: Data) -> torch.Tensor:
        """Return the library size of each cell (n, 1)."""
        import torch

        if self._library_size != "observed":
            return torch.full((data.n_obs, 1), float(self._library_size))
        if self._size_factor is not None:
            # MULTIVI adds 1e-6 before it takes the logarithm.
            return torch.from_numpy(self._size_factor.read(data)[:, None] + np.float32(1e-6 * self._multi))
        if self._multi:
            return torch.from_numpy(self._infer(data, lambda found: found["libsize_expr"].exp()))
        if not self._module.use_observed_lib_size:
            return torch.from_numpy(self._infer(data, lambda found: found["ql"].loc.exp()))
        read = self._blocks[0].reader(data)
        return torch.from_numpy(
            np.concatenate([read(rows).sum(axis=1) for rows in self._row_blocks(data.n_obs)])[:, None]
        )

    def _infer(self, data: Data, take: Callable[[dict[str, Any]], torch.Tensor]) -> np.ndarray:
        """Run the encoders over the cells, in blocks, and keep what `take` takes of their outputs."""
        import torch

        readers = [block.reader(data) for block in self._blocks]
        covariates = self._covariates(data, None) if self._module.encode_covariates else []
        device, taken = self._module.device, []
        # The model also draws samples, which nobody needs.
        with predicting(self._module), torch.random.fork_rng([device] if device.type == "cuda" else []):
            for rows in self._row_blocks(data.n_obs):
                x = torch.from_numpy(np.hstack([read(rows) for read in readers]))
                inputs = self._encoder_inputs(x, [part[rows] for part in covariates])
                taken.append(take(self._module.inference(**inputs)).cpu().numpy())
        return np.concatenate(taken)

    def _encoder_inputs(self, x: torch.Tensor, covariates: list[torch.Tensor]) -> dict[str, torch.Tensor | None]:
        """Return what the encoders are called with; those that read no covariates still want batches."""
        import torch

        n = len(x)
        batches, categories, numbers = covariates or [torch.zeros((n, w), dtype=torch.int64) for w in (1, 0, 0)]
        inputs: dict[str, torch.Tensor | None] = {
            "x": x,
            "batch_index": batches,
            "cat_covs": categories if categories.shape[1] else None,
            "cont_covs": numbers if numbers.shape[1] else None,
        }
        if self._multi:
            # What is asked of the encoders depends on none of these: there are no proteins.
            inputs |= {"y": torch.zeros((n, 1)), "size_factor": torch.ones((n, 2)), "label": None}
            inputs["cell_idx"] = torch.zeros(n, dtype=torch.int64)
        return inputs


def _check(model: Any) -> bool:
    """Refuse what is no trained model of a supported class; tell whether it has two modalities."""
    # Where scvi-tools is not imported, nothing can be a model of it.
    scvi = vars(sys.modules["scvi.model"]) if "scvi.model" in sys.modules else {}
    supported = isinstance(model, tuple(scvi[name] for name in SUPPORTED if name in scvi))
    if not supported:
        raise TypeError(
            f"model= is a {type(model).__name__}. Pass a trained model of scvi.model: {', '.join(SUPPORTED)}; one in a folder is "
            "loaded with scvi.model.SCVI.load(folder, adata)."
        )
    if not model.is_trained_:
        raise ValueError(f"The {type(model).__name__} is not trained. Call its train() first, or load a trained one.")
    if not isinstance(model, scvi["MULTIVI"]):
        return False
    if model.module.n_input_proteins:
        raise ValueError(
            "The MULTIVI has proteins, which its decoder draws at random; supported are RNA and accessibility."
        )
    if model.registry.get("setup_method_name") != "setup_mudata":
        raise ValueError("The MULTIVI was set up with an AnnData. Train one with MULTIVI.setup_mudata.")
    return True


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Put blocks of cells together, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
