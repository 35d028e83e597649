"""EVON: its equations in float64 NumPy, and what holds of it as of IVON."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from statistical import assert_at_most, assert_mean, assert_moved

import ivon_jax

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SHAPES = {"w": (4, 3), "conv": (2, 1, 2, 3), "b": (3,), "scale": ()}
PARAMS = {k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
SETTINGS = {"learning_rate": 0.1, "ess": 50.0, "b2": 0.9}


def evon(**kwargs):
    return ivon_jax.evon(**SETTINGS | kwargs)


TX = evon()


def step(tx, params, opt_state, key):
    """One step at a sample, with the gradient cos(theta)."""
    theta = ivon_jax.sample(key, params, opt_state)
    grads = jax.tree.map(jnp.cos, theta)
    updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
    return optax.apply_updates(params, updates), opt_state


def train(tx, params, keys):
    def body(carry, key):
        return step(tx, *carry, key), None

    return jax.lax.scan(body, (params, tx.init(params)), keys)[0]


compiled_train = jax.jit(train, static_argnums=0)


class Reference:
    """The equations for one matrix, from the text of the papers alone."""

    def __init__(self, m, lam, h0, beta1, beta2, beta3, delta):
        self.m = np.array(m, np.float64)
        self.rows, self.columns = self.m.shape
        self.h, self.g = np.full_like(self.m, h0), np.zeros_like(self.m)
        self.ql, self.qr = np.eye(self.rows), np.eye(self.columns)
        self.l, self.r = (np.zeros((n, n)) for n in self.m.shape)
        self.lam, self.delta = lam, delta
        self.beta1, self.beta2, self.beta3 = beta1, beta2, beta3
        self.t = 0

    def theta(self, epsilon):
        sigma = 1 / np.sqrt(self.lam * (self.h + self.delta))
        return self.m + self.ql @ (sigma * epsilon) @ self.qr.T

    def step(self, grad, theta, alpha, clip=None, orthogonalize=False):
        self.t += 1
        into = lambda x: self.ql.T @ x @ self.qr  # noqa: E731
        rotated, precision = into(grad), self.lam * (self.h + self.delta)
        h_hat = rotated * into(theta - self.m) * precision
        if clip is not None:
            h_hat = np.clip(h_hat, -clip * self.h, clip * self.h)
        self.g = self.beta1 * self.g + (1 - self.beta1) * rotated
        correction = (self.h - h_hat) ** 2 / (self.h + self.delta)
        self.h = (
            self.beta2 * self.h
            + (1 - self.beta2) * h_hat
            + 0.5 * (1 - self.beta2) ** 2 * correction
        )
        g_bar = self.g / (1 - self.beta1**self.t)
        u = (g_bar + self.delta * into(self.m)) / (self.h + self.delta)
        update = self.ql @ u @ self.qr.T
        grad = grad + self.delta * self.m
        self.m = self.m - alpha * (newton_schulz(update) if orthogonalize else update)
        self.l = self.beta3 * self.l + (1 - self.beta3) * grad @ grad.T
        self.r = self.beta3 * self.r + (1 - self.beta3) * grad.T @ grad

    def turn(self, ql, qr):
        """The momentum out of the old basis, and into the new one."""
        momentum = self.ql @ self.g @ self.qr.T
        self.ql, self.qr = ql, qr
        self.g = ql.T @ momentum @ qr

    def power_iteration(self):
        self.turn(positive_qr(self.l @ self.ql), positive_qr(self.r @ self.qr))


def positive_qr(a):
    """The one factor of a matrix for which the triangle's diagonal is positive."""
    q, r = np.linalg.qr(a)
    return q * np.sign(np.diag(r))


