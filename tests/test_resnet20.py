"""ResNet-20 on CIFAR: its data, and steps that scan and resume."""

import io
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import resnet20
from checkpoint import Folder
from flax import nnx
from PIL import Image
from zoo.layers import normalize

import ivon_jax

pytestmark = pytest.mark.usefixtures("standard_promotion", "implicit_ranks")


def test_augmented_image_is_a_crop_of_the_image_or_its_mirror(key):
    """Of all 2 x 9 x 9 crops from a margin of 4, one; over 64 images, many."""
    images_key, augment_key = jax.random.split(key)
    images = jax.random.bits(images_key, (64, 32, 32, 3), jnp.uint8)
    augmented = jax.jit(resnet20.augment)(augment_key, images)
    assert (augmented.shape, augmented.dtype) == (images.shape, jnp.uint8)
    found = set()
    for image, result in zip(np.asarray(images), np.asarray(augmented), strict=True):
        matches = [
            (flipped, i, j)
            for flipped, source in enumerate((image, image[:, ::-1]))
            for i, j in np.ndindex(9, 9)
            if (
                np.pad(source, ((4, 4), (4, 4), (0, 0)))[i : i + 32, j : j + 32]
                == result
            ).all()
        ]
        assert len(matches) == 1
        found.update(matches)
    flips, rows, columns = (set(values) for values in zip(*found, strict=True))
    assert flips == {0, 1}
    assert {min(rows), max(rows), min(columns), max(columns)} == {0, 8}


def ramps(count):
    """Smooth images, which JPEG keeps to within a few levels."""
    x, y = np.mgrid[:32, :32]
    channels = [np.stack([4 * x + n, 4 * y + n, x + y], axis=-1) for n in range(count)]
    return np.asarray(channels, np.uint8)


def jpeg_arrays(split, images, labels):
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    return {
        f"{split}_jpeg": np.frombuffer(b"".join(files), np.uint8),
        f"{split}_offsets": np.cumsum([0, *map(len, files)]),
        f"{split}_labels": labels,
    }


def plain_arrays(split, images, labels):
    return {f"{split}_images": images, f"{split}_labels": labels}


@pytest.mark.parametrize(("arrays", "most"), [(jpeg_arrays, 8), (plain_arrays, 0)])
def test_file_round_trip(arrays, most, tmp_path):
    """Each image under its own label, exactly or as JPEG keeps it."""
    images, labels = ramps(7), np.arange(7, dtype=np.uint8)
    train = arrays("train", images[:5], labels[:5])
    np.savez(tmp_path / "data.npz", **train, **arrays("test", images[5:], labels[5:]))
    config = resnet20.Config(data=str(tmp_path / "data.npz"), num_train=4)
    splits = [*resnet20.load_data(config)]
    assert [len(split_labels) for _, split_labels in splits] == [4, 2]
    for loaded, loaded_labels in splits:
        assert (loaded.dtype, loaded_labels.dtype) == (jnp.uint8, jnp.int32)
        error = np.asarray(loaded, int) - images[np.asarray(loaded_labels)]
        assert np.abs(error).max() <= most


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "No such file"),
        ({"train_labels": np.zeros(2, int)}, "train_images is not a file"),
        (plain_arrays("train", ramps(2), np.zeros(3, int)), r"labels \(3,\) for 2 im"),
        (plain_arrays("train", ramps(2), np.zeros(2, int)), "test_labels is not a"),
    ],
    ids=["missing file", "missing images", "wrong shape", "missing split"],
)
def test_wrong_file_says_what_it_should_be(arrays, message, tmp_path):
    path = tmp_path / "data.npz"
    if arrays is not None:
        np.savez(path, **arrays)
    expected = rf"must be an npz file with `train_images`.*{message}"
    with pytest.raises(SystemExit, match=expected):
        resnet20.read_npz(str(path))


def test_a_folder_is_read_by_the_name_of_its_data_set(tmp_path, monkeypatch):
    """Images of another size are scaled; what does not fit ends with one line."""
    arguments, images = [], Image.fromarray(np.full((40, 40, 3), 7, np.uint8))

    class Split:
        def arrays(self, size):
            return resnet20.hub.decode(3 * [images], size), np.arange(3)

    def load(*args):
        arguments.append(args)
        return 2 * [Split()]

    monkeypatch.setattr(resnet20.hub, "load", load)
    config = resnet20.Config(data=str(tmp_path), dataset="cifar100")
    splits = [*resnet20.load_data(config)]
    assert arguments == [("cifar100", str(tmp_path))]
    assert [images.shape for images, _ in splits] == 2 * [(3, 32, 32, 3)]
    monkeypatch.undo()
    with pytest.raises(SystemExit, match=r"`--data`: .*datasets|cannot be read"):
        [*resnet20.load_data(config)]


