"""Every example has the form of a tutorial, and prints what it says."""

import ast
import contextlib
import io
import pathlib
import re

import jax
import matplotlib.pyplot as plt
import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
# The quickstart also has a tuned baseline and a control, the other one two systems.
LINES = {"digits": 170, "heteroscedastic": 160}
NUMBERS = {"digits": 6, "heteroscedastic": 4}

every_example = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def as_a_reader_runs_it(monkeypatch, tmp_path):
    """Under JAX's default promotion, in a folder of its own, without a screen."""
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    plt.close("all")


@pytest.mark.usefixtures("optimized")
@every_example
def test_example_prints_what_its_header_says_and_saves_its_picture(name, tmp_path):
    """Roughly: machines round differently, and training amplifies it."""
    assert numbers(run(name)) == pytest.approx(expected(name), rel=0.05, abs=0.01)
    pictures = {f"{name}.png"} & set(docstring(name).replace(",", " ").split())
    assert {path.name for path in tmp_path.iterdir()} == pictures


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


def run(name):
    """What the example prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source(name), f"{name}.py", "exec"), {"__name__": "__main__"})
    return printed.getvalue()
