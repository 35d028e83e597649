"""Validation perplexity of the tiny GPT-2 over training: IVON beside AdamW (Fig. 1a).

    python benchmarks/gpt2_curve.py             # 80 minutes on two CPU cores

Both train on as many bytes of Python's standard library, each with the best of six
settings after the whole run (seed 0; the table of trials is printed), then three more
seeds with it; and IVON once more with bfloat16 computation (Fig. 2b). Started again, it
goes on from its checkpoints.
"""

import dataclasses
import itertools

import numpy as np
from common import flags, gpt2, results
from common.flags import Results

GRIDS = {
    "adamw": {"adamw_lr": (3e-3, 1e-2, 3e-2), "adamw_b1": (0.9, 0.7)},
    "ivon": {"ivon_lr": (2.0, 3.0, 4.5), "ivon_b1": (0.7, 0.5)},
}
SEEDS = 1, 2, 3
RUNS = {
    "AdamW": ("adamw", "float32"),
    "IVON": ("ivon", "float32"),
    "IVON, bfloat16": ("ivon", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    results: Results = "gpt2_curve.json"


def train(optimizer, seed, num_samples=16, **settings):
    """Return perplexity at the mean and averaged over samples, and the log."""
    values = "_".join(str(value) for value in settings.values())
    folder = f"checkpoints/gpt2_curve/{optimizer}_{values}_{seed}"
    config = gpt2.parse_args(["--optimizer", optimizer, "--checkpoint_dir", folder])
    fixed = dict(max_to_keep=1, write=0, num_samples=num_samples)
    config = dataclasses.replace(config, seed=seed, **fixed, **settings)
    _, log, averaged, _ = gpt2.run(config)
    return log, averaged


def tune(study, optimizer):
    """Return the best setting."""
    names, values = zip(*GRIDS[optimizer].items(), strict=True)
    settings = [dict(zip(names, s, strict=True)) for s in itertools.product(*values)]
    logs = [train(optimizer, 0, 1, **setting)[0] for setting in settings]
    losses = [log[-1]["perplexity"] for log in logs]
    return settings[study.trials(optimizer, settings, losses, "perplexity")]


def rows_of(name, settings, logs, averages):
    """Yield records of the mean and of each number of samples."""
    rates = [entry["tokens_per_second"] for log in logs for entry in log]
    rest = settings | {"tokens/s": np.median(rates)}
    at_mean = [log[-1]["perplexity"] for log in logs]
    label = f"{name}@mean" if averages[0] else name
    yield {"system": label, "samples": None, "perplexity": at_mean} | rest
    for count in averages[0]:
        values = [average[count] for average in averages]
        yield {"system": name, "samples": count, "perplexity": values} | rest


def main():
    """Tune, and train three seeds."""
    config = flags.parse(Config, __doc__)
    study = results.Study(config)
    best = {optimizer: tune(study, optimizer) for optimizer in GRIDS}
    test, curves = [], {}
    for name, (optimizer, dtype) in RUNS.items():
        settings = best[optimizer]
        runs = [train(optimizer, s, **settings, dtype=dtype) for s in SEEDS]
        logs, averages = zip(*runs, strict=True)
        test += rows_of(name, settings, logs, averages)
        curves["tokens"] = [entry["tokens"] for entry in logs[0]]
        curves[name] = [[entry["perplexity"] for entry in log] for log in logs]
        study.curves("perplexity by tokens", curves)
    study.table("validation", test, {"perplexity": 4, "tokens/s": 0})


if __name__ == "__main__":
    main()
