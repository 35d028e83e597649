"""Data sets of the hub's layout, read from files that the tests write."""

import sys

import numpy as np
import pytest
from common import hub
from PIL import Image

IMAGES = [name for name, source in hub.SOURCES.items() if "im" in source.inputs[0]]
TEXTS = [name for name in hub.SOURCES if name not in IMAGES]


@pytest.fixture
def library(tmp_path_factory):
    """The library `datasets`, and a cache for it."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets, str(tmp_path_factory.mktemp("cache"))


def picture(value, size):
    """An image whose left half is black."""
    pixels = np.full((size, size, 3), value, np.uint8)
    pixels[:, : size // 2] = 0
    return pixels


def write_parquet(datasets, folder, source, make_input):
    """Write three examples to train on and two to test on."""
    folder.mkdir(exist_ok=True)
    for split, count in zip(source.splits, (3, 2), strict=True):
        rows = {
            column: [make_input(i, column) for i in range(count)]
            for column in source.inputs
        }
        top = max(source.classes - 1, 1)
        labels = [0, top, 1][:count] if source.classes else [0.5, 2.25, 5.0][:count]
        rows[source.label] = labels
        rows["other"] = count * [0]
        table = datasets.Dataset.from_dict(rows)
        if make_input is as_image:
            table = table.cast_column(source.inputs[0], datasets.Image())
        table.to_parquet(folder / f"{split}-00000.parquet")


def as_image(i, _column):
    return Image.fromarray(picture(50 * i, 32))


def as_text(i, column):
    return f"{column} {i}"


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_parquet_files(name, library, tmp_path):
    """In order, as uint8, with the labels of the column that counts."""
    datasets, cache = library
    source = hub.SOURCES[name]
    write_parquet(datasets, tmp_path / "data", source, as_image)
    train, test = hub.load(name, tmp_path / "data", cache)
    assert (len(train), len(test)) == (3, 2)
    images, labels = train.arrays()
    assert (images.dtype, images.shape) == (np.uint8, (3, 32, 32, 3))
    np.testing.assert_array_equal(images, [picture(50 * i, 32) for i in range(3)])
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, [0, source.classes - 1, 1])
    np.testing.assert_array_equal(test.arrays()[1], [0, source.classes - 1])


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_parquet_files(name, library, tmp_path):
    """One text, or a pair in the order of the columns; stsb has real labels."""
    datasets, cache = library
    source = hub.SOURCES[name]
    write_parquet(datasets, tmp_path / "data", source, as_text)
    train, _ = hub.load(name, tmp_path / "data", cache)
    texts, labels = train.arrays(count=2)
    expected = [tuple(f"{c} {i}" for c in source.inputs) for i in range(2)]
    assert texts == (expected if len(source.inputs) == 2 else [t for (t,) in expected])
    assert labels.dtype == (np.int32 if source.classes else np.float32)
    expected = [0, source.classes - 1] if source.classes else [0.5, 2.25]
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny-imagenet"])
def test_a_folder_of_images_for_each_class(name, library, tmp_path):
    """Whatever the columns are called on the hub; wide, high, grey ones become one."""
    _, cache = library
    for split in hub.SOURCES[name].splits:
        for label, shape in enumerate([(20, 40), (40, 20), (40, 40, 3)]):
            folder = tmp_path / "data" / split / f"class {label}"
            folder.mkdir(parents=True)
            pixels = np.full(shape, 50 * label, np.uint8)
            Image.fromarray(pixels).save(folder / "0.png")
    train, _ = hub.load(name, tmp_path / "data", cache)
    images, labels = train.arrays(size=16)
    assert images.shape == (3, 16, 16, 3)
    np.testing.assert_array_equal(images.max(axis=(1, 2, 3)), 50 * labels)
    with pytest.raises(ValueError, match="`size` is needed: images are of 3 different"):
        train.arrays()


def test_images_are_cut_in_the_middle_not_squeezed():
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200
    assert (hub.decode([Image.fromarray(wide)], 8) == 200).all()


def write_medmnist(path, shape=(28, 28, 3), **changes):
    arrays = {}
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        numbers = np.arange(count, dtype=np.uint8)
        ones = np.ones((count, *shape), np.uint8)
        arrays[f"{split}_images"] = numbers.reshape(-1, *[1] * len(shape)) * ones
        arrays[f"{split}_labels"] = numbers[:, None]
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})


@pytest.mark.parametrize(
    ("name", "shape"), [("dermamnist", (28, 28, 3)), ("bloodmnist", (28, 28))]
)
def test_files_of_medmnist(name, shape, tmp_path):
    """In colours or in grey; labels are a column there."""
    write_medmnist(tmp_path / "a.npz", shape)
    train, test = hub.load(name, tmp_path / "a.npz")
    images, labels = train.arrays()
    assert (images.dtype, images.shape) == (np.uint8, (5, 28, 28, 3))
    np.testing.assert_array_equal(images[:, 0, 0, 2], np.arange(5))
    np.testing.assert_array_equal(labels, np.arange(5))
    assert len(test) == 3


def test_batches_have_each_example_once_in_another_order(tmp_path):
    """Five in twos: one is left out; each image stays with its label."""
    write_medmnist(tmp_path / "a.npz")
    train, _ = hub.load("dermamnist", tmp_path / "a.npz")
    orders = set()
    for seed in range(5):
        batches = [*train.batches(2, np.random.default_rng(seed), size=7)]
        assert [images.shape for images, _ in batches] == 2 * [(2, 7, 7, 3)]
        for images, labels in batches:
            np.testing.assert_array_equal(images[:, 0, 0, 0], labels)
        labels = np.concatenate([labels for _, labels in batches])
        assert len(set(labels.tolist())) == 4
        orders.add(tuple(labels.tolist()))
    assert len(orders) > 1


@pytest.mark.parametrize("batch_size", [0, 6])
def test_a_batch_that_no_split_fills_is_refused(batch_size, tmp_path):
    write_medmnist(tmp_path / "a.npz")
    train, _ = hub.load("dermamnist", tmp_path / "a.npz")
    message = rf"`batch_size` must be in 1\.\.5, got {batch_size}"
    with pytest.raises(ValueError, match=message):
        next(train.batches(batch_size, np.random.default_rng(0)))


def test_a_name_of_no_data_set_is_refused():
    with pytest.raises(ValueError, match=r"`name` must be one of cifar10, .*'mnist'"):
        hub.load("mnist")


def test_a_path_to_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`path` must be a file or a folder, got"):
        hub.load("cifar10", tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None}, "train_images is not a file"),
        ({"test_labels": np.zeros((2, 1), np.uint8)}, "2 labels for 3 images"),
    ],
)
def test_a_file_that_is_not_medmnists_says_what_is_wrong(changes, message, tmp_path):
    write_medmnist(tmp_path / "a.npz", **changes)
    expected = rf"`path` must be dermamnist\.npz of MedMNIST.*{message}"
    with pytest.raises(ValueError, match=expected):
        hub.load("dermamnist", tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"must be pathmnist\.npz.* got ''"):
        hub.load("pathmnist")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full(5, 7), r"Labels must be in 0\.\.6, got 7\.\.7"),
        (np.full(5, -1), r"Labels must be in 0\.\.6, got -1\.\.-1"),
        (np.zeros(5), "Labels must be integers, got float64"),
    ],
)
def test_labels_of_no_class_are_refused(labels, message, tmp_path):
    """Where a test set is hidden, they are -1."""
    write_medmnist(tmp_path / "a.npz", train_labels=labels[:, None])
    train, _ = hub.load("dermamnist", tmp_path / "a.npz")
    with pytest.raises(ValueError, match=message):
        train.arrays()


def test_without_the_library_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = r"'imdb' needs `pip install 'ivon-jax\[datasets\]'`"
    with pytest.raises(ImportError, match=message):
        hub.load("imdb", tmp_path)


def test_missing_splits_and_columns_are_named(library, tmp_path):
    datasets, cache = library
    folder = tmp_path / "data"
    write_parquet(datasets, folder, hub.SOURCES["imdb"], as_text)
    message = "must have the columns sentence, label, got text, label, other"
    with pytest.raises(ValueError, match=r"there is no validation-\*\.parquet, nor"):
        hub.load("cola", folder, cache)
    (folder / "test-00000.parquet").rename(folder / "validation-00000.parquet")
    with pytest.raises(ValueError, match=rf"`path` .*data' {message}"):
        hub.load("cola", folder, cache)


def test_a_folder_without_a_data_set_says_so(library, tmp_path):
    _, cache = library
    (tmp_path / "data").mkdir()
    message = (
        r"`path` .*data' cannot be read: there is no train-\*\.parquet, nor train/"
    )
    with pytest.raises(ValueError, match=message):
        hub.load("imdb", tmp_path / "data", cache)


def test_without_a_path_it_asks_the_hub(library, monkeypatch):
    """By name and configuration; a failure says what to do."""
    asked = []

    def load_dataset(*args, cache_dir):
        del cache_dir
        asked.append(args)
        raise ConnectionError("no route.")

    monkeypatch.setattr(library[0], "load_dataset", load_dataset)
    message = r"'mrpc' cannot be read: no route\. Without a network, pass `path`\."
    with pytest.raises(ValueError, match=message):
        hub.load("mrpc")
    assert asked == [("nyu-mll/glue", "mrpc")]
