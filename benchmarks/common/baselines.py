"""The systems that IVON is compared with, each as three or four pure functions.

A system is a function ``system(problem, **setting) -> System``, where a `Problem` is a
network, its likelihood and the length of training, and a setting is hyperparameters
that may be traced: `fit` trains many runs, each with a key and a setting of its own, as
one vmapped program, and `predict` averages their class probabilities over draws.

    runs = fit(ivon, problem, keys, settings, (inputs, targets))
    probs = predict(ivon, problem, runs.state, keys, settings, test_inputs, 64)

All have the same prior, of mean zero and precision `Problem.prior_precision`, which
`with_prior` makes a hyperparameter; only AdamW and AdaHessian have a weight decay that
is none. `trials` are settings to tune with.
"""

import dataclasses
import itertools
import operator
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy.stats import qmc
from tqdm import tqdm

import ivon_jax

softplus = jax.nn.softplus


@dataclasses.dataclass(frozen=True)
class Problem:
    """What to learn, and for how long; `params` is a pair of body and linear head."""

    init: Callable  # key -> params, where params[1] is {"w": (F, C), "b": (C,)}
    features: Callable  # params, x, drop -> (N, F); drop(activations) is for dropout
    loss: Callable  # outputs (N, C), targets -> (N,): negative log-likelihoods
    num_data: int
    batch_size: int
    epochs: int
    prior_precision: float = 1.0  # of every weight
    augment: Callable | None = None  # key, x -> x
    # Steps in one scan, 0 for an epoch; 1 where XLA is slow with convolutions in a
    # loop, as on a CPU.
    steps_per_call: int = 0
    runs_at_once: int = 0  # 0: all, side by side

    @property
    def num_steps(self):
        """Steps of all epochs; what does not fill a batch is left out."""
        return self.epochs * (self.num_data // self.batch_size)

    @property
    def weight_decay(self):
        """The prior's share of one example."""
        return self.prior_precision / self.num_data

    @property
    def b2(self):
        """The Hessian is averaged over half of the run, as in the paper."""
        return 1 - 2 / self.num_steps

    def apply(self, params, x, drop=lambda x: x):
        """Map inputs to outputs, (N, C)."""
        return self.features(params, x, drop) @ params[1]["w"] + params[1]["b"]

    def mean_loss(self, params, x, y):
        """Return the mean negative log-likelihood of a batch."""
        return self.loss(self.apply(params, x), y).mean()

    def schedule(self, peak):
        """Warm up in 2.5 % of the steps, as in the paper, then a cosine to zero."""
        warmup = self.num_steps // 40
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, self.num_steps)
        return lambda count: peak * shape(count)


class System(NamedTuple):
    """How to train and to predict, for settings already chosen."""

    init: Callable  # params -> state
    step: Callable  # key, state, x, y -> state
    outputs: Callable  # key, state, x -> the outputs (N, C) of one draw
    finish: Callable = lambda state, _x, _y: state  # state, all data -> state


def with_prior(system):
    """Make the precision of the prior a hyperparameter of `system`."""

    def with_precision(problem, prior_precision, **setting):
        problem = dataclasses.replace(problem, prior_precision=prior_precision)
        return system(problem, **setting)

    return with_precision


def trials(ranges, count):
    """Return settings {name: (count,)}, a Sobol sequence in log(low) to log(high)."""
    low, high = np.log(list(ranges.values())).T
    points = qmc.Sobol(len(ranges), seed=0).random(count)
    points = np.exp(low + points * (high - low)).astype("float32")
    return dict(zip(ranges, points.T, strict=True))


def mlp(sizes):
    """Return ``init`` and ``features`` of a multilayer perceptron with ReLUs."""
    he_normal = jax.nn.initializers.he_normal()

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        weights = map(he_normal, keys, itertools.pairwise(sizes))
        *body, head = ({"w": w, "b": jnp.zeros(w.shape[1])} for w in weights)
        return body, head

    def features(params, x, drop):
        x = x.reshape(len(x), -1)
        for layer in params[0]:
            x = drop(jax.nn.relu(x @ layer["w"] + layer["b"]))
        return x

    return init, features


