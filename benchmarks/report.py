"""What the benchmarks share: flags, the conditions of a run, and Markdown tables."""

import os
import pathlib
import platform
import subprocess

import jax
import numpy as np
from common import flags
from common.flags import Count, Picture, Positive  # noqa: F401
from scipy.stats import sem


def parse_args(config_type, doc, **full):
    """Read a Config, a dataclass, from the command line; `full` is for ``--full 1``."""
    parser = flags.create_parser(config_type, doc)
    given = vars(parser.parse_args())
    defaults = full if full and given.get("full") else {}
    return flags.checked(parser, config_type(**defaults | given))


def print_conditions(config):
    """Print what runs where."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=7"],
        cwd=pathlib.Path(__file__).parent,
        capture_output=True,
        text=True,
    ).stdout.strip()
    device = f"{jax.devices()[0].device_kind} ({platform.machine()})"
    device += f" with {os.cpu_count()} cores"
    print(f"jax {jax.__version__} on {device}, commit {commit},")
    print(f"`{config}`\n", flush=True)


def print_table(titles, rows):
    """Print rows of cells, and an empty line."""
    for cells in (titles, ["---"] * len(titles), *rows):
        print(f"| {' | '.join(map(str, cells))} |")
    print(flush=True)


def mean_and_error(values, digits):
    """Return a cell, ``mean ± standard error``."""
    return f"{np.mean(values):.{digits}f} ± {sem(values):.{digits}f}"


def best(losses):
    """Return the index of the lowest loss; a diverged trial, NaN, never has it."""
    if np.all(np.isnan(losses)):
        raise SystemExit(f"All {len(losses)} trials diverged.")
    return int(np.nanargmin(losses))


def trial_cells(name, settings, losses):
    """Return cells of a system's trials, a list of dictionaries; the best is bold."""
    cells = [
        " / ".join(f"{value:.2g}" for value in setting.values()) + f": {loss:.4g}"
        for setting, loss in zip(settings, losses, strict=True)
    ]
    cells[best(losses)] = f"**{cells[best(losses)]}**"
    return name, " / ".join(settings[0]).replace("_", " "), ", ".join(cells)


TRIALS = "", "hyperparameters", "trials: validation NLL"
