"""What IVON's settings do, and what shifted data does (Table 8, Figs. 4 and 7).

    python benchmarks/ablations.py                         # scikit-learn's digits
    python benchmarks/ablations.py --mnist mnist10k.npz    # 10,000 digits of MNIST

Six minutes of one core for the digits.

Networks, data and the tuning of AdamW, SGD and IVON are those of uncertainty.py. Tables
of the Hessian's initial value, of the number of samples in prediction and in training,
and of test images with noise, blur, less contrast and rotation, in five severities
each.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import uncertainty
from common import baselines, flags, results
from common.flags import Count, Results
from scipy import ndimage

HESS_INITS = 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0
NUM_SAMPLES = 1, 2, 4, 8, 16, 32, 64
MC_SAMPLES = 1, 2, 4, 8
SHIFTS = {  # of images (N, size, size) in [0, 1], by severity 1 to 5
    "noise": lambda x, s: x + 0.1 * s * np.random.default_rng(s).normal(size=x.shape),
    "blur": lambda x, s: ndimage.gaussian_filter(x, (0, *[0.02 * s * x.shape[1]] * 2)),
    "contrast": lambda x, s: x.mean() + (1 - 0.17 * s) * (x - x.mean()),
    "rotation": lambda x, s: ndimage.rotate(x, 12 * s, (2, 1), reshape=False, order=1),
}
SHIFTED = "AdamW", "SGD", "IVON@mean", "IVON"
TITLES = "accuracy %", "NLL", "ECE", "Brier"


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    mnist: str = ""  # .npz with `images` and `labels`
    epochs: int = 0  # 0: what uncertainty.py has for the data set
    trials: Count = 16  # of each system
    seeds: Count = 5
    members: Count = 5  # of an ensemble: the first is used, for its seeds
    tuning_seeds: int = 0  # 0: what uncertainty.py has
    num_samples: Count = 64
    results: Results = "ablations.json"


def train(system, settings, task, config, description):
    """Train the seeds of every setting; return ``probs(system, num_samples)``."""
    problem = uncertainty.make_problem(task, config, len(task.train[1]))
    data = [jnp.asarray(array) for array in task.train]
    images = jnp.asarray(task.test[0])
    keys = jax.random.split(jax.random.key(0), (2, config.seeds))
    keys = keys[:, jnp.arange(config.seeds * len(settings)) % config.seeds]
    stack = baselines.stacked(settings, config.seeds)
    runs = baselines.fit(system, problem, keys[0], stack, data, description)

    def probs(system, num_samples):
        arguments = problem, runs.state, keys[1], stack, images, num_samples
        result = baselines.predict(system, *arguments)
        return result.reshape(len(settings), config.seeds, *result.shape[1:])

    return probs


def scores(probs, labels):
    """Return {title: (seeds,)} of probabilities (seeds, N, C)."""
    labels = jnp.asarray(labels)
    return {
        title: np.asarray(
            jax.jit(jax.vmap(uncertainty.SCORES[title], (0, None)))(probs, labels)
        )
        for title in TITLES
    }


def of_hess_init(setting, task, config):
    """Return rows by h_0, at the mean and by samples."""
    settings = [setting | {"hess_init": h} for h in HESS_INITS]
    system, _ = uncertainty.SYSTEMS["IVON"]
    probs = train(system, settings, task, config, "h_0")
    labels = task.test[1]
    at_mean = probs(baselines.at_mean(system), 1)
    sampled = probs(system, config.num_samples)
    return {
        f"{h:g}": (scores(mean, labels), scores(samples, labels))
        for h, mean, samples in zip(HESS_INITS, at_mean, sampled, strict=True)
    }


def of_num_samples(setting, task, config):
    """Return rows by the number of samples, in prediction and in training."""
    labels, prediction, training = task.test[1], {}, {}
    for mc_samples in MC_SAMPLES:
        ivon = functools.partial(baselines.ivon, mc_samples=mc_samples)
        system = baselines.with_prior(ivon)
        probs = train(system, [setting], task, config, f"{mc_samples} samples")
        [sampled] = probs(system, config.num_samples)
        training[str(mc_samples)] = scores(sampled, labels)
        if mc_samples == 1:
            [at_mean] = probs(baselines.at_mean(system), 1)
            prediction["mean"] = scores(at_mean, labels)
            for num_samples in NUM_SAMPLES:
                [sampled] = probs(system, num_samples)
                prediction[str(num_samples)] = scores(sampled, labels)
    return prediction, training


def of_shift(settings, task, config):
    """Return {system: rows by severity}, means over the kinds of shift."""
    images, labels = task.test
    shifted = [images] + [
        shift(images, severity) for severity in range(1, 6) for shift in SHIFTS.values()
    ]
    images = jnp.asarray(np.concatenate(shifted), jnp.float32)
    rows = {}
    for name, setting in settings.items():
        probs = uncertainty.test(name, setting, task, config, images)
        for system in set(probs) & set(SHIFTED):
            parts = jnp.split(probs[system], len(shifted), axis=1)
            found = [scores(part, labels) for part in parts]
            grouped = [found[:1]] + [
                found[i : i + len(SHIFTS)] for i in range(1, len(found), len(SHIFTS))
            ]
            rows[system] = [
                {title: np.mean([g[title] for g in group], axis=0) for title in TITLES}
                for group in grouped
            ]
    return {system: rows[system] for system in SHIFTED}


def main():
    """Tune, train, and print the tables."""
    config = flags.parse(Config, __doc__)
    make_task = uncertainty.mnist_task if config.mnist else uncertainty.digits_task
    task = make_task(config)
    study = results.Study(config)
    names = "AdamW", "SGD", "IVON"
    settings = {name: uncertainty.tune(study, name, task, config)[0] for name in names}
    hess_init = of_hess_init(settings["IVON"], task, config)
    prediction, training = of_num_samples(settings["IVON"], task, config)
    shift = of_shift(settings, task, config)

    rows = [
        {"h_0": float(h), **at_mean(mean), **samples}
        for h, (mean, samples) in hess_init.items()
    ]
    study.table("h_0", rows)
    for title, found in (("prediction", prediction), ("training", training)):
        rows = [{"samples": count, **row} for count, row in found.items()]
        study.table(f"samples in {title}", rows)
    rows = [
        {"severity": severity, "system": name, **row}
        for severity in range(6)
        for name, row in ((name, rows[severity]) for name, rows in shift.items())
    ]
    study.table("shifted", rows)


def at_mean(columns):
    """Name the columns of predictions at the mean."""
    return {f"{title} at the mean": values for title, values in columns.items()}


if __name__ == "__main__":
    main()
