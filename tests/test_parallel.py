"""Several devices: each draws its own noise, and the product comes before the mean."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compilation import QUICK_PROCESS
from statistical import assert_at_most, assert_mean

FOLDER = Path(__file__).parent
ROUNDING = 1e-13  # of double precision, for sums of thousands of terms


@functools.cache
def run_on_eight_devices(script):
    """In a process of its own, because this one has one device."""
    command = [sys.executable, "-W", "error", FOLDER / script]
    env = os.environ | QUICK_PROCESS | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def facts_of(name, script="eight_devices.py"):
    done = run_on_eight_devices(script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)[name]


@pytest.mark.parametrize("map_", ["Auto", "Explicit", "unchecked", "pmap"])
def test_eight_devices_are_eight_samples_of_one(map_):
    """Value, gradient and Hessian: the mean over keys ``fold_in(key, j)`` and slices.

    With micro-batches, samples, a clip and a point mass, in double precision.
    """
    facts = facts_of("one_device")
    assert facts[map_] < ROUNDING
    assert facts["between parts"] > 0.1


def test_the_hessian_of_eight_devices_is_unbiased():
    """On a quadratic its mean is the Hessian's diagonal."""
    facts = facts_of("quadratic")
    assert_mean(facts["eight"], facts["hessian"])


def test_its_variance_is_an_eighth_of_that_of_one_device():
    """Logarithms of variances, with the errors that the fourth moments give."""
    facts = facts_of("quadratic")
    (eight, eight_error), (one, one_error) = (
        log_variance(facts[name]) for name in ("eight", "one")
    )
    error = np.hypot(eight_error, one_error)
    assert_at_most(np.abs(eight - one + np.log(8)), 5 * error)
    assert_at_most(error, 0.1)


def log_variance(draws):
    """The logarithm of the variance over axis 0, and its standard error."""
    squares = (draws - np.mean(draws, axis=0)) ** 2
    variance = squares.mean(axis=0)
    return np.log(variance), squares.std(axis=0) / variance / len(draws) ** 0.5


def test_the_product_after_the_mean_would_be_an_eighth_of_the_hessian():
    """So what is unbiased above is not that, which falls short by 7/8."""
    facts = facts_of("quadratic")
    eighth = np.asarray(facts["hessian"]) / 8
    assert_mean(facts["product too late"], eighth)
    with pytest.raises(AssertionError):
        assert_mean(facts["eight"], eighth)


@pytest.mark.parametrize("map_", ["pmap", "shard_map"])
def test_replicas_stay_identical_to_the_bit(map_):
    """After 100 steps on copies of parameters and state that nothing ties together."""
    facts = facts_of("replicas")
    assert facts[map_]["differ"] == []
    assert 0.1 < facts[map_]["moved"] < 10


HYBRID = ["Auto, 8x1", "Auto, 4x2", "Auto, 2x4", "Explicit, 4x2"]


@pytest.mark.parametrize("mesh", HYBRID)
def test_a_model_axis_leaves_the_estimate_and_shards_it(mesh):
    """Manual over data alone, each device holds the estimate of its shard."""
    facts = facts_of("hybrid")
    assert facts[mesh]["difference"] < ROUNDING
    assert facts[mesh]["floats of a device"] == facts[mesh]["shard"]


@pytest.mark.parametrize("mesh", HYBRID)
def test_a_replica_samples_its_shards_without_communication(mesh):
    """On an explicit mesh jax 0.10 gathers what enters such a map, sample or not."""
    facts = facts_of("hybrid")[mesh]
    allowed = facts["collectives of entry"] if mesh.startswith("Explicit") else []
    assert sorted(facts["collectives of sample"]) == sorted(allowed)


@pytest.mark.parametrize(
    ("mesh", "share"), [("Auto, 4x2", 2), ("Auto, 2x4", 4), ("Explicit, 4x2", 2)]
)
def test_a_replica_draws_the_noise_of_its_shard_alone(mesh, share):
    """The temporaries shrink as the shards do; whole noise would not."""
    facts = facts_of("hybrid")
    whole = facts["Auto, 8x1"]["memory of sample"]
    of_entry = facts[mesh]["memory of entry"] if mesh.startswith("Explicit") else 0
    assert facts[mesh]["memory of sample"] - of_entry < 1.01 * whole / share


