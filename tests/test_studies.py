"""Every study runs at the toy size that its first lines name, and checks its flags.

`WHOLE_STUDIES=1 pytest tests/test_studies.py -k header` runs whole studies, for a
quarter of an hour, and compares what they print with their headers.
"""

import ast
import dataclasses
import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from common import flags
from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = *(ROOT / "benchmarks").glob("*.py"), ROOT / "examples" / "gpt2.py"
STUDIES = sorted(path for path in SCRIPTS if "\nToy size: `" in path.read_text())
NAMES = [path.stem for path in STUDIES]
# Where zero means something.
MAY_BE_ZERO = {
    *("seed", "warmup", "warmup_epochs", "write", "process_id", "cpu_devices"),
    *("remat", "bfloat16"),  # switches
}
WITHOUT_FILES = [
    "mlp_digits",
    "multi_ivon",
    "merged_networks",
    "lora_digits",
    "regression_gap",
]
WITH_IMAGES = [
    "task_sequence",
    "leave_one_out_loss",
    "unknown_classes",
    "pruned_weights",
    "wrong_labels",
]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_runs_prints_a_table_and_saves_its_picture(path, tmp_path):
    """With warnings as errors, in a folder of its own."""
    toy = re.search(r"^Toy size: `(.*)`", path.read_text(), re.MULTILINE).group(1)
    printed = tables(run(path, tmp_path, "-W", "error", flags=shlex.split(toy)))
    assert printed
    assert list(tmp_path.glob("*.png"))
    rows = {row[0] for table in printed for row in table}
    words = {word for t in printed for row in t for c in row for word in c.split()}
    for titles, *others in tables(docstring(path)):
        assert set(" ".join(titles[1:]).split()) <= words
        if path.stem != "resnet20":  # which prints one optimizer at a time
            assert {row[0] for row in others} <= rows


@pytest.mark.skipif("not os.environ.get('WHOLE_STUDIES')", reason="15 minutes")
@pytest.mark.parametrize("name", WITHOUT_FILES + WITH_IMAGES)
def test_header_is_what_the_study_prints(name, tmp_path):
    """Within three standard errors, because machines round differently."""
    path = ROOT / "benchmarks" / f"{name}.py"
    expected = cells(docstring(path))
    printed = cells(run(path, tmp_path))
    assert expected.keys() <= printed.keys()
    for place in (place for place in expected if place[1] != "seconds"):
        (mean, error), (other, _) = expected[place], printed[place]
        assert abs(mean - other) <= 3 * error + 0.002 * abs(mean), place


def test_readme_has_the_table_of_the_quickstart():
    [table] = tables(docstring(ROOT / "benchmarks" / "mlp_digits.py"))
    assert table in tables((ROOT / "README.md").read_text())


def test_labels_of_two_bars_that_are_cut_do_not_overlap():
    """Where over 30 % of the digits and of the others are sure."""
    digits = importlib.import_module("mlp_digits")
    figure = Figure(figsize=(10, 3.5), dpi=200, layout="constrained")
    sure = np.eye(10)[np.zeros(100, int)]
    _, axes, _ = figure.subplots(1, 3)
    digits.draw_entropies(axes, "AdamW", "#D55E00", sure, sure)
    figure.draw_without_rendering()
    first, second = (text.get_window_extent() for text in axes.texts)
    assert not first.overlaps(second)


def run(path, folder, *options, flags=()):
    """What an example prints."""
    result = subprocess.run(
        [sys.executable, *options, path, *flags],
        cwd=folder,
        env=os.environ | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text()))


