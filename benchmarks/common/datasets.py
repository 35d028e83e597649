"""Images and labels that fit the network, or an error that says what does not."""

import sys
import zipfile

import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits


def load_images(path=""):
    """Return images (N, height, width) in [0, 1] of an npz file, and their labels.

    Without a path they are scikit-learn's 1,797 digits, of 8x8 pixels.
    """
    if path:
        images, labels = read_images(path)
        images = images / 255
    else:
        digits = load_digits()
        images, labels = digits.images / 16, digits.target
    return jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)


def load_halves(path=""):
    """Return (images (N, pixels), labels) to train on, and the same to test on.

    They are not shuffled: the second half, of other writers, is the harder test.
    """
    images, labels = load_images(path)
    images, half = images.reshape(len(labels), -1), len(labels) // 2
    return (images[:half], labels[:half]), (images[half:], labels[half:])


def read_images(path, num_classes=10, shape=None):
    """Return images, uint8 (N, height, width), and labels of an npz file, or exit."""
    size = "(N, height, width)" if shape is None else f"(N, {shape[0]}, {shape[1]})"
    try:
        # NumPy would read other files, too.
        with zipfile.ZipFile(path), np.load(path) as arrays:
            images, labels = arrays["images"], arrays["labels"]
        return check_images(images, labels, num_classes, shape)
    except Exception as error:  # there are many ways to be no such file
        sys.exit(
            f"`--data` must be an npz file with `images`, uint8 {size}, and `labels`, "
            f"N integers in 0..{num_classes - 1}, got {path!r}: {error}"
        )


def check_images(images, labels, num_classes, shape=None):
    """Return images, uint8 (N, *shape), and labels, int32, or raise a ValueError."""
    fits = images.shape[1:] == shape if shape else images.ndim == 3
    if images.dtype != np.uint8 or not fits or not images.size:
        raise ValueError(f"the images are {images.dtype} {images.shape}.")
    if labels.shape != (len(images),) or not len(labels):
        raise ValueError(f"there are labels {labels.shape} for {len(images)} images.")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers, got {labels.dtype}.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels must be in 0..{num_classes - 1}, the classes of the network, got "
            f"{low}..{high}."
        )
    return images, labels.astype(np.int32)
