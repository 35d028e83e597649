"""Other people's trainers and tools, with IVON: `make clients` installs them.

`make test` skips what is not installed; with CLIENTS set, nothing is skipped.
"""

import functools
import importlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recipes

import ivon_jax

PAGE = "trainers.md"
pytestmark = [
    pytest.mark.usefixtures("standard_promotion", "implicit_ranks"),
    pytest.mark.filterwarnings("ignore"),  # theirs
]


def needs(*packages):
    """Skip the test where one is missing, unless the clients are what is tested."""
    if "CLIENTS" not in os.environ:
        for package in packages:
            pytest.importorskip(package)
    return [importlib.import_module(package) for package in packages]


def plain_loop(tx, loss_fn, params, steps, key):
    """The README's, its first gradient at the mean."""
    opt_state = tx.init(params)
    [state] = ivon_jax.find_states(opt_state)
    theta, curvature = params, {"hess": state.hess}

    @jax.jit
    def step(t, theta, params, opt_state, curvature):
        grads = jax.grad(loss_fn)(theta)
        updates, opt_state = tx.update(grads, opt_state, params, **curvature)
        params = optax.apply_updates(params, updates)
        theta = ivon_jax.sample(jax.random.fold_in(key, t + 1), params, opt_state)
        return theta, params, opt_state

    for t in range(steps):
        theta, params, opt_state = step(t, theta, params, opt_state, curvature)
        curvature = {"sample": theta}
    return ivon_jax.posterior(params, opt_state)


def assert_close(posterior, expected):
    """Mean and precision, to the rounding of many steps in double precision."""
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-9),
        posterior,
        expected,
    )


@pytest.mark.parametrize(
    ("package", "section"), [("equinox", "Equinox"), ("haiku", "Haiku")]
)
def test_the_loss_falls(package, section):
    needs(package)
    namespace = recipes.run(PAGE, section)
    assert namespace["loss"] < 0.2 * jnp.mean(namespace["labels"] ** 2)


@pytest.mark.usefixtures("x64")
def test_optimistix_trains_the_plain_loops_posterior():
    needs("optimistix")
    space = recipes.run(PAGE, "Optimistix")
    expected = plain_loop(
        space["tx"],
        lambda params: space["objective"](params, (space["inputs"], space["labels"])),
        jnp.zeros(3),
        50,
        jax.random.key(1),
    )
    assert_close(space["posterior"], expected)
    assert np.all(space["solution"].value != space["evaluate_here"])


@pytest.mark.usefixtures("x64")
def test_numpyro_trains_the_plain_loops_posterior():
    """About the exact one: h is an average of 100 estimates, 14 % off or more."""
    needs("numpyro")
    space = recipes.run(PAGE, "NumPyro SVI")
    svi, data = space["svi"], (space["inputs"], space["labels"])
    start = svi.get_params(svi.init(jax.random.key(0), *data))

    def loss_fn(params):
        return svi.loss.loss(
            jax.random.key(0), params, space["model"], space["guide"], *data
        )

    expected = plain_loop(space["svi_tx"], loss_fn, start, 1000, jax.random.key(1))
    assert_close(space["posterior"], expected)
    exact = jnp.sum(space["inputs"] ** 2, axis=0) / 0.09 + 0.01
    [precision] = jax.tree.leaves(space["posterior"].precision)
    np.testing.assert_allclose(precision, exact, rtol=0.5)


@pytest.mark.usefixtures("x64")
def test_gpjax_keeps_the_state_and_its_loss_falls():
    needs("gpjax")
    space = recipes.run(PAGE, "Trainers that drop the optimizer's state", "GPJax")
    assert space["history"][-1] < space["history"][0]
    assert space["kept"]["opt_state"].count == 100

    def loss(model):
        return -space["gpx"].objectives.conjugate_mll(model, space["data"])

    assert loss(space["evaluate_here"]) < space["history"][0]


