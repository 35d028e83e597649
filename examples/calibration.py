"""
Calibration: how wide a posterior predicts best
===============================================

A network learns digits from 200 images, of which a fifth have a label drawn at random.
300 others choose the temperature of its posterior: the factor of all variances. You
will see the negative log-likelihood (NLL) along the curve of temperatures, from nearly
zero, which is the mean, to a posterior that is far too wide, and whether 1,297 new
images agree. It takes 15 seconds on two CPU cores, draws calibration.png, and prints
the NLL of the new images::

    mean: 0.771
    samples: 0.709
    calibrated samples: 0.709
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from sklearn.datasets import load_digits

import ivon_jax
from ivon_jax import metrics

SEED = 0
NUM_TRAIN, NUM_HELD_OUT = 200, 300
WRONG = 0.2  # of the labels to train on
HIDDEN = 64
STEPS, BATCH_SIZE = 2000, 50
NUM_SAMPLES = 64

# %%
# Three sets are drawn. A network that is sure of a wrong label has learned too much,
# and the images that it was trained on can't tell.

keys = jax.random.split(jax.random.key(SEED), 6)
order_key, wrong_key, label_key, init_key, train_key, predict_key = keys
digits = load_digits()
order = jax.random.permutation(order_key, len(digits.target))
splits = jnp.split(order, (NUM_TRAIN, NUM_TRAIN + NUM_HELD_OUT))
images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
train, held_out, test = ((images[rows], labels[rows]) for rows in splits)
wrong = jax.random.bernoulli(wrong_key, WRONG, (NUM_TRAIN,))
drawn = jax.random.randint(label_key, (NUM_TRAIN,), 0, 10)
train = train[0], jnp.where(wrong, drawn, train[1])

# %%
# A network with two hidden layers maps images to class probabilities. Settings are
# those that `recommended` has for a run of this length.

shapes = [(64, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 10)]
params = [
    (jax.random.normal(key, shape) * (2 / shape[0]) ** 0.5, jnp.zeros(shape[1]))
    for key, shape in zip(jax.random.split(init_key, 3), shapes, strict=True)
]


def probs(theta, images):
    """Map images (N, 64) to probabilities (N, 10)."""
    *hidden, (matrix, bias) = theta
    for w, b in hidden:
        images = jax.nn.relu(images @ w + b)
    return jax.nn.softmax(images @ matrix + bias)


def loss_fn(theta, images, labels):
    """Mean negative log-likelihood of a batch, in nats."""
    return metrics.negative_log_likelihood(probs(theta, images), labels)


tx = ivon_jax.ivon(**ivon_jax.recommended(NUM_TRAIN, STEPS, BATCH_SIZE))

# %%
# Each step draws a batch, and a sample of the weights. `scan` makes one compiled loop
# of all steps, with a key for each.


def step(carry, key):
    """Take a step along the gradient at a sample of the weights."""
    params, opt_state = carry
    rows_key, noise_key = jax.random.split(key)
    theta = ivon_jax.sample(noise_key, params, opt_state)
    rows = jax.random.randint(rows_key, (BATCH_SIZE,), 0, NUM_TRAIN)
    grads = jax.grad(loss_fn)(theta, *(x[rows] for x in train))
    updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
    return (optax.apply_updates(params, updates), opt_state), None


step_keys = jax.random.split(train_key, STEPS)
run = jax.jit(lambda carry: jax.lax.scan(step, carry, step_keys)[0])
posterior = ivon_jax.posterior(*run((params, tx.init(params))))

# %%
# `calibrate` tries temperatures on the held-out images, first far apart and then around
# the best one. `calibration_curve` has the NLL at each of them.


def with_samples(fn, images, labels):
    """Call one of the two on a set, with the same draws."""
    options = {"num_samples": NUM_SAMPLES, "args": (images,)}
    return fn(probs, posterior, labels, predict_key, **options)


curves = {
    name: with_samples(ivon_jax.calibration_curve, *data)
    for name, data in {"held out": held_out, "test": test}.items()
}
calibrated = with_samples(ivon_jax.calibrate, *held_out)


def nll_of(posterior):
    """Return the NLL of the average over samples, on the test images."""
    args = probs, posterior, predict_key, NUM_SAMPLES, test[:1]
    return metrics.negative_log_likelihood(ivon_jax.predict(*args), test[1])


print(f"mean: {loss_fn(posterior.mean, *test):.3f}")
print(f"samples: {nll_of(posterior):.3f}")
print(f"calibrated samples: {nll_of(calibrated):.3f}")

# %%
# On the left the curve is flat: that is the mean. Where it is lowest, samples disagree
# on what was learned of few images; on the right nothing is left of it.

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, curve in curves.items():
    order = jnp.argsort(curve.temperatures)
    axes.plot(curve.temperatures[order], curve.nll[order], ".-", label=name)
chosen = curves["held out"].temperature
axes.axvline(chosen, color="black", linestyle=":", label=f"chosen: {chosen:.2g}")
axes.set(xscale="log", xlabel="temperature", ylabel="NLL, nats", ylim=(0.6, 1.2))
axes.legend()
figure.savefig("calibration.png", dpi=150)
