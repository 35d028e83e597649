"""The page "Saving a posterior": written by one process, read by another."""

import os
import subprocess
import sys

import recipes


def printed(section, folder):
    """What the blocks of a section print, in a process of their own."""
    code = "\n".join(recipes.blocks("saving.md")[section])
    path = [str(recipes.ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_posterior_is_the_same_in_a_new_process(tmp_path):
    """Its samples, from four kinds of file, None for a point mass among them."""
    [expected] = printed("Save", tmp_path)
    assert printed("Load", tmp_path) == 4 * [expected]
