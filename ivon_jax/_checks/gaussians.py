"""Distributions: whether they have what a function needs."""


def distribution(name, value, verb):
    """Reject what does not offer `verb`, or has values of no distribution."""
    if not hasattr(value, verb):
        raise TypeError(
            f"`{name}` must be a Posterior, one Gaussian, got {type(value).__name__}. "
            f"Pass `ivon_jax.{name}(params, opt_state)`."
        )
    if hasattr(value, "validate"):
        value.validate()


def posterior_to_sample(posterior):
    """Reject what has no samples, the parameters above all."""
    if not hasattr(posterior, "sample"):
        raise TypeError(
            f"`posterior` must be a posterior, got {type(posterior).__name__}. Pass "
            "`ivon_jax.posterior(params, opt_state)`."
        )
