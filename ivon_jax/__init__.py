"""IVON: variational learning as an optax gradient transformation."""

import importlib
from typing import Any

from . import (
    calibration as calibration,
    diagnostics as diagnostics,
    merging as merging,
    metrics as metrics,
    pruning as pruning,
    sensitivity as sensitivity,
    settings as settings,
    tuning as tuning,
)
from ._distributions.basis import Basis as Basis
from ._distributions.gaussian import Posterior as Posterior
from ._distributions.mixture import Mixture as Mixture
from ._distributions.natural import (
    NaturalParameters as NaturalParameters,
    PointMass as PointMass,
)
from ._distributions.rotated import RotatedPosterior as RotatedPosterior
from ._evaluation.objective import evidence_lower_bound as evidence_lower_bound
from ._optimizer.estimate import Estimate as Estimate
from ._optimizer.evon import evon as evon, scale_by_evon as scale_by_evon
from ._optimizer.gradients import value_and_grad as value_and_grad
from ._optimizer.posterior import (
    mean as mean,
    posterior as posterior,
    prior as prior,
    sample as sample,
)
from ._optimizer.sampled import sampled as sampled
from ._optimizer.state import (
    EVONState as EVONState,
    IVONState as IVONState,
    SampledState as SampledState,
    find_states as find_states,
)
from ._optimizer.transform import (
    ivon as ivon,
    scale_by_ivon as scale_by_ivon,
)
from .calibration import (
    CalibrationCurve as CalibrationCurve,
    calibrate as calibrate,
    calibration_curve as calibration_curve,
)
from .predictive import (
    Linearized as Linearized,
    Moments as Moments,
    Uncertainty as Uncertainty,
    linearized as linearized,
    predict as predict,
    predict_moments as predict_moments,
    uncertainty as uncertainty,
)
from .settings import recommended as recommended
from .tuning import tune as tune

__version__ = "0.3.0"


def __getattr__(name: str) -> Any:
    """Import `ivon_jax.flax` when it is first used: the core does not need Flax."""
    if name == "flax":
        return importlib.import_module("ivon_jax.flax")
    raise AttributeError(f"module 'ivon_jax' has no attribute {name!r}")