@pytest.mark.parametrize("mesh", ["Auto, 4x2", "Auto, 2x4"])
def test_only_activations_cross_the_model_axis(mesh):
    """One per example there; over data, two floats for each parameter of the shard."""
    facts = facts_of("hybrid")[mesh]
    over_model, over_data = facts["rows"], 2 * facts["shard"] + 1
    expected = [["all-reduce", over_model], ["all-reduce", over_data]]
    assert sorted(facts["collectives"]) == expected


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "2x4"])
def test_training_on_one_sample_is_the_same_on_any_mesh(mesh):
    """Parameters and state after 20 steps, in double precision."""
    facts = facts_of("shared_sample")
    assert facts[mesh] < ROUNDING
    assert facts["moved"] > 0.1


def test_theta_is_the_same_to_the_bit_on_any_mesh():
    """Where the compiler's rounding of a function does not depend on the shard's shape.

    Some releases round `rsqrt` or `erf_inv` otherwise in the loop of a vector than in
    its remainder: there four units in the last place are allowed. Another draw would
    differ by millions.
    """
    facts = facts_of("theta_on_meshes")
    assert set(facts["scalar"].values()) == {0.0}
    assert_at_most(list(facts["vector"].values()), 4)
    for mesh in ("8x1", "4x2", "2x4"):
        assert facts["vector"][f"Auto, {mesh}"] == facts["vector"][f"Explicit, {mesh}"]


def test_own_noise_costs_one_all_reduce_of_two_floats_a_parameter():
    """And one for the loss and each float of aux, in one instruction."""
    facts = facts_of("communication")
    floats = 2 * facts["parameters"] + 1 + facts["aux"]
    assert facts["own noise"] == [["all-reduce", floats]]


def test_a_shared_sample_costs_one_all_reduce_of_one_float_a_parameter():
    """As without IVON."""
    facts = facts_of("communication")
    assert facts["shared noise"] == [["all-reduce", facts["parameters"] + 1]]


@pytest.mark.parametrize(("map_", "replicas"), [("shard_map", ()), ("pmap", (8,))])
def test_floating_aux_is_averaged_and_integers_stay_each_devices_own(map_, replicas):
    """So an integer that differs needs ``P("data")`` among `out_specs`."""
    facts = facts_of("aux")
    found = facts[map_]
    mean = np.broadcast_to(facts["mean"], (*replicas, len(facts["mean"])))
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-5, atol=1e-7)
    assert found["positive"] == facts["positive"]
    assert found["examples"] == np.full(replicas, facts["examples"]).tolist()


MAPS = "eight_devices_maps.py"


def test_estimates_are_the_same_within_every_map():
    """Samples, micro-batches, estimators, meshes, checks of the types, dropout keys."""
    facts = facts_of("estimates", MAPS)
    assert len(facts) == 10
    assert {name for name, found in facts.items() if not found < ROUNDING} == set()


def test_means_over_samples_are_the_same_within_a_map():
    """Predictions, the bound, the Fisher and others, of one device's examples."""
    facts = facts_of("posteriors", MAPS)
    assert len(facts) == 8
    assert {name for name, found in facts.items() if not found < ROUNDING} == set()


EVON = "eight_devices_evon.py"
in_both_kinds = pytest.mark.parametrize("kind", ["Auto", "Explicit"])


@in_both_kinds
def test_a_step_in_bases_is_that_of_one_device(kind):
    """From the same state: the sample, the mean and h, to the rounding of float32."""
    facts = facts_of(kind, EVON)
    for name in ("theta", "params", "hess"):
        assert facts[name] < 1e-4
    assert facts["types stay"]
    assert facts["sharded as parameters"]


@in_both_kinds
def test_a_sample_in_bases_gathers_each_matrix_at_most_twice(kind):
    """The noise is drawn in parts; two products turn all 2,048 entries of it."""
    gathered = sum(floats for _, floats in facts_of(kind, EVON)["of a sample"])
    assert 0 < gathered <= 2 * 2048
