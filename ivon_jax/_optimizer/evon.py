"""IVON in the eigenbases of SOAP's preconditioner, as optax transformations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _update_rules
from .._arrays.trees import mask_of
from .._distributions.basis import into, map_bases, out_of
from .._distributions.gaussian import Posterior
from .._distributions.parts import over
from .._distributions.rotated import RotatedPosterior
from . import eigenbasis, transform
from .state import EVONState, flat_like

WEIGHT_DECAY = 1e-6
MORE_THAN_ONE = _checks.Limit("more than 1", lambda x: x > 1)


def scale_by_evon(
    ess: jax.typing.ArrayLike,
    *,
    hess_init: jax.typing.ArrayLike = 1.0,
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.9999,
    weight_decay: jax.typing.ArrayLike = WEIGHT_DECAY,
    basis_every: jax.typing.ArrayLike = 10,
    basis_decay: jax.typing.ArrayLike | None = None,
    orthogonalize: bool = False,
    hess_clip: jax.typing.ArrayLike | None = None,
    prior: Posterior | RotatedPosterior | None = None,
    max_side: int | None = None,
    stacked: bool | optax.Params = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Turn gradients into :math:`Q_L [(\bar g + \delta m) / (h + \delta)] Q_R^\top`.

    This is EVON without its learning rate, for an `optax.chain` of your own; `evon` is
    the ready optimizer and documents the arguments.

    >>> tx = optax.chain(scale_by_evon(ess=1000), optax.scale_by_learning_rate(1e-3))
    """
    transform.check_prior(
        prior, weight_decay, WEIGHT_DECAY, (Posterior, RotatedPosterior)
    )
    b2 = _checks.number("b2", b2, _checks.DECAY_RATE)
    if basis_decay is None:
        basis_decay = b2
    b3 = _checks.number("basis_decay", basis_decay, _checks.DECAY_RATE)
    basis_every = _number_of_steps("basis_every", basis_every)
    _checks.boolean("orthogonalize", orthogonalize)
    if hess_clip is not None:
        hess_clip = _checks.number("hess_clip", hess_clip, MORE_THAN_ONE)
    if max_side is None:  # no number by default: optax would inject it as an array
        max_side = eigenbasis.MAX_SIDE
    _checks.integer_between("max_side", max_side, 0)
    diagonal = None
    if prior is not None:
        prior = RotatedPosterior.of_diagonal(prior)
        weight_decay = transform.WEIGHT_DECAY  # which is how `ivon` is given none
        diagonal = Posterior(prior.mean, prior.precision_diagonal)
    # IVON itself, of the coordinates.
    rule = transform.preconditioner(ess, hess_init, b1, b2, weight_decay, diagonal)

    def stacks(tree):
        return mask_of("stacked", stacked, tree)

    def init(params):
        state = rule.init(params)

        def identity(param, stacked):
            return eigenbasis.identity(param, stacked, max_side)

        bases = jax.tree.map(identity, params, stacks(params))
        statistics = map_bases(eigenbasis.no_statistic, bases)
        flat = [flat_like(tree, params) for tree in (bases, statistics)]
        if prior is None:
            return EVONState(state, *flat, None, None)
        p = over(params, prior)
        own = Posterior(p.mean, p.precision)
        return EVONState(state, *flat, own, flat_like(p.bases, params))

    def update(grads, state, params=None, *, sample=None, hess=None, **extra_args):
        at_mean = extra_args.get("at_mean")  # of `sampled` alone
        grads, hess = transform.estimate_of(grads, state, params, sample, hess, at_mean)
        if hess_clip is not None:
            hess = jax.tree.map(_clip(hess_clip), hess, state.hess)
        bases, coordinates = state.bases, into(state.bases, params)
        directions, inner = rule.update(
            into(bases, grads),
            _with_prior(state, params, coordinates),
            coordinates,
            hess=hess,
        )
        updates = out_of(bases, directions)
        if orthogonalize:
            updates = jax.tree.map(eigenbasis.orthogonalized, updates, stacks(updates))
        state = state._replace(ivon=inner)
        grads = _with_pull(state, params, grads)
        return updates, _next_bases(state, grads, basis_every, b3)

    # In optax's protocol the first argument is `updates`; it is passed by position.
    tx = optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]
    return transform.in_params_dtype(tx, EVONState)