def tables(text):
    """The tables of a text, lists of rows of cells without their spaces."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    rows = [[line.strip("|").split("|") for line in t.splitlines()] for t in found]
    return [
        [[" ".join(cell.split()) for cell in row] for row in (top, *rest)]
        for top, _, *rest in rows
    ]


def cells(text):
    """{(row, column): (mean, standard error)}, of the first table that has it."""
    found = {}
    for titles, *rows in tables(text):
        for name, *row in rows:
            for title, cell in zip(titles[1:], row, strict=True):
                if "±" in cell:
                    values = tuple(map(float, cell.split("±")))
                    found.setdefault((name, title), values)
    return found


def refused(name, capsys, monkeypatch, *arguments):
    """What the example says when it refuses these arguments, before any work."""
    example = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as error:
        example.main()
    assert error.value.code not in (0, None)
    return f"{error.value.code} {capsys.readouterr().err}"


def fields(name):
    """(name, kind) of the flags of an example."""
    config = importlib.import_module(name).Config
    return [(field.name, flags._kind(field)) for field in dataclasses.fields(config)]


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_no_run_can_mean_are_refused(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for field, kind in fields(name):
        bad = {
            int: ["-1", "nan", "1.5", str(2**31)] + ["0"] * (field not in MAY_BE_ZERO),
            float: ["-1", "-1e-9", "nan", "inf", "1e39"],
        }
        for value in bad.get(kind, ()):
            message = refused(name, capsys, monkeypatch, f"--{field}={value}")
            assert f"--{field}" in message
            assert "must be" in message or f"invalid int value: '{value}'" in message


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_that_cannot_be_written_is_refused(
    name, capsys, monkeypatch, tmp_path
):
    """Also that of the default: here a folder has its name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / importlib.import_module(name).Config.plot).mkdir()
    (tmp_path / "file").touch()
    cases = {
        (): "must be writable",
        ("--plot", "missing/a.png"): "must be writable (No such file or directory)",
        ("--plot", "file/a.png"): "must be writable (Not a directory)",
        ("--plot", "a.xyz"): "must end in .png, ",
        ("--plot", ""): "must end in .png, ",
    }
    for arguments, message in cases.items():
        assert message in refused(name, capsys, monkeypatch, *arguments)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("gpt2 --block 1", "--block must be at least 2, got 1."),
        ("gpt2 --prompt=", "--prompt must not be empty, got ''."),
        ("gpt2 --remat 2", "--remat must be at most 1, got 2."),
        ("gpt2 --ivon_b2 0.99999999", "--ivon_b2 must be below 1"),
        ("gpt2 --distributed localhost", "--distributed must be auto or HOST:PORT"),
        ("gpt2 --distributed :80", "--distributed must be auto or HOST:PORT"),
        ("gpt2 --distributed localhost:http", "--distributed must be auto or HOST"),
        ("gpt2 --process_id 1", "--process_id must be below --num_processes 1"),
        ("resnet20 --depth 3", "--depth must be 2, 8, 14, 20"),
        ("resnet20 --epochs 5", "--warmup_epochs must be below --epochs 5, got 5."),
        ("mnist --dataset digits --batch_size 9999", "must be at most 1438"),
        ("leave_one_out_loss --num_train 1797", "`--num_train` must be below 1797"),
        ("leave_one_out_loss --batch_size 301", "must be at most 300"),
        ("mlp_digits --batch_size 899", "must be at most 898"),
        ("mlp_digits --batch_size 700 --tune", "must be at most 598"),
        ("pruned_weights --batch_size 899", "must be at most 898"),
        ("multi_ivon --batch_size 899", "must be at most 898"),
        ("unknown_classes --batch_size 899", "must be at most"),
        ("unknown_classes --num_known 10", "--num_known must be at most 9, got 10."),
        ("lora_digits --batch_size 101", "must be at most 100"),
        ("task_sequence --batch_size 1438", "must be at most 1437"),
        ("task_sequence --epochs 1 --forget 29", "`--forget` must be at most 28 steps"),
        ("merged_networks --steps 2", "`--forget` must be at most 2 steps, got 3.0."),
        ("wrong_labels --batch_size 1438", "must be at most 1437"),
        ("wrong_labels --flip 1", "--flip must be below 1, got 1.0."),
        ("wrong_labels --flip 0", "--flip must be positive, got 0.0."),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    command, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    name, *arguments = command.split()
    assert message in refused(name, capsys, monkeypatch, *arguments)


def test_numbers_at_the_ends_are_taken():
    parser = flags.create_parser(importlib.import_module("gpt2").Config, "Doc.")
    given = "--seed 0 --steps 1 --adamw_lr 0 --ivon_b2 0 --max_norm 1e-30 --block 2"
    config = importlib.import_module("gpt2").Config(
        **vars(parser.parse_args(given.split()))
    )
    assert flags.checked(parser, config) is config


IMAGES = np.zeros((100, 28, 28), np.uint8)
LABELS = np.arange(100) % 10
BAD_FILES = {
    "too many classes": ({"labels": np.arange(100)}, "got 0..99."),
    "a negative label": ({"labels": LABELS - 1}, "got -1..8."),
    "a class too many": ({"labels": LABELS.astype(np.uint8) + 1}, "got 1..10."),
    "floats": ({"labels": LABELS.astype(np.float32)}, "labels must be integers"),
    "booleans": ({"labels": LABELS > 4}, "labels must be integers, got bool"),
    "texts": ({"labels": LABELS.astype(str)}, "labels must be integers"),
    "one label too few": ({"labels": LABELS[1:]}, "there are labels (99,) for 100 im"),
    "a column": ({"labels": LABELS[:, None]}, "there are labels (100, 1) for 100 im"),
    "float images": ({"images": IMAGES / 255}, "the images are float64"),
    "no images": ({"images": IMAGES[:0], "labels": LABELS[:0]}, "the images are uint8"),
    "another name": ({"labels": None, "y": LABELS}, "labels is not a file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("name", [*WITH_IMAGES, "mnist", "resnet20"])
def test_files_that_do_not_fit_the_network_are_refused(
    name, case, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    changes, message = BAD_FILES[case]
    arrays = {"images": IMAGES, "labels": LABELS} | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    if name == "resnet20":
        shape = len(arrays["images"]), 32, 32, 3
        arrays["images"] = np.zeros(shape, arrays["images"].dtype)
        arrays = {
            f"{split}_{key}": array
            for split in ("train", "test")
            for key, array in arrays.items()
        }
    np.savez(tmp_path / "data.npz", **arrays)
    printed = refused(name, capsys, monkeypatch, "--data", "data.npz")
    assert "`--data` must be an npz file with" in printed
    assert message in printed
