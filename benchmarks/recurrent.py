"""The paper's Table 13 in small: a recurrent network for text.

    python benchmarks/recurrent.py

It takes four minutes of one core.

Which package of Python's standard library is this? An embedding, a layer of gated
recurrent units and a linear head on the mean of its states read 32 tokens. Each
package's files are in random order, and its excerpts go in that order to training,
validation (the last third of the training set) and test: at most one file of a package
lies on each border. Systems, their ranges and their tuning are those of uncertainty.py.
"""

import collections
import dataclasses
import pathlib
import re
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import uncertainty
from common import flags, results
from common.flags import Count, Results
from flax import linen as nn

PACKAGES = (
    "asyncio",
    "email",
    "idlelib",
    "importlib",
    "multiprocessing",
    "tkinter",
    "unittest",
    "xml",
)
SYSTEMS = "AdamW", "SGD", "IVON"
ROWS = "AdamW", "SGD", "IVON@mean", "IVON"
NORMAL = jax.nn.initializers.lecun_normal()
TITLES = "accuracy %", "NLL", "ECE", "Brier"


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    vocabulary: Count = 2000  # the most frequent tokens; all others are one
    length: Count = 32  # tokens of an excerpt
    per_package: Count = 1000  # excerpts, a fifth of them to test on
    width: Count = 32  # of the embedding and of the recurrent units
    epochs: Count = 12
    trials: Count = 16  # of each system
    tuning_seeds: Count = 1
    seeds: Count = 5
    members: Count = 1  # of an ensemble, which uncertainty.py has alone
    num_samples: Count = 64
    results: Results = "recurrent.json"


class Encoder(nn.Module):
    """An embedding and a layer of gated recurrent units."""

    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, tokens):
        """Map tokens (N, T) to the mean of the states, (N, width)."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        # Flax's initial value, an orthogonal matrix, hangs under vmap on two cores:
        # each QR decomposition of jax 0.10 waits for threads that the others hold.
        return nn.RNN(nn.GRUCell(self.width, recurrent_kernel_init=NORMAL))(x).mean(1)


def excerpts(package, config):
    """Return as many excerpts of the package, lists of tokens, in the files' order."""
    root = pathlib.Path(sysconfig.get_path("stdlib"), package)
    paths = sorted(p for p in root.rglob("*.py") if "test" not in p.parts)
    found = []
    for i in np.random.default_rng(0).permutation(len(paths)):
        text = paths[i].read_text(encoding="utf-8", errors="replace")
        tokens = re.findall(r"\w+|[^\w\s]", text)
        starts = range(0, len(tokens) - config.length + 1, config.length)
        found += [tokens[j : j + config.length] for j in starts]
    chosen = np.linspace(0, len(found) - 1, config.per_package, dtype=int)
    return [found[i] for i in chosen]


def load_task(config):
    """Return the excerpts as arrays of token numbers, and the network."""
    packages = [excerpts(package, config) for package in PACKAGES]
    # One of each package in turn, so that all cuts are at the same share of each.
    texts = [text for turn in zip(*packages, strict=True) for text in turn]
    labels = np.tile(np.arange(len(PACKAGES)), config.per_package)
    cut = len(PACKAGES) * (4 * config.per_package // 5)
    counts = collections.Counter(token for text in texts[:cut] for token in text)
    known = counts.most_common(config.vocabulary - 1)
    numbers = {token: i + 1 for i, (token, _) in enumerate(known)}
    tokens = np.array([[numbers.get(token, 0) for token in text] for text in texts])
    train, test = ((tokens[part], labels[part]) for part in np.s_[:cut, cut:])
    length = dict(batch_size=50)
    return uncertainty.Task(train, test, 0, network(config), length, tuning_seeds=1)


def network(config):
    """Return ``init`` and ``features`` of the recurrent network."""
    encoder = Encoder(config.vocabulary, config.width)

    def init(key):
        body_key, head_key = jax.random.split(key)
        body = encoder.init(body_key, jnp.zeros((1, config.length), int))["params"]
        head = NORMAL(head_key, (config.width, len(PACKAGES)))
        return body, {"w": head, "b": jnp.zeros(len(PACKAGES))}

    def features(params, tokens, drop):
        return drop(encoder.apply({"params": params[0]}, tokens))

    return init, features


def main():
    """Tune, train, test and print."""
    config = flags.parse(Config, __doc__)
    task = load_task(config)
    texts, labels = map(jnp.asarray, task.test)
    study = results.Study(config)
    print(f"{len(task.train[1])} excerpts to train on, {len(labels)} to test on.\n")
    probs = {}
    for name in SYSTEMS:
        setting, _ = uncertainty.tune(study, name, task, config)
        probs |= uncertainty.test(name, setting, task, config, texts)
    rows = [
        {"system": name}
        | {
            t: jax.vmap(uncertainty.SCORES[t], (0, None))(probs[name], labels)
            for t in TITLES
        }
        for name in ROWS
    ]
    study.table("test", rows)


if __name__ == "__main__":
    main()