def newton_schulz(x):
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def bumpy(theta):
    """The gradient of a bowl that is not aligned with the axes, with bumps."""
    rows, columns = theta.shape
    a = np.linspace(-1, 1, rows * rows).reshape(rows, rows)
    b = np.cos(np.arange(columns**2)).reshape(columns, columns)
    a, b = a @ a.T + 0.5 * np.eye(rows), b @ b.T + 0.5 * np.eye(columns)
    return a @ theta @ b + np.sin(theta)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("shape", "basis_every", "hess_clip", "orthogonalize"),
    [
        ((4, 3), 10, None, False),
        ((4, 3), 1, None, False),
        ((4, 3), 500, None, False),
        ((4, 3), 10, 1.5, False),
        ((4, 3), 10, None, True),
        ((2, 1, 2, 3), 10, 1.5, True),
    ],
    ids=["default", "every step", "one basis", "clipped", "orthogonal", "convolution"],
)
def test_agrees_with_the_equations_to_1e_10(
    shape, basis_every, hess_clip, orthogonalize
):
    """Mean, h, momentum, bases, statistics: after each of 200 steps.

    Eigenvectors have no signs, and a first gradient of three columns has no fourth:
    the first bases are the library's, once they are seen to be eigenvectors.
    """
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 3))
    reference = Reference(start, 100.0, 2.0, 0.9, 0.97, 0.95, 1e-3)
    tx = ivon_jax.evon(
        0.05,
        ess=100,
        hess_init=2.0,
        b1=0.9,
        b2=0.97,
        weight_decay=1e-3,
        basis_every=basis_every,
        basis_decay=0.95,
        hess_clip=hess_clip,
        orthogonalize=orthogonalize,
        rescale_lr=False,
    )
    params = jnp.asarray(start.reshape(shape))
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for t in range(1, 201):
        epsilon = rng.normal(size=(4, 3))
        q = ivon_jax.posterior(params, opt_state)
        theta = q.perturb(jnp.asarray(epsilon.reshape(shape)))
        expected = reference.theta(epsilon)
        grads = jnp.asarray(bumpy(expected).reshape(shape))
        updates, opt_state = update(grads, opt_state, params, sample=theta)
        params = optax.apply_updates(params, updates)
        reference.step(bumpy(expected), expected, 0.05, hess_clip, orthogonalize)
        [state] = ivon_jax.find_states(opt_state)
        if t == 1:
            assert_eigenvectors(state.bases.left, reference.l)
            assert_eigenvectors(state.bases.right, reference.r)
            reference.turn(*map(np.asarray, state.bases))
        elif t % basis_every == 0:
            reference.power_iteration()
        for ours, theirs in [
            (theta, expected),
            (params, reference.m),
            (state.hess, reference.h),
            (state.momentum, reference.g),
            (state.bases.left, reference.ql),
            (state.bases.right, reference.qr),
            (state.statistics.left, reference.l),
            (state.statistics.right, reference.r),
        ]:
            ours = np.reshape(ours, theirs.shape)
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def assert_eigenvectors(q, statistic):
    """Orthogonal, and those of large eigenvalues first."""
    q = np.asarray(q)
    np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=1e-13)
    values = q.T @ statistic @ q
    assert_at_most(np.abs(values - np.diag(np.diag(values))), 1e-13 * values[0, 0])
    assert np.all(np.diff(np.diag(values)) <= 1e-13 * values[0, 0])


SAME = {"ess": 50.0, "b1": 0.9, "b2": 0.9, "weight_decay": 0.1}
FEW_KEYS = jax.random.split(KEY, 3)


@pytest.mark.parametrize("regulariser", ["weight_decay", "prior"])
def test_without_matrices_it_is_ivon_to_the_bit(regulariser):
    """No side is short enough for a basis; b1 and weight_decay are IVON's here."""
    settings = dict(SAME)
    if regulariser == "prior":
        del settings["weight_decay"]
        mean = jax.tree.map(jnp.sin, PARAMS)
        settings["prior"] = ivon_jax.Posterior.isotropic(mean, 5.0)
    ours = compiled_train(ivon_jax.evon(0.1, **settings, max_side=1), PARAMS, FEW_KEYS)
    theirs = compiled_train(ivon_jax.ivon(0.1, **settings), PARAMS, FEW_KEYS)
    assert_same_runs(ours, theirs)


def test_in_identity_bases_it_is_ivon_to_the_bit():
    """Statistics that are known keep the first gradient from making bases.

    Without ``jit``, where XLA may round the two programs in other places.
    """
    runs = []
    for tx in (ivon_jax.evon(0.1, **SAME, basis_every=99), ivon_jax.ivon(0.1, **SAME)):
        state, *others = tx.init(PARAMS)
        if hasattr(state, "statistics"):
            begun = jax.tree.map(jnp.ones_like, state.flat_statistics)
            state = state._replace(flat_statistics=begun)
        carry = PARAMS, (state, *others)
        for key in FEW_KEYS:
            carry = step(tx, *carry, key)
        runs.append(carry)
    assert_same_runs(*runs)


