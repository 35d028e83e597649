"""Checkpoints that outlive a kill, a full disk, flipped bits and a second run.

    with checkpoint.Folder(path, identity) as folder:
        state, log, start = folder.restore(state)
        for step in range(start, ...):
            ...
            folder.save(step, state, log)  # written while training goes on
            folder.check()  # did that fail meanwhile?

    with checkpoint.ends_at_once():  # around main
        main()

Orbax writes the arrays, in shards, from as many processes as there are. It does not
notice what changes on the disk, so every checkpoint has the checksums of its arrays and
of its record.
"""

import contextlib
import dataclasses
import fcntl
import logging
import os
import pathlib
import sys
import tempfile
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from checksums import checksum, checksum_of_record, describe
from jax.experimental import multihost_utils

# What Orbax logs is raised, too, and reported once.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class WriteError(Exception):
    """A checkpoint could not be written."""


@contextlib.contextmanager
def ends_at_once():
    """End the process on a WriteError: threads of Orbax would wait for 300 seconds."""
    try:
        yield
    except WriteError as error:
        print(error, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)


def identify(config, free, **data):
    """Return what a checkpoint and the run that continues from it have in common.

    All of a Config but the fields in `free`, and a checksum of each list of arrays.
    """
    fields = dataclasses.asdict(config).items()
    common = {k: v for k, v in fields if k not in free and k not in data}
    return common | {name: describe(arrays) for name, arrays in data.items()}


class _Manager(ocp.CheckpointManager):
    """Leaves the notice of the end to `preemption`.

    Orbax would ask for it, too, from a thread and for a step that is past: JAX takes
    that for where this process is, and the processes agree on a step that it never
    comes to.
    """

    def reached_preemption(self, _step):
        """Return False, without asking."""
        return False


class Folder:
    """The checkpoints of one run in one folder, and the lock that keeps others out."""

    def __init__(self, path, identity, max_to_keep=2):
        self.path, self.identity = pathlib.Path(path).absolute(), identity
        self._lock = self._error = None
        _, reason = agreed(self._open)
        if reason:
            self._unlock()
            sys.exit(f"Cannot write to `--checkpoint_dir` {self.path}: {reason}")
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep)
        self.manager = _Manager(self.path, options=options)

    def __enter__(self):
        """Return itself."""
        return self

    def __exit__(self, kind, *_):
        """Wait for the last checkpoint, unless one could not be written."""
        try:
            if kind is not WriteError:
                self.manager.close()
        except Exception as error:
            raise self._failed(error) from None
        finally:
            self._unlock()

    def save(self, step, state, log):
        """Begin to write `state`, arrays, and `log`, for JSON."""
        self.check()
        record = {
            "config": self.identity,
            "log": log,
            "state": int(checksum(state)),
        }
        record["checksum"] = checksum_of_record(record)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        )
        try:
            self._try_a_write()
            self.manager.save(step, args=args)
        except Exception as error:
            raise self._failed(error) from None
        threading.Thread(target=self._watch, daemon=True).start()

    def check(self):
        """Raise a WriteError if the last checkpoint could not be written."""
        if self._error:
            raise self._failed(self._error) from None

    def restore(self, state):
        """Return the newest intact state, in shards like `state`, its log and its step.

        Damaged checkpoints are named, and moved aside for the one before. Where there
        is none, return `state`, an empty log and 0.
        """
        state, damaged = jax.tree.map(jnp.asarray, state), []
        for step in sorted(self.manager.all_steps(), reverse=True):
            path = self.path / str(step)
            record, reason = agreed(lambda path=path: _read_record(path))
            if not reason:
                self._check_identity(path, record["config"])
                restored, reason = agreed(lambda path=path: _read_state(path, state))
            if not reason and int(checksum(restored)) != record["state"]:
                reason = "its arrays do not have its checksum."
            if not reason:
                self._set_aside(damaged)
                return restored, record["log"], step
            print(f"The checkpoint {path} is damaged: {reason}", file=sys.stderr)
            damaged.append(path)
        if damaged:
            sys.exit(
                f"No checkpoint in {self.path} is intact. To start again, pass another "
                "`--checkpoint_dir`, or delete that folder."
            )
        return state, [], 0

    def delete_all(self):
        """Delete the checkpoints, to start again."""
        for step in self.manager.all_steps():
            self.manager.delete(step)

    def _open(self):
        """Lock the folder, in one process of the run, and try a write in each."""
        self.path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            self._lock = open(self.path / "lock", "ab")  # noqa: SIM115
            try:
                # The system forgets it when the process ends, also by force.
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(
                    "another run is writing there. Wait for it, stop it, or pass "
                    "another `--checkpoint_dir`."
                ) from None
        self._try_a_write()

    def _unlock(self):
        if self._lock:
            self._lock.close()

    def _try_a_write(self):
        """Raise before Orbax starts threads, which would wait for a folder in vain."""
        with tempfile.TemporaryFile(dir=self.path) as file:
            file.write(bytes(4096))

    def _watch(self):
        """Wait for a checkpoint that is being written, and keep the error."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            self._error = error

    def _failed(self, error):
        """Return what to raise; a lost process is another matter."""
        if isinstance(error, jax.errors.JaxRuntimeError):
            return error
        return WriteError(
            f"Cannot write a checkpoint to {self.path}: {_first_line(error)}\nMake "
            "room for it, or pass another `--checkpoint_dir`. The same command goes on "
            "from the last checkpoint that is complete."
        )

    def _check_identity(self, path, config):
        """Stop where this run is another one than that of the checkpoint."""
        differences = [
            f"`{name}` is {config.get(name)} there and {value} here"
            for name, value in self.identity.items()
            if config.get(name) != value
        ]
        if differences:
            sys.exit(
                f"The checkpoint {path} is of another configuration: "
                f"{', '.join(differences)}. Pass the same flags and data, or another "
                "`--checkpoint_dir`, or delete that folder."
            )

    def _set_aside(self, damaged):
        """Rename damaged checkpoints, so that training can write those steps again."""
        if not damaged:
            return
        for path in damaged if jax.process_index() == 0 else ():
            aside = path.with_name(f"damaged_{path.name}")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}_again")
            path.rename(aside)
            print(
                f"Going on from the one before; {path} is now {aside}.", file=sys.stderr
            )
        multihost_utils.sync_global_devices("set aside")
        self.manager.reload()


def agreed(read):
    """Return ``read()``, and why not all processes could, if they couldn't."""
    try:
        value, reason = read(), ""
    except Exception as error:  # there are many ways to be damaged
        value, reason = None, _first_line(error)
    if not multihost_utils.process_allgather(np.array(not reason)).all():
        reason = reason or "another process cannot do it."
    return value, reason


def _first_line(error):
    return str(error).partition("\n")[0] or repr(error)


def _read_record(path):
    """Return configuration, log and checksum of one checkpoint, or raise."""
    reader = _alone(ocp.JsonCheckpointHandler)
    record = reader.restore(path / "record", args=ocp.args.JsonRestore())
    if record.pop("checksum") != checksum_of_record(record):
        raise ValueError("its record does not have its checksum.")
    return record


def _read_state(path, state):
    """Return the state of one checkpoint, or raise."""
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    reader = _alone(ocp.StandardCheckpointHandler)
    return reader.restore(path / "state", args=ocp.args.StandardRestore(like))


def _alone(handler):
    """Return a reader that doesn't wait for other processes.

    Should one of them fail, the others would wait forever.
    """
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=str(me)
    )
    kwargs = dict(multiprocessing_options=options)
    return ocp.Checkpointer(handler(**kwargs), **kwargs)
