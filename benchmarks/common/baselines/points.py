"""Systems that end with one set of weights; MC dropout draws its activations."""

import itertools

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from common.baselines.problem import System


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


def muon(problem, learning_rate, weight_decay):
    """Return Muon for the matrices, and AdamW for all else, with one learning rate."""
    schedule = problem.schedule(learning_rate)
    decays = dict(weight_decay=weight_decay, adam_weight_decay=weight_decay)
    return point(problem, optax.contrib.muon(schedule, **decays))


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
