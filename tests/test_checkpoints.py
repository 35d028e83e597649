"""Checkpoints of examples/gpt2: damage, failing writes, a second run, other data."""

import dataclasses
import gc
import pathlib
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint import Folder, identify
from checksums import checksum
from jax.experimental import multihost_utils

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
STATE = {
    "w": np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32),
    "b": np.arange(5, dtype=np.int32),
    "step": np.int32(7),
}
LATER = {name: array + 1 for name, array in STATE.items()}
IDENTITY = {"seed": 0, "learning_rate": 0.1}


@pytest.fixture(autouse=True)
def collect():
    """Where Orbax cannot read a file, it leaves coroutines behind, and they warn."""
    yield
    gc.collect()


def on_device(state):
    return jax.tree.map(jnp.asarray, state)


def written(path):
    """A folder with two checkpoints."""
    with Folder(path, IDENTITY) as folder:
        folder.save(1, on_device(STATE), [{"nll": 0.5}])
        folder.save(2, on_device(LATER), [{"nll": 0.5}, {"nll": 0.25}])
    return path


def restored(path):
    with Folder(path, IDENTITY) as folder:
        return folder.restore(on_device(jax.tree.map(np.zeros_like, STATE)))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return written(tmp_path_factory.mktemp("original"))


def files(path):
    return [file for file in sorted(path.rglob("*")) if file.is_file()]


def test_newest_state_log_and_step_come_back(original):
    state, log, step = restored(original)
    chex.assert_trees_all_equal(state, LATER)
    assert (log, step) == ([{"nll": 0.5}, {"nll": 0.25}], 2)


def test_without_checkpoints_the_state_is_that_to_begin_with(tmp_path):
    state, log, step = restored(tmp_path / "new")
    chex.assert_trees_all_equal(state, jax.tree.map(np.zeros_like, STATE))
    assert (log, step) == ([], 0)


def flip_the_end(content):
    return content[:-8] + bytes(byte ^ 0x5A for byte in content[-8:-4]) + content[-4:]


def flip_the_middle(content):
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 0x10]) + content[half + 1 :]


