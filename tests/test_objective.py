"""The evidence lower bound is the evidence, less a divergence.

Linear regression with Gaussian noise of known variance, on inputs with orthogonal
columns: the exact posterior is a Gaussian of diagonal covariance, of precision
``x_j'x_j / variance + prior precision``, and the marginal likelihood is the density
of the targets under N(0, variance I + X X' / prior precision).
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import temp_bytes
from statistical import assert_mean

import ivon_jax
from ivon_jax._evaluation.objective import evidence_lower_bound

N, DIMENSION = 40, 4
NOISE = 0.25  # variance of the targets
WEIGHT_DECAY = 0.05
PRIOR_PRECISION = N * WEIGHT_DECAY
RNG = np.random.default_rng(0)
X = np.linalg.qr(RNG.normal(size=(N, DIMENSION)))[0] * [4.0, 6.0, 8.0, 10.0]
Y = X @ RNG.normal(size=DIMENSION) + NOISE**0.5 * RNG.normal(size=N)
CURVATURE = np.sum(X**2, axis=0) / NOISE
PRECISION = CURVATURE + PRIOR_PRECISION
MEAN = X.T @ Y / NOISE / PRECISION


def log_evidence():
    covariance = NOISE * np.eye(N) + X @ X.T / PRIOR_PRECISION
    _, log_determinant = np.linalg.slogdet(2 * np.pi * covariance)
    return -0.5 * (log_determinant + Y @ np.linalg.solve(covariance, Y))


def loss_fn(theta):
    """Mean negative log-likelihood, with its constants, in theta's dtype."""
    x, y = (jnp.asarray(array, theta.dtype) for array in (X, Y))
    return 0.5 * jnp.mean((y - x @ theta) ** 2 / NOISE + np.log(2 * np.pi * NOISE))


def gaussian(mean, precision, dtype=float):
    return ivon_jax.Posterior(jnp.asarray(mean, dtype), jnp.asarray(precision, dtype))


def prior_of(q):
    """IVON's, N(0, 1 / (ess weight_decay)), in the dtype of `q`."""
    precision = jnp.full_like(q.mean, PRIOR_PRECISION)
    return ivon_jax.Posterior(jnp.zeros_like(q.mean), precision)


def draws(q, key):
    """Bounds of one sample each."""

    def draw(sample_key):
        return evidence_lower_bound(
            loss_fn, q, prior_of(q), sample_key, ess=N, num_samples=1
        )

    return jax.jit(jax.vmap(draw))(jax.random.split(key, 2000))


@pytest.mark.statistical
@pytest.mark.usefixtures("x64")
def test_at_the_exact_posterior_the_bound_is_the_evidence(key):
    """log p(D) = E[log p(D | theta)] - KL(q || prior) where q is the posterior."""
    assert_mean(draws(gaussian(MEAN, PRECISION), key), log_evidence())


@pytest.mark.statistical
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("shift", "factor"), [(0.1, 1.0), (0.0, 3.0), (0.0, 0.3), (-0.2, 2.0)]
)
def test_elsewhere_it_is_less_by_the_divergence_to_the_exact_posterior(
    shift, factor, key
):
    q = gaussian(MEAN + shift, factor * PRECISION)
    gap = q.kl_divergence(gaussian(MEAN, PRECISION))
    assert gap > 0.1
    assert_mean(draws(q, key), log_evidence() - gap)


@pytest.mark.statistical
@pytest.mark.usefixtures("x64")
def test_batches_leave_the_bound_unbiased(key):
    """The mean loss of a random batch has the mean loss of the data as its mean."""

    def draw(draw_key):
        batch_key, sample_key = jax.random.split(draw_key)
        rows = jax.random.choice(batch_key, N, (5,), replace=False)

        def batch_loss(theta):
            squares = (jnp.asarray(Y)[rows] - jnp.asarray(X)[rows] @ theta) ** 2
            return 0.5 * jnp.mean(squares / NOISE + np.log(2 * np.pi * NOISE))

        q = gaussian(MEAN, PRECISION)
        return evidence_lower_bound(
            batch_loss, q, prior_of(q), sample_key, ess=N, num_samples=2
        )

    assert_mean(jax.jit(jax.vmap(draw))(jax.random.split(key, 2000)), log_evidence())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ess", [7.0, jnp.array(7.0, jnp.float32)])
def test_it_is_minus_equation_1_for_any_ess(ess, key):
    q = gaussian(MEAN, PRECISION)
    theta = [q.sample(sample_key) for sample_key in jax.random.split(key, 3)]
    losses = np.mean([loss_fn(t) for t in theta])
    ratio = PRIOR_PRECISION / PRECISION
    kl = 0.5 * np.sum(ratio - np.log(ratio) + PRIOR_PRECISION * MEAN**2 - 1)
    bound = evidence_lower_bound(loss_fn, q, prior_of(q), key, ess=ess, num_samples=3)
    np.testing.assert_allclose(bound, -(7.0 * losses + kl), rtol=1e-12)
    assert bound.dtype == jnp.float64