def assert_same_runs(ours, theirs):
    chex.assert_trees_all_equal(ours[0], theirs[0])
    [state], [expected] = (ivon_jax.find_states(run[1]) for run in (ours, theirs))
    chex.assert_trees_all_equal(state.hess, expected.hess)
    chex.assert_trees_all_equal(state.momentum, expected.momentum)


def test_which_sides_have_a_basis():
    """Matrices and convolutions; not vectors, sides of one, or long ones."""
    shapes = SHAPES | {"row": (1, 3), "long": (20, 3), "attention": (2, 3, 4)}
    params = {k: jnp.zeros(s) for k, s in shapes.items()}
    bases = ivon_jax.evon(0.1, 10, max_side=10).init(params)[0].bases
    sides = {k: [None if q is None else q.shape for q in b] for k, b in bases.items()}
    assert sides == {
        "w": [(4, 4), (3, 3)],
        "conv": [(4, 4), (3, 3)],
        "b": [None, None],
        "scale": [None, None],
        "row": [None, (3, 3)],
        "long": [None, (3, 3)],
        "attention": [None, None],
    }


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_stacked_layers_are_the_layers(orthogonalize):
    """Of a scan over layers, each has a basis of its own; also the vectors' axis."""
    layers = {"w": (2, 4, 3), "conv": (2, 3, 1, 2, 4), "b": (2, 3)}
    params = {
        k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in layers.items()
    }
    params |= {"head": PARAMS["w"]}
    options = {"basis_every": 2, "orthogonalize": orthogonalize}
    tx = evon(stacked=dict.fromkeys(layers, True) | {"head": False}, **options)
    grads = [jax.tree.map(lambda p, i=i: jnp.cos(i + p), params) for i in range(4)]
    hess = jax.tree.map(lambda p: 1.0 + p**2, params)
    result, state = steps_with(tx, params, grads, hess)
    for i in range(2):
        of_layer = lambda tree, i=i: {k: tree[k][i] for k in layers}  # noqa: E731
        alone, alone_state = steps_with(
            evon(**options), of_layer(params), map(of_layer, grads), of_layer(hess)
        )
        chex.assert_trees_all_close(of_layer(result), alone, rtol=1e-5)
        of_layers = of_layer(jax.tree.map(lambda x: x, state[0].hess))
        chex.assert_trees_all_close(of_layers, alone_state[0].hess, rtol=1e-5)
    assert state[0].bases["w"].left.shape == (2, 4, 4)
    assert not state[0].bases["b"].turns
    assert state[0].bases["head"].left.shape == (4, 4)


def steps_with(tx, params, grads, hess):
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        updates, opt_state = update(grad, opt_state, params, hess=hess)
        params = optax.apply_updates(params, updates)
    return params, opt_state


def test_bases_begin_with_the_first_gradient_that_is_not_zero():
    """Until then they are the identity; of the layers each waits for its own."""
    params = {"w": jnp.ones((2, 4, 3))}
    tx = evon(stacked=True, basis_every=1000)
    opt_state = tx.init(params)
    grads = {"w": jnp.asarray(RNG.normal(size=(2, 4, 3)), jnp.float32)}
    zeros = jax.tree.map(jnp.zeros_like, grads)
    first = {"w": grads["w"].at[1].set(0.0)}
    moved = []
    for grad in (zeros, first, grads, grads):
        before = opt_state[0].bases["w"].left
        _, opt_state = tx.update(grad, opt_state, params, hess=params)
        change = opt_state[0].bases["w"].left - before
        moved.append(list(map(bool, jnp.abs(change).max(axis=(1, 2)) > 1e-3)))
    assert moved == [[False, False], [True, False], [False, True], [False, False]]


def test_bases_follow_every_tenth_step_alone():
    tx = evon()
    opt_state, update = tx.init(PARAMS), jax.jit(tx.update)
    changed = []
    for i in range(1, 22):
        grads = jax.tree.map(lambda p, i=i: jnp.cos(i + p), PARAMS)
        before = opt_state[0].bases["w"].left
        _, opt_state = update(grads, opt_state, PARAMS, hess=PARAMS)
        if np.any(opt_state[0].bases["w"].left != before):
            changed.append(i)
    assert changed == [1, 10, 20]
    assert update._cache_size() == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30], ids=str)
