"""IVON: variational learning as an optax gradient transformation."""

import importlib
from typing import Any

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


def __getattr__(name: str) -> Any:
    """Import `ivon_jax.flax` when it is first used: the core does not need Flax."""
    if name == "flax":
        return importlib.import_module("ivon_jax.flax")
    raise AttributeError(f"module 'ivon_jax' has no attribute {name!r}")