def test_failed_download_says_what_to_do(monkeypatch):
    def fetch_openml(**_):
        raise OSError("no route")

    monkeypatch.setattr(resnet20, "fetch_openml", fetch_openml)
    message = re.escape("`--dataset cifar100`: no route. Without a network, pass `--da")
    with pytest.raises(SystemExit, match=message):
        resnet20.download("cifar100")


class Pixel(nnx.Module):
    """A classifier of the mean colour: quick to compile."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 10, rngs=rngs)

    def __call__(self, images):
        return self.linear(normalize(images).mean(axis=(1, 2)))


def tiny(config):
    model = Pixel(nnx.Rngs(0))
    return model, resnet20.create_optimizer(model, config, num_train=16)


CONFIG = resnet20.Config(epochs=4, warmup_epochs=1, batch_size=4)
KEY = jax.random.key(0)


@pytest.mark.parametrize("optimizer", ["ivon", "adamw", "sgd"])
def test_scan_of_steps_is_the_same_steps_one_by_one(optimizer):
    config = resnet20.dataclasses.replace(CONFIG, optimizer=optimizer)
    step = resnet20.ivon_step if optimizer == "ivon" else resnet20.plain_step
    data = resnet20.synthetic(16)
    batches = jnp.arange(16).reshape(4, 4)
    states, losses = [], []
    for chunk in (4, 1):
        modules = tiny(config)
        chunks = batches.reshape(-1, chunk, 4)
        results = [
            resnet20.train_steps(*modules, data, rows, KEY, step) for rows in chunks
        ]
        states.append(nnx.state(modules))
        losses.append(np.mean(results))
    assert modules[1].step[...] == 4
    chex.assert_trees_all_close(*states, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_ivon_step_takes_the_gradient_at_the_sample():
    """Algorithm 1 in plain optax, from the same state."""
    model, optimizer = tiny(CONFIG)
    graphdef, params = nnx.split(model, nnx.Param)
    tx, batch = optimizer.tx, resnet20.synthetic(4)

    def loss_fn(theta):
        return resnet20.loss_fn(nnx.merge(graphdef, theta, copy=True), *batch)

    @jax.jit
    def plain_optax(params, opt_state, key):
        theta = ivon_jax.sample(key, params, opt_state)
        grads = jax.grad(loss_fn)(theta)
        updates, opt_state = tx.update(grads, opt_state, params, sample=theta)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for key in jax.random.split(KEY, 2):  # the first has a learning rate of zero
        params, opt_state = plain_optax(params, opt_state, key)
        nnx.jit(resnet20.ivon_step)(model, optimizer, *batch, key)
    chex.assert_trees_all_close(nnx.state(model, nnx.Param), params, rtol=1e-5)


@pytest.mark.parametrize(("total", "expected"), [(1000, 50), (391, 23), (40, 40)])
def test_scanned_steps_divide_an_epoch(total, expected, monkeypatch):
    assert resnet20.steps_per_call(total) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert resnet20.steps_per_call(total) == expected


def test_run_that_stopped_ends_as_one_that_did_not(tmp_path, monkeypatch):
    """The same parameters, optimizer state and log, bit for bit."""
    data = resnet20.synthetic(16)

    def run(folder):
        config = resnet20.dataclasses.replace(CONFIG, checkpoint_dir=folder)
        modules = tiny(config)
        log = resnet20.fit(KEY, *modules, data, data, config)
        return nnx.state(modules), [{**epoch, "seconds": 0} for epoch in log]

    expected = run(str(tmp_path / "whole"))
    save = Folder.save

    def interrupted(folder, epoch, *args):
        save(folder, epoch, *args)
        if epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Folder, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(str(tmp_path / "parts"))
    monkeypatch.undo()
    resumed = run(str(tmp_path / "parts"))
    chex.assert_trees_all_equal(resumed[0], expected[0])
    assert resumed[1] == expected[1]


def test_checkpoint_of_another_configuration_is_refused(tmp_path):
    """It names what differs; another data set of the same shape differs too."""
    config = resnet20.dataclasses.replace(CONFIG, checkpoint_dir=str(tmp_path))
    data = resnet20.synthetic(16)
    resnet20.fit(KEY, *tiny(config), data, data, config)
    other = resnet20.dataclasses.replace(config, weight_decay=0.5)
    message = re.escape("`weight_decay` is 0.0002 there and 0.5 here, `data` is ")
    with pytest.raises(SystemExit, match=message):
        resnet20.fit(KEY, *tiny(other), (data[0], 9 - data[1]), data, other)
