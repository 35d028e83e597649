"""The densely connected network: DenseNet-121, with twelve channels a layer for CIFAR.

Huang et al., Densely Connected Convolutional Networks, CVPR 2017. Filter response
normalisation is in the place of batch normalisation and rectifiers.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers import FilterResponseNorm, conv, flatten, linear, normalize, pool


def norm_conv(in_features, features, size, rngs):
    """Return a normalisation, and a convolution without bias."""
    layer = conv(in_features, features, size, rngs, bias=False)
    return nnx.Sequential(FilterResponseNorm(in_features), layer)


class DenseLayer(nnx.Module):
    """Put `growth` new channels, made of all others by a bottleneck, in front."""

    def __init__(self, in_features, growth, rngs):
        self.bottleneck = norm_conv(in_features, 4 * growth, 1, rngs)
        self.new = norm_conv(4 * growth, growth, 3, rngs)

    def __call__(self, x):
        """Map (N, height, width, in_features) to `growth` channels more."""
        return jnp.concatenate([self.new(self.bottleneck(x)), x], axis=-1)


class DenseNet(nnx.Module):
    """Four dense blocks; between two the channels and each side are halved.

    Its head sees each square of 32 pixels: of an image of 64, four.
    """

    def __init__(self, growth, num_classes, rngs, *, counts=(6, 12, 24, 16), size=32):
        features = 2 * growth
        self.stem = conv(3, features, 3, rngs, bias=False)
        self.blocks, self.transitions = nnx.List(), nnx.List()
        for count in counts:
            if len(self.blocks):
                self.transitions.append(norm_conv(features, features // 2, 1, rngs))
                features //= 2
            starts = range(features, features + count * growth, growth)
            layers = (DenseLayer(start, growth, rngs) for start in starts)
            self.blocks.append(nnx.Sequential(*layers))
            features += count * growth
        self.norm = FilterResponseNorm(features)
        self.head = linear(features * (size // 32) ** 2, num_classes, rngs)

    def __call__(self, images):
        """Map images, uint8 (N, size, size, 3), to logits, (N, num_classes)."""
        first, *others = self.blocks
        x = first(self.stem(normalize(images)))
        for transition, block in zip(self.transitions, others, strict=True):
            x = block(pool(transition(x), 2))
        return self.head(flatten(pool(jax.nn.relu(self.norm(x)), 4)))
