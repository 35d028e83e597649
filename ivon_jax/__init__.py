"""IVON: variational learning as an optax gradient transformation."""

from . import metrics as metrics
from ._gradients import value_and_grad as value_and_grad
from ._posterior import (
    Posterior as Posterior,
    find_states as find_states,
    posterior as posterior,
    sample as sample,
)
from ._transform import (
    Estimate as Estimate,
    IVONState as IVONState,
    ivon as ivon,
    scale_by_ivon as scale_by_ivon,
)
from .predictive import predict as predict

__version__ = "0.1.0"
