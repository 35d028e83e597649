"""Train GPT-2 from scratch with IVON or AdamW, on one device, a pod, or many hosts.

    python examples/gpt2.py                        # tiny, on Python's own source code
    python examples/gpt2.py --optimizer adamw --checkpoint_dir checkpoints/adamw
    python examples/gpt2.py --data shakespeare.txt --checkpoint_dir checkpoints/shakes
    python examples/gpt2.py --size small --data openwebtext    # GPT-2 124M, the paper's

Any text does, byte by byte. The last line is the paper's run (section 4.1.1): 124M
parameters (`--size medium` and `large` are 355M and 773M) without biases, in bfloat16
over float32 parameters, 100,000 steps of 480 sequences of 1,024 tokens, cut into
micro-batches with noise of their own, whose gradients are clipped to norm 1 before the
product with it. Learning rates are the paper's, not rescaled (its scripts have 300
instead of 0.3, times hess_init 0.001), ess is 1e10 as in its scripts. `--data` is a
folder with `train.bin` and `val.bin`, tokens as nanoGPT writes them. The tiny network
has learning rates of its own grid.

Many devices: `--mesh data=4,fsdp=2,model=2` for 16. "data" is replicas, "fsdp" cuts
batch and parameters, "model" cuts the layers (tensor parallel). With `--noise replica`
each replica of "data" has a sample of its own, as in the paper: then lower
`--microbatches` as much. Simulate devices with `--cpu_devices 8`.

Many hosts: the same command on each. `--distributed auto` on TPU pods and under Slurm;
elsewhere `--distributed HOST:PORT --num_processes N --process_id I`, with host and port
of process 0. If one is lost, the others stop within `--heartbeat_seconds` and say
"another task died". Start all of them again: the same command goes on from the last
checkpoint, on any number of devices and hosts. A damaged checkpoint is named and moved
aside for the one before.

It prints the validation perplexity (of bytes, or of tokens) at the mean and averaged
over posterior samples, and a text; draws both; and takes 3 minutes for the tiny network
on two CPU cores. See benchmarks/README.md for IVON beside AdamW.

Toy size: `--steps 4 --batch_size 8 --microbatches 2 --block 32 --num_samples 2`
"""

import dataclasses
import functools
import importlib
import math
import os
import pathlib
import sys
import sysconfig
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from matplotlib.figure import Figure
from tqdm import tqdm

import ivon_jax

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
from common import checkpoints, flags
from common.flags import Count, Fraction, Picture, Positive, Seed, Switch, Text


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
# What the paper's runs did differently for each size; flags override it.
PRESETS = {
    "tiny": dict(
        steps=1000,
        warmup=100,
        batch_size=16,
        microbatches=1,
        block=128,
        eval_every=100,
        dtype="float32",
        ivon_lr=3.0,
        ivon_b1=0.7,
        ivon_hess_init=0.03,
        ivon_ess=1e8,
        adamw_lr=0.01,
    ),
    "small": dict(ivon_lr=0.3, microbatches=24),
    "medium": dict(ivon_lr=0.2, microbatches=40),
    "large": dict(ivon_lr=0.15, microbatches=120),
}
ROWS = {"ivon": "IVON@mean", "adamw": "AdamW"}
CHOICES = {
    "size": SIZES,
    "optimizer": ROWS,
    "noise": ("shared", "replica"),
    "dtype": ("float32", "bfloat16"),
}
# These may differ between a checkpoint and the run that continues from it.
FREE = (
    "mesh",
    "num_samples",
    "eval_batches",
    "checkpoint_every",
    "max_to_keep",
    "checkpoint_dir",
    "plot",
    "prompt",
    "write",
    "distributed",
    "num_processes",
    "process_id",
    "cpu_devices",
    "heartbeat_seconds",
)


