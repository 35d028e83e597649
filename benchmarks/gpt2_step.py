"""Memory and time of GPT-2's training step, IVON beside AdamW (the paper's Table 6).

    python benchmarks/gpt2_step.py                       # 1 min, on any machine
    python benchmarks/gpt2_step.py --sizes small,medium --batch_size 16 --steps 20

Memory is exact, from the compiled program: arguments, new outputs and temporaries, in
parameter-sized float32 buffers; the state and the parameters are 3. `--steps` also runs
the programs and prints the median time of a step: the second line, for a GPU. The paper
has 1.23 and 1.19 times AdamW's time, 1.06 and 1.17 times its memory, for 124M and 355M.

What to see: with float32 IVON takes one buffer more, theta; with bfloat16 theta takes
the place of the cast and the noise is drawn again rather than kept. Micro-batches
(`--microbatches 2`) cost another buffer, the sum of h_hat, and on CPUs three or four
that XLA moves out of their loop.
"""

import dataclasses
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import optax
import report
from tqdm import tqdm

sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))
import gpt2


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    sizes: str = "small"
    dtypes: str = "float32,bfloat16"
    batch_size: report.Count = 1
    microbatches: report.Count = 1
    vocabulary: report.Count = 50304
    steps: int = 0  # to time


def compile_step(size, dtype, optimizer, config):
    """Return the compiled step, and a function that makes its arguments."""
    flags = dict(size=size, dtype=dtype, optimizer=optimizer)
    flags |= dict(batch_size=config.batch_size, microbatches=config.microbatches)
    run = gpt2.parse_args([f"--{name}={value}" for name, value in flags.items()])
    mesh = gpt2.create_mesh("")
    key = jax.random.key(0)
    tx = gpt2.create_optimizer(run)

    def create():
        params = gpt2.nnx.state(gpt2.GPT(run, config.vocabulary, gpt2.nnx.Rngs(key)))
        tokens = jnp.zeros((config.batch_size, run.block + 1), jnp.int32)
        return params, tx.init(params), tokens, key

    with jax.set_mesh(mesh):
        graphdef = gpt2.nnx.graphdef(
            gpt2.nnx.eval_shape(
                lambda: gpt2.GPT(run, config.vocabulary, gpt2.nnx.Rngs(key))
            )
        )
        loss_fn, _ = gpt2.create_losses(graphdef)
        step = gpt2.create_train_step(loss_fn, tx, run, mesh)
        step = jax.jit(step, donate_argnums=(0, 1))
        compiled = step.lower(*jax.eval_shape(create)).compile()
    return compiled, jax.jit(create)


def buffers(compiled, create):
    """Return the peak memory in parameter-sized float32 buffers."""
    used = compiled.memory_analysis()
    peak = used.argument_size_in_bytes + used.temp_size_in_bytes
    peak += used.output_size_in_bytes - used.alias_size_in_bytes
    params = jax.eval_shape(create)[0]
    return peak / (4 * optax.tree.size(params))


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


def measure(size, dtype, optimizer, config):
    """Return buffers and milliseconds, None where nothing ran."""
    compiled, create = compile_step(size, dtype, optimizer, config)
    ms = milliseconds(compiled, create, config.steps) if config.steps else None
    return buffers(compiled, create), ms


def main():
    """Print a line for each size and dtype."""
    config = report.parse_args(Config, __doc__)
    report.print_conditions(config)
    print("| GPT-2 | dtype | buffers, AdamW | IVON | more | ms, AdamW | IVON | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    cases = [(s, d) for s in config.sizes.split(",") for d in config.dtypes.split(",")]
    for size, dtype in tqdm(cases):
        adamw, adamw_ms = measure(size, dtype, "adamw", config)
        ivon, ivon_ms = measure(size, dtype, "ivon", config)
        cells = [size, dtype, f"{adamw:.3f}", f"{ivon:.3f}", f"{ivon - adamw:.3f}"]
        if config.steps:
            cells += [f"{adamw_ms:.1f}", f"{ivon_ms:.1f}", f"{ivon_ms / adamw_ms:.3f}"]
        else:
            cells += [""] * 3
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
