"""Results as data: what a script measured, with which configuration, where and when.

    study = results.Study(config)
    study.table("test", [{"system": "IVON", "NLL": [0.17, 0.18]}], {"NLL": 3})

prints the table, and writes it into the JSON file that ``--results`` names.
"""

import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np

from common import tables

FOLDER = pathlib.Path(__file__).parent.parent / "results"


class Study:
    """The results of one run: printed as they come, and kept as data."""

    def __init__(self, config):
        self._path, self._start = pathlib.Path(config.results), time.perf_counter()
        script = sys.modules[type(config).__module__].__file__
        self._data = {
            "study": pathlib.Path(script).stem,
            "command": command(script, config),
            "source": "run",
            "date": str(datetime.date.today()),
            "commit": _commit(),
            "environment": environment(),
            "config": _fields(config),
            "tables": {},
            "curves": {},
        }
        for key in ("environment", "config"):
            print(", ".join(f"{k} {v}" for k, v in self._data[key].items()))
        print(f"commit {self._data['commit']}\n", flush=True)

    def table(self, name, rows, digits=None):
        """Print and keep records of labels, numbers, and lists of one for each seed."""
        table = {"digits": digits or {}, "rows": _plain(rows)}
        self._data["tables"][name] = table
        print(f"{name}:\n\n{tables.markdown(table)}", flush=True)
        self._write()

    def trials(self, system, settings, losses, score="validation NLL"):
        """Print and keep a system's trials, a list of dictionaries; return the best."""
        chosen = best(losses)
        kept = self._data["tables"].setdefault("trials", {"digits": {}, "rows": []})
        trials = enumerate(zip(settings, losses, strict=True))
        rows = _plain(
            {"system": system, **setting, score: loss, "chosen": i == chosen}
            for i, (setting, loss) in trials
        )
        kept["rows"] += rows
        print(f"{system}: best of {len(rows)} trials {rows[chosen]}\n", flush=True)
        self._write()
        return chosen

    def curves(self, name, values):
        """Keep what a plot needs: nested lists or dictionaries of numbers."""
        self._data["curves"][name] = _plain(values)
        self._write()

    def _write(self):
        minutes = (time.perf_counter() - self._start) / 60
        self._path.write_text(dumps(self._data | {"minutes": round(minutes, 1)}))


def environment():
    """Say what runs where."""
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }


def load(folder=FOLDER):
    """Return {name: results} of all files in the folder."""
    return {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}


def command(script, config):
    """Return what to type for the same run again."""
    words = ["python", f"benchmarks/{pathlib.Path(script).name}"]
    defaults = _fields(type(config)())
    for name, value in _fields(config).items():
        if value != defaults[name]:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def best(losses):
    """Return the index of the lowest loss; a diverged trial, NaN, never has it."""
    if np.all(np.isnan(losses)):
        raise SystemExit(f"All {len(losses)} trials diverged.")
    return int(np.nanargmin(losses))


def dumps(value, depth=4):
    """Return JSON with a line for each record of a table."""
    if not depth or not isinstance(value, dict | list) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    if isinstance(value, dict):
        items = [f"{json.dumps(k)}: {dumps(v, depth - 1)}" for k, v in value.items()]
        begin, end = "{}"
    else:
        items, (begin, end) = [dumps(v, depth - 1) for v in value], "[]"
    if all(not isinstance(v, dict | list) for v in _children(value)):
        return begin + ", ".join(items) + end
    return f"{begin}\n" + ",\n".join(items) + f"\n{end}"


def _children(value):
    return value.values() if isinstance(value, dict) else value


def _plain(value):
    """Arrays as lists, numbers with six digits, and null for what is not finite."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | Iterator):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _fields(config):
    """Return the fields, with DATA for the folder that the variable DATA names."""
    data = os.environ.get("DATA", "").rstrip("/")
    fields = dataclasses.asdict(config)
    del fields["results"]
    return {
        name: value.replace(data, "DATA") if data and isinstance(value, str) else value
        for name, value in fields.items()
    }


def _commit():
    return subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=7"],
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