def test_a_gradient_without_finite_squares_leaves_no_trace_in_the_statistics(bad):
    grads = jax.tree.map(jnp.cos, PARAMS)
    _, opt_state = TX.update(grads, TX.init(PARAMS), PARAMS, hess=PARAMS)
    grads["w"] = grads["w"].at[0, 0].set(bad)
    _, after = TX.update(grads, opt_state, PARAMS, hess=PARAMS)
    before = opt_state[0].statistics["w"]
    chex.assert_trees_all_equal(after[0].statistics["w"], before)


def test_orthogonalized_steps_have_singular_values_of_about_one():
    """0.68 to 1.21, of all that are not tiny; other arrays have a norm of one."""
    tx = evon(learning_rate=1.0, orthogonalize=True)
    grads = {k: jnp.cos(3 * p) for k, p in PARAMS.items()}
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, hess=PARAMS)
    for name in ("w", "conv"):
        values = np.linalg.svd(updates[name].reshape(4, 3), compute_uv=False)
        assert_at_most(np.abs(values - 0.95), 0.3)
    for name in ("b", "scale"):
        np.testing.assert_allclose(jnp.linalg.norm(updates[name]), 1.0, rtol=1e-6)
    zero, _ = tx.update(
        jax.tree.map(jnp.zeros_like, grads),
        tx.init(grads),
        jax.tree.map(jnp.zeros_like, grads),
        hess=grads,
    )
    for x in jax.tree.leaves(zero):
        np.testing.assert_array_equal(x, 0.0)


@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_orthogonalized_steps_do_not_know_the_scale_of_the_loss(factor):
    """Nor is it lost in the squares of norms."""
    tx = evon(orthogonalize=True, weight_decay=0.0)

    def step(scale):
        grads = jax.tree.map(lambda p: scale * jnp.cos(3 * p), PARAMS)
        return tx.update(grads, tx.init(PARAMS), PARAMS, hess=PARAMS)[0]

    chex.assert_trees_all_close(step(factor), step(1.0), atol=1e-4)


def test_a_hessian_estimate_that_is_not_finite_is_not_clipped_away():
    """It counts as a gradient of NaN, as with `ivon`."""
    tx = evon(hess_clip=1.5)
    hess = PARAMS | {"b": jnp.array([1.0, jnp.inf, 1.0])}
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, hess=hess)
    np.testing.assert_array_equal(jnp.isnan(updates["b"]), [False, True, False])
    assert float(state[0].hess["b"][1]) == 1.0


CURVATURE = jnp.asarray(np.diag([0.5, 1.0, 2.0, 4.0]) + 0.3, jnp.float32)


def bowl(theta, x=None):  # noqa: ARG001
    return 0.5 * jnp.sum(theta["w"] * (CURVATURE @ theta["w"]))


@pytest.mark.statistical
@pytest.mark.usefixtures("standard_promotion")
def test_estimates_are_of_the_hessian_in_the_basis(key):
    """On a bowl E[h_hat] is the diagonal of Q^T A Q, for every column."""
    params = {"w": PARAMS["w"]}
    opt_state = compiled_train(TX, params, FEW_KEYS)[1]
    grad_fn = ivon_jax.value_and_grad(bowl, mc_samples=2, microbatches=2)
    _, estimates = jax.jit(
        jax.vmap(lambda k: grad_fn(k, params, opt_state, jnp.ones(2)))
    )(jax.random.split(key, 500))
    left = opt_state[0].bases["w"].left
    expected = jnp.diag(left.T @ CURVATURE @ left)
    assert_mean(estimates.hess["w"], jnp.tile(expected[:, None], (1, 3)))


