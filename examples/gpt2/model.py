"""GPT-2 without biases, and where its parameters lie on a mesh of devices."""

import dataclasses
import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a network."""

    layers: int
    heads: int
    width: int


SIZES = {
    "tiny": Size(layers=4, heads=4, width=128),
    "small": Size(layers=12, heads=12, width=768),
    "medium": Size(layers=24, heads=16, width=1024),
    "large": Size(layers=36, heads=20, width=1280),
}


class Block(nnx.Module):
    """Attention, then two layers, each normalised before and added to its input."""

    def __init__(self, size, dtype, rngs):
        heads = size.heads, size.width // size.heads
        init = nnx.initializers.normal(0.02)
        last = nnx.initializers.normal(0.02 / math.sqrt(2 * size.layers))
        kwargs = dict(use_bias=False, dtype=dtype, rngs=rngs)
        norm = functools.partial(nnx.LayerNorm, size.width, epsilon=1e-5, **kwargs)
        linear = functools.partial(nnx.LinearGeneral, **kwargs)
        self.norm1, self.norm2 = norm(), norm()
        self.qkv = linear(size.width, (3, *heads), kernel_init=init)
        self.out = linear(heads, size.width, axis=(-2, -1), kernel_init=last)
        self.up = linear(size.width, 4 * size.width, kernel_init=init)
        self.down = linear(4 * size.width, size.width, kernel_init=last)

    def __call__(self, x):
        """Map (B, T, width) to the same shape."""
        q, k, v = jnp.moveaxis(self.qkv(self.norm1(x)), -3, 0)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x)), approximate=False))


class GPT(nnx.Module):
    """GPT-2 without biases; the embeddings are the last layer, too."""

    def __init__(self, config, vocabulary, rngs):
        size, dtype = SIZES[config.size], jnp.dtype(config.dtype)
        init = nnx.initializers.normal(0.02)
        kwargs = dict(embedding_init=init, dtype=dtype, rngs=rngs)
        self.tokens = nnx.Embed(vocabulary, size.width, **kwargs)
        self.positions = nnx.Embed(config.block, size.width, **kwargs)
        self.norm = nnx.LayerNorm(
            size.width, epsilon=1e-5, use_bias=False, dtype=dtype, rngs=rngs
        )
        # One layer's arrays stacked on the others', to compile a single one.
        create = nnx.vmap(lambda rngs: Block(size, dtype, rngs))
        self.blocks = nnx.split_rngs(splits=size.layers)(create)(rngs)
        self.remat = config.remat

    def __call__(self, tokens):
        """Map tokens (B, T) to logits (B, T, vocabulary) of the next ones."""
        graphdef, layers = nnx.split(self.blocks)

        def apply(x, layer):
            return batch_sharded(nnx.merge(graphdef, layer)(x)), None

        apply = jax.checkpoint(apply) if self.remat else apply
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        x, _ = jax.lax.scan(apply, batch_sharded(x), layers)
        return batch_sharded(self.tokens.attend(self.norm(x)))


# The mesh: each replica ("data") has a part of the batch, and all parameters; "fsdp"
# cuts both; "model" cuts heads and hidden units (tensor parallel), not the batch.
AXES = ("data", "fsdp", "model")
PARAMETER_AXES = {
    "tokens": P(("fsdp", "model")),
    "qkv": P(None, "fsdp", None, "model"),
    "out": P(None, "model", None, "fsdp"),
    "up": P(None, "fsdp", "model"),
    "down": P(None, "model", "fsdp"),
}


def create_mesh(text):
    """Return the mesh of a text such as ``data=4,model=2``."""
    if text:
        pairs = [pair.partition("=") for pair in text.split(",")]
        sizes = {name.strip(): int(n) if n.isdigit() else 0 for name, _, n in pairs}
        twice = len(sizes) < len(pairs)
    else:
        sizes, twice = {"data": jax.device_count()}, False
    count = math.prod(sizes.values())
    if twice or set(sizes) - set(AXES) or count != jax.device_count():
        sys.exit(
            f"`--mesh` must be sizes of {', '.join(AXES)}, each once, whose product is "
            f"the number of devices, {jax.device_count()}, such as "
            f"data={jax.device_count()}. Got {text!r}."
        )
    shape = [sizes.get(name, 1) for name in AXES]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_shardings(params, mesh):
    """Return a tree like `params` of where each array lies."""

    def sharding(path, x):
        names = [str(getattr(entry, "key", "")) for entry in path]
        specs = [PARAMETER_AXES[name] for name in names if name in PARAMETER_AXES]
        result = NamedSharding(mesh, specs[0] if specs else P())
        try:
            result.shard_shape(x.shape)
        except ValueError:
            sys.exit(
                f"`--mesh` cannot cut {'/'.join(names)}, of shape {x.shape}, along "
                f"{result.spec} with {dict(mesh.shape)}. Take a size of model that "
                "divides the heads, and one of fsdp that divides the width."
            )
        return result

    return jax.tree_util.tree_map_with_path(sharding, params)


def batch_sharded(x):
    """Keep the first axis on the devices of the batch; the others are free."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if name != "model" and kind == AxisType.Auto and mesh.shape[name] > 1
    )
    free = (P.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, P(axes, *free)) if axes else x


def create_network(key, config, vocabulary, mesh):
    """Return the network's definition, and its parameters where they belong."""

    def create(key):
        return GPT(config, vocabulary, nnx.Rngs(key))

    graphdef, shapes = nnx.split(nnx.eval_shape(create, key))
    shardings = parameter_shardings(shapes, mesh)
    init = jax.jit(lambda key: nnx.state(create(key)), out_shardings=shardings)
    return graphdef, init(key)


def create_losses(graphdef):
    """Return the mean loss, and the probability of each token (B, T), of sequences."""

    def losses(params, tokens):
        logits = nnx.merge(graphdef, params)(tokens[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])

    def loss_fn(params, tokens):
        return losses(params, tokens).mean()

    def probs_fn(params, tokens):
        return jnp.exp(-losses(params, tokens))

    return loss_fn, probs_fn


def write_text(graphdef, params, prompt, config, key):
    """Return tokens: the prompt, and `config.write` more drawn one after the other."""
    prompt = prompt[-(config.block - 1) :]
    length = min(len(prompt) + config.write, config.block)
    texts = np.zeros((jax.device_count(), length), np.int32)  # each device has a text
    texts[:, : len(prompt)] = prompt

    @functools.partial(jax.jit, out_shardings=P())
    def write(params, texts, key):
        def append(i, texts):
            logits = nnx.merge(graphdef, params)(texts)[:, i - 1].astype(jnp.float32)
            token = jax.random.categorical(jax.random.fold_in(key, i), logits)
            return texts.at[:, i].set(token)

        return jax.lax.fori_loop(len(prompt), length, append, texts)

    return np.asarray(write(params, texts, key))[0]
