"""What does IVON cost beside AdamW, SGD and Sophia: a training step, and the optimizer.

    python benchmarks/overhead.py             # 6 min on two CPU cores
    python benchmarks/overhead.py --full 1    # GPT-2 124M and 355M: for a GPU
    python benchmarks/overhead.py --models mlp --sizes 1e6 --rounds 3    # a look

Every round times all programs of a comparison one after the other, beginning with
another one each time. "time / AdamW" is the median over rounds of the ratio within a
round, with the quartiles: what else the machine does meanwhile cancels out. A time is
that of `--steps` steps, because Sophia estimates its Hessian in one step of ten.

Buffers are the peak memory of the compiled step, arguments included, in float32 arrays
of the parameters' size; "more" is beside AdamW. Passes are what its operations read and
write, in the same unit: XLA counts the body of a loop once, and caches may save some.

The last table has no network: nanoseconds per parameter of an update with given
gradients and sample, and of drawing the sample. With several samples the latter is all
of `value_and_grad` for a linear loss, which needs theta nowhere.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import resnet20
from common import flags, gpt2, programs, results, tables
from common.flags import Count, Results
from flax import nnx
from tqdm import tqdm
from zoo.resnet import ResNet

import ivon_jax


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    full: int = 0  # 1: the sizes below that are FULL's
    models: str = "gpt2-tiny,resnet20,mlp"
    dtype: str = "float32"  # of GPT-2's computation
    block: Count = 128  # tokens in a sequence
    vocabulary: Count = 256
    batch_sizes: str = "1,4,8"  # of GPT-2; the middle one is the first table's
    resnet_batch_size: Count = 16
    mlp_batch_size: Count = 128
    mlp_width: Count = 1024
    mc_samples: str = "1,2,4"
    keys: str = "threefry2x32,rbg,unsafe_rbg"
    sizes: str = "1e6,1e7,1e8"  # parameters of the optimizer alone
    arrays: str = "4,150"  # in how many arrays
    rounds: Count = 7
    steps: Count = 10  # in a round
    results: Results = "overhead.json"


FULL = dict(
    models="gpt2-small,gpt2-medium,resnet20,mlp",
    dtype="bfloat16",
    block=1024,
    vocabulary=50304,
    batch_sizes="4,16,32",
    resnet_batch_size=50,
    rounds=20,
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network to train: ``loss_fn(params, *batch)``, and the dtype it computes in."""

    name: str
    params: optax.Params
    loss_fn: callable
    batch: tuple
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer; the last two are for IVON and EVON."""

    name: str
    mc_samples: int = 1
    key: str = "threefry2x32"

    def create(self):
        """Return the transformation."""
        match self.name:
            case "AdamW":
                return optax.adamw(1e-4)
            case "SGD":
                return optax.sgd(1e-4, momentum=0.9)
            case "Sophia":
                return optax.contrib.sophia(1e-4)
            case "IVON":
                return ivon_jax.ivon(1e-4, ess=1e6)
            case "EVON":
                return ivon_jax.evon(1e-4, ess=1e6)


BASELINES = Optimizer("AdamW"), Optimizer("SGD"), Optimizer("Sophia")


def gpt2_problem(size, batch_size, config):
    """The network of examples/gpt2, on random tokens."""
    flags = dict(size=size, block=config.block, dtype=config.dtype)
    run = gpt2.parse_args([f"--{name}={value}" for name, value in flags.items()])
    rngs = nnx.Rngs(jax.random.key(0))
    graphdef, params = nnx.split(gpt2.GPT(run, config.vocabulary, rngs))
    shape = batch_size, config.block + 1
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocabulary)
    loss_fn, _ = gpt2.create_losses(graphdef)
    return Problem(f"gpt2-{size}", params, loss_fn, (tokens,), config.dtype)


def resnet_problem(config):
    """ResNet-20 with filter response normalisation of benchmarks/zoo."""
    model = ResNet(20, 16, 10, nnx.Rngs(jax.random.key(0)))
    shape = config.resnet_batch_size, 32, 32, 3
    images = jax.random.bits(jax.random.key(1), shape, jnp.uint8)
    return classifier("resnet20", model, images)


def mlp_problem(config):
    """Two hidden layers, on images of MNIST's size."""
    rngs, width = nnx.Rngs(jax.random.key(0)), config.mlp_width
    layers = nnx.Linear(784, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
    head = nnx.Linear(width, 10, rngs=rngs)
    model = nnx.Sequential(layers[0], nnx.relu, layers[1], nnx.relu, head)
    images = jax.random.uniform(jax.random.key(1), (config.mlp_batch_size, 784))
    return classifier("mlp", model, images)


def classifier(name, model, images):
    """A problem of ten classes with random labels."""
    graphdef, params = nnx.split(model)
    labels = jax.random.randint(jax.random.key(2), images.shape[:1], 0, 10)

    def loss_fn(params, images, labels):
        return resnet20.loss_fn(nnx.merge(graphdef, params), images, labels)

    return Problem(name, params, loss_fn, (images, labels))


def create_problem(name, config):
    """Return a problem of `--models`."""
    if name.startswith("gpt2-"):
        return gpt2_problem(name[5:], middle(numbers(config.batch_sizes)), config)
    return {"resnet20": resnet_problem, "mlp": mlp_problem}[name](config)


def training_step(problem, optimizer):
    """Return (params, opt_state, key, *batch) -> params, opt_state."""
    tx, loss_fn = optimizer.create(), problem.loss_fn

    def step(params, opt_state, key, *batch):
        extra = {}
        if optimizer.name in ("IVON", "EVON"):
            _, estimate = ivon_jax.value_and_grad(
                loss_fn,
                mc_samples=optimizer.mc_samples,
                compute_dtype=jnp.dtype(problem.dtype),
            )(key, params, opt_state, *batch)
            grads, extra["hess"] = estimate
        else:
            grads = jax.grad(loss_fn)(params, *batch)
        if optimizer.name == "Sophia":
            extra["obj_fn"] = lambda params: loss_fn(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    return step


def compiled(fn, *args, donate=()):
    """Compile, off the clock."""
    return jax.jit(fn, donate_argnums=donate).lower(*args).compile()


def paired_seconds(runs, rounds):
    """Return the seconds of each run in each round (rounds, runs)."""
    seconds = np.zeros((rounds, len(runs)))
    for i in range(-1, rounds):  # the first one warms up, and is overwritten
        for j in range(len(runs)):
            k = (i + j) % len(runs)
            begin = time.perf_counter()
            runs[k]()
            seconds[i, k] = time.perf_counter() - begin
    return seconds


def repeated(fn, carry, constants, count):
    """A run: `count` times ``carry = fn(*carry, *constants)``; the next goes on."""

    def run():
        nonlocal carry
        for _ in range(count):
            carry = fn(*carry, *constants)
        jax.block_until_ready(carry)

    return run


def compare(problem, optimizers, config, bar):
    """Return a row for each optimizer; the first is what the others are divided by."""
    runs, used, size = [], [], optax.tree.size(problem.params)
    for optimizer in optimizers:
        params = jax.tree.map(jnp.copy, problem.params)
        carry = params, jax.jit(optimizer.create().init)(params)
        constants = jax.random.key(3, impl=optimizer.key), *problem.batch
        step = training_step(problem, optimizer)
        step = compiled(step, *carry, *constants, donate=(0, 1))
        runs.append(repeated(step, carry, constants, config.steps))
        used.append((programs.peak_memory(step) / 4 / size, passes(step) / size))
        bar.update()
    seconds = paired_seconds(runs, config.rounds)
    rows = []
    for i, optimizer in enumerate(optimizers):
        buffer, words = used[i]
        ms = 1e3 * np.median(seconds[:, i]) / config.steps
        row = {"network": problem.name, "parameters": size}
        row |= {"batch": len(problem.batch[0]), "optimizer": label(optimizer)}
        row |= {"ms": ms, "time / AdamW": spread(seconds[:, i] / seconds[:, 0])}
        row |= {"buffers": buffer, "more": buffer - used[0][0], "passes": words}
        rows.append(row)
    return rows


DIGITS = {"time / AdamW": 2, "buffers": 2, "more": 2, "passes": 0}


ALONE = "AdamW, ns", "IVON's update", "its samples", "both", "both / AdamW"


def label(optimizer):
    """Name an optimizer, and what of it is not the default."""
    text = optimizer.name
    if optimizer.mc_samples > 1:
        text += f", {optimizer.mc_samples} samples"
    return text if optimizer.key == "threefry2x32" else f"{text}, {optimizer.key}"


def passes(step):
    """Memory traffic of all operations in float32 numbers."""
    return step.cost_analysis()["bytes accessed"] / 4


def spread(values):
    """Median and quartiles."""
    low, mid, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": mid, "low": low, "high": high}


def alone(size, arrays, key, mc_samples, config):
    """Return ns per parameter of AdamW's update, IVON's, its samples; and a ratio."""
    params, grads = (equal_arrays(size, arrays, value) for value in (0.1, 0.01))
    size, count = optax.tree.size(params), max(1, round(1e7 / size))
    adamw, ivon = Optimizer("AdamW").create(), Optimizer("IVON").create()
    constants = jax.random.key(0, impl=key), params, ivon.init(params)

    def hess_estimate(*args):
        def linear(theta):
            return optax.tree.vdot(theta, grads)

        grad_fn = ivon_jax.value_and_grad(linear, mc_samples=mc_samples)
        return grad_fn(*args)[1].hess

    draw = ivon_jax.sample if mc_samples == 1 else hess_estimate
    draw = compiled(draw, *constants)
    extra = {"sample" if mc_samples == 1 else "hess": draw(*constants)}
    runs = [
        updates_in_place(adamw, params, grads, {}, count),
        updates_in_place(ivon, params, grads, extra, count),
        repeated(lambda *_: draw(*constants), (), (), count),
    ]
    seconds = paired_seconds(runs, 3 * config.rounds) / count
    both = seconds[:, 1] + seconds[:, 2]
    times = 1e9 / size * np.median(np.column_stack([seconds, both]), axis=0)
    return *times, spread(both / seconds[:, 0])


def equal_arrays(size, arrays, value):
    """About `size` numbers."""
    shape = round(size / arrays / 128), 128
    return [jnp.full(shape, value) for _ in range(arrays)]


def updates_in_place(tx, params, grads, extra, count):
    """A run of updates with given gradients and sample, or Hessian estimate."""

    def update(params, opt_state, grads, extra):
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    carry, constants = (jax.tree.map(jnp.copy, params), tx.init(params)), (grads, extra)
    step = compiled(update, *carry, *constants, donate=(0, 1))
    return repeated(step, carry, constants, count)


def numbers(text):
    """Return the numbers of a text such as ``1,2,4``."""
    return [int(float(x)) for x in text.split(",")]


def middle(values):
    """Return the one in the middle."""
    return values[len(values) // 2]


def variations(name, config):
    """Comparisons of GPT-2: batch size by samples, then the random keys."""
    size, samples = name[5:], numbers(config.mc_samples)
    ivons = [Optimizer("IVON", mc_samples=s) for s in samples]
    sizes = numbers(config.batch_sizes)
    cases = [(n, [BASELINES[0], *ivons]) for n in sizes]
    keys = [Optimizer("IVON", key=key) for key in config.keys.split(",")]
    cases.append((middle(sizes), [BASELINES[0], *keys]))
    return [(functools.partial(gpt2_problem, size, n, config), o) for n, o in cases]


def cases_alone(config):
    """Return (parameters, arrays, key, samples): one thing at a time changes."""
    sizes, keys = numbers(config.sizes), config.keys.split(",")
    samples, base = numbers(config.mc_samples), middle(sizes)
    few, *more = numbers(config.arrays)
    return [
        *((size, few, keys[0], 1) for size in sizes),
        *((size, count, keys[0], 1) for size in (sizes[0], base) for count in more),
        *((base, few, key, 1) for key in keys[1:]),
        *((base, few, keys[0], s) for s in samples if s > 1),
    ]


def main():
    """Measure."""
    config = flags.parse(Config, __doc__, **FULL)
    study = results.Study(config)
    names = list(filter(None, config.models.split(",")))
    optimizers = [*BASELINES, Optimizer("IVON")]
    first = [(functools.partial(create_problem, n, config), optimizers) for n in names]
    gpt2s = [name for name in names if name.startswith("gpt2-")]
    second = [case for name in gpt2s[:1] for case in variations(name, config)]
    trees = cases_alone(config)
    total = sum(len(o) for _, o in first + second) + len(trees)
    with tqdm(total=total, unit="program", leave=False) as bar:
        for title, cases in (("networks", first), ("GPT-2", second)):
            rows = [row for make, o in cases for row in compare(make(), o, config, bar)]
            if rows:
                study.table(title, rows, DIGITS)
        rows = []
        for size, arrays, key, samples in trees:
            cells = alone(size, arrays, key, samples, config)
            labels = dict(parameters=size, arrays=arrays, key=key, samples=samples)
            rows.append(tables.record(labels, ALONE, cells))
            bar.update()
    study.table("optimizer alone", rows, dict.fromkeys(ALONE, 2))


if __name__ == "__main__":
    main()