def check_address(text):
    """Reject what no process can be reached by."""
    host, _, port = text.rpartition(":")
    if text not in ("", "auto") and not (host and port.isdecimal()):
        raise ValueError("must be auto or HOST:PORT, such as localhost:1234")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    size: str = "tiny"
    optimizer: str = "ivon"
    data: str = ""  # a text, or a folder with train.bin and val.bin; or the library
    steps: Count = 100_000
    warmup: int = 2000  # steps, at most a tenth of them
    batch_size: Count = 480  # sequences a step, over all devices
    microbatches: Count = 24  # parts of the batch, one after the other; each has noise
    block: Annotated[int, flags.between(2)] = 1024  # tokens in a sequence
    dtype: str = "bfloat16"  # of the computation; parameters are float32
    remat: Switch = 0  # 1: keep the layers' inputs alone for the backward pass
    ivon_lr: float = 0.3
    ivon_ess: Positive = 1e10
    ivon_hess_init: Positive = 1e-3
    ivon_b1: Fraction = 0.9
    ivon_b2: Fraction = 0.99999
    ivon_clip_radius: Positive = 1e-3
    ivon_weight_decay: float = 1e-6
    adamw_lr: float = 6e-4
    adamw_b1: Fraction = 0.9
    adamw_b2: Fraction = 0.95
    adamw_weight_decay: float = 0.1
    max_norm: Positive = 1.0  # of gradients, for both
    seed: Seed = 0
    mesh: str = ""  # such as data=4,fsdp=2,model=2; otherwise all devices are data
    noise: str = "shared"  # one sample a step, or one for each "replica": data index
    eval_every: Count = 1000  # steps
    eval_batches: Count = 20
    num_samples: Count = 16  # of the posterior, for the table
    checkpoint_every: Count = 1000  # steps
    max_to_keep: Count = 2  # checkpoints
    checkpoint_dir: Text = "checkpoints/gpt2"
    plot: Picture = "gpt2.png"
    prompt: Text = "def "
    write: int = 200  # tokens to write after the prompt
    distributed: Annotated[str, check_address] = ""  # "auto", or HOST:PORT of the first
    num_processes: Count = 1
    process_id: int = 0
    cpu_devices: int = 0  # simulate so many in this process
    heartbeat_seconds: Count = 100  # how long a lost process may go unnoticed


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


