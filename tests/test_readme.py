"""Every code block of the README runs, in order, in one session."""

import pathlib
import re
import subprocess

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def blocks(language):
    return [code for name, code in BLOCKS if name == language]


def test_every_block_is_in_a_language_that_is_tested():
    """The text is what the quickstart prints: tests/test_examples.py."""
    assert {name for name, _ in BLOCKS} == {"python", "shell", "bibtex", "text"}


@pytest.mark.usefixtures("standard_promotion")
def test_python_blocks_run():
    """As a reader pastes them, one after the other, under JAX's default promotion."""
    namespace = {}
    with jax.numpy_rank_promotion("allow"):
        for code in blocks("python"):
            exec(compile(code, "README.md", "exec"), namespace)


@pytest.mark.parametrize("line", "".join(blocks("shell")).splitlines())
def test_shell_lines_name_targets_and_extras_that_exist(line):
    """A dry run: they install packages and train for minutes."""
    if line.startswith("make "):
        command = line.split("#")[0].split()
        subprocess.run([*command, "--dry-run"], cwd=ROOT, check=True)
    else:
        extra = re.fullmatch(r'pip install "\.(?:\[(\w+)\])?" *(?:#.*)?', line).group(1)
        assert (
            extra is None or f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
        )


def test_files_that_the_readme_links_to_exist():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []
