"""The GPT-2 example: the network, its data, its meshes, processes and checkpoints."""

import dataclasses
import functools
import os
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from compilation import AS_USERS_DO, QUICK_PROCESS
from config import Config, parse_args
from data import Tokens, load_data
from flax import nnx
from model import AXES, GPT, create_losses, create_mesh, parameter_shardings
from step import create_optimizer, create_train_step
from train import run

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT, TEXT = ROOT / "examples" / "gpt2" / "train.py", ROOT / "LICENSE"
pytestmark = pytest.mark.usefixtures("implicit_ranks", "standard_promotion")
TOY = (
    "--data text.txt --steps 20 --warmup 4 --batch_size 8 --block 16 --ivon_lr 1 "
    "--ivon_hess_init 0.1 --ivon_ess 1e5 --eval_every 10 --eval_batches 1 "
    "--num_samples 1 --checkpoint_every 5 --max_to_keep 4 --write 1 "
    "--heartbeat_seconds 10"
)

MAY_BE_ZERO = {"seed", "warmup", "write", "process_id", "cpu_devices", "remat"}


def configure(flags=TOY, **changes):
    return dataclasses.replace(parse_args(shlex.split(flags)), **changes)


def refused(flags, capsys):
    """What the example says when it refuses these flags."""
    with pytest.raises(SystemExit):
        parse_args(flags)
    return capsys.readouterr().err


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda f: f.name)
def test_numbers_that_no_run_can_mean_are_refused(field, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = {
        int: ["-1", "nan", "1.5", str(2**31)] + ["0"] * (field.name not in MAY_BE_ZERO),
        float: ["-1", "-1e-9", "nan", "inf", "1e39"],
    }
    for value in bad.get(field.type, ()):
        message = refused([f"--{field.name}={value}"], capsys)
        assert f"--{field.name}" in message
        assert "must be" in message or f"invalid int value: '{value}'" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--block 1", "--block must be at least 2, got 1."),
        ("--prompt=", "--prompt must not be empty, got ''."),
        ("--checkpoint_dir=", "--checkpoint_dir must not be empty, got ''."),
        ("--remat 2", "--remat must be at most 1, got 2."),
        ("--ivon_b2 0.99999999", "--ivon_b2 must be below 1"),
        ("--ivon_ess 1e-46", "--ivon_ess must be positive, got 1e-46."),
        ("--distributed localhost", "--distributed must be auto or HOST:PORT"),
        ("--distributed :80", "--distributed must be auto or HOST:PORT"),
        ("--distributed localhost:http", "--distributed must be auto or HOST"),
        ("--process_id 1", "--process_id must be below --num_processes 1, got 1."),
        ("--size huge", "argument --size: invalid choice: 'huge'"),
        ("--plot missing/a.png", "must be writable (No such file or directory)"),
        ("--plot file/a.png", "must be writable (Not a directory), got 'file/a.png'."),
        ("--plot folder.png", "must be writable (Is a directory)"),
        ("--plot a.xyz", "must end in .png, "),
        ("--plot=", "must end in .png, "),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    flags, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    assert message in refused(shlex.split(flags), capsys)


def test_the_picture_of_the_default_is_tried_too(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / Config.plot).mkdir()
    assert "--plot must be writable (Is a directory)" in refused([], capsys)


def test_numbers_at_the_ends_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configure(
        "--seed 0 --steps 1 --adamw_lr 0 --ivon_b2 0 --max_norm 1e-30 --block 2 "
        f"--warmup 0 --write {2**31 - 1}"
    )
    assert (config.steps, config.ivon_b2, config.max_norm) == (1, 0.0, 1e-30)


def test_flags_override_what_the_size_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configure("--size medium --microbatches 20")
    assert (config.ivon_lr, config.microbatches, config.steps) == (0.2, 20, 100_000)


def shapes(config, vocabulary):
    """The network's definition, and its parameters as shapes alone."""
    create = functools.partial(GPT, config, vocabulary)
    return nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))


@pytest.mark.parametrize(
    ("size", "count"),
    [("small", 124_373_760), ("medium", 354_599_936), ("large", 773_582_080)],
)
def test_sizes_are_those_of_the_paper(size, count):
    """Embeddings V w + T w, L layers of 12 w^2 + 2 w, and the last norm's w."""
    params = shapes(configure(f"--size {size}"), 50304)[1]
    assert sum(x.size for x in jax.tree.leaves(params)) == count


