"""
Learning one task after the other
=================================

Five tasks come one by one, and when a task is over its images are gone. A network that
goes on training forgets what it knew. Bayes' rule says what to do instead: the
posterior of yesterday is the prior of today. You will see how much a network remembers
with each of three priors: none to speak of, one that holds all weights near those of
yesterday alike, and yesterday's posterior, which knows what each weight is worth. It
takes 25 seconds on two CPU cores, draws continual.png, and prints the accuracy on all
five tasks after the last one, in per cent::

    accuracy, first prior: 51.7
    accuracy, isotropic: 59.9
    accuracy, posterior: 75.6
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import ivon_jax

SEED = 0
NUM_TASKS = 5
EPOCHS = 50
BATCH_SIZE = 50
LAYERS = (64, 128, 128, 10)
# Precision of a prior by the number of training examples.
FIRST_PRECISION, ISOTROPIC_PRECISION = 1e-4, 0.03
# Learning rate and `hess_init`: of 14 to 19 settings for each prior those that remember
# most, on images held out from the training (benchmarks/task_sequence.py).
FIRST, ISOTROPIC, POSTERIOR = (0.01, 1.0), (0.3, 0.3), (0.3, 0.1)

# %%
# Each task is to read the same digits, but with the pixels in an order of its own. Four
# fifths of the images are for training.

digits = load_digits()
rng = np.random.default_rng(SEED)
shuffled = rng.permutation(len(digits.target))
pixels = digits.data[shuffled] / 16
orders = [rng.permutation(64) for _ in range(NUM_TASKS)]
images = jnp.asarray(np.stack([pixels[:, order] for order in orders]), jnp.float32)
labels = jnp.asarray(digits.target[shuffled])
num_train = 4 * len(labels) // 5

# %%
# The network is a function of its weights: a list of matrices and biases. Nothing in it
# knows which task an image is from.


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


def accuracies(params):
    """Accuracy on the test images of each task, in per cent."""
    right = logits(params, images[:, num_train:]).argmax(-1) == labels[num_train:]
    return 100 * right.mean(axis=-1)


# %%
# IVON takes any Gaussian as its prior. `ess` counts the examples of this task alone:
# what earlier ones have taught is in the prior.


@jax.jit
def learn(key, params, prior, learning_rate, hess_init, task):
    """Train on one task; return its posterior, and each epoch's accuracies on all."""
    num_steps = EPOCHS * (num_train // BATCH_SIZE)
    tx = ivon_jax.ivon(
        optax.cosine_decay_schedule(learning_rate, num_steps),
        num_train,
        hess_init=hess_init,
        b2=1 - 3 / num_steps,
        prior=prior,
    )

    def step(carry, key):
        params, opt_state = carry
        rows_key, noise_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (BATCH_SIZE,), 0, num_train)
        theta = ivon_jax.sample(noise_key, params, opt_state)
        grads = jax.grad(loss_fn)(theta, images[task][rows], labels[rows])
        updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
        return (optax.apply_updates(params, updates), opt_state), None

    def epoch(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, accuracies(carry[0])

    keys = jax.random.split(key, (EPOCHS, num_steps // EPOCHS))
    carry, curve = jax.lax.scan(epoch, (params, tx.init(params)), keys)
    return ivon_jax.posterior(*carry), curve


# %%
# The methods differ in what they make of a posterior q to have a prior for the next
# task. Each begins where the last task has ended.

key, *layer_keys = jax.random.split(jax.random.key(SEED), len(LAYERS))
start = [
    (jax.random.normal(layer_key, (m, n)) / m**0.5, jnp.zeros(n))
    for layer_key, m, n in zip(layer_keys, LAYERS, LAYERS[1:], strict=False)
]
zeros = jax.tree.map(jnp.zeros_like, start)
first = ivon_jax.Posterior.isotropic(zeros, FIRST_PRECISION * num_train)
spring = ISOTROPIC_PRECISION * num_train
methods = {
    "first prior": (FIRST, lambda _: first),
    "isotropic": (ISOTROPIC, lambda q: ivon_jax.Posterior.isotropic(q.mean, spring)),
    "posterior": (POSTERIOR, lambda q: q),
}
figure, panels = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
for panel, (name, (settings, next_prior)) in zip(panels, methods.items(), strict=True):
    params, prior, curves = start, first, []
    for task in range(NUM_TASKS):
        task_key = jax.random.fold_in(key, task)
        posterior, curve = learn(task_key, params, prior, *settings, task)
        params, prior = posterior.mean, next_prior(posterior)
        curves.append(curve)
    print(f"accuracy, {name}: {curves[-1][-1].mean():.1f}")
    panel.plot(np.arange(1, NUM_TASKS * EPOCHS + 1) / EPOCHS, np.concatenate(curves))
    panel.set(title=name, xlabel="tasks trained on", xlim=(0, NUM_TASKS))
panels[0].set(ylabel="accuracy on each task (%)")
figure.savefig("continual.png", dpi=200)
