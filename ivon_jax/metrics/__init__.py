r"""How good predictions are: of classes, of numbers, and of how sure they are.

* Classes: `accuracy`, `negative_log_likelihood`, `brier_score`,
  `expected_calibration_error` take ``probs`` of shape (..., C), probabilities of C
  classes, and integer ``labels`` of shape (...) in 0..C-1. :math:`p_{ic}` is example
  i's probability of class c, :math:`y_i` its label.
* Regression: `gaussian_nll`, `crps`, `interval_coverage` take ``mean``, ``variance``
  (the square of the standard deviation) and ``targets``, all of one shape (...).
* Scores: `out_of_distribution` takes those of two sets, `risk_coverage` scores and
  errors of one.

They take JAX or NumPy arrays, and return a scalar, the mean over all N examples; the
last two return dictionaries.

``where``, booleans that broadcast to the labels' shape, says which examples count: the
mean is over those. The others, padding, may have any label, such as -1 or -100, and
any predictions, NaN among them.

All work under ``jit``. There, values go unchecked: a label out of range, a variance
that is not positive or a NaN that counts makes the result NaN, as does a mask without
any example. Elsewhere each raises TypeError or ValueError for arguments that do not
fit: shapes, labels that are not integers or out of range, probabilities that are
negative or do not sum to one.

Reference: Snoek et al., Can You Trust Your Model's Uncertainty?, NeurIPS 2019, whose
metrics of classes the paper uses (appendix C.3).
"""

from ._classification import (
    accuracy as accuracy,
    brier_score as brier_score,
    expected_calibration_error as expected_calibration_error,
    negative_log_likelihood as negative_log_likelihood,
)
from ._ranking import (
    out_of_distribution as out_of_distribution,
    risk_coverage as risk_coverage,
)
from ._regression import (
    crps as crps,
    gaussian_nll as gaussian_nll,
    interval_coverage as interval_coverage,
)
