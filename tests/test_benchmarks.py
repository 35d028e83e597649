"""The page of the benchmarks is what the data say, and the data fit their scripts."""

import dataclasses
import importlib
import json
import math
import pathlib
import re
import shlex

import numpy as np
import plots
import pytest
import render
from common import flags, results, tables

ROOT = pathlib.Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = results.load()
TEMPLATE = (BENCHMARKS / "page.md").read_text()
PAGE = (BENCHMARKS / "README.md").read_text()
TOOLS = {"plots", "render", "run"}
SCRIPTS = sorted({p.stem for p in BENCHMARKS.glob("*.py")} - TOOLS)
README_SAYS = [
    "lower than AdamW's by {mlp_digits > test > AdamW - IVON > NLL},",
    "than at the mean by {mlp_digits > test > IVON@mean - IVON > NLL}.",
    "In accuracy AdamW is {mlp_digits > test > AdamW - IVON > accuracy %} points",
    "(ECE: AdamW {mlp_digits_by_nll > test > AdamW > ECE}, IVON "
    "{mlp_digits_by_nll > test > IVON > ECE}; NLL: "
    "{mlp_digits_by_nll > test > AdamW - IVON > NLL} lower)",
    "{claims > holds} hold, {claims > does not} do not, and {claims > can't} can't be",
    "{overhead > networks > gpt2-tiny; IVON > time / AdamW} times AdamW's for a small",
    "{overhead > networks > mlp; IVON > time / AdamW} times for a small MLP",
    "{gpt2_step_h200_small > step > IVON, threefry2x32 > ms} ms with IVON and "
    "{gpt2_step_h200_small > step > AdamW, cast once > ms} ms with AdamW",
]
RESULTS_SAY = [
    "network (IVON {recurrent > test > IVON > NLL}, AdamW "
    "{recurrent > test > AdamW > NLL})",
    "higher than SGD's ({recurrent > test > SGD > NLL})",
    "(IVON {uncertainty_mnist > in domain > IVON > NLL}, SGD "
    "{uncertainty_mnist > in domain > SGD > NLL})",
    "shifted digits (IVON {ablations_digits > shifted > 5; IVON > NLL}, SGD "
    "{ablations_digits > shifted > 5; SGD > NLL})",
    "on digits ({ablations_digits > samples in prediction > 16 > NLL} for "
    "{ablations_digits > samples in prediction > mean > NLL})",
    "(IVON {uncertainty_digits > turned > IVON > AUROC %}, SGD "
    "{uncertainty_digits > turned > SGD > AUROC %} %)",
    "on MNIST (Multi-IVON {uncertainty_mnist > in domain > Multi-IVON > NLL}, "
    "ensemble {uncertainty_mnist > in domain > Deep ensemble > NLL})",
    "the posterior gains {small_data > test > 100; 20; no noise - 100; 20; IVON > NLL}",
    "(AUROC: IVON {unknown_classes > out of domain > IVON; entropy > AUROC}, AdamW "
    "{unknown_classes > out of domain > AdamW; entropy > AUROC} %)",
]


def module_of(name):
    if name == "ground_truth":
        pytest.importorskip("blackjax")  # of the extra for benchmarks alone
    return importlib.import_module(name)


def config_of(module):
    """The Config of the command line."""
    if not hasattr(module, "parse_args"):
        return flags.parse(module.Config, module.__doc__)
    config = module.parse_args()
    return config[0] if isinstance(config, tuple) else config  # mnist's flag --fresh


def test_every_script_has_results_and_every_result_its_script():
    assert {result["study"] for result in RESULTS.values()} == set(SCRIPTS)


@pytest.mark.parametrize("name", RESULTS)
def test_configuration_fits_its_script(name, monkeypatch):
    """It has the fields of today's Config, and its command gives their values."""
    result = RESULTS[name]
    module = module_of(result["study"])
    expected = {field.name for field in dataclasses.fields(module.Config)}
    assert set(result["config"]) == expected - {"results"}
    monkeypatch.setattr("sys.argv", shlex.split(result["command"])[1:])
    config = dataclasses.asdict(config_of(module))
    assert {k: config[k] for k in result["config"]} == result["config"]


