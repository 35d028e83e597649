"""
An ensemble of posteriors
=========================

Five networks learn the digits from different first weights. Each ends with a Gaussian
of its own, and together these are a mixture: Multi-IVON. You will see one program train
all five, and what the mixture adds to a single posterior. It takes 30 seconds on two
CPU cores, draws ensemble.png, and prints the negative log-likelihood (NLL, in nats for
each image; lower is better) of 899 images that are not for training::

    NLL, mean of one posterior: 0.251
    NLL, samples of one posterior: 0.174
    NLL, samples of the mixture: 0.166
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy import ndimage
from sklearn.datasets import load_digits

import ivon_jax

SEED = 0
STEPS = 4000
BATCH_SIZE = 50
LAYERS = (64, 128, 128, 10)
MEMBERS, NUM_SAMPLES = 5, 60
LEARNING_RATE, HESS_INIT, B2 = 1.0, 0.3, 0.9997
ANGLES = range(0, 181, 15)

# %%
# The first half of the images is for training; the second was collected later, and
# tests.

digits = load_digits()
images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
num_train = len(labels) // 2


def logits(params, images):
    """Map images, (N, 64), to the logits of the ten digits, (N, 10)."""
    *hidden, (matrix, bias) = params
    for w, b in hidden:
        images = jax.nn.relu(images @ w + b)
    return images @ matrix + bias


def loss_fn(params, rows):
    """Mean cross-entropy of some rows of the training set."""
    losses = optax.losses.softmax_cross_entropy_with_integer_labels
    return losses(logits(params, images[rows]), labels[rows]).mean()


# %%
# This is the step of one network. `vmap` makes it a step of all: every array gets the
# member as its first axis. Members exchange nothing: cut along that axis, they train on
# as many devices without any communication.

schedule = optax.cosine_decay_schedule(LEARNING_RATE, STEPS)
ivon = ivon_jax.ivon(schedule, num_train, hess_init=HESS_INIT, b2=B2)


def init(key):
    """Draw the first weights of a network."""
    layer_keys = jax.random.split(key, len(LAYERS) - 1)
    return [
        (jax.random.normal(layer_key, (m, n)) / m**0.5, jnp.zeros(n))
        for layer_key, m, n in zip(layer_keys, LAYERS, LAYERS[1:], strict=False)
    ]


@jax.jit
@jax.vmap
def train_step(params, opt_state, rows, key):
    """Step along the gradient at a sample of the weights."""
    theta = ivon_jax.sample(key, params, opt_state)
    grads = jax.grad(loss_fn)(theta, rows)
    updates, opt_state = ivon.update(grads, opt_state, params, sample=theta)
    return optax.apply_updates(params, updates), opt_state


key = jax.random.key(SEED)
params = jax.vmap(init)(jax.random.split(key, MEMBERS))
opt_state = jax.vmap(ivon.init)(params)
rng = np.random.default_rng(SEED)
for i in range(STEPS):
    rows = rng.integers(0, num_train, (MEMBERS, BATCH_SIZE))
    keys = jax.random.split(jax.random.fold_in(key, i), MEMBERS)
    params, opt_state = train_step(params, opt_state, rows, keys)

# %%
# `Mixture` takes the stacked posteriors as they are, and `predict` draws from a mixture
# as from a single one: 60 samples are 12 of each member.

posteriors = jax.vmap(ivon_jax.posterior)(params, opt_state)
mixture = ivon_jax.Mixture.from_stacked(posteriors)


def nll_of_mean(posterior, images):
    """Return the NLL of the test labels, predicted by the mean of the weights."""
    probs = jax.nn.softmax(logits(posterior.mean, images))
    return ivon_jax.metrics.negative_log_likelihood(probs, labels[num_train:])


@jax.jit
def nll(posterior, images):
    """Return the NLL of the test labels, predicted by the average over samples."""

    def probs(theta):
        return jax.nn.softmax(logits(theta, images))

    average = ivon_jax.predict(probs, posterior, key, NUM_SAMPLES)
    return ivon_jax.metrics.negative_log_likelihood(average, labels[num_train:])


means = jax.vmap(nll_of_mean, (0, None))(posteriors, images[num_train:])
singles = jax.vmap(nll, (0, None))(posteriors, images[num_train:])
print(f"NLL, mean of one posterior: {means.mean():.3f}")
print(f"NLL, samples of one posterior: {singles.mean():.3f}")
print(f"NLL, samples of the mixture: {nll(mixture, images[num_train:]):.3f}")

# %%
# Turn the test images, and all five networks are wrong in the same way. The mixture
# loses little less than a member: it is no cure for images of another kind.

of_one, of_mixture = [], []
for angle in ANGLES:
    turned = ndimage.rotate(digits.images[num_train:], angle, (2, 1), False, order=1)
    turned = jnp.asarray(turned.reshape(-1, 64) / 16, jnp.float32)
    of_one.append(jax.vmap(nll, (0, None))(posteriors, turned).mean())
    of_mixture.append(nll(mixture, turned))
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(ANGLES, of_one, "o-", label="one (mean of five)")
axes.plot(ANGLES, of_mixture, "o-", label="mixture of the five")
axes.set(xlabel="angle (degrees)", ylabel="NLL (nats)")
axes.legend(title="posteriors")
figure.savefig("ensemble.png", dpi=200)
