"""
Regression: unsure where there are no data
==========================================

A network learns a curve from 100 noisy points in two clusters. You will see how to
write the loss, so that the Gaussian over the weights is the posterior of Bayes' rule,
and how far its samples spread on the points, in the gap between them and outside. It
takes 15 seconds on two CPU cores, draws regression.png, and prints the mean standard
deviation of a prediction, of which the noise of the points alone makes 0.1::

    on the data: 0.126
    in the gap: 0.147
    outside: 0.334
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import ivon_jax

SEED = 0
NUM_DATA = 100
NOISE = 0.1  # standard deviation of the targets, which the loss knows
HIDDEN = 32
STEPS = 20_000
LEARNING_RATE = 0.05
B2 = 0.9995  # the Hessian is an average over the last 2,000 steps
PRIOR_PRECISION = 1.0  # a standard normal for every weight
NUM_SAMPLES = 256

# %%
# The points lie between 0.6 and 1.6 on both sides of zero. Between the clusters there
# is nothing, and the curve has to be guessed.

keys = jax.random.split(jax.random.key(SEED), 5)
x_key, noise_key, init_key, train_key, draw_key = keys
x = jax.random.uniform(x_key, (NUM_DATA,), minval=0.6, maxval=1.6).at[::2].multiply(-1)
y = 0.7 * jnp.sin(2.5 * x) + NOISE * jax.random.normal(noise_key, (NUM_DATA,))

# %%
# The network has two hidden layers, and one output. Its initial weights are the first
# mean of the posterior.

shapes = [(1, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)]
params = [
    (jax.random.normal(key, shape) / shape[0] ** 0.5, jnp.zeros(shape[1]))
    for key, shape in zip(jax.random.split(init_key, 3), shapes, strict=True)
]


def apply(theta, x):
    """Map inputs (N,) to predictions (N,)."""
    *hidden, (matrix, bias) = theta
    x = x[:, None]
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return (x @ matrix + bias)[:, 0]


# %%
# The loss is the negative log-likelihood of one point, in nats: a squared error divided
# by twice the variance of the noise, not by anything else. Times `ess`, the number of
# points, it is that of all points; `weight_decay` times `ess` is the prior's precision.


def loss_fn(theta):
    """Mean negative log-likelihood of the points, but for a constant."""
    return jnp.mean((apply(theta, x) - y) ** 2) / (2 * NOISE**2)


tx = ivon_jax.ivon(
    optax.cosine_decay_schedule(LEARNING_RATE, STEPS),
    ess=NUM_DATA,
    hess_init=1 / NOISE**2,  # the curvature of the loss in the last bias
    b2=B2,
    weight_decay=PRIOR_PRECISION / NUM_DATA,
    rescale_lr=False,
)

# %%
# Each step sees all points. What a step needs goes in, and comes out: so `scan` makes
# one compiled loop of all of them, with a key for each.


def train_step(carry, key):
    """Take a step along the gradient at a sample of the weights."""
    params, opt_state = carry
    theta = ivon_jax.sample(key, params, opt_state)
    loss, grads = jax.value_and_grad(loss_fn)(theta)
    updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
    return (optax.apply_updates(params, updates), opt_state), loss


step_keys = jax.random.split(train_key, STEPS)
train = jax.jit(lambda carry, keys: jax.lax.scan(train_step, carry, keys))
(params, opt_state), losses = train((params, tx.init(params)), step_keys)

# %%
# Each sample of the weights is a curve. Their variance comes from the weights; that of
# a new point has the noise as well.

posterior = ivon_jax.posterior(params, opt_state)
grid = jnp.linspace(-2.6, 2.6, 261)
curves = jax.vmap(apply, (0, None))(posterior.sample(draw_key, (NUM_SAMPLES,)), grid)
mean, stddev = curves.mean(0), jnp.sqrt(curves.var(0) + NOISE**2)
distance = jnp.abs(grid)
print(f"on the data: {stddev[(distance > 0.6) & (distance < 1.6)].mean():.3f}")
print(f"in the gap: {stddev[distance < 0.6].mean():.3f}")
print(f"outside: {stddev[distance > 1.6].mean():.3f}")

# %%
# In the gap the band is wider than on the data, but modestly so: a Gaussian without
# correlations is too sure in between (Foong et al., 2019). Outside the curves fan out.

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.fill_between(grid, mean - 2 * stddev, mean + 2 * stddev, color="0.85")
axes.plot(grid, curves[:8].T, color="C0", linewidth=0.8)
axes.plot(grid, mean, color="black", linewidth=2, label="mean, ± 2 standard deviations")
axes.plot(grid, 0.7 * jnp.sin(2.5 * grid), "k:", label="true curve")
axes.plot(x, y, "o", color="C1", markersize=3, label="data")
axes.set(xlabel="x", ylabel="y", ylim=(-2, 2))
axes.legend(loc="upper center", fontsize="small")
figure.savefig("regression.png", dpi=200)