def test_no_token_sees_those_after_it():
    config = configure(dtype="float32")
    graphdef, params = nnx.split(GPT(config, 256, nnx.Rngs(0)))
    tokens = jnp.arange(16)[None]
    logits = nnx.merge(graphdef, params)(tokens)
    changed = nnx.merge(graphdef, params)(tokens.at[0, 9:].set(7))
    np.testing.assert_array_equal(logits[:, :9], changed[:, :9])
    assert np.abs(logits - changed)[:, 9:].max() > 0.01


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
def test_vectors_are_not_decayed(optimizer):
    """With no gradient and h_hat = h, what moves is what decays."""
    config = configure(
        optimizer=optimizer,
        ivon_weight_decay=0.1,
        ivon_clip_radius=1.0,
        warmup=0,
    )
    params = nnx.state(GPT(config, 256, nnx.Rngs(0)))
    tx = create_optimizer(config)
    zeros = jax.tree.map(jnp.zeros_like, params)
    extra = {"hess": zeros} if optimizer == "ivon" else {}
    updates, _ = tx.update(zeros, tx.init(params), params, **extra)
    moved = {
        jax.tree_util.keystr(path): bool(jnp.any(x))
        for path, x in jax.tree_util.tree_leaves_with_path(updates)
    }
    assert {name for name, moves in moved.items() if not moves} == {
        name for name in moved if "norm" in name
    }


PEAKS = {}


def buffers(optimizer, dtype):
    """Peak memory of a compiled step, in parameters; tokens enough to matter."""
    if (optimizer, dtype) not in PEAKS:
        config = configure(optimizer=optimizer, dtype=dtype, block=128, batch_size=4)
        mesh = create_mesh("")
        with jax.set_mesh(mesh):
            graphdef, params = shapes(config, 2048)
            tx = create_optimizer(config)
            loss_fn = create_losses(graphdef)[0]
            step = create_train_step(loss_fn, tx, config, mesh)
            tokens = jax.ShapeDtypeStruct((4, 129), jnp.int32)
            key = jax.eval_shape(lambda: jax.random.key(0))
            args = params, jax.eval_shape(tx.init, params), tokens, key
            compiled = (
                jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile(AS_USERS_DO)
            )
        used = compiled.memory_analysis()
        peak = used.argument_size_in_bytes + used.temp_size_in_bytes
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
        PEAKS[optimizer, dtype] = peak / size
    return PEAKS[optimizer, dtype]


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1.15), ("bfloat16", 0.0)])
def test_ivon_needs_theta_beside_what_adamw_needs(dtype, allowed):
    """One array of parameters; in bfloat16 theta takes the place of AdamW's cast."""
    assert buffers("ivon", dtype) - buffers("adamw", dtype) <= allowed


