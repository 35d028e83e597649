"""The optimizers of the paper's GPT-2 runs, and one step of training with them."""

import functools
import sys

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import ivon_jax


def create_optimizer(config):
    """Return the paper's optimizers: weight decay on matrices alone."""
    if config.optimizer == "ivon":
        kwargs = dict(
            learning_rate=schedule(config.ivon_lr, config),
            ess=config.ivon_ess,
            hess_init=config.ivon_hess_init,
            b1=config.ivon_b1,
            b2=config.ivon_b2,
            clip_radius=config.ivon_clip_radius,
            rescale_lr=False,
        )
        groups = {
            "matrix": ivon_jax.ivon(weight_decay=config.ivon_weight_decay, **kwargs),
            "vector": ivon_jax.ivon(weight_decay=0.0, **kwargs),
        }
        return optax.partition(groups, kinds)
    adamw = optax.adamw(
        schedule(config.adamw_lr, config),
        b1=config.adamw_b1,
        b2=config.adamw_b2,
        weight_decay=config.adamw_weight_decay,
        mask=lambda params: jax.tree.map(lambda kind: kind == "matrix", kinds(params)),
    )
    return optax.chain(optax.clip_by_global_norm(config.max_norm), adamw)


def kinds(params):
    """Tell matrices from the vectors that scale after a normalisation."""

    def kind(path, _):
        names = [getattr(entry, "key", None) for entry in path]
        return "vector" if "scale" in names else "matrix"

    return jax.tree_util.tree_map_with_path(kind, params)


def schedule(peak, config):
    """Return a warm-up from zero and a cosine to zero."""
    warmup = min(config.warmup, config.steps // 10)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.steps)


def create_grad_fn(loss_fn, config, mesh):
    """Return (key, params, opt_state, tokens) -> loss, what the optimizer needs."""
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % (config.microbatches * replicas):
        sys.exit(
            "`--batch_size` must be a multiple of `--microbatches` "
            f"{config.microbatches} times the {replicas} devices that share it, got "
            f"{config.batch_size}."
        )
    if config.optimizer == "adamw":
        return accumulated_grad(loss_fn, config.microbatches)
    dtype = jnp.dtype(config.dtype)
    grad_fn = functools.partial(
        ivon_jax.value_and_grad,
        loss_fn,
        mc_samples=config.mc_samples,
        microbatches=config.microbatches,
        grad_transform=optax.clip_by_global_norm(config.max_norm),
        compute_dtype=dtype,
    )
    if config.noise == "shared":
        return grad_fn()
    # What devices send each other has the dtype of the computation, as with AdamW.
    reduce_dtypes = dict.fromkeys(("grad_reduce_dtype", "hess_reduce_dtype"), dtype)
    return jax.shard_map(
        grad_fn(axis_name="data", **reduce_dtypes),
        mesh=mesh,
        in_specs=(P(), P(), P(), P("data")),
        out_specs=P(),
        axis_names={"data"},  # the others stay automatic
        check_vma=False,  # jax 0.12 cannot check the derivative of GELU
    )


def accumulated_grad(loss_fn, count):
    """Return the same for an optimizer that takes gradients at the parameters."""

    def grad_fn(key, params, opt_state, tokens):
        del key, opt_state

        def add(total, part):
            result = jax.value_and_grad(loss_fn)(params, part)
            return jax.tree.map(lambda a, b: a + b / count, total, result), None

        if count == 1:
            return jax.value_and_grad(loss_fn)(params, tokens)
        parts = tokens.reshape(-1, count, tokens.shape[1]).swapaxes(0, 1)
        zeros = jnp.zeros([]), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, parts)[0]

    return grad_fn


def compiler_options(platform):
    """Return what `jax.jit` should tell the compiler of a platform.

    Where one axis cuts the batch and the parameters, XLA for TPUs makes of each matrix
    product a loop over the axis, of pieces too small for the chip. So it gathers the
    parameters of a layer instead.
    """
    options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    return options if platform == "tpu" else None


def create_train_step(loss_fn, tx, config, mesh):
    """Return (params, opt_state, tokens, key) -> params, opt_state, loss."""
    grad_fn = create_grad_fn(loss_fn, config, mesh)

    def train_step(params, opt_state, tokens, key):
        loss, grads = grad_fn(key, params, opt_state, tokens)
        extra = {}
        if isinstance(grads, ivon_jax.Estimate):
            grads, extra["hess"] = grads
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, loss

    return train_step
