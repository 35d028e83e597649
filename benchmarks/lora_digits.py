"""LoRA with IVON in Flax NNX: a posterior over the adapters, the base frozen.

    python benchmarks/lora_digits.py         # 40 s on two CPU cores
    python benchmarks/lora_digits.py --tune  # 6 min: the trials behind the defaults

A network learns upright digits with AdamW. Then low-rank adapters, and nothing else,
learn digits turned by 90 degrees from 100 examples: once with AdamW, once with IVON,
each with the best of nine settings by NLL on 200 turned digits kept aside.
`wrt=nnx.LoRAParam` is all it takes: the optimizer samples, trains and decays the
adapters; the base comes out bit for bit as it went in, and that is checked.
It is tested on 699 other digits.

`--mc_samples 2 --microbatches 2 --bfloat16 1` estimates the gradient from two samples
of each half of a batch, in bfloat16; the default is one of the batch, in float32.

Toy size: `--pretrain_epochs 2 --epochs 2 --seeds 1 --mc_samples 2 --microbatches 2`
"""

import collections
import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import optax
from common import flags, results
from common.flags import Count, Positive, Results, Switch
from common.scores import DIGITS, over_seeds, scores
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

import ivon_jax
import ivon_jax.flax


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    pretrain_epochs: Count = 60
    epochs: Count = 200
    batch_size: Count = 50
    rank: Count = 4
    adamw_lr: float = 3e-3
    adamw_weight_decay: float = 0.01
    ivon_lr: float = 0.1
    ivon_hess_init: Positive = 3.0
    mc_samples: Count = 1
    microbatches: Count = 1
    bfloat16: Switch = 0
    num_samples: Count = 64
    seeds: Count = 3
    results: Results = "lora_digits.json"


class Network(nnx.Module):
    """Two hidden layers, each linear map with a low-rank adapter beside it."""

    def __init__(self, rank, rngs):
        sizes = (64, 128, 128, 10)
        self.layers = nnx.List(
            nnx.LoRA(m, rank, n, base_module=nnx.Linear(m, n, rngs=rngs), rngs=rngs)
            for m, n in itertools.pairwise(sizes)
        )

    def __call__(self, images):
        """Map images, (N, 64), to logits, (N, 10)."""
        *hidden, last = self.layers
        for layer in hidden:
            images = nnx.relu(layer(images))
        return last(images)


ADAPTERS = nnx.LoRAParam
BASE = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


def load_splits():
    """Upright digits to pretrain on; turned ones to fine-tune, to tune by, to test."""
    digits = load_digits()
    upright = jnp.asarray(digits.images / 16, jnp.float32)
    turned = jnp.rot90(upright, axes=(1, 2))
    labels = jnp.asarray(digits.target, jnp.int32)
    upright, turned = (x.reshape(len(labels), -1) for x in (upright, turned))
    pretrain = upright[:798], labels[:798]
    edges = ((798, 898), (898, 1098), (1098, 1797))
    return pretrain, *((turned[i:j], labels[i:j]) for i, j in edges)


def loss_fn(model, images, labels):
    """Mean cross-entropy of a batch."""
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def adamw_step(model, optimizer, images, labels):
    """Take a step with what the optimizer's `wrt` names."""
    trained = nnx.DiffState(0, optimizer.wrt)
    loss, grads = nnx.value_and_grad(loss_fn, argnums=trained)(model, images, labels)
    optimizer.update(model, grads)
    return loss


@nnx.jit(static_argnames="config")
def ivon_step(model, optimizer, images, labels, key, config):
    """The same at samples of the adapters, one for each slice of the batch."""
    grad_fn = ivon_jax.flax.value_and_grad(
        loss_fn,
        wrt=ADAPTERS,
        mc_samples=config.mc_samples,
        microbatches=config.microbatches,
        compute_dtype=jnp.bfloat16 if config.bfloat16 else None,
    )
    loss, estimate = grad_fn(key, model, optimizer, images, labels)
    optimizer.update(model, estimate.grad, hess=estimate.hess)
    return loss


def batches(key, images, labels, batch_size):
    """Yield the data once, shuffled, in batches of one size."""
    order = jax.random.permutation(key, len(labels))
    for start in range(0, len(labels) - batch_size + 1, batch_size):
        rows = order[start : start + batch_size]
        yield images[rows], labels[rows]


@nnx.jit
def predict(model, images):
    """Class probabilities (N, 10) of one network."""
    return nnx.softmax(model(images))


@nnx.jit(static_argnames="num_samples")
def posterior_predict(model, optimizer, images, key, num_samples):
    """Class probabilities (N, 10), averaged over adapters drawn from the posterior."""
    q = ivon_jax.flax.posterior(model, optimizer)
    graphdef, _, rest = nnx.split(model, optimizer.wrt, ...)

    def probs(theta):
        return nnx.softmax(nnx.merge(graphdef, theta, rest)(images))

    return ivon_jax.predict(probs, q, key, num_samples)


def pretrain(key, data, config, bar):
    """A network that knows upright digits; its adapters still do nothing."""
    init_key, order_key = jax.random.split(key)
    model = Network(config.rank, nnx.Rngs(init_key))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=BASE)
    for epoch_key in jax.random.split(order_key, config.pretrain_epochs):
        for batch in batches(epoch_key, *data, config.batch_size):
            adamw_step(model, optimizer, *batch)
        bar.update()
    return model


