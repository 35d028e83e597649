"""Memory and time of GPT-2's training step, IVON beside AdamW (the paper's Table 6).

    python benchmarks/gpt2_step.py                       # 1 min, on any machine
    python benchmarks/gpt2_step.py --sizes small,medium --dtypes bfloat16 \
        --batch_size 8 --steps 20 --keys threefry2x32,rbg         # 3 min on a GPU

Memory is exact, from the compiled program: arguments, new outputs and temporaries, also
in parameter-sized float32 buffers; the state and the parameters are 3. `--steps` runs
the programs, too, and prints the median time of a step. The paper has 1.23 and 1.19
times AdamW's time, 1.06 and 1.17 times its memory, for 124M and 355M. `--keys` are the
generators of IVON's noise.

What to see: with float32 IVON takes one buffer more, theta; with bfloat16 theta takes
the place of the cast and the noise is drawn again rather than kept. The network casts
its parameters layer by layer; "cast once" is AdamW with all of them cast at the start,
as theta is, and the fair measure of IVON's time in bfloat16. Micro-batches
(`--microbatches 2`) cost another buffer, the sum of h_hat, however many they are.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from common import flags, gpt2, programs, results
from common.flags import Count, Results
from flax import nnx
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    sizes: str = "small"
    dtypes: str = "float32,bfloat16"
    batch_size: Count = 1
    microbatches: Count = 1
    vocabulary: Count = 50304
    keys: str = "threefry2x32"  # of IVON
    steps: int = 0  # to time
    results: Results = "gpt2_step.json"


def compile_step(size, dtype, optimizer, impl, cast, config):
    """Return the compiled step, and a function that makes its arguments."""
    flags = dict(size=size, dtype=dtype, optimizer=optimizer)
    flags |= dict(batch_size=config.batch_size, microbatches=config.microbatches)
    run = gpt2.parse_args([f"--{name}={value}" for name, value in flags.items()])
    mesh = gpt2.create_mesh("")
    key = jax.random.key(0)
    noise_key = jax.random.key(0, impl=impl)
    tx = gpt2.create_optimizer(run)

    def create():
        params = nnx.state(gpt2.GPT(run, config.vocabulary, nnx.Rngs(key)))
        tokens = jnp.zeros((config.batch_size, run.block + 1), jnp.int32)
        return params, tx.init(params), tokens, noise_key

    with jax.set_mesh(mesh):
        graphdef = nnx.graphdef(
            nnx.eval_shape(lambda: gpt2.GPT(run, config.vocabulary, nnx.Rngs(key)))
        )
        loss_fn, _ = gpt2.create_losses(graphdef)
        if cast:
            loss_fn = cast_once(loss_fn, run.dtype)
        step = gpt2.create_train_step(loss_fn, tx, run, mesh)
        step = jax.jit(step, donate_argnums=(0, 1))
        compiled = step.lower(*jax.eval_shape(create)).compile()
    return compiled, jax.jit(create)


def cast_once(loss_fn, dtype):
    """`loss_fn` with all parameters rounded before the first layer, as IVON's theta."""

    def loss(params, tokens):
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        return loss_fn(params, tokens)

    return loss


def milliseconds(compiled, create, steps):
    """Return the median time of a step, after three to warm up."""
    params, opt_state, tokens, key = create()
    times = []
    for _ in range(steps + 3):
        begin = time.perf_counter()
        params, opt_state, loss = compiled(params, opt_state, tokens, key)
        jax.block_until_ready((params, loss))
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times[3:])


def measure(size, dtype, optimizer, impl, cast, config):
    """Return parameters, peak bytes, and milliseconds, None where nothing ran."""
    compiled, create = compile_step(size, dtype, optimizer, impl, cast, config)
    count = optax.tree.size(jax.eval_shape(create)[0])
    ms = milliseconds(compiled, create, config.steps) if config.steps else None
    return count, programs.peak_memory(compiled), ms


DIGITS = {"GiB": 3, "GiB / AdamW": 3, "buffers": 3, "more": 3, "ms": 1, "ms / AdamW": 3}


def rows_of(size, dtype, config, bar):
    """Return the records of one size and dtype, AdamW's first."""
    keys = config.keys.split(",")
    systems = [("AdamW", keys[0], False), *(("IVON", key, False) for key in keys)]
    if dtype != "float32":
        systems.insert(1, ("AdamW", keys[0], True))
    rows, first = [], None
    for name, impl, cast in systems:
        count, peak, ms = measure(size, dtype, name.lower(), impl, cast, config)
        _, first_peak, first_ms = first = first or (count, peak, ms)
        label = f"{name}, {impl}" if name == "IVON" and len(keys) > 1 else name
        label += ", cast once" * cast
        row = {"GPT-2": size, "dtype": dtype, "optimizer": label}
        row |= {"GiB": peak / 2**30, "GiB / AdamW": peak / first_peak}
        row |= {"buffers": peak / 4 / count, "more": (peak - first_peak) / 4 / count}
        row |= {"ms": ms, "ms / AdamW": ms and ms / first_ms}
        rows.append(row)
        bar.update()
    return rows


def main():
    """Measure each size, dtype and optimizer."""
    config = flags.parse(Config, __doc__)
    study = results.Study(config)
    cases = [(s, d) for s in config.sizes.split(",") for d in config.dtypes.split(",")]
    per_case = 1 + len(config.keys.split(","))
    total = sum(per_case + (dtype != "float32") for _, dtype in cases)
    with tqdm(total=total, unit="program", leave=False) as bar:
        rows = [row for case in cases for row in rows_of(*case, config, bar)]
    study.table("step", rows, DIGITS)


if __name__ == "__main__":
    main()
