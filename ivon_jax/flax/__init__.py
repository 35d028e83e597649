"""IVON in Flax: a linen `TrainState` that samples, and NNX models drawn from q."""

from ._linen import TrainState as TrainState
from ._nnx import (
    arrays as arrays,
    mean as mean,
    posterior as posterior,
    prior as prior,
    sample as sample,
    value_and_grad as value_and_grad,
)
