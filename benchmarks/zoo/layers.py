"""What the networks share: first weights, normalisation of images and of channels."""

import math

import jax
import jax.numpy as jnp
from flax import nnx


def uniform_init(fan_in):
    """Weights and biases from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default."""

    def init(key, shape, dtype):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return {"kernel_init": init, "bias_init": init}


class FilterResponseNorm(nnx.Module):
    """Normalise each channel of each image alone; the threshold is the non-linearity.

    Singh and Krishnan, Filter Response Normalization Layer, CVPR 2020. Unlike batch
    normalisation it has no running statistics, which would belong to no one sample.
    """

    def __init__(self, features):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.threshold = nnx.Param(jnp.zeros(features))

    def __call__(self, x):
        """Map (N, height, width, features) to the same shape."""
        mean_square = jnp.mean(x**2, axis=(1, 2), keepdims=True)
        x = x * jax.lax.rsqrt(mean_square + 1e-6)
        return jnp.maximum(self.scale[...] * x + self.bias[...], self.threshold[...])


def conv(in_features, features, size, rngs, *, stride=1, bias=True, **options):
    """Return a convolution with square filters; of `nnx.Conv` are other options."""
    options = uniform_init(fan_in=in_features * size**2) | options
    shape = in_features, features, (size, size), stride
    return nnx.Conv(*shape, use_bias=bias, rngs=rngs, **options)


def linear(in_features, features, rngs):
    """Return a linear layer."""
    return nnx.Linear(in_features, features, rngs=rngs, **uniform_init(in_features))


def normalize(images):
    """Scale by the mean and the standard deviation of ImageNet's pixels."""
    mean = jnp.array([0.485, 0.456, 0.406])
    stddev = jnp.array([0.229, 0.224, 0.225])
    return (images.astype(jnp.float32) / 255 - mean) / stddev


def pool(x, size):
    """Average over squares of this many pixels."""
    count, height, width, features = x.shape
    squares = x.reshape(count, height // size, size, width // size, size, features)
    return squares.mean(axis=(2, 4))


def flatten(x):
    """Map (N, ...) to (N, features)."""
    return x.reshape(len(x), math.prod(x.shape[1:]))
