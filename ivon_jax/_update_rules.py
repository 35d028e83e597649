r"""The equations of IVON (Shen et al., 2024, Algorithm 1), one array at a time.

The paper's symbols are :math:`m` for the posterior mean (the parameters),
:math:`h` for the Hessian diagonal, :math:`g` for the momentum, :math:`\sigma` for
the posterior's standard deviation, :math:`\lambda` for the effective sample size
``ess``, and :math:`\delta` for the weight decay. Gradients and Hessians are those of
the *mean* loss per example. Every array of one call has one floating-point dtype;
scalars are Python numbers or of that dtype.

Reference: Shen et al., Variational Learning is Effective for Large Deep Networks,
ICML 2024, https://arxiv.org/abs/2402.17641
"""

import jax.numpy as jnp

LARGEST_HESS = 1e15  # no curvature: sigma is below 1e-7 of a weight for any ess


def precision(hess, ess, weight_decay):
    r"""Line 8: posterior precision :math:`1 / \sigma^2 = \lambda (h + \delta)`.

    ``ess`` turns the curvature per example, `hess`, into that of the data set. The
    prior is the Gaussian of mean zero and precision :math:`\lambda \delta`.

    >>> precision(3.0, ess=100, weight_decay=1.0)
    400.0
    """
    return ess * (hess + weight_decay)


def perturbation(noise, precision):
    r"""Line 2: :math:`\theta - m = \sigma \epsilon`, for standard normal `noise`.

    >>> print(perturbation(noise=2.0, precision=4.0))
    1.0
    """
    return noise / jnp.sqrt(precision)


def hess_estimate(grad, perturbation, precision):
    r"""Line 3: :math:`\hat h = \hat g \cdot (\theta - m) / \sigma^2`.

    By Stein's identity its mean over :math:`\theta \sim q` is the Hessian diagonal of
    the loss smoothed by `q`, for the price of one product. It exists where the loss
    itself has no second derivative (ReLU), and a single draw may be negative.

    >>> hess_estimate(grad=0.5, perturbation=-0.1, precision=400.0)
    -20.0
    """
    return grad * perturbation * precision


def hess_estimate_of_noise(grad, noise, precision):
    r"""Line 3 from standard normal noise: :math:`\hat h = \hat g \epsilon / \sigma`.

    >>> print(hess_estimate_of_noise(grad=0.5, noise=-2.0, precision=400.0))
    -20.0
    """
    return grad * noise * jnp.sqrt(precision)


def squared_gradient(grad):
    r"""The squared gradient :math:`\hat g^2`, for line 3's :math:`\hat h`.

    Of one example's gradient it is the Gauss-Newton term of Eq. 2; of a mini-batch's
    mean gradient it is the cheap, biased stand-in of RMSprop and Adam.

    >>> squared_gradient(-3.0)
    9.0
    """
    return grad**2


def next_momentum(momentum, grad, b1):
    r"""Line 4: :math:`g \leftarrow \beta_1 g + (1 - \beta_1) \hat g`.

    >>> next_momentum(1.0, grad=3.0, b1=0.5)
    2.0
    """
    return b1 * momentum + (1.0 - b1) * grad


def next_hess(hess, hess_hat, b2, weight_decay):
    r"""Line 5: average `hess_hat` into `hess` without ever losing positivity.

    .. math::
        h \leftarrow h + s + \frac{s^2}{2 (h + \delta)},
        \qquad s = (1 - \beta_2)(\hat h - h)

    The last term, from Riemannian gradient descent (Lin et al., 2020, Theorem 1), is
    what a plain moving average lacks. With :math:`p = h + \delta` and :math:`r = s / p`
    the rule reads :math:`p \leftarrow p (1 + (1 + r)^2) / 2`: one step at most halves
    the precision, however negative :math:`\hat h` is.

    The increment is added to `hess`, because in float32 a product with
    :math:`\beta_2 = 0.99999` would round most of it away.

    >>> print(next_hess(1.0, hess_hat=-10.0, b2=0.9, weight_decay=0.0))
    0.505
    """
    lowest = _lowest(jnp.result_type(hess), weight_decay)
    hess = in_range(hess, weight_decay)
    step = (1.0 - b2) * (hess_hat - hess)
    change = step * (1.0 + 0.5 * step / (hess + weight_decay))
    # A sum comes last, not a clip: XLA repeats a clip wherever its result is used, and
    # then both the old and the new `hess` need memory.
    return hess + jnp.clip(change, lowest - hess, LARGEST_HESS - hess)


def usable(hess, hess_hat, b2, weight_decay):
    r"""Whether line 5 can take `hess_hat`, entry by entry.

    Not where it is NaN or infinite, nor where line 5 would carry :math:`h` beyond
    `LARGEST_HESS`: its square makes of a single wild gradient a precision from which
    the moving average does not come back in any run.

    >>> print(usable(hess=1.0, hess_hat=1e17, b2=0.99999, weight_decay=0.0))
    False
    """
    hess = in_range(hess, weight_decay)
    step = (1.0 - b2) * (hess_hat - hess)
    precision = hess + weight_decay
    # Line 5 times the precision: a division would be too dear for XLA to repeat it
    # wherever the answer is used. A comparison with NaN is not true.
    change, largest = step * (precision + 0.5 * step), (LARGEST_HESS - hess) * precision
    return change <= largest


def in_range(hess, weight_decay):
    r"""Return :math:`h` where the precision and its inverse are finite in floats.

    >>> print(in_range(-3.0, weight_decay=1.0) > -1.0)
    True
    """
    return jnp.clip(hess, _lowest(jnp.result_type(hess), weight_decay), LARGEST_HESS)


def _lowest(dtype, weight_decay):
    """Return the least `hess` of which the precision has an inverse in floats.

    Repeated halving would round the sum to zero, and a smaller `weight_decay` than
    before could make it negative.
    """
    info = jnp.finfo(dtype)
    return float(info.tiny) ** 0.5 - (1.0 - float(info.eps)) * weight_decay


def debiased(momentum, b1, count):
    r"""Line 6: :math:`\bar g = g / (1 - \beta_1^t)`, the mean of `count` gradients.

    The momentum starts at zero and needs this; the Hessian starts at ``hess_init``,
    a belief of its own, and is never debiased.

    >>> print(debiased(0.5, b1=0.5, count=1))
    1.0
    """
    return momentum / (1.0 - b1**count)


def direction(momentum, mean, hess, weight_decay):
    r"""Line 7: the Newton-like direction :math:`(\bar g + \delta m) / (h + \delta)`.

    Unlike Adam's there is no square root: `hess` is a curvature, not a squared
    gradient, and :math:`\delta m` is the gradient of the prior.

    >>> direction(momentum=1.0, mean=2.0, hess=1.0, weight_decay=1.0)
    1.5
    """
    return (momentum + weight_decay * mean) / (hess + weight_decay)
