import ast
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import mutants
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PLANTED = """
def noticed(x):
    return float(x)

def noticed_elsewhere(x):
    return float(x)

def unnoticed(x):
    return float(x)
"""
TEST = """
import subprocess, sys
from ivon_jax import planted

def test_noticed():
    assert planted.noticed(2.0) == 2.0

def test_in_a_process_of_its_own():
    lines = "from ivon_jax import planted; assert planted.noticed_elsewhere(2.0) == 2.0"
    subprocess.run([sys.executable, "-c", lines], cwd="/", check=True)

def test_unnoticed():
    assert planted.unnoticed(2.0)
"""
RUN = """
import pathlib, sys, mutants
tests = {"planted": ["planted"]}
print("SURVIVORS", mutants.survivors(pathlib.Path(sys.argv[1]), tests))
"""


@pytest.mark.slow
def test_a_planted_mutant_is_found_where_a_test_cannot_fail(tmp_path):
    """And killed where one can."""
    for name, text in {
        "ivon_jax/__init__.py": "",
        "ivon_jax/planted.py": PLANTED,
        "tests/test_planted.py": TEST,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
    )
    assert done.returncode == 0, done.stderr
    rows, survivors = done.stdout.split("SURVIVORS")
    assert survivors.count("planted.unnoticed: ") == rows.count("SURVIVES") == 1
    assert "planted.noticed" not in survivors
    assert rows.count("test_planted.py::test_noticed") == 1
    assert rows.count("test_planted.py::test_in_a_process_of_its_own") == 1


@pytest.mark.parametrize("module", mutants.TESTS)
def test_every_module_has_mutants_that_compile(module):
    source = mutants.path_of(ROOT, module).read_text()
    found = mutants.mutants_of(module, source)
    assert len(found) > 1
    assert source not in found.values()
    for mutant in found.values():
        ast.parse(mutant)
    for name in mutants.TESTS[module]:
        assert (ROOT / "tests" / f"test_{name}.py").exists()


def test_what_no_test_can_notice_is_in_the_source():
    assert mutants.unknown(ROOT, mutants.TESTS) == []
    assert all(mutants.EQUIVALENT.values())


def test_each_rule_is_nan_negated_doubled_and_loses_a_term():
    source = "def f(x):\n    y = x + 1\n    return 2 * y\n"
    found = mutants.mutants_of("_update_rules", source)
    labels = [name.split(" -> ")[1] for name in found]
    assert labels[1:4] == ["nan", "-1", "2"]
    assert len(labels) == 5


@dataclasses.dataclass(frozen=True)
class Wheel:
    radius: float
    turn: Callable[[float], float]


def test_all_that_counts_is_changed():
    value = {"a": 3.0, "b": jnp.ones(2, jnp.bfloat16), "c": [2, True], "d": None}
    result = mutants.changed("-1", value)
    assert result["a"] == -3.0
    np.testing.assert_array_equal(result["b"], -value["b"])
    assert result["b"].dtype == jnp.bfloat16
    assert result["c"] == [4, False]
    assert mutants.changed("2", lambda x: x)(3.0) == 6.0
    assert mutants.changed("nan", np.dtype(np.float32)) == jnp.bfloat16
    assert np.isnan(mutants.changed("nan", (x for x in [1.0]))[0])
    assert mutants.changed("2", range(3)) == (0, 2, 4)
    wheel = mutants.changed("-1", Wheel(2.0, lambda x: x))
    assert (wheel.radius, wheel.turn(3.0)) == (-2.0, -3.0)


def test_a_part_that_has_no_mutants_is_no_success(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["mutants.py", "_update_rules", "_update_rules.nothing"]
    )
    with pytest.raises(
        SystemExit, match=r"No mutant begins with _update_rules\.nothing"
    ):
        mutants.main()


@pytest.mark.parametrize(
    ("name", "marker", "kept"),
    [
        ("test_x[seed=0]", "statistical", True),
        ("test_x[seed=1]", "statistical", False),
        ("test_x[seed=1]", None, True),
    ],
)
def test_of_three_seeds_one_is_enough_and_a_single_one_stays(name, marker, kept):
    class Item:
        nodeid, path = name, Path("test_x.py")

        def get_closest_marker(self, of):
            return of if of == marker else None

    Item.name = name
    items = [Item()]
    mutants.Quickest({}).pytest_collection_modifyitems(items)
    assert len(items) == kept
