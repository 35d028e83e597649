"""Fine-tune a pretrained language model (section 4.3.1, in small): IVON beside AdamW.

    python benchmarks/finetuning.py

It takes twelve minutes of one core.

AdamW pretrains the tiny GPT-2 on the source of Python's standard library. AdamW and
IVON then fine-tune it on English, the help texts that Python carries (pydoc_data, which
is not in the source above, and no paragraph twice). The last twentieth of the texts is
for the test, and a twentieth of the rest validates six learning rates of each
optimizer, from a range that pilot runs on that part gave; all else is as in
examples/gpt2. The best one trains on all but the test part, with three more seeds.
Perplexity is per byte; the base's on English is of the test part.
"""

import dataclasses
import functools
import pathlib
import sysconfig
import tempfile
from pydoc_data import topics

import jax
from common import flags, gpt2, results
from common.flags import Count, Results

GRIDS = {
    "adamw": ("adamw_lr", (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)),
    "ivon": ("ivon_lr", (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)),
}
NAMES = {"adamw": "AdamW", "ivon": "IVON"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    pretraining_steps: Count = 1000
    steps: Count = 100
    batch_size: Count = 16
    block: Count = 64  # bytes in a sequence
    seeds: Count = 3
    num_samples: Count = 8  # of the posterior
    results: Results = "finetuning.json"


def write_texts(folder):
    """Write a text to pretrain with, one to tune and one to test with."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    paths = sorted(root.rglob("*.py"))
    others = {"site-packages", "pydoc_data"}
    source = [p.read_bytes() for p in paths if not others & set(p.parts)]
    (folder / "source").write_bytes(b"".join(source))
    paragraphs = "\n".join(topics.topics.values()).split("\n\n")
    english = "\n\n".join(dict.fromkeys(paragraphs)).encode()
    (folder / "test").write_bytes(english)
    (folder / "tuning").write_bytes(english[: len(english) * 19 // 20])


def prepare(config, key):
    """Return mesh, batches to train on and to validate on, and the network."""
    mesh = gpt2.create_mesh("")
    *arrays, vocabulary = gpt2.load_data(config)
    data = [gpt2.Tokens(array, vocabulary, config, mesh) for array in arrays]
    return mesh, data, *gpt2.create_network(key, config, vocabulary, mesh)


def perplexity(params, config):
    """Return what these parameters have on the last part of the text."""
    _, (_, validation), graphdef, _ = prepare(config, jax.random.key(config.seed))
    loss_fn, _ = gpt2.create_losses(graphdef)
    mean_loss = jax.jit(functools.partial(loss_fn, params))
    return gpt2.evaluate(mean_loss, validation, config)


def train(config, params=None):
    """Train from `params` on, or from the start; return parameters and {row: value}."""
    init_key, train_key, predict_key = jax.random.split(jax.random.key(config.seed), 3)
    mesh, data, graphdef, fresh = prepare(config, init_key)
    loss_fn, probs_fn = gpt2.create_losses(graphdef)
    # A copy: the steps reuse its memory.
    params = fresh if params is None else jax.tree.map(lambda x: x.copy(), params)
    tx = gpt2.create_optimizer(config)
    state = params, tx.init(params)
    with jax.set_mesh(mesh), gpt2.open_checkpoints(config, data) as folder:
        arguments = config, mesh, state, loss_fn, tx, data, folder, train_key
        state, log = gpt2.fit(*arguments)
        rows = {gpt2.ROWS[config.optimizer]: log[-1]["perplexity"]}
        if config.optimizer == "ivon" and config.num_samples:
            arguments = state, probs_fn, data[1], config, predict_key
            averaged = gpt2.posterior_perplexities(*arguments)
            rows["IVON"] = averaged[config.num_samples]
    return state[0], rows


def configure(config, folder, optimizer, text, **settings):
    """Return the configuration of a run of GPT-2 on one of the texts."""
    fields = dict(
        data=str(folder / text),
        steps=config.steps,
        eval_every=max(config.steps, config.pretraining_steps),  # at the end alone
        batch_size=config.batch_size,
        block=config.block,
        num_samples=config.num_samples,
        checkpoint_dir=tempfile.mkdtemp(dir=folder),
    )
    preset = gpt2.parse_args(["--optimizer", optimizer])
    return dataclasses.replace(preset, **fields | settings)


def tune(study, base, make, optimizer):
    """Return the best setting of the grid."""
    row, (name, grid) = gpt2.ROWS[optimizer], GRIDS[optimizer]
    settings = [{name: value} for value in grid]
    values = []
    for setting in settings:
        run = make(optimizer, "tuning", num_samples=0, **setting)
        values.append(train(run, base)[1][row])
    score = "validation perplexity"
    return settings[study.trials(NAMES[optimizer], settings, values, score)]


def main():
    """Pretrain, fine-tune and test."""
    config = flags.parse(Config, __doc__)
    study = results.Study(config)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_texts(folder)
        make = functools.partial(configure, config, folder)
        base, rows = train(make("adamw", "source", steps=config.pretraining_steps))
        before = perplexity(base, make("adamw", "test"))
        base_rows = [{"source": rows["AdamW"], "English": before}]
        study.table("perplexity of the base", base_rows, {"source": 3, "English": 3})
        test = []
        for optimizer in GRIDS:
            setting = tune(study, base, make, optimizer)
            runs = [
                train(make(optimizer, "test", seed=seed, **setting), base)[1]
                for seed in range(1, config.seeds + 1)
            ]
            test += [
                {"system": row, "perplexity": [run[row] for run in runs]}
                for row in runs[0]
            ]
    study.table("test", test, {"perplexity": 4})


if __name__ == "__main__":
    main()
