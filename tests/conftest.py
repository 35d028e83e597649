"""A strict session: no implicit promotion, fixed seeds, double precision on demand."""

import functools
import gc
import os

import compilation
import jax
import numpy as np
import pytest

compilation.quicken()
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Where tests run side by side, threads of factorisations wait for each other for ever.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Tracing makes many small objects, among which by default garbage is sought too often.
gc.set_threshold(200_000, 20, 100)


# Whole files: processes of their own, eight devices, whole runs, scripts.
SLOW = {
    *("test_gpt2", "test_parallel", "test_resnet20", "test_resume", "test_studies"),
    *("test_benchmarks", "test_examples", "test_pages", "test_saving"),
    *("test_linear_regression", "test_settings", "test_trainers", "test_tuning"),
    *("test_minilm", "test_zoo"),
}


def pytest_collection_modifyitems(items):
    """Mark what `make test-fast` leaves out, and begin with it.

    The files go to the cores in this order: a long one at the end would keep one alone.
    """
    items.sort(key=lambda item: item.path.stem not in SLOW)
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")


def pytest_collection_finish():
    """Leave what was imported alone: it stays."""
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc):
    """Three random keys for what holds of draws on average, one for the rest."""
    marks = metafunc.definition.iter_markers("parametrize")
    if "key" in metafunc.fixturenames and all("key" not in m.args[0] for m in marks):
        statistical = metafunc.definition.get_closest_marker("statistical")
        seeds = (0, 1, 2) if statistical else (1,)
        ids = "seed={}".format
        metafunc.parametrize("key", seeds, ids=ids, indirect=True)


@pytest.fixture
def key(request):
    return jax.random.key(request.param)


@pytest.fixture(scope="session", autouse=True)
def nan_equals_nothing():
    """To NumPy, and to Chex which asks it, NaN equals NaN: two wrong results agree."""

    def strict(compare):
        @functools.wraps(compare)
        def without_nan(actual, desired, *args, **kwargs):
            for array in map(np.asarray, (actual, desired)):
                # NaN alone differs from itself, in any dtype.
                assert np.all(array == array), f"NaN in {array}"
            compare(actual, desired, *args, **kwargs)

        return without_nan

    with pytest.MonkeyPatch.context() as patch:
        for name in ("assert_allclose", "assert_array_equal"):
            patch.setattr(np.testing, name, strict(getattr(np.testing, name)))
        yield


@pytest.fixture(scope="module", autouse=True)
def release_programs():
    """Of all modules together, compiled programs would take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def optimized():
    """For whole runs, which take longer than to compile them."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def standard_promotion():
    """For optax's own transformations that are not written for strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def implicit_ranks():
    """For Flax's layers, which broadcast implicitly."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x64():
    """Run one test in double precision."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
