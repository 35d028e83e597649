"""
Pruning what the posterior is not sure of
=========================================

How many weights of a network could be zero? IVON's posterior has an answer for each:
where the standard deviation is larger than the mean, the data don't even know its sign.
You will see a network lose its weights by three criteria, without further training:
signal to noise, variance alone, and magnitude. It takes 15 seconds on two CPU cores,
draws pruning.png, and prints the accuracy in per cent without 80 % of the weights::

    accuracy, signal to noise: 94.2
    accuracy, variance: 80.4
    accuracy, magnitude: 94.1
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import ivon_jax
from ivon_jax import pruning

SEED = 0
STEPS = 4000
BATCH_SIZE = 50
LAYERS = (64, 128, 128, 10)
LEARNING_RATE, HESS_INIT, WEIGHT_DECAY = 1.0, 1.0, 1e-3
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)

# %%
# The digits come with scikit-learn. The first half is for training; the second was
# collected later, and tests.

digits = load_digits()
images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
num_train = len(labels) // 2
test_images, test_labels = images[num_train:], labels[num_train:]

# %%
# The network is a function of its weights, trained as always with IVON. Weight decay,
# the precision of the prior, is what makes weights small that no image needs.


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


ivon = ivon_jax.ivon(
    optax.cosine_decay_schedule(LEARNING_RATE, STEPS),
    num_train,
    hess_init=HESS_INIT,
    b2=1 - 1 / STEPS,
    weight_decay=WEIGHT_DECAY,
)


@jax.jit
def train_step(params, opt_state, rows, key):
    """Step along the gradient at a sample of the weights."""
    theta = ivon_jax.sample(key, params, opt_state)
    grads = jax.grad(loss_fn)(theta, rows)
    updates, opt_state = ivon.update(grads, opt_state, params, sample=theta)
    return optax.apply_updates(params, updates), opt_state


key, *layer_keys = jax.random.split(jax.random.key(SEED), len(LAYERS))
params = [
    (jax.random.normal(layer_key, (m, n)) / m**0.5, jnp.zeros(n))
    for layer_key, m, n in zip(layer_keys, LAYERS, LAYERS[1:], strict=False)
]
opt_state = ivon.init(params)
rng = np.random.default_rng(SEED)
for i in range(STEPS):
    rows = rng.choice(num_train, BATCH_SIZE, replace=False)
    step_key = jax.random.fold_in(key, i)
    params, opt_state = train_step(params, opt_state, rows, step_key)
posterior = ivon_jax.posterior(params, opt_state)

# %%
# `curve` prunes to each sparsity and evaluates what is left. A criterion is a function
# of the posterior; `mask` makes one of any scores.


def accuracy(params):
    """Accuracy on the test images, in per cent."""
    return 100 * jnp.mean(logits(params, test_images).argmax(-1) == test_labels)


def by_magnitude(posterior, sparsity):
    """Remove the smallest weights, as one would without a posterior."""
    return pruning.mask(jax.tree.map(jnp.abs, posterior.mean), sparsity)


criteria = {
    "signal to noise": pruning.by_signal_to_noise,
    "variance": pruning.by_variance,
    "magnitude": by_magnitude,
}
curves = {
    name: pruning.curve(accuracy, posterior, SPARSITIES, criterion)
    for name, criterion in criteria.items()
}

# %%
# Signal to noise leaves the accuracy as it is until few weights remain, and magnitude
# does so, too: after so short a training the deviations don't differ by much.

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, curve in curves.items():
    print(f"accuracy, {name}: {curve[SPARSITIES.index(0.8)]:.1f}")
    axes.plot(100 * (1 - np.array(SPARSITIES)), curve, "o-", label=name)
axes.set(xscale="log", xlabel="weights kept (%, log scale)", ylabel="accuracy (%)")
axes.invert_xaxis()
axes.legend()
figure.savefig("pruning.png", dpi=200)