def point(problem, tx, outputs=None):
    """Train with an optax transformation; ``outputs(key, params, x)`` may be random."""
    outputs = outputs or (lambda _key, params, x: problem.apply(params, x))

    def step(key, state, x, y):
        params, opt_state = state
        grads = jax.grad(lambda p: problem.loss(outputs(key, p, x), y).mean())(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return System(
        init=lambda params: (params, tx.init(params)),
        step=step,
        outputs=lambda key, state, x: outputs(key, state[0], x),
    )


def adamw(problem, learning_rate, weight_decay):
    """Return AdamW, whose decoupled weight decay is no prior."""
    schedule = problem.schedule(learning_rate)
    return point(problem, optax.adamw(schedule, weight_decay=weight_decay))


def heavy_ball(schedule, weight_decay):
    """Return optax's SGD with momentum 0.9, and the gradient of the prior."""
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, optax.sgd(schedule, momentum=0.9))


def sgd(problem, learning_rate):
    """Return SGD with momentum, for the maximum of the posterior density."""
    schedule = problem.schedule(learning_rate)
    return point(problem, heavy_ball(schedule, problem.weight_decay))


def adahessian(problem, learning_rate, weight_decay, b1=0.9, b2=0.999, eps=1e-4):
    """Return AdaHessian (Yao et al., 2021): Adam with Hutchinson's Hessian diagonal.

    Spatial averaging, as in the paper, is over the window of convolutions alone.
    """
    schedule = problem.schedule(learning_rate)

    def spatial_mean(x):
        if x.ndim < 4:
            return x
        return jnp.broadcast_to(x.mean(axis=(0, 1), keepdims=True), x.shape)

    def init(params):
        zeros = optax.tree.zeros_like(params)
        return params, zeros, zeros, jnp.zeros([], jnp.int32)

    def step(key, state, x, y):
        params, momentum, square, count = state
        signs = optax.tree.random_like(key, params, jax.random.rademacher)
        grad_fn = jax.grad(lambda p: problem.mean_loss(p, x, y))
        grads, products = jax.jvp(grad_fn, (params,), (signs,))
        diagonal = jax.tree.map(lambda z, hz: spatial_mean(z * hz), signs, products)
        momentum = optax.tree.update_moment(grads, momentum, b1, 1)
        square = optax.tree.update_moment(diagonal, square, b2, 2)
        mean = optax.tree.bias_correction(momentum, b1, count + 1)
        scale = optax.tree.bias_correction(square, b2, count + 1)

        def move(p, m, v):
            direction = m / (jnp.sqrt(v) + eps) + weight_decay * p
            return p - schedule(count) * direction

        return jax.tree.map(move, params, mean, scale), momentum, square, count + 1

    return System(init, step, lambda _key, state, x: problem.apply(state[0], x))


def gaussian(problem, posterior, init, step):
    """Return a system that draws its weights from ``posterior(state)``."""

    def outputs(key, state, x):
        return problem.apply(posterior(state).sample(key), x)

    return System(init, step, outputs)


def at_mean(system):
    """Predict with the mean of the weights that `system` learns, ``state[0]``."""

    def mean(problem, **setting):
        return system(problem, **setting)._replace(
            outputs=lambda _key, state, x: problem.apply(state[0], x)
        )

    return mean