def evon(
    learning_rate: optax.ScalarOrSchedule,
    ess: jax.typing.ArrayLike,
    *,
    hess_init: jax.typing.ArrayLike = 1.0,
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.9999,
    weight_decay: jax.typing.ArrayLike = WEIGHT_DECAY,
    basis_every: jax.typing.ArrayLike = 10,
    basis_decay: jax.typing.ArrayLike | None = None,
    orthogonalize: bool = False,
    hess_clip: jax.typing.ArrayLike | None = None,
    prior: Posterior | RotatedPosterior | None = None,
    rescale_lr: bool | None = None,
    max_side: int | None = None,
    stacked: bool | optax.Params = False,
) -> optax.GradientTransformationExtraArgs:
    r"""IVON in eigenbases: train a Gaussian with correlations over the parameters.

    For a matrix of parameters with mean M it trains the posterior :math:`\theta = M +
    Q_L (\sigma \odot E) Q_R^\top`, where E is standard normal and the columns of
    :math:`Q_L, Q_R` are the eigenvectors of SOAP's preconditioner: moving averages L, R
    of :math:`G G^\top` and :math:`G^\top G` over the gradients G, for which
    :math:`\delta M` is added to them. There it is `ivon`:
    with the coordinates :math:`G' = Q_L^\top G Q_R` of the gradient at :math:`\theta`,
    :math:`E'` of :math:`\theta - M` and :math:`M'` of the mean,

    .. math::
        \hat h &= G' E' / \sigma^2 \\
        g &\leftarrow \beta_1 g + (1 - \beta_1) G' \\
        h &\leftarrow \beta_2 h + (1 - \beta_2) \hat h
            + (1 - \beta_2)^2 (h - \hat h)^2 / (2 (h + \delta)) \\
        M &\leftarrow M - \alpha \, Q_L [(g / (1 - \beta_1^t) + \delta M') /
            (h + \delta)] Q_R^\top

    `ivon_jax.sample`, `posterior`, `predict`, `value_and_grad`, `sampled` and all
    wrappers work as for `ivon`; `posterior` returns a `RotatedPosterior`. Arrays of one
    axis are as with `ivon`, to the last bit. See docs/evon.md for when to use which.

    >>> import ivon_jax
    >>> params = {"w": jnp.ones((3, 2))}
    >>> tx = ivon_jax.evon(learning_rate=0.1, ess=1000)
    >>> opt_state = tx.init(params)
    >>> theta = ivon_jax.sample(jax.random.key(0), params, opt_state)
    >>> grads = jax.grad(lambda theta: jnp.mean(theta["w"] ** 2))(theta)
    >>> updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
    >>> params = optax.apply_updates(params, updates)

    The bases are the identity until the first gradient that is not zero; then
    eigenvectors are calculated once. Every `basis_every` steps one power iteration,
    :math:`Q \leftarrow \mathrm{qr}(L Q)`, follows the statistics. The momentum is
    turned with the basis; h stays where it is, as in SOAP: its average forgets. Under
    `jax.vmap` over runs every step computes new bases, and drops most of them.

    Args:
      learning_rate: :math:`\alpha`, as are `ess`, `hess_init` and `b1` those of `ivon`.
      ess: :math:`\lambda`, the number of training examples.
      hess_init: :math:`h_0`.
      b1: :math:`\beta_1`.
      b2: :math:`\beta_2`, of h. It must have time to move: ``1 / (1 - b2)`` steps are
        a small part of the run.
      weight_decay: :math:`\delta`, per example; it is the same in all bases.
      basis_every: steps between power iterations.
      basis_decay: :math:`\beta_3`, of the statistics L and R; None is `b2`.
      orthogonalize: make the singular values of each matrix's step about one, by five
        Newton-Schulz iterations as in Muon, and the norm of each other array's.
      hess_clip: c, more than one, clips :math:`\hat h` to :math:`\pm c \, h`, entry by
        entry; 1.2 to 2 steadies runs with few examples. None does not clip.
      prior: a Gaussian in the place of `weight_decay`'s, as for `ivon`, also in bases
        of its own: yesterday's posterior. Its whole precision pulls the mean; its
        diagonal in the present basis is added to h, which is the best there is for a
        posterior that is diagonal there. While the basis turns, that sum stays.
      rescale_lr: multiply the learning rate by ``hess_init + weight_decay``, as `ivon`
        does; None does so unless `orthogonalize`.
      max_side: sides of a matrix beyond this length stay as they are; None is 10,000.
        Each of the others needs memory for two square matrices.
      stacked: a tree of booleans, or a prefix of one: whether the first axis of an
        array stacks layers, as in a scan over them, each with a basis of its own.
        Besides it, arrays of two axes are matrices, and those of four convolutions of
        shape (H, W, in, out), matrices with H W in rows. All others stay diagonal.

    Returns:
      A transformation as `ivon`'s. ``hess=`` and `Estimate` are of the Hessian's
      diagonal in the present bases, as `value_and_grad` estimates it.

    Raises:
      TypeError, ValueError: an argument is of the wrong kind or out of range.

    References:
      Minut et al., SOAP-Bubbles, 2026, https://arxiv.org/abs/2606.23357
      Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, ICLR 2025,
      https://arxiv.org/abs/2409.11321
    """
    step = transform.learning_rate_of(learning_rate, ess)
    rule = scale_by_evon(
        ess,
        hess_init=hess_init,
        b1=b1,
        b2=b2,
        weight_decay=weight_decay,
        basis_every=basis_every,
        basis_decay=basis_decay,
        orthogonalize=orthogonalize,
        hess_clip=hess_clip,
        prior=prior,
        max_side=max_side,
        stacked=stacked,
    )
    rules = [rule]
    if rescale_lr is None:
        rescale_lr = not orthogonalize
    if _checks.boolean("rescale_lr", rescale_lr):
        rules.append(transform.rescaled(hess_init, weight_decay, prior))
    return transform.in_params_dtype(optax.chain(*rules, step), EVONState)


