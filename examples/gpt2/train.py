"""Train GPT-2 from scratch with IVON or AdamW, on one device, a pod, or many hosts.

    python examples/gpt2/train.py              # tiny, on Python's own source code
    python examples/gpt2/train.py --optimizer adamw --checkpoint_dir checkpoints/adamw
    python examples/gpt2/train.py --data hamlet.txt --checkpoint_dir checkpoints/hamlet
    python examples/gpt2/train.py --size small --data openwebtext  # the paper's 124M

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
checkpoint, on any number of devices and hosts. So it does after SIGTERM, by which Slurm
and preempted TPUs end a run: it saves the step that it is at, and ends. A damaged
checkpoint is named and moved aside for the one before.

It prints the validation perplexity (of bytes, or of tokens) at the mean and averaged
over posterior samples, and a text; draws both; and takes 3 minutes for the tiny network
on two CPU cores. See benchmarks/README.md for IVON beside AdamW.

Toy size: `--steps 4 --batch_size 8 --microbatches 2 --block 32 --num_samples 2`
"""

import functools
import math
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from checkpoint import Folder, ends_at_once, identify
from config import FREE, parse_args
from data import Tokens, decode, load_data
from matplotlib.figure import Figure
from model import create_losses, create_mesh, create_network, write_text
from preemption import notice
from step import compiler_options, create_optimizer, create_train_step
from tqdm import tqdm

import ivon_jax

ROWS = {"ivon": "IVON@mean", "adamw": "AdamW"}


def fit(config, mesh, state, loss_fn, tx, data, folder, key):
    """Train from the last checkpoint on; return (params, opt_state) and the log."""
    train, validation = data
    state, log, start = folder.restore(state)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    train_step = jax.jit(
        create_train_step(loss_fn, tx, config, mesh),
        donate_argnums=(0, 1),
        out_shardings=(*shardings, None),  # shards stay where they are
        compiler_options=compiler_options(jax.default_backend()),
    )
    mean_loss = jax.jit(loss_fn)
    tokens_per_step = config.batch_size * config.block
    begin, first, loss = time.perf_counter(), start, None
    progress = create_progress(start, config.steps)
    with notice() as told:
        for step in progress:
            step_key = jax.random.fold_in(key, step)
            before = loss
            *state, loss = train_step(*state, train.random(step), step_key)
            jax.block_until_ready(before)  # one step ahead, for who is told to end
            folder.check()
            done, last = step + 1, step + 1 == config.steps
            if last or done % config.eval_every == 0:
                loss = float(loss)  # waits for the device
                seconds = time.perf_counter() - begin
                rate = (done - first) * tokens_per_step / seconds
                mean_fn = functools.partial(mean_loss, state[0])
                entry = dict(
                    step=done,
                    tokens=done * tokens_per_step,
                    loss=loss,
                    perplexity=evaluate(mean_fn, validation, config),
                    tokens_per_second=rate,
                )
                log = [*log, entry]  # a new list: Orbax may be writing the last one
                show(progress, entry)
                begin, first = time.perf_counter(), done
            end = told(done)
            if last or end or done % config.checkpoint_every == 0:
                folder.save(done, tuple(state), log)
            if end and not last:
                print(
                    f"Told to end after step {done}, which is saved.", file=sys.stderr
                )
                sys.exit()
    return state, log


def create_progress(start, stop):
    """Return a progress bar over the steps, in the first process alone."""
    disable = jax.process_index() > 0
    return tqdm(range(start, stop), initial=start, total=stop, disable=disable)


def show(progress, entry):
    """Write the last entry of the log beside the progress bar."""
    loss, perplexity = entry["loss"], entry["perplexity"]
    rate = f"{entry['tokens_per_second']:,.0f} tokens/s"
    progress.set_postfix_str(f"loss {loss:.3f}, perplexity {perplexity:.3f}, {rate}")


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
    identity = identify(config, FREE, data=[tokens.array for tokens in data])
    return Folder(config.checkpoint_dir, identity, config.max_to_keep)


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
    with ends_at_once():
        main()
