"""Few images, some of them with wrong labels: cells of an experiment, side by side."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common import datasets


class Images(NamedTuple):
    """Pixels, (N, size), and labels: all to train on, to choose with, and to test."""

    pool: tuple
    held_out: tuple
    test: tuple
    side: int


def load(path):
    """Return the shuffled images, those of MNIST averaged over 2x2 pixels."""
    images, labels = datasets.load_images(path)
    side = images.shape[1]
    if side == 28:
        side = 14
        images = images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4))
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images.reshape(len(labels), -1)[order], labels[order]
    cuts = 3 * len(labels) // 4, 4 * len(labels) // 5
    parts = zip(jnp.split(images, cuts), jnp.split(labels, cuts), strict=True)
    return Images(*parts, side)


class Cells(NamedTuple):
    """The experiment's cells: numbers of examples, by shares of wrong labels."""

    sizes: list
    flips: list

    @property
    def all(self):
        """Return the pairs of both."""
        return list(itertools.product(self.sizes, self.flips))

    def each(self, values):
        """Repeat values (repeats,) for every cell."""
        return jnp.tile(values, len(self.all))

    def runs(self, size, repeats):
        """Return the slice of runs of the first cell of this size, or None."""
        if size not in self.sizes:
            return None
        first = self.sizes.index(size) * len(self.flips) * repeats
        return slice(first, first + repeats)

    def subsets(self, key, labels, repeats):
        """Return sizes, rows and given labels of all runs, (cells * repeats, ...).

        A repeat's larger subset has the smaller one within, a larger share of wrong
        labels those of the smaller one.
        """
        longest = max(self.sizes)

        def of_run(key, size, flip):
            rows_key, flip_key, other_key = jax.random.split(key, 3)
            rows = jax.random.permutation(rows_key, len(labels))[:longest]
            wrong = jax.random.uniform(flip_key, (longest,)) < flip / 100
            other = jax.random.randint(other_key, (longest,), 1, 10)
            given = (labels[rows] + other * wrong) % 10
            return size, rows, given

        sizes, flips = (
            jnp.repeat(jnp.array(x), repeats) for x in zip(*self.all, strict=True)
        )
        return jax.vmap(of_run)(self.each(jax.random.split(key, repeats)), sizes, flips)