def test_the_loss_takes_arguments(key):
    q = gaussian(MEAN, PRECISION, jnp.float32)

    def loss(theta, x, y):
        return jnp.mean((y - x @ theta) ** 2)

    x, y = (jnp.asarray(array, jnp.float32) for array in (X, Y))
    options = {"ess": N, "num_samples": 2}
    bound = evidence_lower_bound(loss, q, prior_of(q), key, args=(x, y), **options)
    expected = evidence_lower_bound(
        lambda theta: loss(theta, x, y), q, prior_of(q), key, **options
    )
    np.testing.assert_allclose(bound, expected, rtol=1e-6)


def train(key, steps=8000):
    """IVON from wide of the mark; returns the first and the last posterior."""
    tx = ivon_jax.ivon(
        optax.cosine_decay_schedule(0.3, steps),
        ess=N,
        hess_init=20.0,
        b2=0.999,
        weight_decay=WEIGHT_DECAY,
    )
    params = jnp.zeros(DIMENSION)
    first = tx.init(params)

    def step(carry, step_key):
        params, opt_state = carry
        theta = ivon_jax.sample(step_key, params, opt_state)
        grads = jax.grad(loss_fn)(theta)
        updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
        return (optax.apply_updates(params, updates), opt_state), None

    with jax.numpy_dtype_promotion("standard"):
        keys = jax.random.split(key, steps)
        (last_params, last), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))(
            (params, first)
        )
    return ivon_jax.posterior(params, first), ivon_jax.posterior(last_params, last)


@pytest.mark.statistical
def test_training_raises_it_to_the_evidence(key):
    """From far below to within a tenth of a nat: precisions fluctuate by 3 %."""
    train_key, sample_key = jax.random.split(key)
    first, last = train(train_key)
    exact = gaussian(MEAN, PRECISION, jnp.float32)
    before, after = first.kl_divergence(exact), last.kl_divergence(exact)
    assert after < 0.1 < 10.0 < before
    assert_mean(draws(first, sample_key), log_evidence() - before)
    assert_mean(draws(last, sample_key), log_evidence() - after)


def test_memory_does_not_grow_with_the_number_of_samples(key):
    """Up to the keys, 8 bytes each."""
    q = ivon_jax.Posterior(jnp.ones(10_000), jnp.ones(10_000))

    def temporaries(num_samples):
        def run(k):
            return evidence_lower_bound(
                lambda theta: jnp.sum(theta**2),
                q,
                q,
                k,
                ess=1.0,
                num_samples=num_samples,
            )

        return temp_bytes(jax.jit(run).lower(key))

    assert temporaries(1002) - temporaries(2) < 1000 * 100 < 1000 * q.mean.nbytes


def test_low_precision_losses_are_averaged_in_float32(key):
    """A bfloat16 mean of 300 ones would stop at 256."""
    q = prior_of(ivon_jax.Posterior(jnp.zeros(2), None))
    bound = evidence_lower_bound(
        lambda theta: 1.0 + 0.0 * theta.sum().astype(jnp.bfloat16),
        q,
        q,
        key,
        ess=jnp.int32(3),
        num_samples=300,
    )
    assert bound.dtype == jnp.float32
    np.testing.assert_allclose(bound, -3.0, rtol=1e-5)


def test_a_flat_prior_bounds_nothing(key):
    q = gaussian(MEAN, PRECISION, jnp.float32)
    flat = ivon_jax.Posterior(q.mean, jnp.zeros_like(q.mean))
    assert evidence_lower_bound(loss_fn, q, flat, key, ess=N) == -jnp.inf


Q = gaussian(MEAN, PRECISION, jnp.float32)
BAD = [
    ({"ess": 0}, ValueError, "`ess` must be positive, got 0."),
    ({"num_samples": 0}, ValueError, "`num_samples` must be at least 1, got 0."),
    (
        {"posterior": Q.mean},
        TypeError,
        "`posterior` must be a Posterior, one Gaussian, got ",
    ),
    (
        {"prior": None},
        TypeError,
        "`prior` must be a Posterior, one Gaussian, got NoneType. Pass "
        "`ivon_jax.prior(params, opt_state)`.",
    ),
    (
        {"loss_fn": lambda theta: (loss_fn(theta), theta)},
        TypeError,
        "`loss_fn` must return a scalar, the mean loss per example, got tuple. Drop "
        "what it returns besides.",
    ),
    (
        {"loss_fn": lambda _: None},
        TypeError,
        "`loss_fn` must return a scalar, the mean loss per example, got None. Does it",
    ),
    ({"loss_fn": None}, TypeError, "`loss_fn` must be a function of the parameters, "),
    ({"key": 0}, TypeError, "`key` must be a JAX random key, got 0."),
    (
        {"loss_fn": lambda theta: theta**2},
        ValueError,
        "`loss_fn` must return a scalar, the mean loss per example, got shape (4,). "
        "Take its mean.",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_arguments_that_do_not_fit_are_named(arguments, error, message):
    good = {"loss_fn": loss_fn, "posterior": Q, "prior": prior_of(Q), "ess": N}
    with pytest.raises(error, match=re.escape(message)):
        evidence_lower_bound(**(good | {"key": jax.random.key(0)} | arguments))
