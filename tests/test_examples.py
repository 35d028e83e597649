"""Every example has the form of a tutorial and runs at toy size, in this process."""

import ast
import contextlib
import io
import math
import pathlib
import re

import jax
import matplotlib.pyplot as plt
import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "examples"
# For each example, constants that make it short.
TOY = {
    "continual": {"EPOCHS": 1, "NUM_TASKS": 2},
    "digits": {"STEPS": 2, "NUM_SAMPLES": 2, "RATES": (1e-3,)},
    "ensemble": {"STEPS": 2, "ANGLES": (0, 90)},
    "evon": {"STEPS": 2, "NUM_SAMPLES": 2},
    "linen": {"STEPS": 2, "WIDTH": 2, "NUM_SAMPLES": 2},
    "lora": {"PRETRAIN_STEPS": 2, "STEPS": 4, "NUM_SAMPLES": 2},
    "merging": {"STEPS": 4, "SCALES": (0.5, 1.0)},
    "nnx": {"STEPS": 2, "HIDDEN": 8, "NUM_SAMPLES": 2},
    "out_of_domain": {"STEPS": 2, "NUM_SAMPLES": 2},
    "pruning": {"STEPS": 2},
    "regression": {"STEPS": 2, "NUM_SAMPLES": 2},
    "sensitivity": {"STEPS": 2},
    "uncertainty": {"STEPS": 2, "NUM_SAMPLES": 2},
}

# The quickstart also has a tuned baseline and a control.
LINES, NUMBERS = {"digits": 170}, {"digits": 6}

every_example = pytest.mark.parametrize("name", sorted(TOY))


@pytest.fixture(autouse=True)
def as_a_reader_runs_it(monkeypatch, tmp_path):
    """Under JAX's default promotion, in a folder of its own, without a screen."""
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    plt.close("all")


def test_every_example_has_a_toy_size():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(TOY)


@every_example
def test_example_prints_its_numbers_and_saves_its_picture(name, tmp_path):
    printed = numbers(run(name, TOY[name]))
    assert printed.keys() == expected(name).keys()
    assert all(map(math.isfinite, printed.values())), printed
    pictures = {f"{name}.png"} & set(docstring(name).replace(",", " ").split())
    assert {path.name for path in tmp_path.iterdir()} == pictures


@pytest.mark.slow
@every_example
def test_example_prints_what_its_header_says(name):
    """Roughly: machines round differently, and training amplifies it."""
    assert numbers(run(name)) == pytest.approx(expected(name), rel=0.05, abs=0.01)


@every_example
def test_example_is_short_and_has_its_constants_on_top(name):
    lines = source(name).splitlines()
    assert len(lines) <= LINES.get(name, 140)
    top = source(name).split("\n# %%\n")[0]
    assert constants(ast.parse(source(name))).keys() == constants(ast.parse(top)).keys()
    forbidden = r"^(?:class Config|def main|if __name__|import argparse|from common).*"
    assert re.findall(forbidden, source(name), re.MULTILINE) == []


@every_example
def test_example_is_a_text_with_code(name):
    """A title, three numbers, and cells that begin with some lines of narrative."""
    title, underline, empty, *_ = docstring(name).splitlines()
    assert (underline, empty) == ("=" * len(title), "")
    assert len(expected(name)) == NUMBERS.get(name, 3)
    _, *cells = source(name).split("\n# %%\n")
    assert len(cells) >= 3
    for cell in cells:
        narrative = re.match(r"(?:#.*\n)*", cell).group()
        assert 2 <= narrative.count("\n") <= 5, cell[:80]


def test_the_site_says_what_the_quickstart_prints():
    lines = (f"{name}: {number:.3f}\n" for name, number in expected("digits").items())
    assert f"```text\n{''.join(lines)}```" in (ROOT / "docs/index.md").read_text()


def test_a_constant_that_an_example_lacks_is_an_error():
    """A renamed constant would keep its whole size in silence."""
    with pytest.raises(AssertionError, match="EPOCHS"):
        run("digits", {"EPOCHS": 1})


def source(name):
    return (FOLDER / f"{name}.py").read_text()


def docstring(name):
    return ast.get_docstring(ast.parse(source(name)))


def numbers(text):
    """{name: number} of the lines ``name: number``."""
    found = re.findall(r"^ *([^:\n]+): (-?\d+\.\d+|nan|inf)$", text, re.MULTILINE)
    return {name: float(number) for name, number in found}


def expected(name):
    return numbers(docstring(name))


def constants(tree):
    """{name: statement} of the module's assignments to names in capitals."""
    return {
        target.id: statement
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name) and target.id.isupper()
    }


def run(name, changes=()):
    """What the example prints, with some of its constants changed."""
    tree = ast.parse(source(name))
    assignments = constants(tree)
    for constant, value in dict(changes).items():
        assert constant in assignments, f"{name}.py has no constant {constant}"
        assignments[constant].value = ast.parse(repr(value), mode="eval").body
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"{name}.py", "exec"), {"__name__": "__main__"})
    return printed.getvalue()