@pytest.mark.parametrize("name", RESULTS)
def test_results_say_where_they_come_from(name):
    """Those without single seeds say so."""
    result = RESULTS[name]
    machine = {"jax", "python", "device", "machine", "cores"}
    assert set(result["environment"]) == machine
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    of_seeds = [
        value
        for table in result["tables"].values()
        for row in table["rows"]
        for value in row.values()
    ]
    if result["source"] == "run":
        assert result["commit"]
        assert not any(
            isinstance(value, dict) and "mean" in value for value in of_seeds
        )
    else:
        assert result["source"].startswith(("table printed", "printed in"))
        assert not any(isinstance(value, list) for value in of_seeds)


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_written_as_they_were_read(name):
    """A line for each record, so that a change is a line in a diff."""
    text = (results.FOLDER / f"{name}.json").read_text()
    assert results.dumps(json.loads(text)) == text


def test_the_page_is_what_the_data_render():
    """After a change: make page."""
    assert render.page(RESULTS, TEMPLATE) == PAGE


def test_the_readme_has_the_table_of_the_digits():
    readme, columns = (ROOT / "README.md").read_text(), ["system", "accuracy %"]
    table = RESULTS["mlp_digits"]["tables"]["test"]
    assert tables.markdown(table, [*columns, "NLL", "ECE", "Brier"]) in readme


@pytest.mark.parametrize(
    ("file", "heading", "sentences"),
    [
        ("README.md", "## What it brings", README_SAYS),
        ("docs/results.md", "# Results", RESULTS_SAY),
    ],
)
def test_what_a_page_says_is_what_the_data_render(file, heading, sentences):
    """Each of its figures is in one of these sentences, or in a table."""
    text = (ROOT / file).read_text().partition(f"{heading}\n")[2]
    text = text.partition("\n## ")[0].partition("```")[0]
    lines = text.replace("\n  ", " ").splitlines()
    text = " ".join(line for line in lines if not line.startswith("|"))
    for sentence in sentences:
        rendered = render.page(RESULTS, sentence)
        assert rendered in text
        text = text.replace(rendered, "")
    assert re.findall(r"\d+\.\d+", text) == []


def test_no_figure_of_ours_is_beside_the_data():
    """Decimals stand in references alone, but for settings and what the paper has."""
    lines = [
        " | ".join(line.split(" | ")[:2] + line.split(" | ")[4:])
        if line.startswith("| ")
        else line
        for line in TEMPLATE.splitlines()
    ]
    text = render.REFERENCE.sub("", "\n".join(lines))
    text = re.sub(r"`[^`]*`|(b2|h_0) = [\d.]+|[\d.]+M\b", "", text)
    assert re.findall(r"\d+\.\d+", text) == []


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{nothing > test}", "No result has the name 'nothing'"),
        ("{uci > test}", "uci has no 'test': RMSE, LL"),
        ("{uci > ranks > SGD > mean rank, LL}", "0 rows have the labels"),
        ("{uci > chosen > yacht > noise}", "6 rows have the labels"),
        ("{uci > ranks > IVON > nothing}", "nothing"),
        ("{uci}", "is no reference"),
    ],
)
def test_a_reference_to_nothing_is_an_error(reference, message):
    with pytest.raises((KeyError, ValueError), match=message):
        render.page(RESULTS, reference)


def test_cells():
    table = {
        "digits": {"mean": 2},
        "rows": [{"seeds": [1.0, 2.0], "mean": {"mean": 0.5, "error": 0.125}}],
    }
    assert tables.markdown(table).splitlines()[2] == "| 1.500 ± 0.500 | 0.50 ± 0.12 |"
    cells = {
        "": None,
        "text": "text",
        "1,000": 1000,
        "0.1235": 0.123456,
        "2": [2.0],
        "nan ± nan": [1.0, None],
        "1 (0.5-2)": {"median": 1.0, "low": 0.5, "high": 2.0},
    }
    assert [tables.cell(value) for value in cells.values()] == list(cells)


def test_at_most_ten_plots_and_all_are_on_the_page():
    names = [plot.__name__ for plot in plots.PLOTS]
    assert len(names) <= 10
    assert {p.stem for p in (BENCHMARKS / "plots").iterdir()} == set(names)
    assert all(f"(plots/{name}.png)" in PAGE for name in names)


def test_links_of_the_page_lead_somewhere():
    """From the site, too, which has no other files of this folder."""
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (BENCHMARKS / link).exists(), link
        assert link.startswith(("../", "page.md", "plots/", "results")), link


