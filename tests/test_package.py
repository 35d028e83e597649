"""What is published: names, a version, and a wheel with all rooms in it."""

import importlib
import inspect
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile

import pytest

import ivon_jax

ROOT = pathlib.Path(__file__).parent.parent
# A name that goes, or changes, is a breaking change: it needs a line of CHANGELOG.md.
NAMES = {
    "ivon_jax": """Basis CalibrationCurve EVONState Estimate IVONState Linearized
        Mixture Moments NaturalParameters PointMass Posterior RotatedPosterior
        SampledState Uncertainty calibrate calibration calibration_curve diagnostics
        evidence_lower_bound evon find_states ivon linearized mean merging metrics
        posterior predict predict_moments predictive prior pruning recommended
        sample sampled scale_by_evon scale_by_ivon sensitivity settings tune tuning
        uncertainty value_and_grad""",
    "ivon_jax.calibration": """CalibrationCurve calibrate calibration_curve
        linearized_curve temperature_scaling""",
    "ivon_jax.diagnostics": "Diagnosis advice check_step diagnose measure",
    "ivon_jax.flax": """TrainState arrays mean posterior prior sample
        value_and_grad""",
    "ivon_jax.merging": "diagonal_fisher merge task_arithmetic",
    "ivon_jax.metrics": """accuracy brier_score crps expected_calibration_error
        gaussian_nll interval_coverage negative_log_likelihood out_of_distribution
        risk_coverage""",
    "ivon_jax.predictive": """Linearized Moments Uncertainty linearized predict
        predict_moments uncertainty""",
    "ivon_jax.pruning": """by_signal_to_noise by_variance curve mask prune
        signal_to_noise""",
    "ivon_jax.sensitivity": """LeaveOneOut deviations leave_one_out leave_one_out_logits
        leave_one_out_loss sensitivities""",
    "ivon_jax.settings": "recommended",
    "ivon_jax.tuning": "tune",
}


def is_public(module, name, value):
    """Of a module, what it or its rooms define; of the front door, all that is ours."""
    if name.startswith("_"):
        return False
    if inspect.ismodule(value):
        # Flax's room is there from its first use on.
        ours = value.__name__.startswith("ivon_jax.")
        return module is ivon_jax and ours and name != "flax"
    home = getattr(value, "__module__", "")
    if module is ivon_jax:
        return home.startswith("ivon_jax")
    # A folder shows what its private modules define.
    return home == module.__name__ or home.startswith(f"{module.__name__}._")


@pytest.mark.parametrize("path", NAMES)
def test_public_names_are_these(path):
    module = importlib.import_module(path)
    found = {
        name for name, value in vars(module).items() if is_public(module, name, value)
    }
    assert found == set(NAMES[path].split())


def signatures(path):
    """Of the functions and methods that a module defines for users, by name."""
    module = importlib.import_module(path)
    for name, value in vars(module).items():
        if is_public(module, name, value):
            members = vars(value) if inspect.isclass(value) else {"": value}
            for part, member in members.items():
                function = getattr(member, "fget", None) or inspect.unwrap(
                    getattr(member, "__func__", member)
                )
                # Flax gives a dataclass more methods.
                ours = getattr(function, "__module__", "").startswith("ivon_jax")
                if ours and inspect.isfunction(function) and part[:1] != "_":
                    yield f"{name}.{part}", inspect.signature(function)


@pytest.mark.parametrize("path", NAMES)
def test_public_signatures_have_types(path):
    """Mypy leaves out what has none. jax calls ``tree_...``, users don't."""
    for name, signature in signatures(path):
        if ".tree_" not in name:
            untyped = [
                p.name
                for p in signature.parameters.values()
                if p.annotation is p.empty and p.name not in ("self", "cls")
            ]
            assert untyped == [], name
            assert signature.return_annotation is not signature.empty, name


@pytest.mark.parametrize("path", NAMES)
def test_help_begins_with_a_signature_to_read(path):
    """Evaluated, `jax.typing.ArrayLike` is a union of nine types."""
    assert [n for n, signature in signatures(path) if len(str(signature)) > 800] == []


def test_every_public_module_is_listed():
    files = {p.stem for p in (ROOT / "ivon_jax").iterdir() if p.name[0] not in "_."}
    modules = {name.rpartition(".")[2] for name in NAMES if "." in name}
    assert files - {"py"} == modules


def test_the_version_is_the_changelogs_newest_and_the_citations():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - ", changelog, re.MULTILINE)[0]
    citation = (ROOT / "CITATION.cff").read_text()
    [cited] = re.findall(r"^version: (\S+)$", citation, re.MULTILINE)
    assert newest == cited == ivon_jax.__version__


def test_hooks_and_workflow_call_what_a_contributor_calls():
    """The versions that CI pins are those of pyproject.toml."""
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert ".ci/run" in workflow
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for oldest in project["dependencies"]:
        assert oldest.replace(">=", "==") in workflow
    assert f'"{project["requires-python"].removeprefix(">=")}"' in workflow


def test_the_table_of_versions_is_what_ci_runs():
    """The lower bounds, and the Pythons of the workflow."""
    text = (ROOT / "docs/index.md").read_text()
    rows = re.findall(r"^\| (\w+)[^|]* \| ([\d.]+) \| ([^|]+) \|$", text, re.MULTILINE)
    oldest = {name.lower(): version for name, version, _ in rows}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = [*project["dependencies"], *project["optional-dependencies"]["flax"]]
    bounds.append(f"python{project['requires-python']}")
    assert oldest == dict(bound.split(">=") for bound in bounds)
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    pythons = re.search(r"python: \[(.*)\]", workflow)[1].replace('"', "").split(", ")
    newest = {name.lower(): version for name, _, version in rows}
    assert pythons == [oldest["python"], newest.pop("python")]
    assert set(newest.values()) == {"the newest release"}


@pytest.mark.slow
@pytest.mark.slow
def test_a_wheel_has_all_rooms_and_works_in_a_clean_environment(tmp_path):
    """The README runs there, without the checkout; jax and optax are on a path."""
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    run([*build, "-t", "sdist", "-t", "wheel"])
    [wheel], [sdist] = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    run([sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)])
    assert f"-{ivon_jax.__version__}-" in wheel.name
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("ivon_jax/")}
    files = (ROOT / "ivon_jax").rglob("*.*")
    sources = {str(f.relative_to(ROOT)) for f in files if f.suffix in (".py", ".typed")}
    assert packed == sources
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert sources | {"README.md", "LICENSE", "pyproject.toml"} <= names

    python = str(tmp_path / "clean/bin/python")
    venv.create(tmp_path / "clean")
    pip = [sys.executable, "-m", "pip", "--python", python]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)])
    # Of folders on PYTHONPATH, editable installations such as ours are not read.
    path = os.pathsep.join(p for p in sys.path if p.endswith("-packages"))
    run([python, "-c", f"import {', '.join(NAMES)}"], cwd=tmp_path, PYTHONPATH=path)
    script = [python, str(ROOT / "tests/run_readme.py"), str(ROOT / "README.md")]
    file, version = run(script, cwd=tmp_path, PYTHONPATH=path).split()[-2:]
    assert file.startswith(str(tmp_path / "clean"))
    assert version == ivon_jax.__version__


def run(command, cwd=ROOT, **environment):
    """Run a command to its end, and return what it prints."""
    environment = {**os.environ, **environment}
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