class Tokens:
    """A long array of tokens, and batches of it that depend on the step alone."""

    def __init__(self, array, vocabulary, config, mesh):
        self.array, self.vocabulary, self.config = array, vocabulary, config
        self.sharding = NamedSharding(mesh, P(("data", "fsdp")))

    def random(self, step):
        """Return random sequences (batch_size, block + 1), the same on any mesh."""
        rng = np.random.default_rng((self.config.seed, step))
        last = len(self.array) - self.config.block
        return self._at(rng.integers(0, last, self.config.batch_size))

    def regular(self, index, count):
        """Return batch `index` of `count` at even distances."""
        last = len(self.array) - self.config.block - 1
        starts = np.linspace(0, last, count * self.config.batch_size, dtype=int)
        return self._at(starts[index::count])

    def _at(self, starts):
        """Read what this process's devices need."""
        length = self.config.block + 1

        def rows(index):
            slices = [self.array[i : i + length] for i in starts[index[0]]]
            return np.stack(slices).astype(np.int32)

        shape = len(starts), length
        return jax.make_array_from_callback(shape, self.sharding, rows)


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
    grad_fn = functools.partial(
        ivon_jax.value_and_grad,
        loss_fn,
        microbatches=config.microbatches,
        grad_transform=optax.clip_by_global_norm(config.max_norm),
        compute_dtype=jnp.dtype(config.dtype),
    )
    if config.noise == "shared":
        return grad_fn()
    return jax.shard_map(
        grad_fn(axis_name="data"),
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


def fit(config, mesh, state, loss_fn, tx, data, folder, key):
    """Train from the last checkpoint on; return (params, opt_state) and the log."""
    train, validation = data
    state, log, start = folder.restore(state)
    like_state = jax.tree.map(lambda x: x.sharding, state)
    train_step = jax.jit(
        create_train_step(loss_fn, tx, config, mesh),
        donate_argnums=(0, 1),
        out_shardings=(*like_state, None),  # shards stay where they are
    )
    mean_loss = jax.jit(loss_fn)
    progress = tqdm(
        range(start, config.steps),
        initial=start,
        total=config.steps,
        disable=jax.process_index() > 0,
    )
    begin, first = time.perf_counter(), start
    for step in progress:
        *state, loss = train_step(
            *state, train.random(step), jax.random.fold_in(key, step)
        )
        folder.check()
        done = step + 1
        if done % config.eval_every == 0 or done == config.steps:
            loss = float(loss)  # waits for the device
            seconds = time.perf_counter() - begin
            rate = (done - first) * config.batch_size * config.block / seconds
            mean_fn = functools.partial(mean_loss, state[0])
            perplexity = evaluate(mean_fn, validation, config)
            # A new list: the last one may be in the hands of Orbax.
            log = [
                *log,
                dict(
                    step=done,
                    tokens=done * config.batch_size * config.block,
                    loss=loss,
                    perplexity=perplexity,
                    tokens_per_second=rate,
                ),
            ]
            progress.set_postfix_str(
                f"loss {loss:.3f}, perplexity {perplexity:.3f}, {rate:,.0f} tokens/s"
            )
            begin, first = time.perf_counter(), done
        if done % config.checkpoint_every == 0 or done == config.steps:
            folder.save(done, tuple(state), log)
    return state, log


def evaluate(loss_fn, validation, config):
    """Return the perplexity, exp of the mean of `loss_fn` over validation batches."""
    count = config.eval_batches
    losses = [loss_fn(validation.regular(i, count)) for i in range(count)]
    return math.exp(np.mean([float(loss) for loss in losses]))


def posterior_perplexities(state, probs_fn, validation, config, key):
    """Return {number of samples: perplexity of the probabilities averaged over them}.

    Not the mean of the samples' perplexities: every token's probability is averaged.
    """

    @functools.partial(jax.jit, static_argnames="count")
    def loss(state, tokens, count):
        q = ivon_jax.posterior(*state)
        probs = ivon_jax.predict(lambda theta: probs_fn(theta, tokens), q, key, count)
        return -jnp.log(probs).mean()

    powers = range(config.num_samples.bit_length())
    counts = sorted({*(2**i for i in powers), config.num_samples})
    return {
        count: evaluate(lambda x, n=count: loss(state, x, n), validation, config)
        for count in counts
    }


def open_checkpoints(config, data):
    """Open the folder of checkpoints; they are written while training goes on."""
    arrays = [tokens.array for tokens in data]
    identity = checkpoints.identify(config, FREE, data=arrays)
    return checkpoints.Folder(config.checkpoint_dir, identity, config.max_to_keep)


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


def load_data(config):
    """Return tokens to train on, tokens to validate on, and their vocabulary's size."""
    try:
        if config.data and pathlib.Path(config.data).is_dir():
            splits, vocabulary = token_binaries(config.data), 50304
        else:
            texts = text_file(config.data) if config.data else library()
            splits, vocabulary = [np.frombuffer(text, np.uint8) for text in texts], 256
    except (OSError, ValueError) as error:
        sys.exit(
            "`--data` must be a text file, or a folder with `train.bin` and `val.bin`, "
            f"arrays of uint16 tokens; got {config.data!r}: {error}."
        )
    for name, tokens in zip(("training", "validation"), splits, strict=True):
        if len(tokens) < config.block + 2:
            sys.exit(
                f"`--data` has {len(tokens)} {name} tokens, too few for sequences of "
                f"`--block` {config.block}."
            )
        if (largest := int(tokens.max())) >= vocabulary:
            sys.exit(
                f"`--data` must have tokens below {vocabulary}, GPT-2's, got {largest}."
            )
    return *splits, vocabulary


def token_binaries(folder):
    """Open the files of nanoGPT, without reading them into memory."""
    names = "train.bin", "val.bin"
    return [np.memmap(pathlib.Path(folder) / name, np.uint16, "r") for name in names]


def text_file(path):
    """Read a text; its last twentieth is for validation."""
    text = pathlib.Path(path).read_bytes()
    cut = len(text) * 19 // 20
    return text[:cut], text[cut:]


def library():
    """Read the source of Python's standard library, every 20th file for validation."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts)
    texts = [path.read_bytes() for path in paths]
    train = [text for i, text in enumerate(texts) if i % 20]
    return b"".join(train), b"".join(texts[::20])


def decode(tokens, vocabulary):
    """Return text: of bytes, or of GPT-2's tokens if tiktoken is there to ask."""
    if vocabulary == 256:
        return bytes(tokens.tolist()).decode(errors="replace")
    try:
        return importlib.import_module("tiktoken").get_encoding("gpt2").decode(tokens)
    except (ImportError, OSError):
        return f"{tokens.tolist()} (install tiktoken to read it)"


def print_table(rows, log):
    """Print a line for each of {name: validation perplexity}."""
    last = log[-1]
    rate = f"{np.median([entry['tokens_per_second'] for entry in log]):,.0f}"
    print("|           | perplexity | tokens        | tokens/s   |")
    print("| --------- | ---------- | ------------- | ---------- |")
    for name, perplexity in rows.items():
        print(f"| {name:9} | {perplexity:10.3f} | {last['tokens']:13,} | {rate:>10} |")


def draw(path, log, averaged):
    """Draw perplexity over training, and over the number of posterior samples."""
    figure = Figure(figsize=(10, 3.8), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens = [entry["tokens"] for entry in log]
    train = [math.exp(entry["loss"]) for entry in log]
    left.plot(tokens, train, color="#999999", label="training, last batch")
    curve = [entry["perplexity"] for entry in log]
    left.plot(tokens, curve, "o-", color="#D55E00", label="validation, at the mean")
    left.set(xlabel="tokens", ylabel="perplexity", yscale="log")
    left.legend(frameon=False)
    right.axhline(curve[-1], color="#D55E00", label="mean")
    if averaged:
        samples = averaged.items()
        right.plot(*zip(*samples, strict=True), "o-", color="#0072B2", label="samples")
    right.set(xlabel="posterior samples", ylabel="validation perplexity")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def parse_args(args=None):
    """Return the Config of the command line; a flag overrides what the size says."""
    parser = flags.create_parser(Config, __doc__, **CHOICES)
    given = vars(parser.parse_args(args))
    preset = PRESETS[given.get("size", Config.size)]
    config = flags.checked(parser, Config(**preset | given))
    if config.process_id >= config.num_processes:
        parser.error(
            f"--process_id must be below --num_processes {config.num_processes}, got "
            f"{config.process_id}."
        )
    return config


def start_processes(config):
    """Join the other processes, if there are any."""
    if config.cpu_devices:
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    kwargs = dict(heartbeat_timeout_seconds=config.heartbeat_seconds)
    if config.distributed == "auto":
        try:
            jax.distributed.initialize(**kwargs)
        except ValueError as error:
            sys.exit(
                f"`--distributed auto` finds no cluster that JAX knows: {error} Pass "
                "HOST:PORT, `--num_processes` and `--process_id`."
            )
    elif config.distributed:
        jax.distributed.initialize(
            config.distributed, config.num_processes, config.process_id, **kwargs
        )


def run(config):
    """Train, or finish training; return rows of the table, log and averages."""
    mesh = create_mesh(config.mesh)
    train, validation, vocabulary = load_data(config)
    data = [Tokens(array, vocabulary, config, mesh) for array in (train, validation)]
    keys = jax.random.split(jax.random.key(config.seed), 4)
    init_key, train_key, predict_key, write_key = keys
    with jax.set_mesh(mesh), open_checkpoints(config, data) as folder:
        graphdef, params = create_network(init_key, config, vocabulary, mesh)
        loss_fn, probs_fn = create_losses(graphdef)
        tx = create_optimizer(config)
        state = params, tx.init(params)  # in shards, as the parameters are
        args = config, mesh, state, loss_fn, tx, data, folder, train_key
        state, log = fit(*args)
        rows, averaged = {ROWS[config.optimizer]: log[-1]["perplexity"]}, {}
        if config.optimizer == "ivon":
            args = state, probs_fn, data[1], config, predict_key
            averaged = posterior_perplexities(*args)
            rows["IVON"] = averaged[config.num_samples]
        prompt = config.prompt.encode() if vocabulary == 256 else validation[:16]
        text = write_text(graphdef, state[0], list(prompt), config, write_key)
    return rows, log, averaged, decode(text, vocabulary)


def main():
    """Train; print the table and a text, and draw the curves."""
    config = parse_args()
    start_processes(config)
    try:
        rows, log, averaged, text = run(config)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(
            f"Process {jax.process_index()} has lost another one and stops: {error}\n"
            "Start all of them again: they go on from the last checkpoint.",
            file=sys.stderr,
        )
        os._exit(1)  # without waiting for the lost one
    if jax.process_index() == 0:
        print(text)
        print_table(rows, log)
        draw(config.plot, log, averaged)


if __name__ == "__main__":
    with checkpoints.ends_at_once():
        main()