def test_the_estimate_of_one_sample_is_that_of_update():
    """`value_and_grad` and ``sample=`` lead to one state."""
    params, opt_state = compiled_train(TX, {"w": PARAMS["w"]}, FEW_KEYS)
    _, estimate = ivon_jax.value_and_grad(bowl)(KEY, params, opt_state)
    ours = estimate.update(TX, opt_state, params)
    theta = ivon_jax.sample(KEY, params, opt_state)
    theirs = TX.update(jax.grad(bowl)(theta), opt_state, params, sample=theta)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_sample_as_the_trainers_parameters_is_the_plain_loop():
    """After the first step, which is at the mean and leaves h as it is."""
    tx = ivon_jax.sampled(evon(), KEY)
    theta, opt_state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    for t in range(4):
        mean = ivon_jax.mean(theta, opt_state)
        inner = opt_state.inner_state
        grads = jax.tree.map(jnp.cos, theta)
        updates, opt_state = update(grads, opt_state, theta)
        if t == 0:
            chex.assert_trees_all_close(
                opt_state.inner_state[0].hess, inner[0].hess, rtol=1e-7
            )
            assert_moved(opt_state.inner_state[0].bases["w"], inner[0].bases["w"])
        else:
            expected = TX.update(grads, inner, mean, sample=theta)
            chex.assert_trees_all_close(
                (opt_state.mean, opt_state.inner_state),
                (optax.apply_updates(mean, expected[0]), expected[1]),
                rtol=1e-4,
                atol=1e-5,
            )
        theta = optax.apply_updates(theta, updates)
    assert isinstance(ivon_jax.posterior(theta, opt_state), ivon_jax.RotatedPosterior)


def test_groups_of_evon_ivon_and_adam_make_one_posterior():
    """Each is as alone; what Adam trains is a point mass, without a basis."""
    groups = {"w": TX, "conv": evon(b2=0.8), "b": ivon_jax.ivon(0.1, 50.0)}
    groups |= {"scale": optax.adam(0.1)}
    tx = optax.partition(groups, {name: name for name in groups})
    with jax.numpy_dtype_promotion("standard"):
        params, opt_state = compiled_train(tx, PARAMS, FEW_KEYS)
    q = ivon_jax.posterior(params, opt_state)
    assert {k: b.turns for k, b in q.bases.items()} == {
        "w": True,
        "conv": True,
        "b": False,
        "scale": False,
    }
    assert q.trained == {"w": True, "conv": True, "b": True, "scale": False}
    p = ivon_jax.prior(params, opt_state)
    for name in ("w", "conv"):
        np.testing.assert_allclose(p.precision[name], 50.0 * 1e-6, rtol=1e-6)
        state = ivon_jax.find_states(opt_state.inner_states[name])[0]
        expected = 50.0 * (state.hess[name] + 1e-6)
        np.testing.assert_allclose(q.precision[name], expected, rtol=1e-6)
        chex.assert_trees_all_equal(q.bases[name], state.bases[name])
    assert np.isfinite(q.restricted({**q.trained, "scale": False}).kl_divergence(p))


def test_bfloat16_parameters_have_float32_states():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    opt_state = TX.init(params)
    assert dtypes(opt_state[0].bases) == {"float32"}
    theta = ivon_jax.sample(KEY, params, opt_state)
    updates, after = TX.update(theta, opt_state, params, sample=theta)
    assert dtypes((theta, updates)) == {"bfloat16"}
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, opt_state)
    updates, _ = evon(hess_clip=2.0).update(theta, opt_state, params, hess=theta)
    assert dtypes(updates) == {"bfloat16"}


def test_the_state_holds_the_settings():
    [state] = ivon_jax.find_states(evon(b1=0.5, hess_init=2.0).init(PARAMS))
    found = state.count, state.ess, state.weight_decay, state.b1, state.hess_init
    np.testing.assert_allclose(found, (0, 50.0, 1e-6, 0.5, 2.0), rtol=1e-6)
    np.testing.assert_allclose(state.one_minus_b2, 0.1, rtol=1e-6)


def dtypes(tree):
    return {str(x.dtype) for x in jax.tree.leaves(tree)}


def test_what_a_checkpoint_holds_goes_on_as_the_run():
    carry = compiled_train(TX, PARAMS, FEW_KEYS)
    empty = jax.tree.map(jnp.zeros_like, carry)
    restored = serialization.from_bytes(empty, serialization.to_bytes(carry))
    ours, theirs = (step(TX, *run, KEY) for run in (restored, carry))
    chex.assert_trees_all_equal(ours, theirs)


