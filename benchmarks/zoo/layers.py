"""What the networks share: first weights, normalisation of images and of channels."""

import itertools
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
        """Map (N, height, width, features) to the same shape and type, in float32."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide**2, axis=(1, 2), keepdims=True)
        y = self.scale[...] * wide * jax.lax.rsqrt(mean_square + 1e-6)
        return jnp.maximum(y + self.bias[...], self.threshold[...]).astype(x.dtype)


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


def by_products(model, dtype):
    """Let the convolutions of a network be matrix products, of this type.

    Under `jax.vmap` over parameters they are batched products, where XLA makes grouped
    convolutions of convolutions, which GPUs compile and run slowly. The price is
    memory: each pixel has a copy of its neighbours, nine values for one.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv):
            module.conv_general_dilated, module.dtype = convolve, dtype
        elif isinstance(module, nnx.Linear):
            module.dtype = jnp.float32
    return model


def convolve(images, filters, strides, padding, **_):
    """Convolve as `jax.lax.conv_general_dilated` does, without its other options.

    Images are cut into groups of some thousand pixels. The gradient of a filter sums
    over all pixels; so it is the sum of many short products, which fill a device.
    """
    (count, *sizes, _), (*window, _, features) = images.shape, filters.shape
    pads = padding
    if isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(sizes, window, strides, padding)
    images = jnp.pad(images, ((0, 0), *pads, (0, 0)))
    rows, columns = (
        (size + sum(pad) - length) // stride + 1
        for size, pad, length, stride in zip(sizes, pads, window, strides, strict=True)
    )
    height, width = (rows - 1) * strides[0] + 1, (columns - 1) * strides[1] + 1
    neighbours = [
        images[:, i : i + height : strides[0], j : j + width : strides[1]]
        for i, j in itertools.product(*map(range, window))
    ]
    neighbours = jnp.concatenate(neighbours, axis=-1)
    groups = math.gcd(count, max(1, count * rows * columns // 8192))
    neighbours = neighbours.reshape(groups, -1, neighbours.shape[-1])
    filters = jnp.broadcast_to(
        filters.reshape(-1, features), (groups, neighbours.shape[-1], features)
    )
    return (neighbours @ filters).reshape(count, rows, columns, features)
