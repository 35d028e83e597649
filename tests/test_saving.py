"""The page "Saving a posterior": written by one process, read by another."""

import os
import subprocess
import sys

import recipes


def printed(folder, *sections):
    """What the blocks of these sections print, in a process of their own."""
    blocks = recipes.blocks("saving.md")
    code = "\n".join(block for section in sections for block in blocks[section])
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
    [expected] = printed(tmp_path, "Save")
    assert printed(tmp_path, "Load") == 4 * [expected]


def test_a_run_is_the_same_when_it_is_restored(tmp_path):
    """Its posterior has the same samples."""
    expected, restored = printed(tmp_path, "Save", "Save and load a run")
    assert restored == expected


def test_a_state_of_an_older_version_goes_on_from_its_count(tmp_path):
    *_, count = printed(tmp_path, "Save", "States saved by version 0.1")
    assert count == "3"
