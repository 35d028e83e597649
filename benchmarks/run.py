"""Measure again what results/ has, and render README.md.

    python benchmarks/run.py                # what took up to 15 minutes of a CPU
    python benchmarks/run.py uci _mnist     # the results whose name has one of these

Data sets that no package carries are read from the folder in the environment variable
DATA: mnist10k.npz, cifar10_jpeg.npz, uci/. Results that need one are left out without
it. A script that fails leaves its results as they were.
"""

import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

from common import results

ROOT = pathlib.Path(__file__).parent.parent
LONG = 15  # minutes


def selected(name, result, words):
    """Tell whether a result is to be measured again."""
    if words:
        return any(word in name for word in words)
    on_cpu = "cpu" in result["environment"]["device"].lower()
    return on_cpu and (result["minutes"] or 0) <= LONG


def measure(command, path, data):
    """Run a command, and put its results there; tell whether it did not fail."""
    words = [word.replace("DATA", data) for word in shlex.split(command)]
    with tempfile.TemporaryDirectory() as folder:
        new = pathlib.Path(folder, "new.json")
        words = [sys.executable, *words[1:], "--results", str(new)]
        if subprocess.run(words, cwd=ROOT).returncode:
            return False
        path.write_text(new.read_text())
    return True


def main():
    """Run the scripts one after the other; then render the page."""
    data, failed = os.environ.get("DATA", ""), []
    for name, result in results.load(results.FOLDER).items():
        if not selected(name, result, sys.argv[1:]):
            continue
        if "DATA" in result["command"] and not data:
            print(f"Left out, set DATA: {name}")
            continue
        print(f"{name}: {result['command']}", flush=True)
        if not measure(result["command"], results.FOLDER / f"{name}.json", data):
            failed.append(name)
    subprocess.run([sys.executable, ROOT / "benchmarks" / "render.py"], check=True)
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