def bbb(problem, learning_rate, hess_init):
    """Return Bayes by Backprop (Blundell et al., 2015) with Adam.

    Mean and standard deviation, a softplus, descend the negative evidence lower bound
    at one sample of the weights; its divergence from the prior is in closed form.
    """
    tx = optax.adam(problem.schedule(learning_rate))

    def posterior(state):
        mean, rho = state[0]
        return ivon_jax.Posterior(mean, jax.tree.map(lambda r: softplus(r) ** -2, rho))

    def init(params):
        stddev = (problem.num_data * hess_init + problem.prior_precision) ** -0.5
        rho = jnp.log(jnp.expm1(stddev))
        q = params, jax.tree.map(lambda p: jnp.full_like(p, rho), params)
        return q, tx.init(q)

    def step(key, state, x, y):
        def bound(q):
            q = posterior((q,))
            zeros = optax.tree.zeros_like(q.mean)
            prior = ivon_jax.Posterior.isotropic(zeros, problem.prior_precision)
            divergence = q.kl_divergence(prior) / problem.num_data
            return problem.mean_loss(q.sample(key), x, y) + divergence

        updates, opt_state = tx.update(jax.grad(bound)(state[0]), state[1])
        return optax.apply_updates(state[0], updates), opt_state

    return gaussian(problem, posterior, init, step)


def laplace(problem, learning_rate, head_precision):
    """Return SGD, then the last layer's linearised Laplace approximation.

    The outputs are linear in the last layer, so its posterior under the Gauss-Newton
    matrix is exact for the linearised model (Daxberger et al., 2021). As is usual, that
    layer's prior, of `head_precision`, is tuned apart from the one of training.
    """
    base = sgd(problem, learning_rate)

    def inputs_of_head(params, x):
        x = problem.features(params, x, lambda x: x)
        return jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1)

    def finish(state, x, y):
        params, _ = state
        phi = inputs_of_head(params, x)
        of_one = jax.hessian(lambda f, target: problem.loss(f[None], target[None])[0])
        curvature = jax.vmap(of_one)(problem.apply(params, x), y)  # (N, C, C)

        def row(column):  # of blocks: one output against all others
            return jnp.einsum("nf,nd,ng->fdg", phi, column, phi)

        size = phi.shape[1] * curvature.shape[1]
        precision = jax.lax.map(row, curvature.swapaxes(0, 1)).reshape(size, size)
        precision += head_precision * jnp.eye(size)
        return params, jnp.linalg.cholesky(precision)

    def outputs(key, state, x):
        params, factor = state
        noise = jax.random.normal(key, factor.shape[:1])
        noise = jax.scipy.linalg.solve_triangular(factor.T, noise)
        shift = noise.reshape(len(params[1]["b"]), -1)
        return problem.apply(params, x) + inputs_of_head(params, x) @ shift.T

    return System(base.init, base.step, outputs, finish)


def mc_dropout(problem, learning_rate, rate):
    """Return MC dropout (Gal and Ghahramani, 2016), trained with SGD."""

    def outputs(key, params, x):
        layers = itertools.count()

        def drop(x):
            layer_key = jax.random.fold_in(key, next(layers))
            keep = jax.random.bernoulli(layer_key, 1 - rate, x.shape)
            return jnp.where(keep, x / (1 - rate), 0.0)

        return problem.apply(params, x, drop)

    tx = heavy_ball(problem.schedule(learning_rate), problem.weight_decay)
    return point(problem, tx, outputs)