def test_a_key_gives_one_sample():
    params, opt_state = compiled_train(TX, PARAMS, FEW_KEYS)
    draws = [ivon_jax.sample(k, params, opt_state) for k in (KEY, KEY, FEW_KEYS[0])]
    chex.assert_trees_all_equal(*draws[:2])
    assert_moved(draws[2], draws[0])


def dense(basis, diagonal):
    """The matrix with this diagonal in a basis, over entries of rows first."""
    root = np.kron(np.asarray(basis.left), np.asarray(basis.right))
    return root @ np.diag(np.ravel(diagonal)) @ root.T


@pytest.mark.parametrize("kind", ["rotated", "diagonal"])
def test_a_prior_pulls_with_all_of_its_precision(kind):
    """The step is Q [(Q^T (g + P (m - m_p) / ess)) / (h + diag(Q^T P Q) / ess)]."""
    params = {"w": PARAMS["w"]}
    prior = ivon_jax.posterior(*compiled_train(TX, params, FEW_KEYS))
    prior = prior if kind == "rotated" else prior.marginals
    tx = ivon_jax.evon(1.0, ess=20.0, b1=0.0, prior=prior, rescale_lr=False, b2=0.9)
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for i in range(12):
        hess = {"w": 1.0 + params["w"] ** 2}
        grads = {"w": jnp.cos(i + params["w"])}
        before = opt_state[0]
        updates, opt_state = update(grads, opt_state, params, hess=hess)
        basis, h = before.bases["w"], opt_state[0].ivon.hess["w"]
        if i not in (0, 9):  # where a new basis has changed h
            p = ivon_jax.RotatedPosterior.of_diagonal(prior)
            own = p.bases["w"]
            own = own if own.turns else ivon_jax.Basis(jnp.eye(4), jnp.eye(3))
            precision = dense(own, p.precision["w"])
            distance = np.ravel(params["w"] - prior.mean["w"])
            pulled = np.ravel(grads["w"]) + precision @ distance / 20.0
            root = np.kron(np.asarray(basis.left), np.asarray(basis.right))
            diagonal = np.diag(root.T @ precision @ root) / 20.0
            expected = -root @ (root.T @ pulled / (np.ravel(h) + diagonal))
            np.testing.assert_allclose(
                np.ravel(updates["w"]), expected, rtol=2e-4, atol=1e-6
            )
        params = optax.apply_updates(params, updates)
    found = ivon_jax.prior(params, opt_state)
    chex.assert_trees_all_equal(*map(jax.tree.leaves, (found, prior)))


def test_the_precision_stays_while_the_basis_turns_under_a_prior():
    """h gives what the prior's diagonal takes, and both are positive together."""
    params = {"w": PARAMS["w"]}
    prior = ivon_jax.posterior(*compiled_train(TX, params, FEW_KEYS)).tempered(1e-3)
    tx = ivon_jax.evon(0.1, ess=20.0, b2=1 - 1e-7, prior=prior)
    opt_state = tx.init(params)
    begin = ivon_jax.posterior(params, opt_state)
    for i in range(2):
        grads = {"w": jnp.cos(i + params["w"])}
        _, opt_state = tx.update(grads, opt_state, params, hess=opt_state[0].hess)
    q = ivon_jax.posterior(params, opt_state)
    np.testing.assert_allclose(q.precision["w"], begin.precision["w"], rtol=1e-5)
    assert_moved(q.bases["w"], begin.bases["w"])


LABELS = {"w": "evon", "conv": "evon", "b": "sgd", "scale": "evon"}


@pytest.mark.parametrize("labels", [None, LABELS], ids=["all", "some"])
def test_optax_tells_parameters_from_bases(labels):
    """`optax.tree.map_params` maps what is like params: to its sharding, say."""
    tx = evon(prior=ivon_jax.posterior(PARAMS, TX.init(PARAMS)), weight_decay=1e-6)
    if labels:
        tx = optax.partition({"evon": tx, "sgd": optax.sgd(0.1)}, labels)
    mapped = optax.tree.map_params(
        tx, jnp.shape, tx.init(PARAMS), transform_non_params=lambda _: "other"
    )
    [state] = ivon_jax.find_states(mapped)
    names = [k for k in PARAMS if not labels or labels[k] == "evon"]
    for tree in (state.hess, state.momentum, *state.own_prior):
        assert {k: tree[k] for k in names} == {k: PARAMS[k].shape for k in names}
    flat = state.flat_bases, state.flat_statistics, state.flat_prior_bases
    assert flat == ("other",) * 3


