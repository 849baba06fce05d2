from __future__ import annotations

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, holder, representation
from .._design import codes
from .._progress import progress_bar
from .._variables import Asked, variables

Z = 1.96


def probe(
    data: Data,
    use_rep: str | None,
    targets: Asked,
    *,
    layer: str | None = None,
    mod: str | None = None,
    n_folds: int = 5,
    donor: str | None = None,
    rng: int | np.random.Generator | None = 0,
    progress: bool = True,
) -> pd.DataFrame:
    r"""Tell how much of known variables any representation holds linearly: what the best direction in it could know.

    A latent with fewer dimensions than variables can still hold each of them along a direction (superposition). A model is
    fitted to the cells of all folds but one and judged on the cells of that one, for every fold:

    * numbers by ridge regression on all columns, R² = 1 − Σ (y − ŷ)² / Σ (y − ȳ)² over all cells (`metric` `"r2"`). The
      penalty is chosen on the training cells, by generalised cross-validation from 10⁻¹⁰ to 10³ times the mean square of a
      column, among those that leave a quarter of the training cells as degrees of freedom, or no error at all: of a variable
      that is a linear function of the columns R² is 1.000, and of noise about 0, seldom far below, if there are fewer cells than
      columns, too;
    * each label of a categorical variable by logistic regression against all other labels, with the L2 penalty of
      scikit-learn at C = 1: AUROC, the mean share of the other cells of its fold that a cell of the label scores above
      (`"auroc"`); and as a number that is 0 or 1, by ridge regression (`"r2"`).

    Columns are standardised. All variables share the folds.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod` or a joint embedding.
    use_rep
        Key of `obsm` (an embedding, or the activations of an SAE), or `"X"`; by default `X_pca`. In memory or on disk.
    targets
        What to predict: a key of `obsm`, a column of `obs`, a list of these, an array or DataFrame with a row per cell (a
        DataFrame is brought into the order of `obs_names`), or a dict from names of groups to one of these. Booleans count
        as numbers. A categorical column counts label by label; pass its codes to have it as one number.
    layer
        A layer to use as the representation, with `use_rep=None`.
    mod
        The modality to read from.
    n_folds
        Parts that the cells are divided into at random.
    donor
        Column of `obs`: all cells of a donor go to the same fold, so that scores are of other donors.
    rng
        Seed or generator, for the folds.
    progress
        Show a progress bar when it takes more than a second.

    Returns
    -------
    A table with a row per variable, two per label: `group`, `variable`, `kind` (`"number"` or `"label"`), `metric`, `score`,
    `ci_low`, `ci_high` (95 % interval over the held-out cells: the score ± 1.96 standard errors, that of a ratio of means for
    R², DeLong's for AUROC).

    Raises
    ------
    KeyError
        No such representation, column or key.
    TypeError
        `n_folds` is no integer, or variables are no numbers.
    ValueError
        Variables or representation with NaN, or of other cells; no variable that differs between cells; too few cells for
        the folds; more than 10,000 columns and cells.

    Notes
    -----
    The intervals take the models as they are and the cells as independent. A variable that is the same in all cells, and a
    label that has fewer than two cells to compare, scores NaN.

    Normal equations in float64 do not resolve directions with less than 10⁻¹⁰ of the variance of the largest. Logistic
    regressions are trained on up to 20 million values (cells × columns), of cells drawn at random.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.simulate_small(2_000)
    >>> found = sae.tl.probe(adata, "X", {"X": "programs", "A": "activity", "B": "gates"})
    >>> found["score"].round(1).tolist()
    [1.0, 1.0, 1.0, 0.8, 0.6, 0.7, 0.2]
    """
    from ..core.probe import linear_r2, logistic_auroc, random_folds, standardised

    held = holder(data, mod)
    found = variables(held, targets, "targets")
    varies = found.varying("targets")
    donors = None if donor is None else codes(held, donor, slice(None), "donor", least=2)
    generator = np.random.default_rng(rng)
    folds = random_folds(len(found.values), n_folds, generator, donors)
    x = standardised(representation(held, use_rep, layer).matrix)

    score, error = np.full((2, 2, len(varies)), np.nan)
    with progress_bar(2 * len(folds), "probe", "cell", shown=progress) as bar:
        linear = linear_r2(x, found.values[:, varies], folds, on_step=bar.update)
    score[0, varies], error[0, varies] = linear.score, linear.error
    labels = varies & found.label
    if labels.any():
        with progress_bar(n_folds, "probe", "fold", shown=progress) as bar:
            of_labels = logistic_auroc(x, found.values[:, labels] > 0, folds, generator, on_step=bar.update)
        score[1, labels], error[1, labels] = of_labels.score, of_labels.error

    metric, variable = np.nonzero(np.stack([np.ones_like(found.label), found.label]))
    order = np.lexsort((metric, variable))
    metric, variable = metric[order], variable[order]
    score, error = score[metric, variable], error[metric, variable]
    lowest = np.where(metric == 1, 0.0, -np.inf)
    columns = {
        "group": found.group[variable],
        "variable": found.name[variable],
        "kind": np.array(["number", "label"], dtype=object)[found.label[variable].astype(int)],
        "metric": np.array(["r2", "auroc"], dtype=object)[metric],
        "score": score,
        "ci_low": np.maximum(score - Z * error, lowest),
        "ci_high": np.minimum(score + Z * error, 1),
    }
    return _schema.tidy(columns, list(columns), {})
