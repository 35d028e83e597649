"""Every example runs at the toy size that its first lines name."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_prints_a_table_and_saves_its_picture(path, tmp_path):
    """With warnings as errors, in a folder of its own."""
    toy = re.search(r"^Toy size: `(.*)`", path.read_text(), re.MULTILINE).group(1)
    result = subprocess.run(
        [sys.executable, "-W", "error", path, *shlex.split(toy)],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"^\|.*\|$", result.stdout, re.MULTILINE), result.stdout
    assert list(tmp_path.glob("*.png"))