def test_settings_may_be_injected_and_scheduled():
    make = optax.inject_hyperparams(ivon_jax.evon, hyperparam_dtype=jnp.float32)
    tx = make(
        0.1,
        ess=50.0,
        b2=0.9,
        hess_clip=lambda count: jnp.array([1.5, 2.0, 3.0])[count],
        basis_decay=0.8,
        basis_every=2,
    )
    params, opt_state = compiled_train(tx, PARAMS, FEW_KEYS)
    options = {"basis_decay": 0.8, "basis_every": 2}
    expected = PARAMS, evon(**options).init(PARAMS)
    for clip, key in zip((1.5, 2.0, 3.0), FEW_KEYS, strict=True):
        expected = step(evon(**options, hess_clip=clip), *expected, key)
    chex.assert_trees_all_close(params, expected[0], rtol=1e-4)
    ours, theirs = opt_state.inner_state[0].hess, expected[1][0].hess
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4)


BAD_SETTINGS = {
    "basis_every": (0, "`basis_every` must be at least 1, got 0."),
    "basis_decay": (1.0, "`basis_decay` must be in [0, 1), got 1.0."),
    "orthogonalize": ("svd", "`orthogonalize` must be True or False, got 'svd'."),
    "hess_clip": (1.0, "`hess_clip` must be more than 1, got 1.0."),
    "max_side": (-1, "`max_side` must be at least 0, got -1."),
    "ess": (-1.0, "`ess` must be positive, got -1.0."),
    "hess_init": (0.0, "`hess_init` must be positive, got 0.0."),
    "b1": (1.0, "`b1` must be in [0, 1), got 1.0."),
    "b2": (1.0, "`b2` must be in [0, 1), got 1.0."),
    "weight_decay": (-1.0, "`weight_decay` must be non-negative, got -1.0."),
    "learning_rate": (-1.0, "`learning_rate` must be non-negative, got -1.0."),
    "rescale_lr": ("no", "`rescale_lr` must be True or False, got 'no'."),
    "prior": (1.0, "`prior` must be a Posterior, got float."),
}


@pytest.mark.parametrize(("name", "bad"), BAD_SETTINGS.items(), ids=BAD_SETTINGS)
def test_a_bad_setting_is_named(name, bad):
    value, message = bad
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        ivon_jax.evon(**SETTINGS | {name: value})


def test_two_priors_are_one_too_many():
    prior = ivon_jax.Posterior.isotropic(PARAMS, 1.0)
    with pytest.raises(ValueError, match="`weight_decay` must be left out where"):
        evon(prior=prior, weight_decay=1e-4)


def test_a_state_of_ivon_is_none_of_evon():
    """And the other way round."""
    ivon = ivon_jax.ivon(0.1, 50.0)
    for tx, other, name in ((TX, ivon, "evon"), (ivon, TX, "ivon")):
        message = f"`state` must be the state of `ivon_jax.{name}`, got "
        with pytest.raises(ValueError, match=re.escape(message)):
            tx.update(PARAMS, other.init(PARAMS), PARAMS, hess=PARAMS)


def test_ivon_takes_no_prior_in_bases():
    """Its marginals it takes."""
    q = ivon_jax.posterior(PARAMS, TX.init(PARAMS))
    with pytest.raises(TypeError, match=r"Pass `prior.marginals`, or train with"):
        ivon_jax.ivon(0.1, 50.0, prior=q)
    ivon_jax.ivon(0.1, 50.0, prior=q.marginals).init(PARAMS)


def test_diagnostics_measure_h_where_it_is():
    """Of coordinates: gamma, the sum of positive h / (h + delta); of entries: noise."""
    params, opt_state = compiled_train(evon(weight_decay=0.5), PARAMS, FEW_KEYS)
    numbers = ivon_jax.diagnostics.measure(params, opt_state)
    hess = ivon_jax.find_states(opt_state)[0].hess
    shares = jax.tree.map(lambda h: jnp.maximum(h, 0.0) / (h + 0.5), hess)
    gamma = sum(float(jnp.sum(x)) for x in jax.tree.leaves(shares))
    np.testing.assert_allclose(numbers["effective_params"], gamma, rtol=1e-5)
    variance = ivon_jax.posterior(params, opt_state).variance
    noise, weights = (
        sum(float(jnp.sum(x)) for x in jax.tree.leaves(tree))
        for tree in (variance, jax.tree.map(jnp.square, params))
    )
    expected = np.sqrt(noise / weights)
    np.testing.assert_allclose(numbers["noise_to_weight"], expected, rtol=1e-5)


