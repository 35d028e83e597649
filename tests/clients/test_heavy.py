"""Trainers that take hundreds of megabytes: `make clients HEAVY="keras brax"`.

Also google-tunix, kauldron and ``"transformers<5"``, the last ones with Flax models.
"""

import importlib.util
import os

import numpy as np
import pytest
import recipes

pytestmark = [
    pytest.mark.usefixtures("standard_promotion", "implicit_ranks"),
    pytest.mark.filterwarnings("ignore"),  # theirs
]


def needs(package):
    """Skip where it is missing, unless it is among what is tested."""
    wanted = package in os.environ.get("CLIENTS", "")
    if not wanted and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize(
    ("package", "section"), [("keras", "Keras 3 on JAX"), ("brax", "brax")]
)
def test_the_loss_falls(package, section):
    needs(package)
    namespace = recipes.run("trainers.md", section)
    assert namespace["loss"] < 0.2 * np.mean(namespace["labels"] ** 2)


def test_brax_trains_the_plain_loops_posterior():
    """It passes no parameters; the draw comes again from its key."""
    needs("brax")
    space = recipes.run("trainers.md", "brax")
    jax, optax, tx = space["jax"], space["optax"], space["sampled_tx"]

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(space["brax_loss"])(params, space["inputs"], space["labels"])
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = np.zeros(3, np.float32)
    carry = params, tx.init(params)
    for _ in range(50):
        carry = step(*carry)
    q = space["ivon_jax"].posterior(*carry)
    np.testing.assert_allclose(space["posterior"].mean, q.mean, rtol=1e-4)
    np.testing.assert_allclose(space["posterior"].precision, q.precision, rtol=1e-4)


def test_kauldron_finds_the_weights():
    needs("kauldron")
    space = recipes.run("trainers.md", "Kauldron")
    kernel = space["posterior"].mean["Dense_0"]["kernel"][:, 0]
    np.testing.assert_allclose(kernel, [1.0, -2.0, 0.5], atol=0.5)
    assert np.any(kernel != space["state"].params["Dense_0"]["kernel"][:, 0])


def test_tunix_finds_the_weights():
    """Of least squares, to a few of the posterior's standard deviations of 0.1."""
    needs("tunix")
    space = recipes.run("trainers.md", "Tunix")
    assert space["trainer"].optimizer.step[...] == 50
    kernel = space["posterior"].mean["kernel"][:, 0]
    np.testing.assert_allclose(kernel, [1.0, -2.0, 0.5], atol=0.5)
    assert np.any(kernel != space["trainer"].model.kernel[...][:, 0])


def test_transformers_flax_model_learns():
    needs("transformers")
    history = recipes.run("trainers.md", "Flax models of transformers")["history"]
    assert np.mean(history[-10:]) < np.mean(history[:10])
