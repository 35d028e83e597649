"""The residual networks: ResNet-20, PreResNet-110, ResNet-18 and ResNet-50.

He et al., Deep Residual Learning for Image Recognition, CVPR 2016; Identity Mappings in
Deep Residual Networks, ECCV 2016. Filter response normalisation is in the place of
batch normalisation, and where nothing else is said its threshold is the activation.
"""

import jax
from flax import nnx

from zoo.layers import FilterResponseNorm, conv, flatten, linear, normalize, pool

HE_NORMAL = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv_norm(in_features, features, size, stride, rngs, **options):
    """Return a convolution and its normalisation."""
    layer = conv(in_features, features, size, rngs, stride=stride, **options)
    return nnx.Sequential(layer, FilterResponseNorm(features))


def stacks(width, counts):
    """Yield (in_features, features, stride) of each block; each stack doubles them."""
    features = width
    for stack, count in enumerate(counts):
        for block in range(count):
            stride = 2 if stack > 0 and block == 0 else 1
            yield features, features * stride, stride
            features *= stride


class Block(nnx.Module):
    """Two convolutions and a shortcut, with no activation after their sum."""

    def __init__(self, in_features, features, stride, rngs):
        self.first = conv_norm(in_features, features, 3, stride, rngs)
        self.second = conv_norm(features, features, 3, 1, rngs)
        projection = (in_features, features, 1, stride, rngs)
        self.shortcut = conv_norm(*projection) if stride > 1 else None

    def __call__(self, x):
        """Map (N, height, width, in_features) to (N, height', width', features)."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return shortcut + self.second(self.first(x))


class ResNet(nnx.Module):
    """The ResNet for CIFAR, of depth 6n + 2; the biases of its convolutions stay."""

    def __init__(self, depth, width, num_classes, rngs):
        self.stem = conv_norm(3, width, 3, 1, rngs)
        shapes = [*stacks(width, 3 * [(depth - 2) // 6])]
        self.blocks = nnx.Sequential(*(Block(*shape, rngs) for shape in shapes))
        features = shapes[-1][1] if shapes else width  # of depth 2 it is the stem
        self.head = linear(features, num_classes, rngs)

    def __call__(self, images):
        """Map images, uint8 (N, height, width, 3), to logits, (N, num_classes)."""
        x = self.blocks(self.stem(normalize(images)))
        return self.head(x.mean(axis=(1, 2)))


class PreActivationBlock(nnx.Module):
    """Normalise before each convolution, and before the projection of a shortcut."""

    def __init__(self, in_features, features, stride, rngs):
        self.norms = nnx.List([FilterResponseNorm(n) for n in (in_features, features)])
        self.first = conv(in_features, features, 3, rngs, stride=stride)
        self.second = conv(features, features, 3, rngs)
        projection = in_features, features, 1, rngs
        self.shortcut = conv(*projection, stride=stride) if stride > 1 else None

    def __call__(self, x):
        """Map (N, height, width, in_features) to (N, height', width', features)."""
        y = self.norms[0](x)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.second(self.norms[1](self.first(y)))


class PreResNet(nnx.Module):
    """The ResNet for CIFAR whose blocks normalise first, of depth 6n + 2."""

    def __init__(self, depth, width, num_classes, rngs):
        self.stem = conv_norm(3, width, 3, 1, rngs)
        shapes = [*stacks(width, 3 * [(depth - 2) // 6])]
        blocks = (PreActivationBlock(*shape, rngs) for shape in shapes)
        self.blocks = nnx.Sequential(*blocks)
        self.norm = FilterResponseNorm(shapes[-1][1])
        self.head = linear(shapes[-1][1], num_classes, rngs)

    def __call__(self, images):
        """Map images, uint8 (N, height, width, 3), to logits, (N, num_classes)."""
        x = self.norm(self.blocks(self.stem(normalize(images))))
        return self.head(x.mean(axis=(1, 2)))


class WideBlock(nnx.Module):
    """Two convolutions without biases and a shortcut; a rectifier after their sum."""

    def __init__(self, in_features, features, stride, rngs):
        options = {"bias": False, "padding": 1}
        self.first = conv_norm(in_features, features, 3, stride, rngs, **options)
        self.second = conv_norm(features, features, 3, 1, rngs, **options)
        projection = (in_features, features, 1, stride, rngs)
        self.shortcut = conv_norm(*projection, bias=False) if stride > 1 else None

    def __call__(self, x):
        """Map (N, height, width, in_features) to (N, height', width', features)."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return jax.nn.relu(shortcut + self.second(self.first(x)))


class WideResNet(nnx.Module):
    """The ResNet for ImageNet, begun at full resolution: of depth 18 by default.

    Its head sees each square of 32 pixels: of an image of 64, four.
    """

    def __init__(self, width, num_classes, rngs, *, counts=(2, 2, 2, 2), size=32):
        self.stem = conv_norm(3, width, 3, 1, rngs, bias=False)
        shapes = [*stacks(width, counts)]
        self.blocks = nnx.Sequential(*(WideBlock(*shape, rngs) for shape in shapes))
        self.head = linear(shapes[-1][1] * (size // 32) ** 2, num_classes, rngs)

    def __call__(self, images):
        """Map images, uint8 (N, size, size, 3), to logits, (N, num_classes)."""
        x = self.blocks(self.stem(normalize(images)))
        return self.head(flatten(pool(x, 4)))


class Bottleneck(nnx.Module):
    """Convolutions of 1, 3 and 1 pixels without biases, and a shortcut."""

    def __init__(self, in_features, features, stride, rngs):
        outer, options = 4 * features, {"bias": False, "kernel_init": HE_NORMAL}
        self.layers = nnx.Sequential(
            conv_norm(in_features, features, 1, 1, rngs, **options),
            conv_norm(features, features, 3, stride, rngs, padding=1, **options),
            conv_norm(features, outer, 1, 1, rngs, **options),
        )
        projection = in_features, outer, 1, stride, rngs
        same = in_features == outer
        self.shortcut = None if same else conv_norm(*projection, **options)

    def __call__(self, x):
        """Map (N, height, width, in_features) to (N, height', width', 4 features)."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return shortcut + self.layers(x)


class ImageNetResNet(nnx.Module):
    """The ResNet for ImageNet with bottlenecks: of depth 50 by default.

    The stride is at the convolution of three pixels, as in torchvision.
    """

    def __init__(self, width, num_classes, rngs, *, counts=(3, 4, 6, 3)):
        options = {"bias": False, "padding": 3, "kernel_init": HE_NORMAL}
        self.stem = conv_norm(3, width, 7, 2, rngs, **options)
        blocks, in_features = [], width
        for _, features, stride in stacks(width, counts):
            blocks.append(Bottleneck(in_features, features, stride, rngs))
            in_features = 4 * features
        self.blocks = nnx.Sequential(*blocks)
        self.head = linear(in_features, num_classes, rngs)

    def __call__(self, images):
        """Map images, uint8 (N, height, width, 3), to logits, (N, num_classes)."""
        x = self.stem(normalize(images))
        x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        return self.head(self.blocks(x).mean(axis=(1, 2)))
