"""Is h learned? IVON's h of each weight beside the exact diagonal of the Hessian.

    python benchmarks/curvature.py

Some minutes of two cores. A small network learns 1,000 of scikit-learn's digits with
the recommended settings, for more and more epochs; with h forgetting ten times as fast;
and with the squared gradient in place of the reparameterization trick. At the end h
stands beside what it estimates: the diagonal of the Hessian of the mean loss of all
examples, exact by as many Hessian-vector products as weights, averaged over samples of
the posterior. "spread" is the standard deviation of the logarithm to base 10 over the
weights, "ranks" Spearman's correlation of the two, "ratio" the mean of h beside that of
the diagonal. What it is good for: the NLL of the other images by 64 samples with this
h, with one precision for all weights (the geometric mean), with the exact diagonal in
its place, and at the mean.

Toy size: `--num_train 60 --epochs 2 --seeds 2 --num_samples 1`
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import flags, networks, results
from common.datasets import load_images
from common.flags import Count, Results, Text
from jax.flatten_util import ravel_pytree
from scipy.stats import spearmanr

import ivon_jax

LAYERS = 64, 16, 10
SYSTEMS = {
    "IVON": (1, "reparameterization"),
    "IVON, forgets faster": (10, "reparameterization"),
    "squared gradient": (1, "squared_gradient"),
}
SCORES = "NLL", "one precision", "exact diagonal", "mean"


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    num_train: Count = 1000
    epochs: Text = "10,100,1000"
    batch_size: Count = 50
    seeds: Count = 5
    num_samples: Count = 4  # of the posterior, for the exact diagonal
    results: Results = "curvature.json"


def probs(theta, x):
    """Map images, (N, 64), to probabilities, (N, 10)."""
    return jax.nn.softmax(networks.apply(theta, x))


def train(key, data, epochs, batch_size, times_faster, hess_estimator):
    """Return the posterior, and the settings."""
    init_key, steps_key = jax.random.split(key)
    num_train = len(data[1])
    steps = epochs * (num_train // batch_size)
    settings = ivon_jax.recommended(num_train, steps, batch_size)
    settings["b2"] = max(0.0, 1 - times_faster * (1 - settings["b2"]))
    tx = ivon_jax.ivon(**settings)
    value_and_grad = ivon_jax.value_and_grad(
        networks.loss, hess_estimator=hess_estimator
    )

    def step(carry, key):
        params, opt_state = carry
        batch_key, draw_key = jax.random.split(key)
        rows = jax.random.randint(batch_key, (batch_size,), 0, num_train)
        batch = data[0][rows], data[1][rows]
        _, estimate = value_and_grad(draw_key, params, opt_state, *batch)
        updates, opt_state = estimate.update(tx, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    params = networks.init(init_key, LAYERS)
    keys = jax.random.split(steps_key, steps)
    carry, _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    return ivon_jax.posterior(*carry), settings


def diagonal(q, data, key, num_samples, chunk_size=64):
    """Return the diagonal of the Hessian of the mean loss, averaged over samples."""
    mean, unravel = ravel_pytree(q.mean)

    def grad_fn(theta):
        return ravel_pytree(jax.grad(networks.loss)(unravel(theta), *data))[0]

    def of_sample(key):
        theta, _ = ravel_pytree(q.sample(key))

        def entry(index):
            tangent = jnp.zeros_like(mean).at[index].set(1)
            return jax.jvp(grad_fn, (theta,), (tangent,))[1][index]

        return jax.lax.map(entry, jnp.arange(mean.size), batch_size=chunk_size)

    return jax.lax.map(of_sample, jax.random.split(key, num_samples)).mean(0)


def run(key, images, labels, epochs, config, system):
    """Return h, the exact diagonal, and the NLL of the other images by both."""
    order_key, train_key, key, test_key = jax.random.split(key, 4)
    order = jax.random.permutation(order_key, len(labels))
    images, labels = images[order], labels[order]
    data = images[: config.num_train], labels[: config.num_train]
    test = images[config.num_train :], labels[config.num_train :]
    q, settings = train(train_key, data, epochs, config.batch_size, *system)
    ess, weight_decay = settings["ess"], settings["weight_decay"]
    precision, unravel = ravel_pytree(q.precision)
    exact = diagonal(q, data, key, config.num_samples)
    precisions = {
        "NLL": precision,
        "one precision": jnp.full_like(precision, jnp.exp(jnp.log(precision).mean())),
        "exact diagonal": ess * (jnp.maximum(exact, 0) + weight_decay),
    }
    nll = {"mean": probs(q.mean, test[0])} | {
        name: ivon_jax.predict(
            *(probs, q._replace(precision=unravel(value)), test_key),
            args=(test[0],),
        )
        for name, value in precisions.items()
    }
    score = ivon_jax.metrics.negative_log_likelihood
    nll = {name: score(value, test[1]) for name, value in nll.items()}
    return precision / ess - weight_decay, exact, nll


def compare(h, exact):
    """Return what the table has of one run's h."""
    return {
        "spread of h": np.std(np.log10(h[h > 0])),
        "of the diagonal": np.std(np.log10(exact[exact > 0])),
        "ranks": spearmanr(h, exact).statistic,
        "ratio": h.mean() / exact.mean(),
    }


def rounded(array):
    """Return numbers of three digits, which is enough for a plot."""
    return [float(f"{x:.2e}") for x in array]


def main():
    """Train all seeds at once, and compare."""
    config = flags.parse(Config, __doc__)
    lengths = flags.numbers("epochs", config.epochs, 1)
    flags.check_batch_size(config.batch_size, config.num_train)
    images, labels = load_images()
    images = images.reshape(len(labels), -1)
    study, rows, pairs = results.Study(config), [], []
    keys = jax.random.split(jax.random.key(0), config.seeds)
    for epochs in lengths:
        for name, system in SYSTEMS.items():

            def one(key, epochs=epochs, system=system):
                return run(key, images, labels, epochs, config, system)

            h, exact, nll = jax.jit(jax.vmap(one))(keys)
            h, exact = np.asarray(h, float), np.asarray(exact, float)
            found = [compare(*pair) for pair in zip(h, exact, strict=True)]
            columns = {name: [row[name] for row in found] for name in found[0]}
            label = {"system": name, "epochs": epochs}
            rows.append(label | columns | {name: nll[name] for name in SCORES})
            pairs.append(label | {"h": rounded(h[0]), "diagonal": rounded(exact[0])})
        study.table("h", rows, dict.fromkeys(columns, 2))
    study.curves("weights of the first seed", pairs)


if __name__ == "__main__":
    main()
