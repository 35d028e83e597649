"""Many runs side by side, ensembles of them, and what else the studies compare with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import uncertainty
from common import baselines
from linear_model import NOISE, example, flat, steps_of, unflat
from statistical import assert_mean

# The scripts of benchmarks/ run so, and these systems are theirs.
pytestmark = pytest.mark.usefixtures("standard_promotion", "implicit_ranks")


@pytest.fixture
def linear():
    return example()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("how", [{}, {"runs_at_once": 1}, {"steps_per_call": 1}])
def test_each_run_has_a_setting_of_its_own(linear, key, how):
    """Here the precision of the prior, for which the exact mean is known."""
    problem = linear.problem(epochs=1000, **how)
    settings = {
        "learning_rate": jnp.array([0.02, 0.03]),
        "prior_precision": jnp.array([0.5, 20.0]),
    }
    system = baselines.with_prior(baselines.sgd)
    data, keys = (jnp.asarray(linear.x), jnp.asarray(linear.y)), jax.random.split(key)
    (params, _), _ = baselines.fit(system, problem, keys, settings, data)
    expected = [
        dataclasses.replace(linear, prior_precision=precision).mean
        for precision in (0.5, 20.0)
    ]
    np.testing.assert_allclose(flat(params), expected, rtol=1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("how", [{}, {"runs_at_once": 1}])
def test_each_run_may_have_data_of_its_own(linear, key, how):
    problem, keys = linear.problem(epochs=1000, **how), jax.random.split(key)
    data = jnp.stack([linear.x, -linear.x]), jnp.stack([linear.y, linear.y + 1])
    settings = {"learning_rate": jnp.full(2, 0.02)}
    args = baselines.sgd, problem, keys, settings, data
    (params, _), _ = baselines.fit(*args, own_data=True)
    expected = [
        dataclasses.replace(linear, x=x, y=y).mean for x, y in zip(*data, strict=True)
    ]
    np.testing.assert_allclose(flat(params), expected, rtol=1e-7)


def test_an_epoch_has_each_example_once_in_an_order_of_its_own(linear, key):
    problem = dataclasses.replace(linear.problem(epochs=2), batch_size=5)

    def counting(_problem):
        def step(_key, state, _x, y):
            count, seen = state
            return count + 1, jax.lax.dynamic_update_slice(seen, y, [5 * count])

        return baselines.System(lambda _: (0, jnp.zeros(40)), step, outputs=None)

    keys, data = jax.random.split(key), (jnp.zeros((20, 3)), jnp.arange(20.0))
    (_, seen), seconds = baselines.fit(counting, problem, keys, {}, data)
    orders = np.reshape(seen, (4, 20))
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(20), (4, 1)))
    assert len(np.unique(orders, axis=0)) == 4
    assert seconds > 0


def test_a_prediction_is_the_mean_of_the_draws_probabilities(linear, key):
    def noisy(_problem, scale):
        def outputs(key, state, x):
            return state + scale * jax.random.normal(key, (len(x), 3))

        return baselines.System(init=None, step=None, outputs=outputs)

    keys, settings = jax.random.split(key), {"scale": jnp.array([1.0, 2.0])}
    states, x = jnp.arange(6.0).reshape(2, 1, 3), jnp.zeros((4, 3))
    arguments = noisy, linear.problem(), states, keys, settings, x, 5
    probs = baselines.predict(*arguments)
    for run, (run_key, scale) in enumerate(zip(keys, (1.0, 2.0), strict=True)):
        noise = [jax.random.normal(k, (4, 3)) for k in jax.random.split(run_key, 5)]
        exp = np.exp(np.asarray(states[run]) + scale * np.array(noise))
        expected = (exp / exp.sum(axis=-1, keepdims=True)).mean(axis=0)
        np.testing.assert_allclose(probs[run], expected, rtol=1e-5)


def test_trials_fill_their_ranges_evenly_on_a_logarithmic_scale():
    """Of sixteen points of a Sobol sequence one is in each sixteenth."""
    ranges = {"learning_rate": (1e-3, 10.0), "rate": (0.1, 0.2)}
    for name, values in baselines.trials(ranges, 16).items():
        low, high = ranges[name]
        place = 16 * np.log(values / low) / np.log(high / low)
        np.testing.assert_array_equal(np.sort(place.astype(int)), np.arange(16))


def test_settings_are_listed_one_by_one_and_stacked_again():
    values = {"a": np.float32([1, 2]), "b": np.float32([3, 4])}
    settings = baselines.one_by_one(values)
    assert settings == [{"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 4.0}]
    stack = baselines.stacked(settings, 2)
    np.testing.assert_array_equal(stack["a"], [1, 1, 2, 2])
    np.testing.assert_array_equal(stack["b"], [3, 3, 4, 4])


def test_what_is_stopped_early_stays_as_it_was(linear, key):
    """After a quarter of 40 steps, on the schedule of all."""
    problem = linear.problem(epochs=40)
    setting = {"learning_rate": 0.1, "weight_decay": 0.2}
    base = baselines.adamw(problem, **setting)
    system = baselines.stopped_early(baselines.adamw)(problem, share=0.25, **setting)
    start = unflat(np.float32([1.0, 2.0, 3.0, 4.0]))
    *_, stopped = steps_of(system, system.init(start), [key] * 40, linear)
    *_, expected = steps_of(base, base.init(start), [key] * 10, linear)
    jax.tree.map(np.testing.assert_array_equal, stopped[0], expected)
    x = jnp.float32(linear.x)
    outputs = system.outputs(key, stopped, x)
    np.testing.assert_array_equal(outputs, base.outputs(key, expected, x))


def test_an_ensemble_is_the_mean_of_its_members_probabilities():
    """Of three networks for each of two seeds, each trained here alone."""
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(12, 4)).astype("float32"), np.arange(12) % 3
    network, length = baselines.mlp((4, 5, 3)), {"epochs": 3, "batch_size": 4}
    task = uncertainty.Task((images, labels), None, 2, network, length, 1)
    config, setting = uncertainty.Config(seeds=2, members=3), {"learning_rate": 0.1}
    setting["prior_precision"] = 1.0
    rows = uncertainty.test("SGD", setting, task, config, images)
    system, problem = uncertainty.SYSTEMS["SGD"][0], uncertainty.make_problem
    train_keys, test_keys = jax.random.split(jax.random.key(0), (2, 6))
    alone = []
    for pair in zip(train_keys, test_keys, strict=True):
        arguments = system, problem(task, config, 12), *(key[None] for key in pair)
        settings = {name: jnp.array([value]) for name, value in setting.items()}
        data = jnp.asarray(images), jnp.asarray(labels)
        state = baselines.fit(*arguments[:3], settings, data).state
        probs = baselines.predict(
            *arguments[:2], state, arguments[3], settings, images, 1
        )
        alone.append(probs[0])
    alone = np.array(alone).reshape(2, 3, 12, 3)
    np.testing.assert_allclose(rows["SGD"], alone[:, 0], rtol=1e-5)
    np.testing.assert_allclose(rows["Deep ensemble"], alone.mean(axis=1), rtol=1e-5)


def test_sgds_posterior_of_the_paper_has_one_variance():
    """Appendix C.5: 1 / (N (1 + delta))."""
    q = baselines.sgd_posterior(unflat(np.ones(4)), num_data=50, damping=0.5)
    np.testing.assert_allclose(flat(q.variance), np.full(4, 1 / 75), rtol=1e-6)
    np.testing.assert_array_equal(flat(q.mean), np.ones(4))


def test_adamws_posterior_of_the_paper_has_its_second_moment(linear, key):
    """Appendix C.5: 1 / (N (sqrt(v) + delta)), v of two steps in NumPy."""
    system = baselines.adamw(linear.problem(), 0.0, 0.0)  # the weights stay
    theta = np.array([1.0, -1.0, 0.5, 0.0])
    state = system.init(unflat(np.float32(theta)))
    *_, (params, opt_state) = steps_of(system, state, [key] * 2, linear)
    q = baselines.adamw_posterior(params, opt_state, num_data=20, damping=0.1)
    gradient = linear.design.T @ (linear.design @ theta - linear.y) / NOISE**2 / 20
    moment = (0.001 + 0.999 * 0.001) * gradient**2
    expected = 1 / (20 * (np.sqrt(moment) + 0.1))
    np.testing.assert_allclose(flat(q.variance), expected, rtol=1e-4)


@pytest.mark.statistical
def test_hamiltonian_monte_carlo_draws_from_the_exact_posterior(linear, key):
    """Mean and covariance, of chains that know nothing of each other."""
    ground_truth = pytest.importorskip("ground_truth")
    sizes = dict(chains=200, warmup=100, length=20, leapfrogs=10)
    config = ground_truth.Config(**sizes)
    data = jnp.float32(linear.x), jnp.float32(linear.y)
    draws, _ = ground_truth.sample_exactly(linear.problem(), data, key, config)
    draws = flat(draws)
    assert_mean(draws.mean(axis=1), linear.mean)
    centred = draws - linear.mean
    products = np.einsum("cdi,cdj->cij", centred, centred) / config.length
    assert_mean(products, np.linalg.inv(linear.precision))


def test_what_is_less_than_another_is_ivons():
    """Of two seeds and four images, all at 0.8 for IVON and 0.4 for the other."""
    ours, theirs = np.full((2, 4, 2), 0.2), np.full((2, 4, 2), 0.6)
    ours[..., 0], theirs[..., 0] = 0.8, 0.4
    probs = {"SGD": jnp.asarray(theirs), "IVON": jnp.asarray(ours)}
    [row] = uncertainty.differences(probs, np.zeros(4, int))
    assert row["IVON less"] == "SGD"
    np.testing.assert_allclose(row["NLL"]["difference"], np.log(0.5), rtol=1e-5)
    np.testing.assert_allclose(row["accuracy %"]["difference"], 100)
