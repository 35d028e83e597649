"""Which image should be labelled next? Active learning by disagreement of draws.

    python benchmarks/active_learning.py --data mnist10k.npz   # six minutes of a core

From 20 labels on, a network learns from scratch, and of 500 others asks for the labels
of 20 more, up to 300: of those of the largest score. BALD (Houlsby et al., 2011) is the
epistemic part of `ivon_jax.uncertainty`: what the draws of the weights disagree on. The
entropy of the prediction needs no draws, so AdamW has it, too, and so has "no noise",
IVON's step without its noise. "BALD, constant precision" takes IVON's draws with one
variance for all weights.

Networks, pixels and ranges are small_data.py's; each system has the best of the same
number of trials on 100 random labels. The area is the mean accuracy over all numbers of
labels. "gain" is what it has over random choices by the same system, "less IVON" what
over IVON by BALD, with 95 % intervals over seeds and test images.

Toy size: `--most 60 --steps 20 --trials 2 --seeds 2 --num_samples 2`
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import small_data
from common import controls, few_images, flags, intervals, results, tables
from common.baselines import subsets
from common.flags import Count, Results
from jax.scipy.special import entr
from tqdm import tqdm

import ivon_jax

FIRST = ASKED = 20  # labels
CANDIDATES = 500
SCORES = "random", "entropy", "BALD", "BALD, constant precision"
SYSTEMS = {  # and how they choose
    "AdamW": SCORES[:2],
    "MC dropout": SCORES[:3],
    "no noise": SCORES[:2],
    "IVON": SCORES,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    data: str = ""  # an npz file with `images` (N, side, side), uint8, and `labels`
    most: Annotated[int, flags.between(2 * FIRST, 1000)] = 300  # labels
    steps: Count = 200  # of each training
    batch_size: Count = 25
    hidden: Count = 50
    trials: Count = 16  # of each system
    seeds: Count = 8
    num_samples: Count = 16
    results: Results = "active_learning.json"


def of_draws(system, state, key, x, num_samples):
    """Return the means of probabilities and of their entropy over draws."""

    def one(key):
        probs = jax.nn.softmax(system.outputs(key, state, x))
        return probs, entr(probs).sum(axis=-1)

    means = jax.lax.map(one, jax.random.split(key, num_samples))
    return jax.tree.map(lambda a: a.mean(axis=0), means)


def all_scores(name, problem, system, state, key, x, num_samples):
    """Return the scores of SCORES, (4, N); those a system has none of are zero."""
    random_key, draw_key = jax.random.split(key)
    at_random, none = jax.random.uniform(random_key, len(x)), jnp.zeros(len(x))
    if name != "IVON":
        probs, aleatoric = of_draws(system, state, draw_key, x, num_samples)
        total = entr(probs).sum(axis=-1)
        return jnp.stack([at_random, total, total - aleatoric, none])

    def probs(theta, x):
        return jax.nn.softmax(problem.apply(theta, x))

    q = ivon_jax.posterior(*state)
    learned, constant = (
        ivon_jax.uncertainty(probs, p, draw_key, num_samples, args=(x,))
        for p in (q, controls.constant_precision(q))
    )
    parts = at_random, learned.total, learned.epistemic, constant.epistemic
    return jnp.stack(parts)


def run(name, problem, images, config, key, setting, choice):
    """Return the images asked for, and whether each test image was right.

    The first have the order of asking, the second, (rounds, N), that of more labels.
    """
    samples = 1 if name in small_data.POINTS else config.num_samples
    system, (pool, labels) = small_data.system_of(name), images.pool
    order_key, rounds_key = jax.random.split(key)
    rounds = 1 + (config.most - FIRST) // ASKED
    # The last answers have no round to be learned in.
    rows = jax.random.permutation(order_key, len(labels))[: FIRST + rounds * ASKED]

    def one_round(rows, count_and_key):
        count, key = count_and_key
        fit_key, test_key, some_key, score_key = jax.random.split(key, 4)
        told = setting | {"size": count}
        state = subsets.train(system, problem, fit_key, told, rows, labels[rows], pool)
        trained = system(problem, **told)
        probs, _ = of_draws(trained, state, test_key, images.test[0], samples)
        some = jax.random.permutation(some_key, len(labels))[:CANDIDATES]
        arguments = trained, state, score_key, pool[some], samples
        score = all_scores(name, problem, *arguments)[choice]
        known = jnp.isin(some, jnp.where(jnp.arange(len(rows)) < count, rows, -1))
        _, asked = jax.lax.top_k(jnp.where(known, -jnp.inf, score), ASKED)
        rows = jax.lax.dynamic_update_slice(rows, some[asked], (count,))
        return rows, probs.argmax(-1) == images.test[1]

    counts = FIRST + ASKED * jnp.arange(rounds)
    keys = jax.random.split(rounds_key, rounds)
    return jax.lax.scan(one_round, rows, (counts, keys))


def run_all(name, problem, images, setting, config):
    """Return {score: right or wrong (seeds, rounds, N)} of a system."""
    keys = jax.random.split(jax.random.key(0), config.seeds)
    choices = [SCORES.index(score) for score in SYSTEMS[name]]

    def one(key, choice):
        return run(name, problem, images, config, key, setting, choice)[1]

    over_seeds = jax.vmap(one, (0, None))
    right = jax.jit(jax.vmap(over_seeds, (None, 0)))(keys, jnp.array(choices))
    return dict(zip(SYSTEMS[name], np.asarray(right), strict=True))


def rows_of(right):
    """Yield a record for each system and score."""
    area = {which: 100.0 * found.mean(axis=1) for which, found in right.items()}

    def less(a, b):
        arrays = (jnp.asarray(area[which]) for which in (a, b))
        key = jax.random.key(1)
        return intervals.interval(key, intervals.paired_mean, *arrays).cell

    for name, score in right:
        yield {
            "system": name,
            "by": score,
            "area": area[name, score].mean(axis=1),
            "accuracy % at last": 100 * right[name, score][:, -1].mean(axis=1),
            "gain": less((name, score), (name, "random")),
            "less IVON": less((name, score), ("IVON", "BALD")),
        }


def main():
    """Tune each system, and let it choose its labels."""
    config = flags.parse(Config, __doc__)
    images, study = few_images.load(config.data), results.Study(config)
    problem = small_data.make_problem(config, images)
    cells, right, trials = few_images.Cells([100], [0]), {}, []
    for name in tqdm(SYSTEMS, leave=False):
        values, nll = small_data.tune(name, problem, images, cells, config)
        trials += small_data.trial_rows(name, values, nll, cells)
        best = {k: float(v[0]) for k, v in small_data.chosen(values, nll).items()}
        found = run_all(name, problem, images, best, config)
        right |= {(name, score): of_score for score, of_score in found.items()}
    study.table("trials", tables.padded(trials))
    digits = {"area": 2, "accuracy % at last": 1, "gain": 2, "less IVON": 2}
    study.table("area", rows_of(right), digits)
    rounds = next(iter(right.values())).shape[1]
    curves = {f"{n}, {score}": 100 * a.mean(axis=2) for (n, score), a in right.items()}
    counts = [FIRST + ASKED * i for i in range(rounds)]
    study.curves("accuracy % by labels", {"labels": counts} | curves)


if __name__ == "__main__":
    main()
