"""Every study runs at the toy size that its first lines name, and checks its flags.

`WHOLE_STUDIES=1 pytest tests/test_studies.py -k whole` measures again, for a quarter of
an hour, and compares with benchmarks/results.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from common import flags
from common.results import load
from scipy.stats import sem

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = (ROOT / "benchmarks").glob("*.py")
STUDIES = sorted(path for path in SCRIPTS if "\nToy size: `" in path.read_text())
NAMES = [path.stem for path in STUDIES]
# Where zero means something.
MAY_BE_ZERO = {"seed", "warmup_epochs", "bfloat16", "tune"}
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
LARGER = ["small_data", "active_learning"]  # whose results are MNIST's


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_runs_and_keeps_tables(path, tmp_path, capsys, monkeypatch):
    """With warnings as errors, in a folder of its own."""
    toy = re.search(r"^Toy size: `(.*)`", path.read_text(), re.MULTILINE).group(1)
    if "jax_num_cpu_devices" in path.read_text():
        printed = run(path, tmp_path, "-W", "error", flags=shlex.split(toy))
    else:
        monkeypatch.chdir(tmp_path)
        printed = run_here(path, shlex.split(toy), capsys, monkeypatch)
    printed = tables(printed)
    assert printed
    [file] = tmp_path.glob("*.json")
    kept = json.loads(file.read_text())
    assert file.stem == kept["study"] == path.stem
    for table, rows in zip(printed, kept["tables"].values(), strict=True):
        assert table[0] == list(rows["rows"][0])
        assert len(table) == 1 + len(rows["rows"])
    for name, result in load().items():
        if result["study"] == path.stem and result["source"] == "run":
            assert layout(kept).items() <= layout(result).items(), name


def layout(result):
    """The columns of each table, but that of trials, which a run may do without."""
    found = {name: list(t["rows"][0]) for name, t in result["tables"].items()}
    return {name: columns for name, columns in found.items() if name != "trials"}


@pytest.mark.skipif("not os.environ.get('WHOLE_STUDIES')", reason="15 minutes")
@pytest.mark.parametrize("name", WITHOUT_FILES + WITH_IMAGES)
def test_a_whole_study_measures_what_is_kept(name, tmp_path):
    """Within three standard errors of each, because machines round differently."""
    path = ROOT / "benchmarks" / f"{name}.py"
    run(path, tmp_path)
    measured = json.loads((tmp_path / f"{name}.json").read_text())
    expected = load()[name]
    for title, table in expected["tables"].items():
        if title == "trials":
            continue
        rows = zip(table["rows"], measured["tables"][title]["rows"], strict=True)
        for row, other in rows:
            for column in (c for c in row if isinstance(row[c], list)):
                means = [np.mean(x[column]) for x in (row, other)]
                error = np.hypot(*(sem(x[column]) for x in (row, other)))
                limit = 3 * error + 0.002 * abs(means[0])
                assert column == "seconds" or abs(means[0] - means[1]) <= limit, row


def run(path, folder, *options, flags=()):
    """What a script prints."""
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


def run_here(path, flags, capsys, monkeypatch):
    """What a script prints that needs no process of its own."""
    plt.switch_backend("agg")
    monkeypatch.setattr(sys, "argv", [str(path), *flags])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        importlib.import_module(path.stem).main()
    plt.close("all")
    return capsys.readouterr().out


def tables(text):
    """The tables of a text, lists of rows of cells without their spaces."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    rows = [[line.strip("|").split("|") for line in t.splitlines()] for t in found]
    return [
        [[" ".join(cell.split()) for cell in row] for row in (top, *rest)]
        for top, _, *rest in rows
    ]


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
def test_a_file_that_cannot_be_written_is_refused(name, capsys, monkeypatch, tmp_path):
    """Also that of the default: here a folder has its name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / importlib.import_module(name).Config.results).mkdir()
    (tmp_path / "file").touch()
    cases = {
        "": "must be writable",
        "missing/a.json": "must be writable (No such file or directory)",
        "file/a.json": "must be writable (Not a directory)",
        "a.xyz": "must end in .json",
        " ": "must end in .json",
    }
    for path, message in cases.items():
        arguments = ["--results", path.strip()] if path else []
        assert message in refused(name, capsys, monkeypatch, *arguments)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("resnet20 --depth 3", "--depth must be 2, 8, 14, 20"),
        ("resnet20 --epochs 5", "--warmup_epochs must be below --epochs 5, got 5."),
        ("cifar --network gru", "--network must be one of resnet20, resnet18, "),
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
        ("task_sequence --tune SGD", "`--tune` must be of AdamW; EWC; IVON, first"),
        ("merged_networks --steps 2", "`--forget` must be at most 2 steps, got 3.0."),
        ("wrong_labels --batch_size 1438", "must be at most 1437"),
        ("wrong_labels --flip 1", "--flip must be below 1, got 1.0."),
        ("wrong_labels --flip 0", "--flip must be positive, got 0.0."),
        (
            "curvature --epochs 0,5",
            "`--epochs` must be numbers in 1..2147483647, got 0",
        ),
        ("temperatures --sizes 100,x", "`--sizes` must be numbers in 1..1200, got 100"),
        ("small_data --sizes 0,100", "`--sizes` must be numbers in 1..1347, got 0,100"),
        (
            "small_data --sizes 9 --flips x",
            "`--flips` must be numbers in 0..90, got x.",
        ),
        ("small_data --systems IVON", "with IVON and no noise, got 'IVON'."),
        ("bandit --deltas 0.5,1", "must be numbers between 0 and 1, got 0.5,1."),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    command, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    name, *arguments = command.split()
    assert message in refused(name, capsys, monkeypatch, *arguments)


def test_numbers_at_the_ends_are_taken():
    config_type = importlib.import_module("unknown_classes").Config
    parser = flags.create_parser(config_type, "Doc.")
    given = "--seed 0 --epochs 1 --num_known 9 --ivon_learning_rate 0 "
    given += "--ivon_hess_init 1e-30"
    config = config_type(**vars(parser.parse_args(given.split())))
    assert flags.checked(parser, config) is config
    config_type = importlib.import_module("multi_ivon").Config
    config = config_type(ivon_b2=0.0)
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
@pytest.mark.parametrize("name", [*WITH_IMAGES, *LARGER, "mnist", "resnet20"])
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
