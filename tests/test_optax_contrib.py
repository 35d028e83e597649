"""Optax's own tests of contributed optimizers and of sharding pass on IVON.

They are in optax's wheel. Their lists of optimizers are replaced, the tests stay.
"""

import os
import pathlib
import re
import subprocess
import sys

import jax
import optax
import pytest

import ivon_jax

OPTAX = pathlib.Path(optax.__file__).parent
HERE = pathlib.Path(__file__).parent
# File, the line before which its list is replaced, and the new list.
FILES = {
    "contrib/_common_test.py": (
        "def _get_opt_factory",
        """
contrib.ivon = ours.ivon
_MAIN_OPTIMIZERS_UNDER_TEST = _ALL_OPTIMIZERS_UNDER_TEST = (
    {"opt_name": "ivon", "opt_kwargs": {"learning_rate": 0.1},
     "wrapper_name": None, "wrapper_kwargs": None},
)
""",
    ),
    "_src/sharding_test.py": (
        "class ShardingTest",
        """
jax.__version__ = "9"  # they compare texts, of which 0.10 is less than 0.7
OPTIMIZERS = {"ivon": ours.told("ivon"), "evon": ours.told("evon")}
""",
    ),
}


def ivon(learning_rate: optax.ScalarOrSchedule, ess: float = 1e5):
    """Their steps know gradients alone, so the draw is the parameters: a narrow one."""
    tx = ivon_jax.ivon(learning_rate, ess, hess_init=100.0, b2=0.999, weight_decay=0.0)
    return ivon_jax.sampled(tx, jax.random.key(0))


def told(name):
    """The core itself, told some Hessian."""
    tx = getattr(ivon_jax, name)(1.0, ess=10.0)

    def update(grads, state, params):
        return tx.update(grads, state, params, hess=grads)

    return optax.GradientTransformation(tx.init, update)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_optax_tests_pass(file, tmp_path):
    """In a process of their own: they assume JAX's default promotion."""
    if not (OPTAX / file).exists():
        pytest.skip("This version of optax does not publish its tests of sharding.")
    line, code = FILES[file]
    parts = (OPTAX / file).read_text().partition(f"\n{line}")
    assert parts[1], f"{file} has no line {line!r}"
    code = "\nimport test_optax_contrib as ours\n" + code
    (tmp_path / "test.py").write_text(parts[0] + code + parts[1] + parts[2])
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "test.py")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    [count] = re.findall(r"Ran (\d+) tests", done.stderr)
    skipped = re.findall(r"skipped=(\d+)", done.stderr) or ["0"]
    assert int(count) - int(skipped[0]) >= 8