@pytest.mark.parametrize("name", SCRIPTS)
def test_numbers_that_no_run_can_mean_are_refused(name, monkeypatch, capsys):
    module = module_of(name)
    for field in dataclasses.fields(module.Config):
        if flags._kind(field) is str:
            continue
        monkeypatch.setattr("sys.argv", [name, f"--{field.name}=-1"])
        with pytest.raises(SystemExit):
            flags.parse(module.Config, module.__doc__)
        assert f"--{field.name} must " in capsys.readouterr().err


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Two results, of scripts that a test writes."""
    module = importlib.import_module("run")
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "render.py").touch()
    for name, device, command in (
        ("one", "cpu", "one.py --data DATA/a"),
        ("two", "H200", "two.py"),
    ):
        result = {"environment": {"device": device}, "minutes": 1.0}
        result["command"] = f"python benchmarks/{command}"
        (folder / f"{name}.json").write_text(json.dumps(result))
    monkeypatch.setattr(results, "FOLDER", folder)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


@pytest.mark.parametrize(
    ("words", "chosen"), [([], ["one"]), (["tw"], ["two"]), (["o"], ["one", "two"])]
)
def test_by_name_or_all_that_is_quick_on_a_cpu(run, words, chosen):
    found = results.load(results.FOLDER)
    assert [
        n for n, result in found.items() if run.selected(n, result, words)
    ] == chosen
    found["one"]["minutes"] = 16.0
    assert not run.selected("one", found["one"], [])


def test_what_is_measured_takes_the_place_of_the_results(run, monkeypatch):
    script = "import sys; open(sys.argv[4], 'w').write(sys.argv[2])"
    (results.FOLDER / "one.py").write_text(script)
    monkeypatch.setattr("sys.argv", ["run.py"])
    monkeypatch.setenv("DATA", "folder")
    run.main()
    assert (results.FOLDER / "one.json").read_text() == "folder/a"


def test_a_failure_leaves_the_results(run, monkeypatch):
    script = "import sys; open(sys.argv[2], 'w').write('half'); raise SystemExit(1)"
    (results.FOLDER / "two.py").write_text(script)
    before = (results.FOLDER / "two.json").read_text()
    monkeypatch.setattr("sys.argv", ["run.py", "two"])
    with pytest.raises(SystemExit, match="two"):
        run.main()
    assert (results.FOLDER / "two.json").read_text() == before


def test_a_command_without_its_data_is_left_out(run, monkeypatch, capsys):
    monkeypatch.delenv("DATA", raising=False)
    monkeypatch.setattr("sys.argv", ["run.py"])
    run.main()
    assert "set DATA" in capsys.readouterr().out


def test_a_diverged_trial_is_never_the_best(tmp_path, capsys):
    """To NumPy, NaN is the least of all losses."""
    losses = [math.nan, 0.5, 0.25, math.inf]
    assert results.best(losses) == 2
    study = study_in(tmp_path)
    settings = [{"ess": x} for x in (1.0, 2.0, 3.0, 4.0)]
    assert study.trials("IVON", settings, losses) == 2
    assert "'ess': 3.0" in capsys.readouterr().out
    rows = json.loads((tmp_path / "a.json").read_text())["tables"]["trials"]["rows"]
    assert [row["chosen"] for row in rows] == [False, False, True, False]
    assert [row["validation NLL"] for row in rows] == [None, 0.5, 0.25, None]
    with pytest.raises(SystemExit, match="All 2 trials diverged"):
        results.best([math.nan, math.nan])


def study_in(folder):
    """A study of a script of this repository, that keeps what it has there."""
    config = importlib.import_module("mlp_digits").Config
    return results.Study(config(results=str(folder / "a.json"), seeds=7))


def test_results_are_kept_as_they_come(tmp_path):
    study = study_in(tmp_path)
    study.table("one", [{"system": "IVON", "NLL": np.float32([0.5, np.nan])}])
    first = json.loads((tmp_path / "a.json").read_text())
    study.curves("two", {"IVON": np.arange(2)})
    second = json.loads((tmp_path / "a.json").read_text())
    assert first["command"] == "python benchmarks/mlp_digits.py --seeds 7"
    assert first["config"]["seeds"] == 7
    assert first["tables"]["one"]["rows"] == [{"system": "IVON", "NLL": [0.5, None]}]
    assert second["tables"] == first["tables"]
    assert second["curves"] == {"two": {"IVON": [0, 1]}}


def test_results_do_not_say_where_the_data_were(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "/home/me/data/")
    config = importlib.import_module("pruned_weights").Config
    path = "/home/me/data/mnist10k.npz"
    study = results.Study(config(data=path, results=str(tmp_path / "a.json")))
    study.table("one", [])
    kept = json.loads((tmp_path / "a.json").read_text())
    assert kept["config"]["data"] == "DATA/mnist10k.npz"
    assert kept["command"].endswith("--data DATA/mnist10k.npz")