def _with_prior(state, params, coordinates):
    """IVON's state with a diagonal prior of coordinates that does what `prior` does.

    Its precision is the diagonal of the prior's in the basis, and its mean lies where
    it pulls at the coordinates as the prior does: with its precision times the
    distance.
    """
    if state.prior is None:
        return state.ivon
    p = state.prior
    pull = into(state.bases, p.precision_times(p.deviation(params)))

    def mean(basis, own_basis, own_mean, x, pull, diagonal):
        if not (basis.turns or own_basis.turns):
            return own_mean
        # A precision of zero has a row of zeros: nothing pulls.
        nonzero = diagonal > 0
        distance = pull / jnp.where(nonzero, diagonal, jnp.ones_like(pull))
        return x - jnp.where(nonzero, distance, jnp.zeros_like(pull))

    diagonal = state.ivon.prior.precision
    means = map_bases(mean, state.bases, p.bases, p.mean, coordinates, pull, diagonal)
    return state.ivon._replace(prior=Posterior(means, diagonal))


def _with_pull(state, params, grads):
    r"""The gradient of all that is minimised, :math:`G + \delta M`, wide.

    That of the loss alone is not zero on average where the prior pulls, and would turn
    the directions of which the data say little. It stays zero where the loss's is: a
    layer that has no gradient yet has no basis yet.
    """
    p, ess = state.prior, state.ess
    if p is None:
        q = state.ivon.prior_of(params)
        pull = q.precision_times(params)
    else:
        pull = p.precision_times(p.deviation(params))

    def total(grad, pull):
        grad = jnp.asarray(grad, pull.dtype)
        return jnp.where(grad == 0, grad, grad + pull / ess.astype(pull.dtype))

    return jax.tree.map(total, grads, pull)


def _next_bases(state, grads, basis_every, b3):
    """The state with `grads` in its statistics, and in new bases where that is due."""

    def average(_, statistic, grad):
        return eigenbasis.next_statistic(statistic, grad, b3)

    statistics = map_bases(average, state.bases, state.statistics, grads)
    bases, inner = eigenbasis.renewed(
        *(state.bases, state.statistics, statistics),
        due=state.count % jnp.asarray(basis_every, state.count.dtype) == 0,
        stay=(state.bases, state.ivon),
        turned=functools.partial(_turned, state),
    )
    return state._replace(
        flat_bases=flat_like(bases, state.hess),
        flat_statistics=flat_like(statistics, state.hess),
        ivon=inner,
    )


def _turned(state, bases):
    """Other bases, and IVON's state in them: the same momentum, and precisions."""
    momentum = into(bases, out_of(state.bases, state.momentum))
    inner = state.ivon._replace(momentum=momentum)
    if state.prior is None:
        return bases, inner
    diagonal = state.prior.seen_from(bases).precision_diagonal
    before = inner.weight_decays
    inner = inner._replace(prior=inner.prior._replace(precision=diagonal))

    def hess(h, before, after):
        return _update_rules.in_range(h + (before - after), after)

    h = jax.tree.map(hess, inner.hess, before, inner.weight_decays)
    return bases, inner._replace(hess=h)


def _clip(factor):
    """Clip to `factor` times h what is finite: what is not must be seen."""

    def clipped(hess_hat, h):
        largest = jnp.asarray(factor, h.dtype) * jnp.abs(h)
        hess_hat = jnp.asarray(hess_hat, h.dtype)
        bounded = jnp.clip(hess_hat, -largest, largest)
        return jnp.where(jnp.isfinite(hess_hat), bounded, hess_hat)

    return clipped


def _number_of_steps(name, value):
    """Return a number of steps; an array where optax has injected one."""
    if isinstance(value, jax.Array):
        return _checks.number(name, value, _checks.at_least(1))
    _checks.integer_between(name, value, 1)
    return int(value)
