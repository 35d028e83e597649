"""Run the commands of README.md, and put what they print where their tables are.

    python benchmarks/run.py                   # all, in under an hour on two CPU cores
    python benchmarks/run.py uci.py --mnist    # those whose command has one of these

Data sets that no package carries are read from the folder in the environment variable
DATA: mnist10k.npz, cifar10_jpeg.npz, uci/. Commands that need one are left out without
it, and those marked "by name only", which take long, unless they are named.
"""

import datetime
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

README = pathlib.Path(__file__).with_name("README.md")
SECTION = re.compile(
    r"```shell\n(?P<command>python benchmarks/.*)\n```\n\n"
    r"<!-- printed(?P<when>.*) -->\n(?s:.*?)<!-- end -->"
)
LATER = ", by name only"


def selected(section, names):
    """Tell whether a section is to be run."""
    if names:
        return any(name in section["command"] for name in names)
    return not section["when"].endswith(LATER)


def run(command, data):
    """Return what the command printed, and the minutes it took; None if it failed."""
    words = [w.replace("DATA/", f"{data}/") for w in shlex.split(command)]
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=README.parent.parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    minutes = (time.perf_counter() - begin) / 60
    output = done.stdout.replace(str(data), "DATA").strip()
    return (output, minutes) if done.returncode == 0 else None


def record(command, output, minutes):
    """Put the output into README.md."""

    def replace(section):
        if section["command"] != command:
            return section[0]
        later = LATER if section["when"].endswith(LATER) else ""
        when = f" {datetime.date.today()}, {minutes:.0f} min{later}"
        head, _ = section[0].split("<!-- printed", 1)
        return f"{head}<!-- printed{when} -->\n{output}\n<!-- end -->"

    text = README.read_text(encoding="utf-8")
    README.write_text(SECTION.sub(replace, text), encoding="utf-8")


def main():
    """Run what the command line names."""
    data, names = os.environ.get("DATA", ""), sys.argv[1:]
    data = pathlib.Path(data).resolve() if data else None
    sections = SECTION.finditer(README.read_text(encoding="utf-8"))
    commands = [s["command"] for s in sections if selected(s, names)]
    failed = []
    if not commands:
        raise SystemExit(f"No command of {README} has one of {names}.")
    for i, command in enumerate(commands):
        print(f"[{i + 1}/{len(commands)}] {command}", flush=True)
        if "DATA/" in command and data is None:
            print("  left out: set DATA to the folder of the data sets", flush=True)
            continue
        result = run(command, data)
        if result is None:
            failed.append(command)
            continue
        record(command, *result)
        print(f"  {result[1]:.1f} min", flush=True)
    if failed:
        raise SystemExit("\n".join(["These failed:", *failed]))


if __name__ == "__main__":
    main()