STEPS, NUM_DATA = 12_000, 400


def correlated_regression():
    """Eight inputs whose variances range over a factor of 3,000, three targets."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    x = rng.normal(size=(NUM_DATA, 8)) * np.sqrt(np.geomspace(1, 1 / 3000, 8)) @ turn.T
    y = x @ rng.normal(size=(8, 3)) + rng.normal(size=(NUM_DATA, 3))
    return x, y


def fitted(make):
    """The posterior after a run with the curvature's average over 1,000 steps."""
    x, y = (jnp.asarray(a, jnp.float32) for a in correlated_regression())
    schedule = optax.cosine_decay_schedule(0.1, STEPS)
    tx = make(schedule, ess=NUM_DATA, b2=0.999, weight_decay=1e-6)

    def loss_fn(theta):
        return 0.5 * jnp.mean(jnp.sum((x @ theta - y) ** 2, axis=1))

    def body(carry, key):
        params, opt_state = carry
        theta = ivon_jax.sample(key, params, opt_state)
        grads = jax.grad(loss_fn)(theta)
        updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
        return (optax.apply_updates(params, updates), opt_state), None

    params = jnp.zeros((8, 3))
    run = jax.jit(lambda carry, keys: jax.lax.scan(body, carry, keys)[0])
    with jax.numpy_dtype_promotion("standard"):
        carry = run((params, tx.init(params)), jax.random.split(KEY, STEPS))
    return ivon_jax.posterior(*carry)


def exact():
    """Mean, and covariance of the inputs' weights, the same for each target."""
    x, y = correlated_regression()
    precision = x.T @ x + NUM_DATA * 1e-6 * np.eye(8)
    return np.linalg.solve(precision, x.T @ y), np.linalg.inv(precision)


def covariance_error(q):
    """Of 20,000 samples, beside the largest entry of the exact covariance."""
    draws = np.asarray(q.sample(KEY, (20_000,))).reshape(20_000, -1)
    expected = np.kron(exact()[1], np.eye(3))
    return np.abs(np.cov(draws.T) - expected).max() / expected.max()


@pytest.mark.slow
def test_the_posterior_of_correlated_inputs_is_recovered():
    """A curvature has a standard error of sqrt(1 - b2), 3 %: here are three of them."""
    q = fitted(ivon_jax.evon)
    assert_at_most(covariance_error(q), 0.1)
    mean, covariance = exact()
    stddev = np.sqrt(np.diag(covariance))[:, None]
    assert_at_most(np.abs(q.mean - mean) / stddev, 0.3)


@pytest.mark.slow
def test_ivon_does_not_recover_it():
    """So the problem is one where covariances count."""
    assert 0.9 < covariance_error(fitted(ivon_jax.ivon)) < 1.1


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion", "implicit_ranks")
def test_modules_of_nnx_train_as_their_arrays():
    """Optimizers of NNX keep the state in variables, also that of a second step."""
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    params = ivon_jax.flax.arrays(nnx.state(model, nnx.Param))
    opt_state = TX.init(params)
    grad_fn = ivon_jax.flax.value_and_grad(lambda model: jnp.mean(model(PARAMS["w"].T)))
    graphdef = nnx.split(model)[0]
    plain_fn = ivon_jax.value_and_grad(
        lambda theta: jnp.mean(nnx.merge(graphdef, theta)(PARAMS["w"].T))
    )
    for key in FEW_KEYS[:2]:
        _, estimate = grad_fn(key, model, optimizer)
        optimizer.update(model, estimate.grad, hess=estimate.hess)
        _, estimate = plain_fn(key, params, opt_state)
        updates, opt_state = estimate.update(TX, opt_state, params)
        params = optax.apply_updates(params, updates)
    ours = ivon_jax.flax.posterior(model, optimizer)
    expected = ivon_jax.posterior(params, opt_state)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)