DAMAGES = {
    "flipped end": flip_the_end,
    "flipped middle": flip_the_middle,
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "deleted": lambda _: None,
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_in_any_file_is_seen_or_changes_nothing(
    damage, original, tmp_path, capfd
):
    """Each file of the newest checkpoint in turn; the one before takes its place."""
    seen = 0
    for number, file in enumerate(files(original / "2")):
        path = copied(original, tmp_path / str(number))
        content = file.read_bytes()
        damaged = path / file.relative_to(original)
        content = DAMAGES[damage](content)
        damaged.unlink() if content is None else damaged.write_bytes(content)
        with Folder(path, IDENTITY) as folder:
            state, log, step = folder.restore(on_device(STATE))
            if step == 1:
                folder.save(2, state, log)
        expected = {1: STATE, 2: LATER}[step]
        chex.assert_trees_all_equal(state, expected)
        assert log == [{"nll": 0.5}, {"nll": 0.25}][:step]
        if step == 1:
            seen += 1
            assert f"The checkpoint {path / '2'} is damaged: " in capfd.readouterr().err
            assert (path / "damaged_2").exists()
            assert restored(path)[2] == 2
    assert seen >= 3


def copied(original, path):
    path.mkdir(parents=True)
    for file in files(original):
        target = path / file.relative_to(original)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return path


def test_training_goes_on_over_a_damaged_step_twice(original, tmp_path):
    """The same step is damaged again: its name aside is taken by then."""
    path = copied(original, tmp_path / "run")
    for _ in range(2):
        (path / "2" / "record" / "metadata").write_bytes(b"")
        with Folder(path, IDENTITY) as folder:
            _, log, step = folder.restore(on_device(STATE))
            assert step == 1
            folder.save(2, on_device(LATER), [*log, {"nll": 0.25}])
        assert restored(path)[2] == 2
    assert {p.name for p in path.glob("damaged*")} == {"damaged_2", "damaged_2_again"}


@pytest.mark.parametrize("missing", ["record", "state"])
def test_a_missing_item_is_damage(missing, original, tmp_path):
    path = copied(original, tmp_path / "run")
    for file in files(path / "2" / missing):
        file.unlink()
    assert restored(path)[2] == 1


def test_no_intact_checkpoint_is_an_error_that_touches_none(original, tmp_path):
    path = copied(original, tmp_path / "run")
    for step in "12":
        (path / step / "record" / "metadata").write_bytes(b"{")
    before = files(path)
    with pytest.raises(SystemExit, match=r"No checkpoint in .* is intact"):
        restored(path)
    assert files(path) == before


def test_another_configuration_is_named(original):
    identity = IDENTITY | {"learning_rate": 0.2}
    with (
        Folder(original, identity) as folder,
        pytest.raises(SystemExit, match=r"`learning_rate` is 0\.1 there and 0\.2"),
    ):
        folder.restore(on_device(STATE))


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = "file"
    lr: float = 0.1
    plot: str = "a.png"


def test_identity_is_that_of_every_entry_and_of_its_shape():
    array = np.zeros((300, 7), np.uint16)
    changed = array.copy()
    changed[-1, -1] = 1
    lists = [[array], [changed], [array.T], [array.view(np.int16)], [array, array]]
    found = [identify(Config(), ("plot",), data=arrays) for arrays in lists]
    assert all(identity.keys() == {"lr", "data"} for identity in found)
    assert len({identity["data"] for identity in found}) == len(lists)


@pytest.mark.parametrize("dtype", ["bool", "int8", "bfloat16", "float32"])
def test_checksum_sees_what_a_sum_of_bits_does_not(dtype):
    """Bits that cancel, entries that change places, arrays that change places."""
    x = jnp.zeros((2, 4), dtype)
    one, other = (x.at[i].set(jnp.ones([], dtype)) for i in ((0, 1), (1, 3)))
    states = [[x, x], [one, x], [other, x], [x, one], [one, one], [x]]
    sums = {int(checksum(state)) for state in states}
    assert len(sums) == len(states)


def test_checksum_of_keys_and_doubles(x64):
    del x64
    keys = [int(checksum(jax.random.key(seed))) for seed in (0, 1)]
    assert keys[0] != keys[1]
    values = jnp.array([1.0, 1.0 + 2.0**-50, 1.0 + 2.0**-20])
    assert len({int(checksum(x)) for x in values}) == 3


def test_a_second_run_is_refused_and_a_later_one_is_not(tmp_path):
    with (
        Folder(tmp_path, IDENTITY),
        pytest.raises(SystemExit, match="another run is writing there"),
    ):
        Folder(tmp_path, IDENTITY)
    with Folder(tmp_path, IDENTITY):
        pass


@pytest.mark.parametrize("inside", ["", "below"])
def test_a_file_in_the_place_of_the_folder_is_refused_at_the_start(inside, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"Cannot write to `--checkpoint_dir` .*file"):
        Folder(tmp_path / "file" / inside, IDENTITY)


PROGRAM = """
import ctypes, os, pathlib, resource, shutil, signal, sys, time
import jax, jax.numpy as jnp
from checkpoint import Folder, ends_at_once

def without_privileges():
    # Start again as a root for whom permissions hold: without CAP_DAC_OVERRIDE.
    prctl, read, drop, override = ctypes.CDLL(None).prctl, 23, 24, 1
    if prctl(read, override) == 1 and prctl(drop, override) == 0:
        os.execv(sys.executable, sys.orig_argv)

def main(folder, failure):
    if failure == "read-only":
        without_privileges()
    state = {"w": jax.random.normal(jax.random.key(0), (300, 1000))}
    with Folder(folder, {}) as saved:
        saved.save(1, state, [])
        if failure == "sleep":
            saved.manager.wait_until_finished()
            print("sleeping", flush=True)
            time.sleep(300)
        saved.manager.wait_until_finished()
        if failure == "full disk":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        elif failure == "file":
            shutil.rmtree(folder)
            pathlib.Path(folder).touch()
        elif failure == "read-only":
            for path in (folder, *pathlib.Path(folder).iterdir()):
                os.chmod(path, 0o500)
        elif failure == "file, in Orbax":
            saved._try_a_write = lambda: (shutil.rmtree(folder), open(folder, "w"))
        saved.save(2, state, [])
        for _ in range(100):
            time.sleep(0.1)
            saved.check()
    print("not reached")

with ends_at_once():
    main(*sys.argv[1:])
"""


def start(folder, failure):
    path = pathlib.Path(__file__).parent.parent / "examples" / "gpt2"
    pipe, code = subprocess.PIPE, f"import sys; sys.path.append({str(path)!r}){PROGRAM}"
    return subprocess.Popen(
        [sys.executable, "-c", code, folder, failure],
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "failure", ["full disk", "read-only", "file", "file, in Orbax"]
)
def test_a_write_that_fails_ends_the_process_at_once(failure, tmp_path):
    """With one clear message; Orbax's threads alone would hold it for 300 seconds."""
    process = start(tmp_path / "run", failure)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"Cannot write a checkpoint to {tmp_path / 'run'}: " in stderr
    assert "Traceback" not in stderr
    assert not stdout
    if failure in ("full disk", "read-only"):  # the first one is complete
        for path in (tmp_path / "run", *(tmp_path / "run").iterdir()):
            path.chmod(0o700)
        with Folder(tmp_path / "run", {}) as folder:
            assert folder.restore({"w": jnp.zeros((300, 1000))})[2] == 1


def test_a_killed_run_leaves_no_lock(tmp_path):
    process = start(tmp_path, "sleep")
    assert process.stdout.readline() == "sleeping\n"
    with pytest.raises(SystemExit, match="another run is writing there"):
        Folder(tmp_path, {})
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with Folder(tmp_path, {}) as folder:
        assert folder.restore({"w": jnp.zeros((300, 1000))})[2] == 1


def test_orbax_does_not_ask_whether_the_run_is_told_to_end(tmp_path, monkeypatch):
    """For a step that is past: JAX would agree on one that this process never sees."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    written(tmp_path)
    assert not asked
