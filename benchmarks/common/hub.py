"""The paper's data sets, from the Hugging Face hub or from files of your own.

    train, test = hub.load("cifar100")              # downloads it, once
    train, test = hub.load("imagenet", "folder")    # reads files: no network
    images, labels = test.arrays(size=224, count=1000)
    for images, labels in train.batches(50, rng, size=224):
        ...

A folder has Parquet files, train-*.parquet, as on the hub, or in train/ a folder of
images for each class; the names of the splits are those of the hub. MedMNIST's files
are its own, such as dermamnist.npz. Images are uint8 (N, size, size, 3), texts are
lists of strings, or of pairs where a task has two sentences. They are decoded when they
are asked for, so that ImageNet needs no more memory than a batch.

It needs an extra: ``pip install 'ivon-jax[datasets]'``.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps


class Source(NamedTuple):
    """Where a data set is, and what its columns are."""

    path: str  # on the hub
    inputs: tuple  # the column of images, or one or two of texts
    label: str
    classes: int  # 0: the label is a real number
    splits: tuple  # to train on, and to test on
    config: str | None = None


def image(path, classes, splits=("train", "test"), label="label", column="image"):
    """Return the source of a data set of images."""
    return Source(path, (column,), label, classes, splits)


def text(path, classes):
    """Return the source of a data set of single texts."""
    return Source(path, ("text",), "label", classes, ("train", "test"))


def glue(config, classes, *inputs, test="validation"):
    """Return the source of a task of GLUE; the labels of its test sets are hidden."""
    splits = "train", test
    return Source("nyu-mll/glue", inputs, "label", classes, splits, config)


PAIR = "sentence1", "sentence2"
SOURCES = {
    "cifar10": image("uoft-cs/cifar10", 10, column="img"),
    "cifar100": image("uoft-cs/cifar100", 100, label="fine_label", column="img"),
    "tiny-imagenet": image("zh-plus/tiny-imagenet", 200, ("train", "valid")),
    "imagenet": image("ILSVRC/imagenet-1k", 1000, ("train", "validation")),
    "svhn": image("ufldl-stanford/svhn", 10)._replace(config="cropped_digits"),
    "flowers": image("dpdl-benchmark/oxford_flowers102", 102),
    "imdb": text("stanfordnlp/imdb", 2),
    "ag_news": text("fancyzhx/ag_news", 4),
    "cola": glue("cola", 2, "sentence"),
    "sst2": glue("sst2", 2, "sentence"),
    "mrpc": glue("mrpc", 2, *PAIR),
    "stsb": glue("stsb", 0, *PAIR),
    "qqp": glue("qqp", 2, "question1", "question2"),
    "mnli": glue("mnli", 3, "premise", "hypothesis", test="validation_matched"),
    "qnli": glue("qnli", 2, "question", "sentence"),
    "rte": glue("rte", 2, *PAIR),
}
MEDMNIST = {  # classes of its sets with one label for each image
    "pathmnist": 9,
    "dermamnist": 7,
    "octmnist": 4,
    "pneumoniamnist": 2,
    "retinamnist": 5,
    "breastmnist": 2,
    "bloodmnist": 8,
    "tissuemnist": 8,
    "organamnist": 11,
    "organcmnist": 11,
    "organsmnist": 11,
}
NAMES = *SOURCES, *MEDMNIST


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples that are read when they are asked for."""

    count: int
    classes: int  # 0: the labels are real numbers
    read: Callable  # indices, size -> inputs, labels

    def __len__(self):
        """Return the number of examples."""
        return self.count

    def arrays(self, size=None, count=None):
        """Return the first `count` examples, or all."""
        count = self.count if count is None else min(count, self.count)
        return self._take(np.arange(count), size)

    def batches(self, batch_size, rng, size=None):
        """Yield all examples once, shuffled; what does not fill a batch is left out."""
        if not 1 <= batch_size <= self.count:
            raise ValueError(
                f"`batch_size` must be in 1..{self.count}, got {batch_size}."
            )
        order = rng.permutation(self.count)
        for start in range(0, self.count - batch_size + 1, batch_size):
            yield self._take(order[start : start + batch_size], size)

    def _take(self, indices, size):
        inputs, labels = self.read(indices, size)
        if not self.classes:
            return inputs, np.asarray(labels, np.float32)
        return inputs, check_labels(np.asarray(labels), self.classes)


