r"""Is this run healthy? Numbers to log while IVON trains, and advice in plain words.

`measure` is pure, for ``jax.jit`` and a logger; `advice` reads its numbers on the host;
`diagnose` is both. `check_step` takes your training step, before a run, and says which
mistakes are in it. Symbols are Algorithm 1's. Sums, means and medians go over the P
entries that IVON owns, each with its own prior, :math:`N(m_0, 1 / (\lambda\delta))`.
Curvatures and losses are per example, losses in nats. From the state alone:

* ``count``, ``ess``, ``weight_decay``, ``num_params``: t, :math:`\lambda` and
  :math:`\delta` (the least t, and means over entries, if there are several) and P.
* ``non_finite``: the share of m, h and g that is NaN or infinite. Healthy: 0.
* ``noise_to_weight``: :math:`\sqrt{\sum \sigma^2 / \sum m^2}`. Healthy: 1e-3 to 0.7,
  where a third of a sample's squared norm is noise. The paper's GPT-2 starts at 0.02
  (noise 3e-4, weights 0.02), its ResNet-20 at about 0.2; small networks that learn
  have 0.05 to 0.6, those that don't 0.8 to 2.5, where it is not the weights that blew
  up.
* ``rounded``: the share of entries with :math:`\sigma < \epsilon |m|`, where the
  spacing :math:`\epsilon` of the parameter's dtype swallows the noise. Healthy: up to
  0.1; about 0 in float32.
* ``hess_median`` (the lower one), ``hess_min``, ``hess_max``: of h, "to see whether a
  reasonable covariance is being learned" (appendix A). ``hess_peak``: the largest over
  ``hess_init``. Healthy: up to 1e4. ``hess_negative``: the share with
  :math:`-\delta < h \leq 0`, where the posterior is as wide as the prior, or wider.
* ``hess_memory``: :math:`\beta_2^T`, the share of h that is still ``hess_init`` after T
  steps. Healthy: up to 0.9; the paper's runs end at 0.13 (ResNets on
  CIFAR, 200k steps), 0.29 (ImageNet), 0.37 (GPT-2), and 0.98 on the smallest GLUE set,
  where h stays what it began as. ``hess_half_life``: the steps in which it halves,
  :math:`-\ln 2 / \ln \beta_2 \approx \ln 2 / (1 - \beta_2)`.
* ``hess_drift``: the median of :math:`|h - h_0| / h_0`. ``hess_target``: the mean of h
  less what is left of h_0, :math:`(\bar h - \beta_2^t h_0) / (1 - \beta_2^t)`, to which
  h is on its way: the mean of the estimates.
* ``hess_spread``: the median distance of :math:`h / h_0` from its median, relative to
  that. Below 0.02 all are alike: standard deviations differ by a hundredth. In short
  runs they do, whatever the loss is, so that alone is no fault: ``felt_params``.
* ``hess_decayed``: the share of h that is just :math:`\beta_2^t h_0`, all alike: what
  estimates of zero leave, as where ``sample`` was the mean. Zero until a hundredth
  has decayed. Healthy: up to 0.99.
* ``hess_rounding``: the spacing of h's dtype over :math:`1 - \beta_2`. Healthy: below
  1, or h cannot move; 0.01 for float32 and the paper's 0.99999.
* ``effective_params``: MacKay's number of well-determined parameters,
  :math:`\gamma = \sum h / (h + \delta) = \sum (1 - \lambda\delta\sigma^2)`, with zero
  for entries of negative h; ``effective_share``: :math:`\gamma / P`.
* ``kl_divergence``: from the prior, in nats, of the data set; infinite if it is flat.
* ``clipped``: the share of the direction :math:`(\bar g + \delta (m - m_0)) / (h +
  \delta)` that ``clip_radius`` clips. Healthy: up to 0.9.

With a loss, from samples :math:`\theta \sim q`:

* ``loss_at_mean``, ``loss_at_samples``, and how much the latter is more, ``loss_gap``.
  Healthy: up to 0.5 nats. ``expected_gap``: :math:`\frac{1}{2} \sum \sigma^2 h`, the
  same for a quadratic loss with Hessian h, and :math:`\gamma / 2\lambda` where no h is
  negative. A gap far below it shows that h is rather ``hess_init`` than curvature.
* ``loss_gain``: how much less loss samples have than the prior's mean (weights of zero,
  or those that are fine-tuned). Healthy: from 0.01 nats on; less is what no training
  gives.
* ``felt_params``: twice ``loss_gap`` times :math:`\lambda`. For the posterior of a
  quadratic loss that is :math:`\gamma`, the number of parameters that the data
  determine. Healthy: from 1 on. Less, with an h that is alike everywhere, is an idle h:
  larger than the trace of the Hessian, so that samples do what the mean does. Small
  networks have 2 to 400, and 0.05 to 1.4 with a ``hess_init`` of 100 to 1000. It isn't
  judged at a loss below 0.01 nats, which has no curvature left.
* ``gradient_snr``: the squared norm of the mean gradient over the variance of one
  sample's, on this batch. It falls while training converges.
* ``zero_gradients``: the share of entries with a gradient of zero at all samples.
  Healthy: up to 0.9; inputs that the batch has not (rare words) have none either.
* ``correction_median``, ``correction_mean``: the term that keeps h positive over the
  step that it corrects, :math:`|s| / (2 (h + \delta))`, :math:`s = (1 - \beta_2)(\hat h
  - h)`, of one sample. Healthy: a mean up to 0.05, a tenth of the precision in a step.
* ``hess_noise``: how far the noise of :math:`\hat h` moves h in the long run, the
  median of :math:`\sqrt{(1 - \beta_2) / 2} |\hat h - h| / (h + \delta)`. Healthy: up
  to 0.3; the term above makes h about its square too large. With a batch of B it is
  some :math:`\sqrt{(1 - \beta_2) \lambda / 2B}`: on CIFAR-10 with B = 50, 0.7 at 0.999,
  of which appendix A warns, and 0.07 at 0.99999.

With probabilities of held-out examples, and their labels:

* ``nll_at_mean``, ``nll_of_samples``: the negative log-likelihood at the mean, and of
  probabilities averaged over samples. ``nll_excess``: how much more the latter is,
  less three standard errors, relative to the former. Healthy: up to 0.1;
  `ivon_jax.calibrate` makes it negative.
* ``accuracy``, ``confidence``: of averaged probabilities; ``confidence_gap``: by how
  much accuracy is above confidence, less three standard errors. Healthy: up to 0.1.

With the sizes of the training set and of a batch:

* ``ess_in_batches``: :math:`\lambda` over the number of batches: B where it is the
  number of examples, 1 where it is that of batches. Healthy: from 1.5 on. It is left
  out for batches of fewer than eight.

For a training step `check_step` has the following, and ``ess_in_batches``. It repeats
steps with one thing changed, and without noise where noise has no part in the question:

* ``state_moves``: by how much the count of IVON's state goes up. ``non_finite``: the
  share of m that is NaN or infinite after a step. ``no_gradient``: 1 where all
  gradients are zero. ``recompiled``: how many arrays come back as another kind.
* ``loss_scale``: how much larger the gradient is of a batch that is there twice: 1 of a
  mean, 2 of a sum. ``batch_effect``: how far the gradients of two halves are apart, by
  the mean of their norms. ``batch_coupling``: what the gradient F of halves a and b
  together has beyond F(a, a) and F(b, b), relative to its norm. Rounding is some 1e-7,
  batch normalisation some 0.1 to 1; healthy: up to 0.01.
* ``sample_noise``: the root mean square of :math:`(\theta - m) / \sigma`, as the
  optimizer was told: 1 of one sample, less of several, 0 where it was the mean.
  ``key_effect``: how far it is apart for two keys. ``sample_effect``: how far the
  gradient with noise is from that without. ``sample_error``: how far the gradient is
  from that at the sample that the optimizer was told, in units of the distance from
  that at the mean: some 1e-5 where both are of one theta, up to 0.3 where there are
  several, and more otherwise. Noise is on a few entries there, a tenth of the weights'
  root mean square.
* ``noise_in_params``: how far a step with next to no length moves the parameters, over
  the noise: 0, or 1 where theta took the mean's place.
* ``reach``: :math:`T \|u\| / \|m\|`, u the longest step of a schedule, or T of them in
  one direction: healthy from 0.01 on, as for fine-tuning. ``descent``: minus the cosine
  of the step and the gradient of the objective; steps go down, so 0 to 1.
  ``overshoot``: the curvature along a step times its length, over its limit for an
  averaged gradient, :math:`2 (1 + \beta_1) / (1 - \beta_1)`; healthy up to 1.

References: Shen et al., Variational Learning is Effective for Large Deep Networks, ICML
2024, appendix A; MacKay, Bayesian Interpolation, 1992.
"""

from ._advice import (
    HEALTHY as HEALTHY,
    HEALTHY_STEP as HEALTHY_STEP,
    Diagnosis as Diagnosis,
    advice as advice,
)
from ._check_step import check_step as check_step
from ._diagnose import diagnose as diagnose, measure as measure
