"""Systems that make a Gaussian of what SGD has found."""

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import ivon_jax
from common.baselines.points import heavy_ball, point, sgd
from common.baselines.problem import System


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


def sgd_posterior(params, num_data, damping):
    """Return the Gaussian of the paper's appendix C.5, of variance 1 / (N (1 + delta)).

    It is made ad hoc: SGD has no estimate of the curvature.
    """
    return ivon_jax.Posterior.isotropic(params, num_data * (1 + damping))


def adamw_posterior(params, opt_state, num_data, damping):
    """Return appendix C.5's Gaussian of AdamW, of variance 1 / (N (sqrt(v) + delta)).

    `v` is the second moment, an average of the squared gradients of batches.
    """
    second = optax.tree.get(opt_state, "nu")
    precision = jax.tree.map(lambda v: num_data * (jnp.sqrt(v) + damping), second)
    return ivon_jax.Posterior(params, precision)