def test_flowjax_fits_better():
    needs("flowjax")
    space = recipes.run(PAGE, "FlowJax")
    history = np.asarray(space["history"])
    assert history[-10:].mean() < history[:10].mean()
    data = 2.0 + space["inputs"]
    loss = -jnp.mean(space["evaluate_here"].log_prob(data))
    assert loss < history[:10].mean()


# A network of one layer, a regression with known noise: the posterior is Gaussian.
X = jax.random.normal(jax.random.key(4), (50, 3)) * jnp.array([[1.0, 2.0, 0.5]])
Y = X @ jnp.array([1.0, -1.0, 2.0])


@functools.cache
def posterior():
    """IVON's, with the exact h of the mean loss: that of half of squared errors."""
    params, tx = jnp.zeros(3), ivon_jax.ivon(1.0, ess=50, b1=0.0, b2=0.0)
    opt_state = tx.init(params)
    for _ in range(100):
        grads = X.T @ (X @ params - Y) / 50
        hess = jnp.mean(X**2, axis=0)
        updates, opt_state = tx.update(grads, opt_state, params, hess=hess)
        params = optax.apply_updates(params, updates)
    return ivon_jax.posterior(params, opt_state)


def test_laplax_has_the_same_curvature():
    """The diagonal of its Gauss-Newton matrix and the prior's are IVON's precision."""
    ggn, mv = needs("laplax.curv.ggn", "laplax.util.mv")
    q = posterior()
    product = ggn.create_ggn_mv(
        lambda input, params: jnp.atleast_1d(input @ params),
        q.mean,
        {"input": X, "target": Y[:, None]},
        "mse",
        num_total_samples=50,
    )
    curvature = mv.diagonal(product, layout=q.mean)
    ratio = (q.precision - 50 * 1e-4) / curvature
    np.testing.assert_allclose(ratio, jnp.full(3, ratio[0]), rtol=1e-4)
    assert ratio[0] == pytest.approx(0.5) or ratio[0] == pytest.approx(1.0)


def test_arviz_summarizes_draws():
    """Its mean and standard deviation are the posterior's, to the sampling error."""
    [arviz] = needs("arviz")
    q = posterior()
    draws = q.sample(jax.random.key(0), (4, 1000))
    table = arviz.summary(arviz.from_dict({"w": np.asarray(draws)}), round_to="none")
    error = 5 * np.asarray(q.stddev) / np.sqrt(4000)
    assert np.all(np.abs(table["mean"] - np.asarray(q.mean)) < error)
    np.testing.assert_allclose(table["sd"], q.stddev, rtol=5 / np.sqrt(2 * 4000))
    assert np.all(table["r_hat"] < 1.01)


def test_blackjax_accepts_the_posterior_as_its_metric():
    """With IVON's variances as the mass matrix, HMC's proposals are accepted."""
    [blackjax] = needs("blackjax")
    q = posterior()

    def log_density(w):
        return -0.5 * jnp.sum((X @ w - Y) ** 2) - 0.5 * 50 * 1e-4 * jnp.sum(w**2)

    sampler = blackjax.hmc(
        log_density,
        step_size=0.5,
        inverse_mass_matrix=q.variance,
        num_integration_steps=5,
    )

    def step(state, key):
        state, info = sampler.step(key, state)
        return state, (state.position, info.acceptance_rate)

    keys = jax.random.split(jax.random.key(1), 2000)
    _, (draws, rates) = jax.jit(lambda s: jax.lax.scan(step, s, keys))(
        sampler.init(q.mean)
    )
    assert jnp.mean(rates) > 0.8
    np.testing.assert_allclose(draws.mean(0), q.mean, atol=0.1)
    exact = np.linalg.inv(X.T @ X + 50 * 1e-4 * np.eye(3))
    np.testing.assert_allclose(draws.std(0), np.sqrt(np.diag(exact)), rtol=0.15)
