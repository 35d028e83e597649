"""benchmarks/run.py: the tables of benchmarks/README.md are what its commands print."""

import dataclasses
import importlib
import importlib.util
import math
import pathlib
import re
import shlex

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "benchmarks/README.md").read_text()
COMMANDS = re.findall(r"^python benchmarks/.*", TEXT, re.MULTILINE)
SECTION = """## One

```shell
python benchmarks/one.py --data DATA/one
```

<!-- printed -->
<!-- end -->

Prose.

## Two

```shell
python benchmarks/two.py
```

<!-- printed 2020-01-01, 9 min, by name only -->
old
<!-- end -->
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("run", ROOT / "benchmarks/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = tmp_path / "benchmarks" / "README.md"
    readme.parent.mkdir()
    readme.write_text(SECTION)
    monkeypatch.setattr(module, "README", readme)
    return module


def test_the_readme_runs_every_benchmark(run):
    commands = [section["command"] for section in run.SECTION.finditer(TEXT)]
    assert commands == COMMANDS
    assert len(commands) == TEXT.count("<!-- printed") == TEXT.count("<!-- end")
    scripts = {ROOT / shlex.split(command)[1] for command in commands}
    shared = {"run.py", "report.py", "baselines.py"}
    found = {p for p in (ROOT / "benchmarks").glob("*.py") if p.name not in shared}
    found = {p for p in found if "Toy size: `" not in p.read_text()}
    assert scripts == found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_script_takes_the_flags_of_its_command(command, monkeypatch):
    script, *flags = shlex.split(command)[1:]
    if "ground_truth" in script:
        pytest.importorskip("blackjax")  # of the extra for benchmarks alone
    module = importlib.import_module(pathlib.Path(script).stem)
    monkeypatch.setattr("sys.argv", [script, *flags])
    config = module.report.parse_args(module.Config, module.__doc__)
    for name, value in zip(flags[::2], flags[1::2], strict=True):
        assert str(getattr(config, name.removeprefix("--"))) == value


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_that_no_run_can_mean_are_refused(command, monkeypatch, capsys):
    script = shlex.split(command)[1]
    if "ground_truth" in script:
        pytest.importorskip("blackjax")
    module = importlib.import_module(pathlib.Path(script).stem)
    for field in dataclasses.fields(module.Config):
        if field.type is str:
            continue
        monkeypatch.setattr("sys.argv", [script, f"--{field.name}=-1"])
        with pytest.raises(SystemExit):
            module.report.parse_args(module.Config, module.__doc__)
        assert f"--{field.name} must " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "chosen"),
    [([], ["one"]), (["two"], ["two"]), (["--data", "two"], ["one", "two"])],
)
def test_by_name_or_all_but_the_long_ones(run, names, chosen):
    sections = run.SECTION.finditer(SECTION)
    commands = [s["command"] for s in sections if run.selected(s, names)]
    assert [pathlib.Path(shlex.split(c)[1]).stem for c in commands] == chosen


def test_what_is_printed_takes_the_place_of_the_table(run, tmp_path):
    script = tmp_path / "benchmarks" / "one.py"
    script.write_text("import sys; print(sys.argv[2], '\\\\1')")
    command = "python benchmarks/one.py --data DATA/one"
    output, minutes = run.run(command, tmp_path)
    assert output == r"DATA/one \1"
    run.record(command, output, minutes)
    text = run.README.read_text()
    assert "DATA/one \\1\n<!-- end -->\n\nProse." in text
    assert text.endswith("9 min, by name only -->\nold\n<!-- end -->\n")


def test_a_failure_leaves_the_table(run, tmp_path, monkeypatch):
    script = tmp_path / "benchmarks" / "two.py"
    script.write_text("print('half'); raise SystemExit(1)")
    monkeypatch.setattr("sys.argv", ["run.py", "two"])
    with pytest.raises(SystemExit, match=r"benchmarks/two\.py"):
        run.main()
    assert run.README.read_text() == SECTION


def test_a_command_without_its_data_is_left_out(run, monkeypatch, capsys):
    monkeypatch.delenv("DATA", raising=False)
    monkeypatch.setattr("sys.argv", ["run.py"])
    run.main()
    assert "set DATA" in capsys.readouterr().out
    assert run.README.read_text() == SECTION


def test_a_diverged_trial_is_never_the_best():
    """To NumPy, NaN is the least of all losses."""
    report = importlib.import_module("report")
    losses = [math.nan, 0.5, 0.25, math.inf]
    assert report.best(losses) == 2
    settings = [{"ess": x} for x in (1.0, 2.0, 3.0, 4.0)]
    _, _, cells = report.trial_cells("IVON", settings, losses)
    assert cells == "1: nan, 2: 0.5, **3: 0.25**, 4: inf"
    with pytest.raises(SystemExit, match="All 2 trials diverged"):
        report.best([math.nan, math.nan])
