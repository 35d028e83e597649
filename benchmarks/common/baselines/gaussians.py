"""Systems that learn a Gaussian of independent weights as they train."""

import jax
import jax.numpy as jnp
import optax

import ivon_jax
from common.baselines.problem import System

softplus = jax.nn.softplus


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


def bsam(problem, learning_rate, rho, damping, b1=0.9, b2=0.999):
    """Return bSAM (Möllenhoff and Khan, 2023): SAM that learns a Gaussian's variance.

    A step has two gradients: `g` is that of a sample, and the mean moves by the one at
    ``mean + rho g / s``. The precision is ``num_data s``; `s` begins at one, as in the
    paper, and falls to `damping` and the prior's share where there is no gradient. The
    learning rate is scaled by these two, so that those of VOGN and IVON fit.
    """
    delta = problem.weight_decay
    schedule = problem.schedule(learning_rate * (damping + delta))
    grad_fn = jax.grad(problem.mean_loss)

    def posterior(state):
        precision = jax.tree.map(lambda s: problem.num_data * s, state[2])
        return ivon_jax.Posterior(state[0], precision)

    def init(params):
        zeros, ones = optax.tree.zeros_like(params), optax.tree.ones_like(params)
        return params, zeros, ones, jnp.zeros([], jnp.int32)

    def step(key, state, x, y):
        mean, momentum, scale, count = state
        grad = grad_fn(posterior(state).sample(key), x, y)
        worse = jax.tree.map(lambda m, g, s: m + rho * g / s, mean, grad, scale)
        there = jax.tree.map(lambda g, m: g + delta * m, grad_fn(worse, x, y), mean)
        momentum = optax.tree.update_moment(there, momentum, b1, 1)

        def next_scale(s, g):
            return b2 * s + (1 - b2) * (jnp.sqrt(s) * jnp.abs(g) + delta + damping)

        scale = jax.tree.map(next_scale, scale, grad)
        alpha = schedule(count)
        mean = jax.tree.map(lambda m, g, s: m - alpha * g / s, mean, momentum, scale)
        return mean, momentum, scale, count + 1

    return gaussian(problem, posterior, init, step)


def ivon_optimizer(problem, learning_rate, hess_init):
    """Return IVON as an optax transformation."""
    return ivon_jax.ivon(
        problem.schedule(learning_rate),
        ess=problem.num_data,
        hess_init=hess_init,
        b2=problem.b2,
        weight_decay=problem.weight_decay,
    )


def ivon(problem, learning_rate, hess_init, **options):
    """Return IVON, with samples of its posterior; options of `value_and_grad`."""
    tx = ivon_optimizer(problem, learning_rate, hess_init)
    return trained_by(problem, tx, **options)


def evon(problem, learning_rate, hess_init):
    """Return EVON, with the settings of IVON."""
    tx = ivon_jax.evon(
        problem.schedule(learning_rate),
        ess=problem.num_data,
        hess_init=hess_init,
        b1=0.9,
        b2=problem.b2,
        weight_decay=problem.weight_decay,
    )
    return trained_by(problem, tx)


def trained_by(problem, tx, **options):
    """Return a system whose posterior `tx` trains; options of `value_and_grad`."""
    estimate_fn = ivon_jax.value_and_grad(problem.mean_loss, **options)

    def step(key, state, x, y):
        params, opt_state = state
        _, estimate = estimate_fn(key, params, opt_state, x, y)
        updates, opt_state = estimate.update(tx, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return gaussian(
        problem,
        posterior=lambda state: ivon_jax.posterior(*state),
        init=lambda params: (params, tx.init(params)),
        step=step,
    )
