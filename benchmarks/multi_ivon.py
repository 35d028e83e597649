"""Multi-IVON: several posteriors trained at once, by one vmapped program.

    python benchmarks/multi_ivon.py                   # 80 s of CPU time
    python benchmarks/multi_ivon.py --cpu_devices 5   # a member on each of five devices

Five networks learn half of the digits; their Gaussians are one mixture (paper, section
4.2). On five devices the compiled program has no communication. "AdamW" and "IVON" are
the members alone. Settings are those of mlp_digits.py, of 20 each the best by
validation NLL. The second table has digits that are turned.

Toy size: `--epochs 2 --seeds 1 --members 2 --num_samples 4 --cpu_devices 2`
"""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import datasets, flags, networks, results, tables, training
from common.flags import Count, Fraction, Positive, Results
from common.scores import DIGITS, over_seeds, scores
from scipy import ndimage
from tqdm import tqdm

import ivon_jax
from ivon_jax import metrics, predictive

SIZES = 64, 128, 128, 10
ANGLES = range(0, 181, 15)
CURVES = "NLL", "entropy", "epistemic"
ENSEMBLES = {"AdamW": "AdamW ensemble", "IVON": "Multi-IVON"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    members: Count = 5  # networks of an ensemble
    epochs: Count = 400
    batch_size: Count = 50
    adamw_learning_rate: float = 1e-3
    adamw_weight_decay: float = 0.3
    adamw_b2: Fraction = 0.9999
    ivon_learning_rate: float = 1.0
    ivon_hess_init: Positive = 0.3
    ivon_b2: Fraction = 0.9997
    num_samples: Count = 64  # of IVON, and of all members of Multi-IVON together
    seeds: Count = 3  # ensembles, of other members each
    cpu_devices: Count = 1  # devices to make of this CPU, to spread the members over
    results: Results = "multi_ivon.json"


def no_width(params, _opt_state):
    """The posterior of an optimizer without one: a Gaussian of no width."""
    return ivon_jax.Posterior(params, jax.tree.map(lambda _: None, params))


def make_methods(config, num_train):
    """Each method's (tx, draw), the posterior that it ends with, and samples of it."""
    num_steps = config.epochs * (num_train // config.batch_size)
    adamw = optax.adamw(
        optax.cosine_decay_schedule(config.adamw_learning_rate, num_steps),
        b2=config.adamw_b2,
        weight_decay=config.adamw_weight_decay,
    )
    ivon = ivon_jax.ivon(
        optax.cosine_decay_schedule(config.ivon_learning_rate, num_steps),
        ess=num_train,
        hess_init=config.ivon_hess_init,
        b2=config.ivon_b2,
    )
    return {
        "AdamW": (training.point_mass(adamw), no_width, 1),
        "IVON": (training.gaussian(ivon), ivon_jax.posterior, config.num_samples),
    }


def compile_ensemble(config, method):
    """Return ``init(keys)`` and ``epoch(carry, keys, data)`` of all members."""
    devices = jax.devices()[: math.gcd(config.members, jax.device_count())]
    mesh = jax.sharding.Mesh(np.array(devices), ("members",))
    spread = jax.NamedSharding(mesh, jax.P("members"))

    def init(key):
        params = networks.init(key, SIZES)
        return params, method[0].init(params)

    epoch = functools.partial(
        training.train_epoch, networks.loss, method, config.batch_size
    )
    epochs = jax.vmap(epoch, in_axes=(0, 0, None))
    # Each device has its members' arrays, and all of the data.
    compile_spread = functools.partial(jax.jit, out_shardings=spread)
    return compile_spread(jax.vmap(init)), compile_spread(epochs)


@functools.partial(jax.jit, static_argnames="num_samples")
def evaluate(q, key, images, labels, num_samples):
    """Scores on upright digits; NLL and uncertainties for each angle."""
    result = predictive.uncertainty(
        lambda theta: jax.nn.softmax(networks.apply(theta, images)), q, key, num_samples
    )
    nll = jax.vmap(metrics.negative_log_likelihood, (0, None))(result.probs, labels)
    curves = nll, result.total.mean(axis=1), result.epistemic.mean(axis=1)
    return scores(result.probs[0], labels), curves


def load_data():
    """Return (images, labels) to train on, and the others, turned, with theirs."""
    train, (images, labels) = datasets.load_halves()
    images = np.asarray(images).reshape(-1, 8, 8)
    turned = [ndimage.rotate(images, a, (2, 1), False, order=1) for a in ANGLES]
    return train, jnp.asarray(turned).reshape(len(ANGLES), -1, 64), labels


def train(config, name, method, seed, data):
    """Train an ensemble; return its members' (params, opt_state), and a key."""
    init, epoch = compile_ensemble(config, method)
    keys = jax.random.split(jax.random.key(seed), 2 + config.epochs)
    init_key, test_key, *epoch_keys = keys
    carry = init(jax.random.split(init_key, config.members))
    for key in tqdm(epoch_keys, desc=name, unit="epoch", leave=False):
        carry = epoch(carry, jax.random.split(key, config.members), data)
    return carry, test_key


def main():
    """Train the ensembles; keep the scores, and what rotation does."""
    config = flags.parse(Config, __doc__)
    if config.cpu_devices > 1:
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    data, turned, labels = load_data()
    flags.check_batch_size(config.batch_size, len(data[1]))
    study, rows = results.Study(config), collections.defaultdict(list)
    for name, (method, posterior, count) in make_methods(config, len(data[1])).items():
        for seed in range(config.seeds):
            carry, key = train(config, name, method, seed, data)
            ensemble = ivon_jax.Mixture.from_stacked(jax.vmap(posterior)(*carry))
            test = functools.partial(evaluate, key=key, images=turned, labels=labels)
            singles = jax.vmap(functools.partial(test, num_samples=count))
            single = jax.tree.map(lambda x: x.mean(axis=0), singles(ensemble.stacked))
            rows[name].append(single)
            # As many samples from all members together; of point masses, one of each.
            count_all = max(count, config.members)
            rows[ENSEMBLES[name]].append(test(ensemble, num_samples=count_all))
    test = [
        {"system": name, **over_seeds([scores for scores, _ in runs])}
        for name, runs in rows.items()
    ]
    study.table("test", test, DIGITS | {"accuracy %": 1})
    study.table("turned digits", by_angle(rows), dict.fromkeys(CURVES, 3))


def by_angle(rows):
    """Yield a record for each system and angle."""
    for name, runs in rows.items():
        curves = np.array([curves for _, curves in runs])  # (seeds, 3, angles)
        for i, angle in enumerate(ANGLES):
            values = curves[:, :, i].T.tolist()
            yield tables.record({"system": name, "angle": angle}, CURVES, values)


if __name__ == "__main__":
    main()
