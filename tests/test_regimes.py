"""The studies of small data, active learning and bandits set their problems right."""

import dataclasses

import active_learning
import bandit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_data
from common import few_images, scores
from statistical import assert_mean

# As in the scripts, which are written for jax as it is.
pytestmark = pytest.mark.usefixtures("implicit_ranks", "standard_promotion")


def test_subsets_are_nested_in_size_and_in_wrong_labels(key):
    """And the share of wrong labels is the one that was asked for."""
    cells = few_images.Cells([200, 1000], [0, 20, 40])
    truth = jnp.arange(1500) % 10
    sizes, rows, given = cells.subsets(key, truth, repeats=2)
    assert sizes.tolist() == [200] * 6 + [1000] * 6
    rows, given = (x.reshape(2, 3, 2, 1000) for x in (rows, given))
    assert len(set(rows[0, 0, 0].tolist())) == 1000
    np.testing.assert_array_equal(rows[0, 0], rows[1, 2])
    np.testing.assert_array_equal(given[0], given[1])
    assert np.any(rows[0, 0, 0] != rows[0, 0, 1])
    wrong = np.asarray(given != truth[rows])[0]
    assert not wrong[0].any()
    assert wrong[2][wrong[1]].all()
    np.testing.assert_array_equal(given[0, 1][wrong[1]], given[0, 2][wrong[1]])
    for i, share in enumerate((0.0, 0.2, 0.4)):
        assert_mean(wrong[i].reshape(-1), share)


def test_runs_of_a_cell_are_where_it_is():
    cells = few_images.Cells([100, 300], [0, 20, 40])
    assert cells.all[3] == (300, 0)
    assert cells.runs(300, repeats=5) == slice(15, 20)
    assert cells.runs(1000, repeats=5) is None


def test_losses_are_those_of_the_metric(key):
    probs = jax.nn.softmax(jax.random.normal(key, (3, 50, 10)))
    labels = jnp.arange(50) % 10
    mean = scores.losses(probs, labels).mean(axis=1)
    np.testing.assert_allclose(mean, small_data.scores(probs, labels)["NLL"], rtol=1e-5)


def test_images_of_all_kinds_of_shift_have_their_severity():
    """Severity s predicts the label with probability 1 / s, for each of four kinds."""
    labels = jnp.arange(20) % 10
    share = jnp.repeat(1 / jnp.arange(1.0, 6), 4 * 20)[:, None]
    right = jnp.tile(jax.nn.one_hot(labels, 10), (20, 1))
    probs = share * right + (1 - share) * jnp.roll(right, 1, axis=1)
    both = {name: jnp.stack([probs] * 2) for name in ("IVON", "no noise")}
    rows, found = small_data.of_shift(both, labels)
    nll = [row["NLL"] for row in rows if row["system"] == "IVON"]
    np.testing.assert_allclose(
        nll, np.log(np.arange(1.0, 6))[:, None] * [1, 1], atol=1e-6
    )
    assert [row["severity"] for row in found] == [1, 2, 3, 4, 5]
    assert all(row["NLL"]["difference"] == 0 for row in found)


def test_the_wheel_pays_one_action_in_each_quadrant():
    points = jnp.array([[0.7, 0.6], [0.7, -0.6], [-0.7, 0.6], [-0.7, -0.6], [0.3, 0.2]])
    worth = jax.vmap(bandit.worth, (0, None))(points, 0.8)
    expected = np.ones((5, 5))
    expected[:, 0] = 1.2
    expected[np.arange(4), np.arange(1, 5)] = 50.0
    np.testing.assert_allclose(worth, expected)


def test_random_choices_regret_what_the_wheel_says(key):
    """Inside 4/5 of 0.2, and outside 50 less the mean of (50, 1.2, 1, 1, 1)."""
    config = bandit.Config(decisions=1000, batch_size=1)
    keys = jax.random.split(key, 20)
    regret = bandit.run_all(bandit.uniform, keys, {}, jnp.full(20, 0.9), config)
    inside = 0.9**2
    expected = inside * 0.16 + (1 - inside) * (50 - 54.2 / 5)
    assert_mean(np.asarray(regret).reshape(-1), expected)


@pytest.mark.parametrize("name", bandit.SYSTEMS)
def test_an_agent_learns_which_action_is_worth_more(name, key):
    """From rewards of one context: action 3 pays all, and after 300 steps it knows."""
    make_agent, _ = bandit.SYSTEMS[name]
    settings = {
        **dict(epsilon=0.0, rate=0.02, keep=0.9, hess_init=0.3, stddev=0.02),
        "learning_rate": 0.3 if "hess_init" in bandit.SYSTEMS[name][1] else 3e-3,
    }
    _, ranges = bandit.SYSTEMS[name]
    agent = make_agent(**{k: settings[k] for k in ranges})
    actions = jnp.arange(30) % 5
    x = jnp.tile(jnp.array([[0.5, 0.5]]), (30, 1))
    batch = bandit.Batch(x, actions, jnp.asarray(actions == 3, float))

    def step(state, i):
        step_key = jax.random.fold_in(key, i)
        return agent.step(step_key, state, jnp.arange(30), batch, 1000), None

    state, _ = jax.lax.scan(step, agent.init(key), jnp.arange(300))
    keys = jax.random.split(key, 20)
    values = jax.vmap(agent.values, (0, None, None))(keys, state, x[0])
    assert np.all(np.argmax(values, axis=1) == 3)


def test_no_image_is_asked_for_twice(key):
    """Here from a pool that is hardly larger than the candidates of one round."""
    config = active_learning.Config(most=80, steps=2, num_samples=2)
    images = few_images.load("")
    few = (array[:520] for array in images.pool)
    images = images._replace(pool=tuple(few))
    problem = small_data.make_problem(dataclasses.replace(config), images)
    setting = dict(learning_rate=0.1, prior_precision=1.0)
    arguments = "no noise", problem, images, config, key, setting
    asked = [active_learning.run(*arguments, choice)[0] for choice in (0, 1)]
    for rows in asked:
        assert len(set(rows.tolist())) == len(rows) == 100
    np.testing.assert_array_equal(asked[0][:20], asked[1][:20])
    assert np.any(asked[0][20:] != asked[1][20:])
