"""The networks of the NeurIPS 2021 competition on approximate inference (App. D.3).

Wilson et al., Evaluating Approximate Inference in Bayesian Deep Learning, PMLR 2022.
They have no normalisation, so the exact posterior is that of a simple function.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers import conv, flatten, linear, normalize, pool


class AlexNet(nnx.Module):
    """Five convolutions and three linear layers with SiLU, for CIFAR-10."""

    def __init__(self, num_classes, rngs):
        channels, sizes = (3, 64, 128, 256, 128, 64), (3, 3, 2, 2, 2)
        shapes = zip(itertools.pairwise(channels), sizes, strict=True)
        self.convs = nnx.List(conv(*shape, size, rngs) for shape, size in shapes)
        shapes = itertools.pairwise((8 * 8 * 64, 256, 256))
        self.hidden = nnx.List(linear(*shape, rngs) for shape in shapes)
        self.head = linear(256, num_classes, rngs)

    def __call__(self, images):
        """Map images, uint8 (N, 32, 32, 3), to logits, (N, num_classes)."""
        x = normalize(images)
        for i, layer in enumerate(self.convs):
            x = jax.nn.silu(layer(x))
            x = nnx.max_pool(x, (2, 2), (2, 2)) if i < 2 else x
        x = flatten(x)
        for layer in self.hidden:
            x = jax.nn.silu(layer(x))
        return self.head(x)


class LeNet(nnx.Module):
    """Two convolutions and three linear layers with ReLU, for MedMNIST."""

    def __init__(self, num_classes, rngs):
        self.convs = nnx.List(
            [conv(3, 6, 5, rngs), conv(6, 16, 5, rngs, padding="VALID")]
        )
        shapes = itertools.pairwise((5 * 5 * 16, 120, 84))
        self.hidden = nnx.List(linear(*shape, rngs) for shape in shapes)
        self.head = linear(84, num_classes, rngs)

    def __call__(self, images):
        """Map images, uint8 (N, 28, 28, 3), to logits, (N, num_classes)."""
        x = images.astype(jnp.float32) / 255
        for layer in self.convs:
            x = pool(jax.nn.relu(layer(x)), 2)
        x = flatten(x)
        for layer in self.hidden:
            x = jax.nn.relu(layer(x))
        return self.head(x)
