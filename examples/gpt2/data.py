"""Tokens to train on: any text, byte by byte, or what nanoGPT has prepared."""

import importlib
import pathlib
import sys
import sysconfig

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P


class Tokens:
    """A long array of tokens, and batches of it that depend on the step alone."""

    def __init__(self, array, vocabulary, config, mesh):
        self.array, self.vocabulary, self.config = array, vocabulary, config
        self.sharding = NamedSharding(mesh, P(("data", "fsdp")))

    def random(self, step):
        """Return random sequences (batch_size, block + 1), the same on any mesh."""
        rng = np.random.default_rng((self.config.seed, step))
        last = len(self.array) - self.config.block
        return self._at(rng.integers(0, last, self.config.batch_size))

    def regular(self, index, count):
        """Return batch `index` of `count` at even distances."""
        last = len(self.array) - self.config.block - 1
        starts = np.linspace(0, last, count * self.config.batch_size, dtype=int)
        return self._at(starts[index::count])

    def _at(self, starts):
        """Read what this process's devices need."""
        length = self.config.block + 1

        def rows(index):
            slices = [self.array[i : i + length] for i in starts[index[0]]]
            return np.stack(slices).astype(np.int32)

        shape = len(starts), length
        return jax.make_array_from_callback(shape, self.sharding, rows)


def load_data(config):
    """Return tokens to train on, tokens to validate on, and their vocabulary's size."""
    try:
        if config.data and pathlib.Path(config.data).is_dir():
            splits, vocabulary = token_binaries(config.data), 50304
        else:
            texts = text_file(config.data) if config.data else library()
            splits, vocabulary = [np.frombuffer(text, np.uint8) for text in texts], 256
    except (OSError, ValueError) as error:
        sys.exit(
            "`--data` must be a text file, or a folder with `train.bin` and `val.bin`, "
            f"arrays of uint16 tokens; got {config.data!r}: {error}."
        )
    for name, tokens in zip(("training", "validation"), splits, strict=True):
        if len(tokens) < config.block + 2:
            sys.exit(
                f"`--data` has {len(tokens)} {name} tokens, too few for sequences of "
                f"`--block` {config.block}."
            )
        if (largest := int(tokens.max())) >= vocabulary:
            sys.exit(
                f"`--data` must have tokens below {vocabulary}, GPT-2's, got {largest}."
            )
    return *splits, vocabulary


def token_binaries(folder):
    """Open the files of nanoGPT, without reading them into memory."""
    names = "train.bin", "val.bin"
    return [np.memmap(pathlib.Path(folder) / name, np.uint16, "r") for name in names]


def text_file(path):
    """Read a text; its last twentieth is for validation."""
    text = pathlib.Path(path).read_bytes()
    cut = len(text) * 19 // 20
    return text[:cut], text[cut:]


def library():
    """Read the source of Python's standard library, every 20th file for validation."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts)
    texts = [path.read_bytes() for path in paths]
    train = [text for i, text in enumerate(texts) if i % 20]
    return b"".join(train), b"".join(texts[::20])


def decode(tokens, vocabulary):
    """Return text: of bytes, or of GPT-2's tokens if tiktoken is there to ask."""
    if vocabulary == 256:
        return bytes(tokens.tolist()).decode(errors="replace")
    try:
        return importlib.import_module("tiktoken").get_encoding("gpt2").decode(tokens)
    except (ImportError, OSError):
        return f"{tokens.tolist()} (install tiktoken to read it)"