def finetune(key, model, tx, step, data, test, config, bar):
    """Train a copy's adapters; return {"mean" or "samples": [probabilities, ...]}."""
    order_key, noise_key, predict_key = jax.random.split(key, 3)
    model = nnx.clone(model)
    base = jax.tree.map(jnp.copy, nnx.state(model, BASE))
    optimizer = nnx.Optimizer(model, tx, wrt=ADAPTERS)
    history = collections.defaultdict(list)
    for epoch in range(config.epochs):
        epoch_keys = (jax.random.fold_in(k, epoch) for k in (order_key, noise_key))
        order, noise = epoch_keys
        for i, batch in enumerate(batches(order, *data, config.batch_size)):
            if step is ivon_step:
                step_key = jax.random.fold_in(noise, i)
                loss = step(model, optimizer, *batch, step_key, config)
            else:
                loss = step(model, optimizer, *batch)
        last = epoch == config.epochs - 1
        if last or epoch % max(1, config.epochs // 40) == 0:
            history["epoch"].append(1 + epoch)
            history["mean"].append(predict(model, test))
            if step is ivon_step:
                probs = posterior_predict(
                    model, optimizer, test, predict_key, config.num_samples
                )
                history["samples"].append(probs)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        bar.update()
    chex.assert_trees_all_equal(base, nnx.state(model, BASE))
    return history


def optimizers(config, num_train):
    """AdamW and IVON on a cosine schedule that ends at zero."""
    num_steps = config.epochs * (num_train // config.batch_size)
    adamw = optax.adamw(
        optax.cosine_decay_schedule(config.adamw_lr, num_steps),
        weight_decay=config.adamw_weight_decay,
    )
    ivon = ivon_jax.ivon(
        optax.cosine_decay_schedule(config.ivon_lr, num_steps),
        ess=num_train,
        hess_init=config.ivon_hess_init,
        b2=1 - 2 / num_steps,  # averages the Hessian over half of the run
    )
    return {"AdamW": (adamw, adamw_step), "IVON": (ivon, ivon_step)}


def compare(config, data, test, pretraining, names=("AdamW", "IVON")):
    """Fine-tune with each on every seed; return {row: [histories of probabilities]}."""
    rows = collections.defaultdict(list)
    epochs = config.pretrain_epochs + len(names) * config.epochs
    with tqdm(total=config.seeds * epochs, unit="epoch", leave=False) as bar:
        for seed in range(config.seeds):
            pretrain_key, finetune_key = jax.random.split(jax.random.key(seed))
            model = pretrain(pretrain_key, pretraining, config, bar)
            rows["before"].append({"epoch": [0], "mean": [predict(model, test)]})
            for name in names:
                tx, step = optimizers(config, len(data[1]))[name]
                bar.set_description(name)
                history = finetune(
                    finetune_key, model, tx, step, data, test, config, bar
                )
                rows[name].append(history)
    return rows


def table_rows(rows):
    """Yield (name, histories, "mean" or "samples") for each row of the table."""
    yield "before LoRA", rows["before"], "mean"
    yield "AdamW", rows["AdamW"], "mean"
    yield "IVON@mean", rows["IVON"], "mean"
    yield "IVON", rows["IVON"], "samples"


def by_epoch(rows, labels):
    """Yield the test NLL of every seed while the adapters learn."""
    for name, histories, kind in table_rows(rows):
        for epochs, *runs in zip(
            histories[0]["epoch"],
            *(history[kind] for history in histories),
            strict=True,
        ):
            nll = [float(scores(probs, labels)["NLL"]) for probs in runs]
            yield {"system": name, "epoch": epochs, "NLL": nll}


def tune(config, data, validation, pretraining):
    """Yield the validation scores of nine settings of each optimizer."""
    grids = {
        "AdamW": ("adamw_lr", (1e-3, 3e-3, 1e-2), "adamw_weight_decay", (1e-2, 0.1, 1)),
        "IVON": ("ivon_lr", (0.03, 0.1, 0.3), "ivon_hess_init", (0.3, 1.0, 3.0)),
    }
    images, labels = validation
    for name, (first, firsts, second, seconds) in grids.items():
        kind = "samples" if name == "IVON" else "mean"
        for values in itertools.product(firsts, seconds):
            trial = dict(zip((first, second), values, strict=True))
            candidate = dataclasses.replace(config, **trial)
            rows = compare(candidate, data, images, pretraining, (name,))
            seeds = [scores(history[kind][-1], labels) for history in rows[name]]
            yield {"system": name, **trial, **over_seeds(seeds)}


def main():
    """Pretrain, fine-tune and keep the scores; or tune."""
    config, tuning = flags.parse_or_tune(Config, __doc__)
    pretraining, data, validation, (images, labels) = load_splits()
    flags.check_batch_size(config.batch_size, len(data[1]))
    study = results.Study(config)
    if tuning:
        study.table("trials", tune(config, data, validation, pretraining), DIGITS)
        return
    rows = compare(config, data, images, pretraining)
    test = [
        {
            "system": name,
            **over_seeds([scores(history[kind][-1], labels) for history in histories]),
        }
        for name, histories, kind in table_rows(rows)
    ]
    study.table("test", test, DIGITS)
    study.table("test by epoch", by_epoch(rows, labels), DIGITS)


if __name__ == "__main__":
    main()
