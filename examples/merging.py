"""
Merging fine-tuned networks
===========================

A network has learned plain digits. Copies of it are fine-tuned on digits that are
turned left, turned right, shifted, blurred or inverted, and merged into one network.
You will see that it matters how: added up, the changes get in each other's way; IVON's
Hessian says which copy needs which weight. It takes 20 seconds on two CPU cores, draws
merging.png, and prints the accuracy on all five kinds of digits, in per cent::

    accuracy, before fine-tuning: 47.4
    accuracy, changes added up: 56.8
    accuracy, merged by Hessians: 67.6
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy import ndimage
from sklearn.datasets import load_digits

import ivon_jax
from ivon_jax import merging

SEED = 0
STEPS = 1000
LAYERS, BATCH_SIZE = (64, 128, 128, 10), 50
LEARNING_RATE, HESS_INIT = 0.1, 0.03
NUM_TRAIN, VALIDATION, TEST = 900, slice(900, 1200), slice(1200, None)
SCALES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0)

# %%
# The five kinds of digits are made of the plain ones. 900 of each are for training, the
# next 300 choose how far to go in merging, and the others are the test.

digits = load_digits()
order = np.random.default_rng(SEED).permutation(len(digits.target))
plain, labels = digits.images[order] / 16, jnp.asarray(digits.target[order])
kinds = (
    *(ndimage.rotate(plain, a, (1, 2), False, order=1) for a in (25, -25)),
    ndimage.shift(plain, (0, 0, 1), order=0),
    ndimage.gaussian_filter(plain, (0, 1, 1)),
    1 - plain,
)
images = jnp.asarray(np.stack([plain, *kinds]), jnp.float32).reshape(6, -1, 64)

# %%
# The network is a function of its weights: a list of matrices and biases. The loss is a
# mean over the images of a batch.


def logits(params, images):
    """Map images, (..., 64), to the logits of the ten digits, (..., 10)."""
    *hidden, (matrix, bias) = params
    for w, b in hidden:
        images = jax.nn.relu(images @ w + b)
    return images @ matrix + bias


def loss_fn(params, images, labels):
    """Mean cross-entropy of a batch."""
    losses = optax.losses.softmax_cross_entropy_with_integer_labels
    return losses(logits(params, images), labels).mean()


# %%
# Training is as always with IVON, here in a loop within `jit`. Only `ess`, the second
# argument, counts each image ten times, so that the posterior is narrower.


@jax.jit
def fit(keys, params, images):
    """Take a step with each key, from `params` on; return the posterior."""
    decay = optax.cosine_decay_schedule(LEARNING_RATE, len(keys))
    b2 = 1 - 3 / len(keys)
    ivon = ivon_jax.ivon(decay, 10 * NUM_TRAIN, hess_init=HESS_INIT, b2=b2)

    def step(carry, key):
        params, opt_state = carry
        rows_key, noise_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (BATCH_SIZE,), 0, NUM_TRAIN)
        theta = ivon_jax.sample(noise_key, params, opt_state)
        grads = jax.grad(loss_fn)(theta, images[rows], labels[rows])
        updates, opt_state = ivon.update(grads, opt_state, params, sample=theta)
        return (optax.apply_updates(params, updates), opt_state), None

    carry, _ = jax.lax.scan(step, (params, ivon.init(params)), keys)
    return ivon_jax.posterior(*carry)


# %%
# First the plain digits. Then `vmap` fine-tunes five copies at once, one on each of the
# kinds.

key, *layer_keys = jax.random.split(jax.random.key(SEED), len(LAYERS))
params = [
    (jax.random.normal(layer_key, (m, n)) / m**0.5, jnp.zeros(n))
    for layer_key, m, n in zip(layer_keys, LAYERS, LAYERS[1:], strict=False)
]
base = fit(jax.random.split(key, 2 * STEPS), params, images[0])
tune_all = jax.vmap(fit, (None, None, 0))
stacked = tune_all(jax.random.split(key, STEPS), base.mean, images[1:])
copies = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(len(kinds))]

# %%
# The precision of a posterior is the Hessian of its loss, plus that of the prior. What
# a copy has changed counts as much as its Hessian does beside those of all. How far to
# go, the scale, is chosen on the validation images. With SEED = 1 and 2 the accuracy is
# 64.8 and 57.3 % merged by Hessians, 51.9 and 51.6 % added up.

finetuned, hessians = [q.mean for q in copies], [q.precision for q in copies]


def added_up(scale):
    """Add up the changes of all copies."""
    return merging.task_arithmetic(base.mean, finetuned, scale)


def merged(scale):
    """Weigh each change by the copy's part of the Hessian."""
    return merging.merge(base.mean, finetuned, hessians, base.precision, scale=scale)


def accuracy(params, part):
    """Accuracy on all five kinds of digits, in per cent."""
    return 100 * jnp.mean(logits(params, images[1:, part]).argmax(-1) == labels[part])


print(f"accuracy, before fine-tuning: {accuracy(base.mean, TEST):.1f}")
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, merge in {"changes added up": added_up, "merged by Hessians": merged}.items():
    networks = [merge(scale) for scale in SCALES]
    best = max(networks, key=lambda params: accuracy(params, VALIDATION))
    print(f"accuracy, {name}: {accuracy(best, TEST):.1f}")
    axes.plot(SCALES, [accuracy(params, TEST) for params in networks], label=name)
axes.set(xscale="log", xlabel="scale of the changes", ylabel="accuracy (%)")
axes.legend()
figure.savefig("merging.png", dpi=200)
