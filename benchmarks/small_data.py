"""Few examples and wrong labels: what does the posterior give that nothing else does?

    python benchmarks/small_data.py --data mnist10k.npz   # 10 minutes of a core
    python benchmarks/small_data.py --sizes 100,300       # scikit-learn's digits

A network of two hidden layers learns 100 to 3,000 images, of 14x14 pixels for MNIST's,
of which no, 20 or 40 % of the labels are any other one. Each seed has images and wrong
labels of its own. Other images, a twentieth of all, have their true labels: on them
every system chooses the best of the same number of trials (points of a Sobol sequence),
AdamW when to stop, and what is scaled or calibrated its temperature. All take as many
steps, each on images drawn with replacement. Systems that end
in "scaled" or "calibrated", means and constant precisions are other predictions of the
same networks; the rest is trained for itself, common/controls.py says how.

Every interval is one of 95 %, over seeds and test images together: of the NLL of IVON,
averaged over samples, less that of another system. Below zero is better than that. At
`--shift_size` examples, all with their true labels, the networks also predict shifted
images, and tell which predictions to trust.

Toy size: `--sizes 40 --steps 20 --trials 2 --seeds 2 --systems 'no noise;IVON'`
"""

import dataclasses
import functools
import operator
import sys
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ablations import SHIFTS
from common import (
    baselines,
    controls,
    few_images,
    flags,
    intervals,
    results,
    tables,
)
from common.flags import Count, Results, Text
from common.scores import losses, right
from tqdm import tqdm

from ivon_jax import metrics

