"""An example that is killed and started again ends as if nothing had happened."""

import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Few and small steps, but more epochs than pass between two looks at the folder.
EXAMPLES = {
    "mnist": "--optimizer ivon --dataset digits --epochs 12 --batch_size 20 "
    "--width 4 --curve_samples 4 --num_samples 4",
    "resnet20": "--data synthetic --depth 2 --width 4 --epochs 12 --warmup_epochs 1 "
    "--num_samples 2",
}


def command(name, folder, *flags):
    """The example at toy size, with its checkpoints in `folder`."""
    script = ROOT / "benchmarks" / f"{name}.py"
    toy = [*shlex.split(EXAMPLES[name]), "--checkpoint_dir", folder / "checkpoints"]
    return [sys.executable, "-W", "error", script, *toy, *flags]


def run(name, folder, *flags):
    return subprocess.run(
        command(name, folder, *flags),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def last_checkpoint(folder):
    """The path of the last one that is complete: until then its name has a suffix."""
    paths = (folder / "checkpoints").glob("*/*")
    complete = [path for path in paths if path.name.isdigit()]
    return max(complete, key=lambda path: int(path.name), default=None)


def restored(path):
    """Everything in a checkpoint: the state, and the record with its log."""
    with ocp.CheckpointManager(path.parent) as manager:
        return manager.restore(
            int(path.name),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(), record=ocp.args.JsonRestore()
            ),
        )


def without_times(log):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in log]


def table(result):
    """The printed table without its last column, the time."""
    assert result.returncode == 0, result.stderr
    lines = re.findall(r"^(\|.*)\|.*\|$", result.stdout, re.MULTILINE)
    assert len(lines) > 2, result.stdout
    return lines


@pytest.fixture(scope="module", params=EXAMPLES)
def finished(request, tmp_path_factory):
    """A run that was never interrupted: its name, folder and printed table."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, table(run(request.param, folder))


def test_killed_run_ends_with_the_bits_of_one_that_was_not(finished, tmp_path):
    """SIGKILL leaves no time to save: what counts is the last complete checkpoint."""
    name, finished_folder, printed = finished
    with subprocess.Popen(
        command(name, tmp_path),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while process.poll() is None and last_checkpoint(tmp_path) is None:
            time.sleep(0.01)
        time.sleep(0.1)  # into the next epoch, or the one after
        process.kill()
    assert process.returncode == -signal.SIGKILL

    survivor = last_checkpoint(tmp_path)
    killed = restored(survivor)
    resumed = run(name, tmp_path)
    assert table(resumed) == printed
    final, expected = (
        restored(last_checkpoint(folder)) for folder in (tmp_path, finished_folder)
    )
    chex.assert_trees_all_equal(final["state"], expected["state"])
    assert jax.tree.leaves(final["state"])
    log = final["record"]["log"]
    assert without_times(log) == without_times(expected["record"]["log"])
    # Measured times show that these epochs were not run a second time.
    kept = int(survivor.name)
    assert 0 < kept < len(log)
    assert log[:kept] == killed["record"]["log"]


def test_finished_run_trains_nothing_and_prints_the_same_table(finished):
    name, folder, printed = finished

    def files():
        paths = (folder / "checkpoints").rglob("*")
        return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}

    before = files()
    assert table(run(name, folder)) == printed
    assert files() == before


def test_checkpoint_of_another_configuration_is_an_error(finished):
    name, folder, _ = finished
    result = run(name, folder, "--seed", "7")
    assert result.returncode == 1
    assert "of another configuration: `seed` is 0 there and 7 here" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("finished", ["mnist"], indirect=True)
def test_fresh_starts_again(finished, tmp_path):
    name, folder, _ = finished
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    result = run(name, tmp_path, "--seed", "7", "--epochs", "1", "--fresh")
    assert table(result)
    assert last_checkpoint(tmp_path).name == "1"