def load(name, path="", cache_dir=None):
    """Return the splits to train on and to test on; `path` has files of your own."""
    if name not in NAMES:
        raise ValueError(f"`name` must be one of {', '.join(NAMES)}, got {name!r}.")
    if path and not pathlib.Path(path).exists():
        raise ValueError(f"`path` must be a file or a folder, got {str(path)!r}.")
    if name in MEDMNIST:
        return _load_medmnist(name, path)
    source = SOURCES[name]
    where = f"`path` {str(path)!r}" if path else f"The data set {name!r}"
    try:
        found = _load_all(source, path, cache_dir)
    except ImportError:
        raise ImportError(
            f"The data set {name!r} needs `pip install 'ivon-jax[datasets]'`."
        ) from None
    except Exception as error:  # there are many ways to be no such data set
        advice = "" if path else " Without a network, pass `path`."
        message = f"{where} cannot be read: {error}{advice}"
        raise ValueError(message) from error
    return [_split(found[split], source, where) for split in source.splits]


def check_labels(labels, classes):
    """Return labels as int32, or raise a ValueError."""
    if labels.dtype.kind not in "iu":
        raise ValueError(f"Labels must be integers, got {labels.dtype}.")
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(f"Labels must be in 0..{classes - 1}, got {low}..{high}.")
    return labels.astype(np.int32)


def _load_all(source, path, cache_dir):
    """Return {split: rows}."""
    from datasets import load_dataset

    if not path:
        return load_dataset(source.path, source.config, cache_dir=cache_dir)
    path, splits = pathlib.Path(path), source.splits
    # By name: the library would take all that begins with "valid" for one split.
    files = {split: sorted(path.glob(f"{split}-*.parquet")) for split in splits}
    kind = "parquet"
    if not any(files.values()):
        kind = "imagefolder"
        files = {split: sorted((path / split).rglob("*.*")) for split in splits}
    for split in splits:
        if not files[split]:
            raise ValueError(f"there is no {split}-*.parquet, nor {split}/ of images.")
    files = {split: [*map(str, paths)] for split, paths in files.items()}
    return load_dataset(kind, data_files=files, cache_dir=cache_dir)


def _split(rows, source, where):
    """Return the split of these rows."""
    columns = [*source.inputs, source.label]
    if "image" in rows.column_names and source.inputs == ("img",):
        # What a folder of images has, whatever the name on the hub.
        rows = rows.rename_column("image", "img")
    if "label" in rows.column_names and source.label not in rows.column_names:
        rows = rows.rename_column("label", source.label)
    if not set(columns) <= set(rows.column_names):
        raise ValueError(
            f"{where} must have the columns {', '.join(columns)}, got "
            f"{', '.join(rows.column_names)}."
        )
    texts = all(rows.features[c].dtype == "string" for c in source.inputs)

    def read(indices, size):
        some = rows[indices]
        values = [some[column] for column in source.inputs]
        labels = some[source.label]
        if not texts:
            return decode(values[0], size), labels
        return values[0] if len(values) == 1 else [*zip(*values, strict=True)], labels

    return Split(len(rows), source.classes, read)


def decode(images, size=None):
    """Return images as uint8 (N, size, size, 3), cut in the middle to be square."""
    images = [image.convert("RGB") for image in images]
    if size is not None:
        method = Image.Resampling.BILINEAR
        images = [ImageOps.fit(image, (size, size), method) for image in images]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(
            f"`size` is needed: images are of {len(sizes)} different sizes."
        )
    return np.stack([np.asarray(image) for image in images])


def _load_medmnist(name, path):
    """Return the splits of a file of MedMNIST."""
    try:
        with np.load(path) as arrays:
            return [
                _medmnist_split(arrays, split, MEDMNIST[name])
                for split in ("train", "test")
            ]
    except Exception as error:  # there are many ways to be no such file
        raise ValueError(
            f"`path` must be {name}.npz of MedMNIST, https://medmnist.com, got "
            f"{str(path)!r}: {error}"
        ) from error


def _medmnist_split(arrays, split, classes):
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"].ravel()
    if len(images) != len(labels):
        raise ValueError(f"there are {len(labels)} labels for {len(images)} images.")

    def read(indices, size):
        return decode(map(Image.fromarray, images[indices]), size), labels[indices]

    return Split(len(labels), classes, read)