def swag(problem, learning_rate, swa_ratio, rank=20, snapshots=40):
    """Return SWAG (Maddox et al., 2019): the Gaussian of SGD's last iterates.

    In the last fifth of the steps the learning rate is constant, `swa_ratio` of the
    first one, and `snapshots` of the weights make the mean, the diagonal and, the last
    `rank` of them, the low-rank part of the covariance.
    """
    start = 4 * problem.num_steps // 5
    every = max(1, (problem.num_steps - start) // snapshots)
    cosine = optax.cosine_decay_schedule(1.0, start)

    def schedule(count):
        return learning_rate * (swa_ratio + (1 - swa_ratio) * cosine(count))

    base = point(problem, heavy_ball(schedule, problem.weight_decay))

    def init(params):
        flat = ravel_pytree(params)[0]
        zeros = jnp.zeros([], jnp.int32)
        moments = jnp.zeros_like(flat), jnp.zeros_like(flat)
        return base.init(params), (zeros, zeros, *moments, jnp.zeros((rank, flat.size)))

    def step(key, state, x, y):
        trained, (count, taken, mean, square, deviations) = state
        trained, count = base.step(key, trained, x, y), count + 1
        due = (count > start) & ((count - start) % every == 0)
        weights = ravel_pytree(trained[0])[0]
        share = jnp.where(due, 1 / (taken + 1.0), 0.0)
        mean += share * (weights - mean)
        square += share * (weights**2 - square)
        slot = jnp.where(due, taken % rank, rank)  # the last is none, and dropped
        deviations = deviations.at[slot].set(weights - mean, mode="drop")
        return trained, (count, taken + due, mean, square, deviations)

    def outputs(key, state, x):
        (params, _), (_, taken, mean, square, deviations) = state
        diagonal_key, rank_key = jax.random.split(key)
        stddev = jnp.sqrt(jnp.maximum(square - mean**2, 0.0))
        noise = stddev * jax.random.normal(diagonal_key, mean.shape)
        used = jnp.minimum(taken, rank)
        low_rank = jax.random.normal(rank_key, (rank,)) @ deviations / (used - 1) ** 0.5
        weights = mean + (noise + low_rank) / 2**0.5
        return problem.apply(ravel_pytree(params)[1](weights), x)

    return System(init, step, outputs)


def vogn(problem, learning_rate, hess_init, b1=0.9):
    """Return VOGN (Osawa et al., 2019): squared gradients of single examples.

    The learning rate is scaled as IVON's, so that the same ones fit.
    """
    schedule = problem.schedule(learning_rate * (hess_init + problem.weight_decay))

    def posterior(state):
        def precision(h):
            return problem.num_data * (h + problem.weight_decay)

        return ivon_jax.Posterior(state[0], jax.tree.map(precision, state[2]))

    def init(params):
        hess = jax.tree.map(lambda p: jnp.full_like(p, hess_init), params)
        return params, optax.tree.zeros_like(params), hess, jnp.zeros([], jnp.int32)

    def step(key, state, x, y):
        mean, momentum, hess, count = state
        theta = posterior(state).sample(key)

        # One after the other: their gradients all at once do not fit into the cache.
        def add(total, example):
            grad = jax.grad(problem.mean_loss)(theta, *(a[None] for a in example))
            both = grad, jax.tree.map(jnp.square, grad)
            return jax.tree.map(jnp.add, total, both), None

        total = (optax.tree.zeros_like(theta),) * 2
        total, _ = jax.lax.scan(add, total, (x, y))
        grad, hess_hat = jax.tree.map(lambda a: a / len(y), total)
        delta = problem.weight_decay
        grad = jax.tree.map(lambda g, m: g + delta * m, grad, mean)
        momentum = optax.tree.update_moment(grad, momentum, b1, 1)
        hess = optax.tree.update_moment(hess_hat, hess, problem.b2, 1)

        def move(m, g, h):
            return m - schedule(count) * g / (h + delta)

        return jax.tree.map(move, mean, momentum, hess), momentum, hess, count + 1

    return gaussian(problem, posterior, init, step)


def ivon(problem, learning_rate, hess_init, mc_samples=1):
    """Return IVON, with samples of its posterior."""
    estimate = ivon_jax.value_and_grad(problem.mean_loss, mc_samples=mc_samples)
    tx = ivon_jax.ivon(
        problem.schedule(learning_rate),
        ess=problem.num_data,
        hess_init=hess_init,
        b2=problem.b2,
        weight_decay=problem.weight_decay,
    )

    def step(key, state, x, y):
        params, opt_state = state
        _, grads = estimate(key, params, opt_state, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return gaussian(
        problem,
        posterior=lambda state: ivon_jax.posterior(*state),
        init=lambda params: (params, tx.init(params)),
        step=step,
    )


class Fitted(NamedTuple):
    """The states of all runs, with a leading axis, and the time of one."""

    state: Any
    seconds: float  # of the steps of one run, at the pace of its fastest epoch


def run_functions(system, problem):
    """Return the pure functions that one run consists of."""
    num_batches = problem.num_data // problem.batch_size

    def start(key, setting):
        return system(problem, **setting).init(problem.init(key))

    def shuffle(key, epoch):
        order_key, noise_key = jax.random.split(jax.random.fold_in(key, epoch))
        order = jax.random.permutation(order_key, problem.num_data)
        order = order[: num_batches * problem.batch_size].reshape(num_batches, -1)
        return order, jax.random.split(noise_key, num_batches)

    def steps(state, setting, batches_and_keys, data):
        step = system(problem, **setting).step

        def body(state, batch_and_key):
            batch, key = batch_and_key
            x, y = (array[batch] for array in data)
            if problem.augment:
                key, augment_key = jax.random.split(key)
                x = problem.augment(augment_key, x)
            return step(key, state, x, y), None

        if problem.steps_per_call == 1:
            return body(state, jax.tree.map(lambda a: a[0], batches_and_keys))[0]
        return jax.lax.scan(body, state, batches_and_keys)[0]

    def finish(state, setting, data):
        return system(problem, **setting).finish(state, *data)

    return start, shuffle, steps, finish


def fit(system, problem, keys, settings, data, description=""):
    """Train a run for each of `keys` and of the `settings`, trees with that axis."""
    start, shuffle, steps, finish = run_functions(system, problem)
    start = jax.jit(jax.vmap(start))
    shuffle = jax.jit(jax.vmap(shuffle, (0, None)))
    steps = jax.jit(jax.vmap(steps, (0, 0, 0, None)), donate_argnums=0)
    finish = jax.jit(jax.vmap(finish, (0, 0, None)))
    num_batches = problem.num_data // problem.batch_size
    chunk = problem.steps_per_call or num_batches
    group = problem.runs_at_once or len(keys)
    states, seconds = [], []
    for first in range(0, len(keys), group):
        some = jax.tree.map(operator.itemgetter(np.s_[first : first + group]), settings)
        init_keys, epoch_keys = jax.vmap(jax.random.split, out_axes=1)(
            keys[first : first + group]
        )
        state = start(init_keys, some)
        for epoch in tqdm(range(problem.epochs), desc=description, leave=False):
            begin = time.perf_counter()
            batches, step_keys = shuffle(epoch_keys, epoch)
            for i in range(0, num_batches, chunk):
                part = batches[:, i : i + chunk], step_keys[:, i : i + chunk]
                state = steps(state, some, part, data)
            jax.block_until_ready(state)
            seconds.append((time.perf_counter() - begin) / len(epoch_keys))
        states.append(finish(state, some, data))
    state = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *states)
    return Fitted(state, min(seconds) * problem.epochs)


def draws(system, problem, states, keys, settings, x, num_samples):
    """Return outputs (runs, num_samples, N, C), each at a draw of its own."""

    def one_run(run):
        key, state, setting = run
        outputs = system(problem, **setting).outputs
        draw_keys = jax.random.split(key, num_samples)
        return jax.lax.map(lambda k: outputs(k, state, x), draw_keys)

    group = problem.runs_at_once or len(keys)
    map_runs = jax.jit(lambda runs: jax.lax.map(one_run, runs, batch_size=group))
    return map_runs((keys, states, settings))


def predict(*args):
    """Return class probabilities (runs, N, C), the mean over `draws`."""
    return jax.jit(lambda x: jax.nn.softmax(x).mean(axis=1))(draws(*args))
