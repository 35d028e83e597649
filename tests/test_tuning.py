"""A sweep returns the settings of its best run, and no run by them is another."""

import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ivon_jax
from ivon_jax import metrics

X = jax.random.normal(jax.random.key(0), (120, 4))
Y = (X @ jnp.array([2.0, -1.0, 0.5, 0.0]) > 0).astype(jnp.int32)
TRAIN, HELD_OUT = (X[:80], Y[:80]), (X[80:], Y[80:])
PARAMS = jnp.zeros((4, 2))
SETTINGS = {"learning_rate": 1e-3, "ess": 80.0, "hess_init": 1.0, "weight_decay": 1e-3}
SEARCH = {"learning_rate": (1.0, 1e4), "hess_init": (0.1, 10.0)}
KEY = jax.random.key(1)


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(x @ params, y).mean()


def score(posterior, key):
    x, y = HELD_OUT
    probs = ivon_jax.predict(lambda w: jax.nn.softmax(x @ w), posterior, key, 8)
    return metrics.negative_log_likelihood(probs, y)


def tune(**changed):
    arguments = {
        "loss_fn": loss_fn,
        "params": PARAMS,
        "data": TRAIN,
        "score": score,
        "key": KEY,
        "settings": SETTINGS,
        "num_steps": 40,
        "batch_size": 20,
        "num_trials": 4,
        "num_rungs": 1,
        "search": SEARCH,
    }
    return ivon_jax.tune(**arguments | changed)


@pytest.fixture(scope="module")
def best():
    return tune()


def score_by_hand(settings, num_steps=40, batch_size=20):
    """The run of `tune`, written again."""
    _, run_key, score_key = jax.random.split(KEY, 3)
    params, tx = PARAMS, ivon_jax.ivon(**settings)
    opt_state = tx.init(params)
    for i in range(num_steps):
        rows_key, draw_key = jax.random.split(jax.random.fold_in(run_key, i))
        rows = jax.random.randint(rows_key, (batch_size,), 0, 80)
        theta = ivon_jax.sample(draw_key, params, opt_state)
        grads = jax.grad(loss_fn)(theta, *(x[rows] for x in TRAIN))
        updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
        params = optax.apply_updates(params, updates)
    return score(ivon_jax.posterior(params, opt_state), score_key)


def test_the_result_is_the_best_of_all_runs():
    """Each run's score, as `tune` saw it, and that of the result in a loop by hand."""
    seen = []

    def spied(posterior, key):
        value = score(posterior, key)
        jax.debug.callback(lambda x: seen.append(float(x)), value)
        return value

    best = tune(score=spied)
    jax.effects_barrier()
    assert len(seen) == 4
    np.testing.assert_allclose(score_by_hand(best), min(seen), rtol=1e-5)


def test_the_first_run_has_the_given_settings():
    """Where all others are worse, they come back."""
    best = tune(search={"learning_rate": (1e-4, 1e-3)}, settings=SETTINGS)
    assert best == SETTINGS


def test_it_beats_a_learning_rate_that_is_too_small(best):
    assert best["learning_rate"] > 10 * SETTINGS["learning_rate"]
    assert score_by_hand(best) < 0.8 * score_by_hand(SETTINGS)
    assert {k: best[k] for k in ("ess", "weight_decay")} == {
        "ess": 80.0,
        "weight_decay": 1e-3,
    }


def test_without_a_search_it_varies_what_the_settings_have():
    """Those for fine-tuning have a prior in the place of `weight_decay`."""
    settings = ivon_jax.recommended(80, 40, 20, task="fine_tuning", params=PARAMS + 0.1)
    best = tune(settings=settings, search=None)
    assert best.keys() == settings.keys()
    assert ivon_jax.ivon(**best).init(PARAMS)


def test_a_schedule_is_multiplied(best):
    """As a whole, and the same key finds the same factor as for a number."""
    schedule = optax.constant_schedule(SETTINGS["learning_rate"])
    of_schedule = tune(settings=SETTINGS | {"learning_rate": schedule})
    rate = of_schedule.pop("learning_rate")(7)
    np.testing.assert_allclose(rate, best["learning_rate"])
    assert of_schedule == {k: v for k, v in best.items() if k != "learning_rate"}


def test_half_of_the_runs_goes_on_at_each_rung():
    sizes = []

    def spied(posterior, key):
        jax.debug.callback(lambda x: sizes.append(float(x)), posterior.mean.sum())
        return score(posterior, key)

    tune(score=spied, num_trials=5, num_rungs=2)
    jax.effects_barrier()
    assert len(sizes) == 5 + 3


def test_sixteen_trials_cost_eight_runs():
    """A quarter of the steps of all, another of half of them, a half of a quarter."""
    evaluations = []

    def spied(params, x, y):
        loss = loss_fn(params, x, y)
        jax.debug.callback(lambda x: evaluations.append(float(x)), loss)
        return loss

    tune(loss_fn=spied, num_steps=8, num_trials=16, num_rungs=3)
    jax.effects_barrier()
    assert len(evaluations) == 8 * 8


def test_a_bar_moves_where_tqdm_is_installed_and_changes_nothing(monkeypatch, best):
    moves = []

    def tqdm(parts, **_):
        for part in parts:
            moves.append(part)
            yield part

    for module in (types.SimpleNamespace(tqdm=tqdm), None):
        monkeypatch.setitem(sys.modules, "tqdm.auto", module)
        assert tune() == best
    assert len(moves) == 8


def test_runs_that_diverge_are_worst():
    best = tune(search={"learning_rate": (1e30, 1e38)}, settings=SETTINGS)
    assert best == SETTINGS


def test_leave_one_out_needs_no_other_data():
    def leave_one_out(posterior, _):
        fn = jnp.dot
        return ivon_jax.sensitivity.leave_one_out_loss(
            lambda w, x: fn(x, w), posterior, *TRAIN
        )

    best = tune(score=leave_one_out)
    assert score_by_hand(best) < score_by_hand(SETTINGS)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss_fn": 3.0}, "`loss_fn` must be a function"),
        ({"score": None}, "`score` must be a function"),
        ({"score": lambda q, _key: q.mean}, "`score` must return a real scalar, got"),
        ({"score": lambda _q, _key: jnp.nan}, "`score` must be finite for one run"),
        ({"data": X}, "`data` must be a tuple of arguments, got ArrayImpl"),
        ({"data": (X, Y[:3])}, "`data` must have arrays of one length"),
        ({"data": ()}, "`data` must have arrays of one length"),
        ({"num_steps": 0}, "`num_steps` must be at least 1, got 0."),
        ({"batch_size": 81}, "`batch_size` must be in 1..80, got 81."),
        ({"num_trials": 1}, "`num_trials` must be at least 2, got 1."),
        ({"num_rungs": 4}, "`num_rungs` must be in 1..3, got 4."),
        (
            {"search": {"b2": (0.1, 1)}},
            "`search` must name some of `settings`, got 'b2'",
        ),
        ({"search": {"ess": (2.0, 1.0)}}, "`search['ess']` must be (low, high), got"),
        ({"search": {"ess": (0.0, 1.0)}}, "`search['ess']` must be positive, got 0.0."),
        ({"key": 0}, "`key` must be a JAX random key, got 0."),
    ],
)
def test_bad_arguments_are_named(changed, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        tune(**changed)
