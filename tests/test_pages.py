"""The README and the pages of the site: their code runs, their links exist."""

import pathlib
import re
import subprocess

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "shell", "bibtex", "text", ""}
# Each section of these stands alone: test_trainers.py, clients/ and test_saving.py.
BY_SECTION = {"trainers", "saving"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page, language):
    """The code of a page in this language."""
    found = re.findall(r"^```(\S*).*\n((?:.*\n)*?)```$", page.read_text(), re.MULTILINE)
    assert {name for name, _ in found if name[:1] != "{"} <= LANGUAGES
    return [code for name, code in found if name == language]


WITH_PYTHON = [
    page for page in PAGES if page.stem not in BY_SECTION and blocks(page, "python")
]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """As a reader pastes them, one after the other, under JAX's default promotion."""
    if page.stem == "devices" and jax.__version_info__ < (0, 10):
        pytest.skip("its CPU backend crashes where memory is the host's")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    with jax.numpy_rank_promotion("allow"):
        for code in blocks(page, "python"):
            exec(compile(code, page.name, "exec"), namespace)


@every_page
def test_shell_lines_name_targets_and_extras_that_exist(page):
    """A dry run: they install packages and train for minutes."""
    for line in "".join(blocks(page, "shell")).splitlines():
        if line.startswith("make "):
            command = line.split("#")[0].split()
            subprocess.run([*command, "--dry-run"], cwd=ROOT, check=True)
        elif line.startswith("pip "):
            extra = re.fullmatch(r'pip install "\.(?:\[(\w+)\])?" *(?:#.*)?', line)
            project = (ROOT / "pyproject.toml").read_text()
            assert extra[1] is None or f"\n{extra[1]} = [" in project


@every_page
def test_files_that_a_page_links_to_exist(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_readme_leads():
    assert len(README.read_text().splitlines()) < 150
