"""Which temperature should a posterior have, and can the training data tell?

    python benchmarks/temperatures.py

A minute of two cores. A small network learns 100, 300 and 1,200 of scikit-learn's
digits until it fits them. 300 others choose a temperature of the posterior: by
`calibrate`, and by `linearized_curve` for the linearised model. So do the training
examples alone: by their NLL at outputs shifted as if each had been left out
(`sensitivity.deviations`), and by the evidence lower bound. "scaled mean" has a
temperature of the mean's logits. The table has the NLL of 297 test images, averaged
over 64 samples but for the means and the linearised model; the temperature is a
geometric mean over the seeds.

Toy size: `--sizes 50 --epochs 2 --seeds 2`
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import flags, networks, results
from common.datasets import load_images
from common.flags import Count, Results, Text
from common.training import gaussian, random_steps

import ivon_jax
from ivon_jax import calibration, metrics, sensitivity

LAYERS = 64, 64, 10
HELD_OUT, TEST = slice(1200, 1500), slice(1500, None)
ROWS = "mean", "scaled mean", "T = 1", "calibrate", "linearised"
ROWS += "leave-one-out", "lower bound"
TEMPERATURES = 10.0 ** jnp.linspace(-7, 2, 28)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    sizes: Text = "100,300,1200"  # training examples
    epochs: Count = 100
    batch_size: Count = 25
    learning_rate: flags.Positive = 1.0  # at first; it decays to zero as a cosine
    hess_init: flags.Positive = 1.0
    seeds: Count = 5
    num_samples: Count = 16  # that choose a temperature
    results: Results = "temperatures.json"


def probs(theta, x):
    """Map images, (N, 64), to probabilities, (N, 10)."""
    return jax.nn.softmax(networks.apply(theta, x))


def train(key, data, config):
    """Return the posterior and the prior of a run."""
    init_key, steps_key = jax.random.split(key)
    num_train = len(data[1])
    steps = config.epochs * (num_train // config.batch_size)
    schedule = optax.cosine_decay_schedule(config.learning_rate, steps)
    settings = {"ess": num_train, "hess_init": config.hess_init, "horizon": steps}
    method = gaussian(ivon_jax.ivon(schedule, **settings))
    params = networks.init(init_key, LAYERS)
    carry = params, method[0].init(params)
    keys = jax.random.split(steps_key, steps)
    carry = random_steps(method, config.batch_size, carry, keys, data)
    return ivon_jax.posterior(*carry), ivon_jax.prior(*carry)


def choose(q, prior, train, held_out, key, num_samples):
    """Return the temperature that each criterion chooses."""
    (x, y), (x_held_out, y_held_out) = train, held_out
    curve = calibration.calibration_curve(
        *(probs, q, y_held_out, key), num_samples=num_samples, args=(x_held_out,)
    )
    shift = sensitivity.deviations(networks.apply, q, x, y, chunk_size=50)
    left_out = calibration.calibration_curve(
        *(lambda theta: jax.nn.softmax(networks.apply(theta, x) + shift), q, y, key),
        num_samples=num_samples,
    )

    def bound(temperature):
        return ivon_jax.evidence_lower_bound(
            *(lambda theta: networks.loss(theta, x, y), q.tempered(temperature)),
            *(prior, key),
            ess=len(y),
            num_samples=num_samples,
        )

    bounds = jax.lax.map(bound, TEMPERATURES)
    return {
        "T = 1": jnp.ones([]),
        "calibrate": curve.temperature,
        "leave-one-out": left_out.temperature,
        "lower bound": TEMPERATURES[jnp.argmax(bounds)],
    }


def run(key, num_train, images, labels, config):
    """Return {criterion: (temperature, NLL of the test)} of one run."""
    order_key, train_key, choice_key, test_key = jax.random.split(key, 4)
    order = jax.random.permutation(order_key, len(labels))
    some = slice(0, num_train), HELD_OUT, TEST
    data, held_out, test = ((images[order[i]], labels[order[i]]) for i in some)
    q, prior = train(train_key, data, config)

    def nll(predicted):
        return metrics.negative_log_likelihood(predicted, test[1])

    logits = networks.apply(q.mean, test[0])
    tau = calibration.temperature_scaling(
        networks.apply(q.mean, held_out[0]), held_out[1]
    )
    linear, linear_test = (
        ivon_jax.linearized(networks.apply, q, x, chunk_size=50)
        for x in (held_out[0], test[0])
    )
    best = calibration.linearized_curve(linear, held_out[1]).temperature
    covariance = linear_test.covariance * best
    found = {
        "mean": (jnp.zeros([]), nll(jax.nn.softmax(logits))),
        "scaled mean": (tau, nll(jax.nn.softmax(logits / tau))),
        "linearised": (best, nll(linear_test._replace(covariance=covariance).probs())),
    }
    chosen = choose(q, prior, data, held_out, choice_key, config.num_samples)
    for name, temperature in chosen.items():
        tempered = q.tempered(temperature)
        averaged = ivon_jax.predict(probs, tempered, test_key, args=(test[0],))
        found[name] = temperature, nll(averaged)
    return found


def checked_sizes(config):
    """Return the numbers of training examples, or exit."""
    sizes = flags.numbers("sizes", config.sizes, 1, HELD_OUT.start)
    for size in sizes:
        flags.check_batch_size(config.batch_size, size)
    return sizes


def main():
    """Train all seeds at once, choose and test."""
    config = flags.parse(Config, __doc__)
    images, labels = load_images()
    images = images.reshape(len(labels), -1)
    study, rows = results.Study(config), []
    keys = jax.random.split(jax.random.key(0), config.seeds)
    for size in checked_sizes(config):

        def one(key, size=size):
            return run(key, size, images, labels, config)

        found = jax.jit(jax.vmap(one))(keys)
        for name in ROWS:
            temperature, nll = found[name]
            mean = float(np.exp(np.mean(np.log(np.maximum(temperature, 1e-30)))))
            shown = None if name == "mean" else mean
            rows.append({"N": size, "by": name, "temperature": shown, "NLL": nll})
        study.table("test", rows)


if __name__ == "__main__":
    main()
