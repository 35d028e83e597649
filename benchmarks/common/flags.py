"""Command-line flags from a dataclass, all of them checked before anything runs.

The type of a field says what its flag may be:

    @dataclasses.dataclass(frozen=True)
    class Config:
        epochs: flags.Count = 400
        weight_decay: float = 0.1
        results: flags.Results = "mlp_digits.json"

    config = flags.parse(Config, __doc__)

A plain `int` or `float` is a number that is at least 0, and finite in float32.
"""

import argparse
import dataclasses
import math
import pathlib
import sys
import tempfile
from typing import Annotated, get_origin

import numpy as np

LARGEST = 2**31 - 1


def between(low, high=LARGEST):
    """Return a check of integers, both ends included."""

    def check(value):
        if not low <= value <= high:
            limits = f"at least {low}" if value < low else f"at most {high}"
            raise ValueError(f"must be {limits}")

    return check


def positive(value):
    """Reject what is 0 in float32."""
    if not np.float32(value) > 0:
        raise ValueError("must be positive")


def below_one(value):
    """Reject what is 1 or more in float32."""
    if not np.float32(value) < 1:
        raise ValueError("must be below 1")


def one_line(value):
    """Reject the empty text."""
    if not value:
        raise ValueError("must not be empty")


def file_of(*endings):
    """Return a check of paths: try to write there, and leave no trace."""

    def check(path):
        path = pathlib.Path(path)
        if path.suffix.lower() not in endings:
            raise ValueError(f"must end in {', '.join(endings)}")
        try:
            with tempfile.TemporaryFile(dir=path.parent) as file:
                file.write(bytes(1024))
            if path.exists():
                path.open("ab").close()
        except OSError as error:
            raise ValueError(f"must be writable ({error.strerror})") from None

    return check


Count = Annotated[int, between(1)]
Switch = Annotated[int, between(0, 1)]
Seed = Annotated[int, between(0)]
Positive = Annotated[float, positive]
Fraction = Annotated[float, below_one]
Text = Annotated[str, one_line]
Picture = Annotated[str, file_of(".png", ".jpg", ".pdf", ".svg")]
Results = Annotated[str, file_of(".json")]


def parse(config_type, doc, **full):
    """Return the Config of the command line; `full` is for ``--full 1``."""
    parser = create_parser(config_type, doc)
    given = vars(parser.parse_args())
    defaults = full if given.get("full") else {}
    return checked(parser, config_type(**defaults | given))


def parse_or_tune(config_type, doc):
    """Return the Config of the command line, and whether ``--tune`` is there."""
    parser = create_parser(config_type, doc)
    parser.add_argument("--tune", action="store_true")
    given = vars(parser.parse_args())
    tuning = given.pop("tune")
    return checked(parser, config_type(**given)), tuning


def create_parser(config_type, doc, **choices):
    """Return a parser with a flag for each field; what is not given, is left out."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for field in dataclasses.fields(config_type):
        parser.add_argument(
            f"--{field.name}",
            type=_kind(field),
            default=argparse.SUPPRESS,
            choices=choices.get(field.name),
        )
    return parser


def checked(parser, config):
    """Return `config`, if every field of it is what its type says; else exit."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        try:
            _check_number(_kind(field), value)
            for check in getattr(field.type, "__metadata__", ()):
                check(value)
        except ValueError as error:
            shown = repr(value) if isinstance(value, str) else value
            parser.error(f"--{field.name} {error}, got {shown}.")
    return config


def numbers(name, text, low, high=LARGEST):
    """Return the whole numbers of a flag, with commas between them, or exit."""
    words = text.split(",")
    if not all(word.isdecimal() and low <= int(word) <= high for word in words):
        sys.exit(f"`--{name}` must be numbers in {low}..{high}, got {text}.")
    return [int(word) for word in words]


def check_batch_size(batch_size, num_train):
    """Exit where an epoch would have no batch."""
    if batch_size > num_train:
        sys.exit(
            f"`--batch_size` must be at most {num_train}, the number of training "
            f"examples, got {batch_size}."
        )


def check_forget(forget, num_steps):
    """Exit where ``b2 = 1 - forget / num_steps`` would be negative."""
    if forget > num_steps:
        sys.exit(f"`--forget` must be at most {num_steps} steps, got {forget}.")


def _kind(field):
    """The int, float or str of a field's type."""
    annotated = get_origin(field.type) is Annotated
    return field.type.__origin__ if annotated else field.type


def _check_number(kind, value):
    """Reject numbers that no flag of an example can mean."""
    if kind is int:
        between(0)(value)
    if kind is float:
        with np.errstate(over="ignore"):
            finite = math.isfinite(np.float32(value))
        if not finite:
            raise ValueError("must be a finite number")
        if value < 0:
            raise ValueError("must be at least 0")
