"""The recurrent network for text: an embedding and two gated layers (App. D.1).

Cho et al., Learning Phrase Representations, EMNLP 2014, in the form of cuDNN, PyTorch
and Keras: the reset gate acts behind the product with the state, and both products have
biases. Flax's cell has those of the input alone.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers import linear, uniform_init


class GRU(nnx.Module):
    """A layer of gated recurrent units."""

    def __init__(self, in_features, features, rngs):
        # PyTorch's bound is that of the state for both.
        options = uniform_init(features) | {"rngs": rngs}
        self.of_input = nnx.Linear(in_features, 3 * features, **options)
        self.of_state = nnx.Linear(features, 3 * features, **options)

    def __call__(self, x):
        """Map (N, T, in_features) to the states (N, T, features)."""

        def step(state, x):
            reset, update, new = jnp.split(x, 3, axis=-1)
            of_state = jnp.split(self.of_state(state), 3, axis=-1)
            reset = jax.nn.sigmoid(reset + of_state[0])
            update = jax.nn.sigmoid(update + of_state[1])
            new = jnp.tanh(new + reset * of_state[2])
            state = (1 - update) * new + update * state
            return state, state

        inputs = self.of_input(x).swapaxes(0, 1)
        first = jnp.zeros((len(x), self.of_state.in_features), inputs.dtype)
        return jax.lax.scan(step, first, inputs)[1].swapaxes(0, 1)


class TextClassifier(nnx.Module):
    """Two layers of gated units, and a linear head on the mean of their states."""

    def __init__(self, vocabulary, width, num_classes, rngs):
        self.embed = nnx.Embed(
            vocabulary, width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs
        )
        self.layers = nnx.Sequential(*(GRU(width, width, rngs) for _ in range(2)))
        self.head = linear(width, num_classes, rngs)

    def __call__(self, tokens):
        """Map tokens, integers (N, T), to logits, (N, num_classes)."""
        return self.head(self.layers(self.embed(tokens)).mean(axis=1))
