"""
LoRA: a posterior over the adapters alone
=========================================

A network learns upright digits with AdamW. Then low-rank adapters (LoRA), and they
alone, learn from 100 digits on their side. You will see how `wrt` tells IVON what to
train. It takes 15 seconds, draws lora.png, and prints the NLL of 899 other digits::

    NLL before: 11.478
    NLL of the mean: 1.410
    NLL of 64 samples: 1.122
"""

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import ivon_jax
import ivon_jax.flax

SEED = 0
NUM_UPRIGHT, NUM_TURNED = 798, 100
HIDDEN, RANK = 128, 4
BATCH_SIZE = 50
PRETRAIN_STEPS = 1000
STEPS = 400
LEARNING_RATE = 0.1
HESS_INIT = 3.0
B2 = 1 - 2 / STEPS  # an average of the Hessian over half of the run
NUM_SAMPLES = 64

# %%
# The digits come with scikit-learn, 8 x 8 pixels each. The first 798 stay upright, the
# next 100 are turned and train the adapters, and the others are turned and test them.

digits = load_digits()
upright, labels = np.asarray(digits.data / 16, np.float32), digits.target
turned = np.rot90(upright.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
test_images, test_labels = (x[NUM_UPRIGHT + NUM_TURNED :] for x in (turned, labels))

# %%
# Flax wraps a linear map in `nnx.LoRA`, which adds the product of two thin matrices to
# its output. They are variables of the type `nnx.LoRAParam`.

base = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


class Network(nnx.Module):
    """One hidden layer, each linear map with an adapter beside it."""

    def __init__(self, rngs):
        first = nnx.Linear(64, HIDDEN, rngs=rngs)
        last = nnx.Linear(HIDDEN, 10, rngs=rngs)
        self.first = nnx.LoRA(64, RANK, HIDDEN, base_module=first, rngs=rngs)
        self.last = nnx.LoRA(HIDDEN, RANK, 10, base_module=last, rngs=rngs)

    def __call__(self, images):
        """Map images, (N, 64), to the logits of the ten digits, (N, 10)."""
        return self.last(nnx.relu(self.first(images)))


def loss_fn(model, images, labels):
    """Mean cross-entropy of a batch."""
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# %%
# AdamW trains the base, without IVON. The adapters add zero yet, and `wrt` leaves them
# out.

model, rng = Network(nnx.Rngs(SEED)), np.random.default_rng(SEED)
optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=base)


@nnx.jit
def pretrain_step(model, optimizer, images, labels):
    """Take a step with the base."""
    grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, base))(model, images, labels)
    optimizer.update(model, grads)


for _ in range(PRETRAIN_STEPS):
    rows = rng.choice(NUM_UPRIGHT, BATCH_SIZE, replace=False)
    pretrain_step(model, optimizer, upright[rows], labels[rows])
before = nnx.softmax(model(test_images))

# %%
# IVON trains the adapters: `wrt` is all it takes. The base is neither sampled nor
# decayed, and is the same to the bit when training ends.

schedule = optax.cosine_decay_schedule(LEARNING_RATE, STEPS)
tx = ivon_jax.ivon(schedule, ess=NUM_TURNED, hess_init=HESS_INIT, b2=B2)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
grad_fn = ivon_jax.flax.value_and_grad(loss_fn, wrt=nnx.LoRAParam)


@nnx.jit
def train_step(key, model, optimizer, images, labels):
    """Take a step with the adapters."""
    _, estimate = grad_fn(key, model, optimizer, images, labels)
    optimizer.update(model, estimate.grad, hess=estimate.hess)


draw_key, *step_keys = jax.random.split(jax.random.key(SEED), 1 + STEPS)
for key in step_keys:
    rows = NUM_UPRIGHT + rng.choice(NUM_TURNED, BATCH_SIZE, replace=False)
    train_step(key, model, optimizer, turned[rows], labels[rows])

# %%
# A function of the adapters for `predict` puts the model together from them and the
# rest. The posterior has 1,320 weights, those of the adapters; the base has 9,610.

graphdef, _, rest = nnx.split(model, nnx.LoRAParam, ...)


def probs(theta):
    """Probabilities of the ten digits, for each test image."""
    return nnx.softmax(nnx.merge(graphdef, theta, rest)(test_images))


posterior = ivon_jax.flax.posterior(model, optimizer)
after = ivon_jax.predict(probs, posterior, draw_key, NUM_SAMPLES)
nll = ivon_jax.metrics.negative_log_likelihood
print(f"NLL before: {nll(before, test_labels):.3f}")
print(f"NLL of the mean: {nll(probs(posterior.mean), test_labels):.3f}")
print(f"NLL of 64 samples: {nll(after, test_labels):.3f}")

# %%
# The first ten test images, with the likeliest digit before and after. Without its
# adapters the network takes what it sees for upright.

figure, panels = plt.subplots(1, 10, figsize=(10, 1.4), layout="constrained")
for i, panel in enumerate(panels):
    panel.imshow(test_images[i].reshape(8, 8), cmap="Greys")
    panel.set(title=f"{before[i].argmax()} → {after[i].argmax()}", xticks=[], yticks=[])
figure.savefig("lora.png", dpi=200)