RATES = {"learning_rate": (0.01, 1.0)}  # of SGD
PRIOR = {"prior_precision": (0.1, 1000.0)}
STEPS = {"learning_rate": (0.03, 10.0)}  # of an average of gradients
GAUSSIAN = STEPS | {"hess_init": (0.1, 100.0)} | PRIOR
ADAMW = {"learning_rate": (3e-4, 0.1), "weight_decay": (0.01, 30.0)}
SYSTEMS = {  # how to train, and the ranges of its hyperparameters
    "AdamW": (baselines.adamw, ADAMW),
    "AdamW, stopped": (baselines.adamw, ADAMW),
    "SGD": (baselines.with_prior(baselines.sgd), RATES | PRIOR),
    "MC dropout": (
        baselines.with_prior(baselines.mc_dropout),
        RATES | {"rate": (0.02, 0.5)} | PRIOR,
    ),
    "no noise": (baselines.with_prior(controls.without_noise), STEPS | PRIOR),
    "constant noise": (
        baselines.with_prior(controls.with_constant_noise),
        GAUSSIAN,
    ),
    "squared gradient": (baselines.with_prior(controls.squared_gradient), GAUSSIAN),
    "bSAM": (
        baselines.with_prior(baselines.bsam),
        STEPS | {"rho": (1e-3, 0.3), "damping": (1e-3, 1.0)} | PRIOR,
    ),
    "IVON": (baselines.with_prior(baselines.ivon), GAUSSIAN),
}
NAMES = ";".join(SYSTEMS)
POINTS = "AdamW", "AdamW, stopped", "SGD", "no noise"
SCALED = "AdamW", "AdamW, stopped", "no noise", "IVON@mean"
ENSEMBLES = "Deep ensemble", "Deep ensemble, equal cost"
ROWS = (
    *("AdamW", "AdamW, scaled", "AdamW, stopped", "AdamW, stopped, scaled"),
    *("SGD", "MC dropout", "bSAM", *ENSEMBLES),
    *("no noise", "no noise, scaled", "constant noise", "squared gradient"),
    *("IVON@mean", "IVON@mean, scaled", "IVON, constant precision"),
    *("IVON", "IVON, calibrated"),
)
EFFECTS = {  # of what IVON has and the other lacks
    "no noise": ("IVON", "no noise"),
    "no noise, both scaled": ("IVON, calibrated", "no noise, scaled"),
    "its mean": ("IVON", "IVON@mean"),
    "constant precision": ("IVON", "IVON, constant precision"),
    "constant noise": ("IVON", "constant noise"),
    "squared gradient": ("IVON", "squared gradient"),
    "AdamW, stopped, scaled": ("IVON", "AdamW, stopped, scaled"),
    "MC dropout": ("IVON", "MC dropout"),
    "bSAM": ("IVON", "bSAM"),
    "deep ensemble": ("IVON", "Deep ensemble"),
    "of equal cost": ("IVON", "Deep ensemble, equal cost"),
}
TABLES = "effect of the posterior", "test", "IVON"
DECIMALS = {
    **{"accuracy %": 1, "NLL": 3, "ECE": 3, "AURC": 4, "IVON's less this": 4},
    **{"flipped %": 0, "less no noise": 3, "both scaled": 3},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    data: str = ""  # an npz file with `images` (N, side, side), uint8, and `labels`
    sizes: Text = "100,300,1000,3000"  # training examples
    flips: Text = "0,20,40"  # % of the labels
    steps: Annotated[int, flags.between(20)] = 600
    batch_size: Count = 25
    hidden: Count = 50
    systems: Text = NAMES
    trials: Count = 16  # of each system
    seeds: Count = 5
    members: Count = 5  # of an ensemble
    num_samples: Count = 32
    shift_size: Count = 1000  # of the networks that see shifted images, if it is there
    results: Results = "small_data.json"


def make_problem(config, images):
    """Return the network, and how long it learns."""
    sizes = images.test[0].shape[1], config.hidden, config.hidden, 10
    init, features = baselines.mlp(sizes)
    return baselines.Problem(
        init=init,
        features=features,
        loss=optax.softmax_cross_entropy_with_integer_labels,
        num_data=0,
        batch_size=config.batch_size,
        epochs=0,
        steps=config.steps,
    )


def system_of(name):
    """Return the system that trains, with the number of examples to be told."""
    return baselines.with_size(SYSTEMS[name][0])


def fit(name, problem, keys, settings, data, images):
    """Train runs with examples of their own."""
    sizes, rows, labels = data
    held_out = images.held_out if name == "AdamW, stopped" else None
    settings = settings | {"size": sizes}
    states = baselines.fit_subsets(
        *(system_of(name), problem, keys, settings, images.pool[0], rows, labels),
        held_out=held_out,
    )
    return states, settings


def tune(name, problem, images, cells, config):
    """Return settings, {name: (trials,)}, and their held-out NLL, (cells, trials)."""
    values = baselines.trials(SYSTEMS[name][1], config.trials)
    data_key, *run_keys = jax.random.split(jax.random.key(1000), 3)
    data = cells.subsets(data_key, images.pool[1], 1)
    data = jax.tree.map(lambda a: jnp.repeat(a, config.trials, axis=0), data)
    settings = {k: cells.each(jnp.asarray(v)) for k, v in values.items()}
    # The same first weights and order of the images for all.
    keys = [jnp.repeat(key, len(data[0])) for key in run_keys]
    states, settings = fit(name, problem, keys[0], settings, data, images)
    x, labels = images.held_out
    samples = 1 if name in POINTS else config.num_samples
    arguments = problem, states, keys[1], settings, x, samples
    nll = losses(baselines.predict(system_of(name), *arguments), labels)
    nll = np.asarray(nll).mean(axis=1).reshape(-1, config.trials)
    return values, nll


def chosen(values, nll):
    """Return each cell's best setting, {name: (cells,)}."""
    best = [results.best(row) for row in nll]
    return {name: column[best] for name, column in values.items()}


def test(name, problem, images, cells, best, moved, config):
    """Return rows of probabilities of one training.

    Those of held-out and test images have shape (cells * seeds, N, 10), those of what
    is `moved`, {(row, "moved"): ...}, that of the shifted cell's seeds.
    """
    data_key, *run_keys = jax.random.split(jax.random.key(0), 3)
    data = cells.subsets(data_key, images.pool[1], config.seeds)
    keys = [cells.each(jax.random.split(key, config.seeds)) for key in run_keys]
    settings = {k: jnp.repeat(jnp.asarray(v), config.seeds) for k, v in best.items()}
    if name == "AdamW":
        predict = ensembles(problem, images, keys[0], settings, data, config)
    else:
        fitted = fit(name, problem, keys[0], settings, data, images)
        predict = predictions(name, problem, *fitted, keys[1], images, config)
    x = jnp.concatenate([images.held_out[0], images.test[0]])
    rows = predict(slice(None), x)
    some = cells.runs(config.shift_size, config.seeds)
    if some is not None:
        rows |= {(row, "moved"): p for row, p in predict(some, moved).items()}
    held_out = len(images.held_out[1])
    for row in set(SCALED) & set(rows):
        chosen_with = rows[row][:, :held_out]
        scale = functools.partial(
            controls.temperature_scaled, labels=images.held_out[1]
        )
        rows[f"{row}, scaled"] = scale(chosen_with, probs=rows[row])
        if some is not None:
            found = scale(chosen_with[some], probs=rows[row, "moved"])
            rows[f"{row}, scaled", "moved"] = found
    return rows


def predictions(name, problem, states, settings, keys, images, config):
    """Return ``predict(runs, x)``: the rows of a system's networks."""
    system = system_of(name)
    best = None
    if name == "IVON":
        best = controls.temperatures(problem, states, keys, images.held_out, 16)

    def predict(runs, x):
        def row(system, samples=config.num_samples, **more):
            some = jax.tree.map(lambda a: a[runs], (states, keys, settings | more))
            return baselines.predict(system, problem, *some, x, samples)

        rows = {name: row(system, 1 if name in POINTS else config.num_samples)}
        if name == "IVON":
            rows["IVON@mean"] = row(baselines.at_mean(system), 1)
            constant = controls.at_constant_precision(system)
            rows["IVON, constant precision"] = row(constant)
            rows["IVON, calibrated"] = row(controls.tempered(system), temperature=best)
        return rows

    return predict


def ensembles(problem, images, keys, settings, data, config):
    """Return ``predict(runs, x)`` of AdamW, as a first member, and its ensembles."""
    members = config.members
    keys = jax.vmap(lambda key: jax.random.split(key, members))(keys).reshape(-1)
    settings, data = jax.tree.map(
        lambda a: jnp.repeat(a, members, axis=0), (settings, data)
    )
    lengths = problem, controls.of_equal_cost(problem, members)
    fitted = [fit("AdamW", p, keys, settings, data, images) for p in lengths]

    def predict(runs, x):
        rows = {}
        for name, (states, told) in zip(ENSEMBLES, fitted, strict=True):
            # The members of a run stand side by side.
            every = np.arange(len(keys)).reshape(-1, members)[runs].reshape(-1)
            of_members = operator.itemgetter(every)
            some = jax.tree.map(of_members, (states, keys, told))
            probs = baselines.predict(system_of("AdamW"), problem, *some, x, 1)
            rows.setdefault("AdamW", probs[::members])
            rows[name] = controls.ensembled(probs, members)
        return rows

    return predict


def shifted(images, number=500):
    """Return the first test images after each severity and kind of shift."""
    x, labels = (array[:number] for array in images.test)
    square = np.asarray(x).reshape(-1, images.side, images.side)
    found = [
        shift(square, severity).reshape(len(square), -1)
        for severity in range(1, 6)
        for shift in SHIFTS.values()
    ]
    return jnp.asarray(np.concatenate(found), jnp.float32), labels


@functools.partial(jax.jit, static_argnums=0)
def over_runs(metric, probs, labels):
    """Return a metric of each run."""
    return jax.vmap(metric, (0, None))(probs, labels)


def scores(probs, labels):
    """Return the columns of a row, a value for each seed."""
    return {
        "accuracy %": 100 * over_runs(metrics.accuracy, probs, labels),
        "NLL": over_runs(metrics.negative_log_likelihood, probs, labels),
        "ECE": over_runs(metrics.expected_calibration_error, probs, labels),
    }


def differences(probs, labels, fold=lambda each: each):
    """Yield records of what IVON has and another lacks, with intervals."""
    key = jax.random.key(2)
    for name, (ivon, other) in EFFECTS.items():
        if other in probs:
            row = {"less": name}
            for title, score in {"NLL": losses, "accuracy %": right}.items():
                pair = (fold(score(probs[system], labels)) for system in (ivon, other))
                found = intervals.interval(key, intervals.paired_mean, *pair)
                row[title] = found.cell
            yield row


def summary(probs, labels):
    """Return the record of the posterior's effect: IVON beside its first control."""
    of = {row["less"]: row["NLL"] for row in differences(probs, labels)}
    ivon, control = (
        losses(probs[n], labels).mean(axis=1) for n in ("IVON", "no noise")
    )
    return {
        "NLL of IVON": ivon,
        "less no noise": of["no noise"],
        "both scaled": of["no noise, both scaled"],
        "NLL of no noise": control,
    }


def aurc(confidence, wrong):
    """Return the area under risk over coverage."""
    return metrics.risk_coverage(confidence, wrong)["aurc"]


aurc_of_runs = jax.jit(jax.vmap(aurc))


def selective(probs, labels):
    """Return rows of how well each system's confidence tells its errors."""

    def parts(name):
        return probs[name].max(-1), probs[name].argmax(-1) != labels

    def difference(*both):
        return aurc(*both[:2]) - aurc(*both[2:])

    for name in probs:
        row = {"system": name, "AURC": aurc_of_runs(*parts(name))}
        found = intervals.interval(
            *(jax.random.key(3), difference, *parts("IVON"), *parts(name))
        )
        yield row | {"IVON's less this": found.cell}


def of_shift(probs, labels):
    """Return rows by severity and system, and the differences by severity."""
    rows, found = [], []
    kinds = len(SHIFTS)
    again = jnp.tile(labels, kinds)

    def fold(each):  # the kinds of shift of an image are no images of their own
        return each.reshape(len(each), kinds, -1).mean(axis=1)

    for severity in range(1, 6):
        count = len(again)
        part = slice((severity - 1) * count, severity * count)
        of_severity = {name: array[:, part] for name, array in probs.items()}
        label = {"severity": severity}
        rows += [
            label | {"system": name, **scores(p, again)}
            for name, p in of_severity.items()
        ]
        found += [label | row for row in differences(of_severity, again, fold)]
    return rows, found


def trial_rows(name, values, nll, cells):
    """Yield a record for each trial: its setting, and the NLL of each cell."""
    titles = [f"{size}, {flip} %" for size, flip in cells.all]
    for i, found in enumerate(nll.T):
        setting = {key: column[i] for key, column in values.items()}
        yield tables.record({"system": name, **setting}, titles, found)


def run_all(study, images, cells, config):
    """Tune, train and test all systems; return {row: probabilities} of all runs."""
    problem, (moved, _) = make_problem(config, images), shifted(images)
    rows, trials = {}, []
    for name in tqdm(config.systems.split(";"), leave=False):
        values, nll = tune(name, problem, images, cells, config)
        trials += trial_rows(name, values, nll, cells)
        best = chosen(values, nll)
        rows |= test(name, problem, images, cells, best, moved, config)
    study.table("trials", tables.padded(trials))
    return rows


def main():
    """Run all cells, and keep the tables."""
    config = flags.parse(Config, __doc__)
    check_systems(config.systems)
    images = few_images.load(config.data)
    cells = few_images.Cells(
        flags.numbers("sizes", config.sizes, 1, len(images.pool[1])),
        flags.numbers("flips", config.flips, 0, 90),
    )
    study = results.Study(config)
    rows = run_all(study, images, cells, config)
    names = [name for name in ROWS if name in rows]
    labels, found = images.test[1], {name: [] for name in TABLES}
    for i, (size, flip) in enumerate(cells.all):
        seeds = slice(i * config.seeds, (i + 1) * config.seeds)
        probs = {name: rows[name][seeds, -len(labels) :] for name in names}
        cell = {"N": size, "flipped %": flip}
        found["effect of the posterior"].append(cell | summary(probs, labels))
        found["test"] += [
            cell | {"system": name, **scores(probs[name], labels)} for name in names
        ]
        found["IVON"] += [cell | row for row in differences(probs, labels)]
        if seeds == cells.runs(config.shift_size, config.seeds):
            found["selective"] = list(selective(probs, labels))
    if config.shift_size in cells.sizes:
        moved = {name: rows[name, "moved"] for name in names}
        pair = of_shift(moved, shifted(images)[1])
        found["shifted"], found["IVON, shifted"] = pair
    for name, records in found.items():
        study.table(name, records, DECIMALS)


def check_systems(text):
    """Exit where a system is unknown, or what all are compared with is missing."""
    names = text.split(";")
    if not {"IVON", "no noise"} <= set(names) <= set(SYSTEMS):
        sys.exit(
            "`--systems` must be some of those of the default, with IVON and no noise, "
            f"got {text!r}."
        )


if __name__ == "__main__":
    main()