def test_batches_depend_on_the_step_alone():
    config = configure()
    mesh = create_mesh("")
    tokens = Tokens(np.arange(1000, dtype=np.uint16), 1000, config, mesh)
    first, again, other = (np.asarray(tokens.random(step)) for step in (3, 3, 4))
    assert first.shape == (8, 17)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_token_binaries_are_read_as_nanogpt_writes_them(tmp_path):
    for name, count in (("train", 100), ("val", 50)):
        np.arange(count, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    train, validation, vocabulary = load_data(configure(data=str(tmp_path)))
    assert (len(train), len(validation), vocabulary) == (100, 50, 50304)
    assert isinstance(train, np.memmap)


def test_validation_text_is_held_out(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(200)) * 5)
    train, validation, _ = load_data(configure(data=str(path)))
    assert (len(train), len(validation)) == (950, 50)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data missing.txt", "`--data` must be a text file, or a folder"),
        ("--data .", "`--data` must be a text file, or a folder"),
        ("--data short.txt", "too few for sequences of `--block` 16"),
        ("--data large", "`--data` must have tokens below 50304, GPT-2's, got 60000"),
        ("--mesh rows=1", "`--mesh` must be sizes of data, fsdp, model"),
        (
            "--mesh data=1,data=1",
            "`--mesh` must be sizes of data, fsdp, model, each on",
        ),
        ("--mesh data=7", "whose product is the number of devices, 1"),
        ("--microbatches 3", "`--batch_size` must be a multiple of `--microbatches` 3"),
    ],
)
def test_bad_flags_are_clear_errors(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(bytes(4000))
    (tmp_path / "short.txt").write_bytes(bytes(20))
    (tmp_path / "large").mkdir()
    for name in ("train", "val"):
        np.full(100, 60000, np.uint16).tofile(tmp_path / "large" / f"{name}.bin")
    with pytest.raises(SystemExit, match=re.escape(message)):
        run(configure(f"{TOY} {flags}"))


def test_a_mesh_that_cannot_cut_the_network_is_named():
    """Four heads over eight devices."""
    mesh = jax.sharding.AbstractMesh((1, 1, 8), AXES)
    params = shapes(configure(), 256)[1]
    with pytest.raises(SystemExit, match=r"`--mesh` cannot cut .* of shape"):
        parameter_shardings(params, mesh)


def launch(folder, flags, *options):
    """The example in a process of its own, in `folder`."""
    # A collective that waits for another process holds one of XLA's threads; with no
    # more threads than devices, all may wait.
    env = os.environ | QUICK_PROCESS | {"JAX_PLATFORMS": "cpu", "NPROC": "16"}
    return subprocess.Popen(
        [sys.executable, *options, SCRIPT, *shlex.split(flags)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def start(folder, flags):
    """The same on a text, with as few and small steps as the tests need."""
    (folder / "text.txt").write_bytes(TEXT.read_bytes())
    return launch(folder, f"{TOY} {flags}")


def finish(*processes):
    """What they printed, once they have ended well."""
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, stderr
    return outputs


def test_it_runs_at_the_toy_size_of_its_header_and_draws(tmp_path):
    """With warnings as errors; the folder gets its picture and checkpoints alone."""
    toy = re.search(r"^Toy size: `(.*)`", SCRIPT.read_text(), re.MULTILINE).group(1)
    [(stdout, _)] = finish(launch(tmp_path, toy, "-W", "error"))
    assert "| perplexity | tokens " in stdout
    names = re.findall(r"^\| (IVON\S*) +\| +[\d.]+ \|", stdout, re.MULTILINE)
    assert names == ["IVON@mean", "IVON"]
    assert {path.name for path in tmp_path.iterdir()} >= {"gpt2.png", "checkpoints"}


def wait_for(happened, processes, seconds=300):
    """Wait until something has happened; end the processes where it does not."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end or any(p.poll() is not None for p in processes):
            for process in processes:
                process.kill()
            pytest.fail(f"{[process.communicate() for process in processes]}")
        time.sleep(0.02)


def start_two(folder, flags=""):
    """Two processes of four devices, joined through a free port."""
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        port = sock.getsockname()[1]
    joined = f"--distributed localhost:{port} --num_processes 2 --cpu_devices 4"
    return [start(folder, f"{joined} --process_id {i} {flags}") for i in range(2)]


def state(folder, step=20):
    """The arrays of a checkpoint, on whatever devices it was written."""
    path = folder / "checkpoints" / "gpt2" / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(path).item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        args = ocp.args.PyTreeRestore(restore_args=args)
        return jax.tree.leaves(reader.restore(path, args=args))


def assert_same(folder, other):
    """To float32 rounding over twenty steps; they move the parameters by 1e-3 each."""
    for x, y in zip(state(folder), state(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def copy(folder, tmp_path, *steps):
    """A folder with some of the checkpoints of another one."""
    for step in steps:
        path = pathlib.Path("checkpoints", "gpt2", str(step))
        shutil.copytree(folder / path, tmp_path / path)
    return tmp_path


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A run on eight devices, that share parameters and batch in three ways."""
    folder = tmp_path_factory.mktemp("eight")
    finish(start(folder, "--cpu_devices 8 --mesh data=2,fsdp=2,model=2"))
    return folder


@pytest.mark.parametrize(
    "flags", ["--cpu_devices 4 --mesh fsdp=4", "--cpu_devices 1"], ids=["four", "one"]
)
def test_a_checkpoint_of_eight_devices_continues_on_fewer(flags, eight, tmp_path):
    folder = copy(eight, tmp_path, 10)
    [(stdout, _)] = finish(start(folder, flags))
    assert_same(folder, eight)
    assert "| IVON@mean |" in stdout


def test_two_processes_of_four_devices_are_one_of_eight(eight, tmp_path):
    flags = "--mesh data=2,fsdp=2,model=2"
    (stdout, _), (other, _) = finish(*start_two(tmp_path, flags))
    assert_same(tmp_path, eight)
    assert "| IVON@mean |" in stdout
    assert "IVON" not in other


@pytest.mark.parametrize("lost", [0, 1], ids=["coordinator", "worker"])
def test_a_lost_process_ends_the_other_and_nothing_saved_is_lost(lost, eight, tmp_path):
    """Soon, with an error that says so; started again, they end as if never lost."""
    processes = start_two(tmp_path)
    folder = tmp_path / "checkpoints" / "gpt2"
    wait_for(lambda: any(p.name.isdigit() for p in folder.glob("*")), processes)
    processes[lost].kill()
    begin = time.monotonic()
    _, stderr = processes[1 - lost].communicate(timeout=60)
    processes[lost].communicate()
    assert time.monotonic() - begin < 40  # the heartbeat's 10 seconds, and rest
    assert processes[1 - lost].returncode != 0
    assert re.search("another task died|has lost another one", stderr), stderr
    if lost:
        finish(*start_two(tmp_path))
        assert_same(tmp_path, eight)


@pytest.mark.parametrize("processes", [1, 2])
def test_told_to_end_it_saves_and_goes_on_elsewhere(processes, tmp_path):
    """SIGTERM, to one process of all, in the middle of a run."""
    flags = "--cpu_devices 1 --steps 100 --eval_every 100 --checkpoint_every 20"
    running = [start(tmp_path, flags)] if processes == 1 else start_two(tmp_path, flags)
    folder = tmp_path / "checkpoints" / "gpt2"
    wait_for(lambda: (folder / "20").exists(), running)
    running[-1].terminate()
    told = [re.search(r"after step (\d+)", err) for _, err in finish(*running)]
    [step] = {int(match[1]) for match in told}
    assert 20 <= step < 100
    assert (folder / str(step)).exists()
    [(stdout, _)] = finish(start(tmp_path, f"{flags} --cpu_devices 2 --mesh fsdp=2"))
    assert "| IVON@mean |" in stdout
    assert (folder / "100").exists()


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage, eight, tmp_path
):
    folder = copy(eight, tmp_path, 10, 15)
    path = folder / "checkpoints" / "gpt2" / "15"
    damage_largest_file(path, damage)
    [(_, stderr)] = finish(start(folder, "--cpu_devices 2"))
    assert f"The checkpoint {path} is damaged: " in stderr
    assert_same(folder, eight)
    assert path.with_name("damaged_15").exists()


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ("--optimizer adamw", "`optimizer` is ivon there and adamw here"),
        ("--block 32", "`block` is 16 there and 32 here"),
        ("--data other.txt", "`data` is"),
        ("--data end.txt", "`data` is"),
    ],
)
def test_a_run_of_another_configuration_is_no_damage(
    flags, difference, eight, tmp_path, monkeypatch
):
    """It is named before arrays of other shapes are read."""
    monkeypatch.chdir(copy(eight, tmp_path, 10))
    (tmp_path / "text.txt").write_bytes(TEXT.read_bytes())
    (tmp_path / "other.txt").write_bytes(TEXT.read_bytes().swapcase())
    (tmp_path / "end.txt").write_bytes(TEXT.read_bytes()[:-1] + b"~")
    with pytest.raises(SystemExit, match=re.escape(difference)):
        run(configure(f"{TOY} {flags}"))
    assert (tmp_path / "checkpoints" / "gpt2" / "10").exists()


def damage_largest_file(path, damage):
    """Of the arrays' files."""
    files = (file for file in (path / "state").rglob("*") if file.is_file())
    file = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def test_no_intact_checkpoint_is_an_error_that_touches_none(eight, tmp_path):
    folder = copy(eight, tmp_path, 15)
    path = folder / "checkpoints" / "gpt2" / "15"
    damage_largest_file(path, "truncated")
    process = start(folder, "")
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert f"No checkpoint in {path.parent} is intact." in stderr
    assert str(SCRIPT) not in stderr  # TensorStore may have tracebacks of its own
    assert path.exists()


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="XLA cannot mix such axes there"
)
def test_replicas_with_samples_of_their_own_train_sharded_parameters(tmp_path):
    """The hybrid mesh: noise by data index, parameters over the other axes."""
    flags = "--cpu_devices 8 --mesh data=2,fsdp=2,model=2 --noise replica"
    [(stdout, _)] = finish(start(tmp_path, flags))
    perplexity = float(re.search(r"IVON@mean \| +([\d.]+)", stdout).group(1))
    assert perplexity < 200  # of 256
