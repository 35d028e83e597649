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
import report
from common import gpt2
from matplotlib.figure import Figure

GRIDS = {
    "adamw": {"adamw_lr": (3e-3, 1e-2, 3e-2), "adamw_b1": (0.9, 0.7)},
    "ivon": {"ivon_lr": (2.0, 3.0, 4.5), "ivon_b1": (0.7, 0.5)},
}
SEEDS = 1, 2, 3
RUNS = {
    "AdamW": ("adamw", "float32", "#0072B2"),
    "IVON": ("ivon", "float32", "#D55E00"),
    "IVON, bfloat16": ("ivon", "bfloat16", "#CC79A7"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    plot: report.Picture = "gpt2_curve.png"


def train(optimizer, seed, num_samples=16, **settings):
    """Return perplexity at the mean and averaged over samples, and the log."""
    values = "_".join(str(value) for value in settings.values())
    folder = f"checkpoints/gpt2_curve/{optimizer}_{values}_{seed}"
    config = gpt2.parse_args(["--optimizer", optimizer, "--checkpoint_dir", folder])
    fixed = dict(max_to_keep=1, write=0, num_samples=num_samples)
    config = dataclasses.replace(config, seed=seed, **fixed, **settings)
    _, log, averaged, _ = gpt2.run(config)
    return log, averaged


def tune(optimizer):
    """Print a line for each setting; return the best one."""
    names, values = zip(*GRIDS[optimizer].items(), strict=True)
    trials = {}
    for setting in itertools.product(*values):
        log, _ = train(optimizer, 0, 1, **dict(zip(names, setting, strict=True)))
        trials[setting] = log[-1]["perplexity"]
        cells = [optimizer, *(f"{value:g}" for value in setting)]
        print(f"| {' | '.join(cells)} | {trials[setting]:.3f} |", flush=True)
    best = list(trials)[report.best(list(trials.values()))]
    return dict(zip(names, best, strict=True))


def mean_and_error(values):
    """Return the mean over seeds, the first axis, and its standard error."""
    return values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5


def main():
    """Tune, train three seeds, print the tables and draw the curves."""
    config = report.parse_args(Config, __doc__)
    report.print_conditions(config)
    print("| optimizer | learning rate | b1 | perplexity |")
    print("| --- | --- | --- | --- |")
    best = {optimizer: tune(optimizer) for optimizer in GRIDS}
    print(f"\nseeds {SEEDS}\n")
    print("| | settings | validation perplexity per byte | tokens/s |")
    print("| --- | --- | --- | --- |")
    figure = Figure(figsize=(10, 3.8), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, (optimizer, dtype, color) in RUNS.items():
        settings = best[optimizer] | {"dtype": dtype}
        results = [train(optimizer, seed, **settings) for seed in SEEDS]
        logs, averages = zip(*results, strict=True)
        curves = np.array([[entry["perplexity"] for entry in log] for log in logs])
        rows = {f"{name}@mean" if averages[0] else name: curves[:, -1]}
        if averages[0]:
            by_count = np.array([list(average.values()) for average in averages])
            counts = list(averages[0])
            rows |= {
                f"{name}, samples: {n}": by_count[:, i] for i, n in enumerate(counts)
            }
            gain, error = mean_and_error(by_count - curves[:, -1:])
            right.errorbar(counts, gain, error, fmt="o-", color=color)
        rates = [entry["tokens_per_second"] for log in logs for entry in log]
        cells = ", ".join(f"{k} {v}" for k, v in best[optimizer].items())
        for row, values in rows.items():
            cell = "{:.4f} ± {:.4f}".format(*mean_and_error(values))
            print(f"| {row} | {cells} | {cell} | {np.median(rates):,.0f} |", flush=True)
        tokens = [entry["tokens"] / 1e6 for entry in logs[0]]
        mean, error = mean_and_error(curves)
        left.plot(tokens, mean, "o-", color=color, label=name)
        left.fill_between(tokens, mean - error, mean + error, color=color, alpha=0.3)
    left.set(xlabel="million bytes", ylabel="validation perplexity", yscale="log")
    left.set_yticks([5, 6, 8, 10, 13], ["5", "6", "8", "10", "13"])
    left.minorticks_off()
    left.legend(frameon=False)
    right.axhline(0.0, color="#999999", linestyle=":")
    right.set(xlabel="posterior samples", ylabel="perplexity above the mean's")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(config.plot)


if __name__ == "__main__":
    main()
