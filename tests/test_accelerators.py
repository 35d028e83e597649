"""What the compilers of TPUs and GPUs make of GPT-2's step: make accelerators."""

import functools
import importlib.util
import re
import textwrap

import accelerators
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accelerators import Case, Config
from common import programs
from jax.sharding import AxisType, PartitionSpec as P, SingleDeviceSharding

from ivon_jax._arrays.noise import normal

# Integers as many as the embeddings or a kernel of the small GPT-2.
WEIGHTS = re.compile(r"u32\[(50304,768|12,(768,3072|3072,768|768,3,12,64))\]")
SHARED, REPLICA = list(accelerators.SYSTEMS)[1:]
# Of a step of GPT-2 124M: memory / AdamW's, cycles / AdamW's, buffers more. None is
# what the compiler does not say.
V5E, H100 = Case("v5e:2x2", "data=4"), Case("h100:1", batch=8)
V5E_PARTS = Case("v5e:2x2", "data=4", batch=8, microbatches=2)
H100_PARTS = Case("h100:1", batch=8, microbatches=2)
V5E_POD = Case("v5e:8x8", **accelerators.POD)
BOUNDS = [
    (V5E, SHARED, {"GiB / AdamW": 1.0, "Mcycles / AdamW": 1.01}),
    (V5E, REPLICA, {"GiB / AdamW": 1.0, "Mcycles / AdamW": 1.01}),
    (V5E_PARTS, SHARED, {"more": 1.75}),
    (H100, SHARED, {"GiB / AdamW": 1.0005}),
    (H100_PARTS, SHARED, {"more": 1.6}),
    (V5E_POD, SHARED, {"GiB / AdamW": 1.02, "Mcycles / AdamW": 1.01}),
    (V5E_POD, REPLICA, {"GiB / AdamW": 1.02}),
]

PROGRAM = textwrap.dedent("""
    HloModule jit_step

    %condition (p: (s32[], f32[8])) -> pred[] {
      %p = (s32[], f32[8]) parameter(0)
      %i = s32[] get-tuple-element(%p), index=0
      %n = s32[]{:T(128)} constant(12)
      ROOT %lt = pred[] compare(%i, %n), direction=LT
    }

    %body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
      %p = (s32[], f32[8]) parameter(0)
      %x = f32[8] get-tuple-element(%p), index=1
      %g = bf16[64]{0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
      %f = f32[8] fusion(%x), calls=%c, backend_config={"estimated_cycles":"100"}
      ROOT %t = (s32[], f32[8]) tuple(%i, %f)
    }

    ENTRY %main (x: f32[8]) -> f32[8] {
      %x = f32[8]{0} parameter(0)
      %w = (s32[], f32[8]) while(%x), condition=%condition, body=%body
      %r = f32[16]{0} all-reduce-start(%x), replica_groups={{0,1},{2,3}}
      %d = f32[16]{0} all-reduce-done(%r)
      ROOT %y = f32[8] fusion(%w), calls=%c, backend_config={"estimated_cycles":"7"}
    }
    """)


class Compiled:
    """A compiled program as a text."""

    def __init__(self, text):
        self._text = text

    def as_text(self):
        return self._text

    def memory_analysis(self):
        class Memory:
            argument_size_in_bytes, output_size_in_bytes = 10, 5
            alias_size_in_bytes, temp_size_in_bytes = 4, 100

        return Memory


def test_what_stands_in_a_loop_counts_as_often_as_it_runs():
    program = programs.read(Compiled(PROGRAM))
    assert program.cycles == 12 * 100 + 7
    assert program.sent == {"all-gather": 12 * 128, "all-reduce": 64}
    assert program.ring == 12 * 128 * 3 / 4 + 64 * 2 / 2
    assert program.overlapped == 64
    assert program.peak == 111


def test_what_is_within_a_fusion_is_not_stored():
    text = PROGRAM.replace(
        "ENTRY", "%c (x: f32[8]) -> f32[8] {\n  ROOT %bits = u32[8] iota()\n}\n\nENTRY"
    )
    names = {instruction.name for instruction in programs.stored(text)}
    assert {"g", "f", "lt", "y"} < names
    assert "bits" not in names


def test_a_loop_that_nobody_can_count_is_an_error():
    text = PROGRAM.replace("constant(12)", "custom-call()")
    with pytest.raises(ValueError, match="No one knows how often g runs"):
        programs.read(Compiled(text))


def test_products_in_loops_and_on_devices_are_counted():
    """Two (4, 3) x (3, 5) for each of eight rows of a batch, then a convolution."""

    def body(x, w):
        def step(total, row):
            return total + row @ w @ w.T, None

        return jax.lax.scan(step, jnp.zeros((4, 3)), x)[0]

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P("data"), P()), "out_specs": P(), "check_vma": False}
    mapped = jax.shard_map(body, mesh=mesh, **specs)

    def program(x, w, image, kernel):
        convolved = jax.lax.conv(image, kernel, (1, 1), "SAME")
        return jnp.sum(mapped(x, w)) + jnp.sum(convolved)

    shapes = (8, 4, 3), (3, 5), (1, 2, 6, 6), (7, 2, 3, 3)
    jaxpr = jax.make_jaxpr(program)(*map(jnp.ones, shapes))
    convolution = 2 * (7 * 6 * 6) * (2 * 3 * 3)
    expected = 8 * 2 * (2 * 4 * 3 * 5) + convolution
    assert accelerators.matrix_flop(jaxpr.jaxpr) == expected


def test_words_that_no_row_has_are_refused():
    with pytest.raises(SystemExit, match="v5e:2x2 data=4 small bfloat16"):
        accelerators.selected(Config(only="v5e gpt9"))
    assert len(accelerators.selected(Config(only="h100 8 in 2"))) == 2


def test_a_missing_compiler_is_named(monkeypatch):
    accelerators.topology.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=r"h100:1 needs the compiler .*accelerators"):
        accelerators.topology("h100:1")


def installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def with_compilers(test):
    """Run only where both compilers are, as a user's program."""
    skip = pytest.mark.skipif(
        not all(map(installed, accelerators.NEEDED.values())),
        reason="needs the extra `accelerators`",
    )
    names = "optimized", "implicit_ranks", "standard_promotion"
    test = pytest.mark.usefixtures(*names)(skip(test))
    return pytest.mark.filterwarnings("ignore")(test)


@with_compilers
@pytest.mark.parametrize("chip", ["v5e:2x2", "h100:1"])
@pytest.mark.parametrize("size", [64, 70_000])
def test_what_is_broadcast_is_drawn_once(chip, size):
    """No fusion that makes the activations has a hash, which it would have for each."""
    shape = 512, size

    def network(key, x):
        scale_key, bias_key = jax.random.split(key)
        scale, bias = (normal(k, (size,), jnp.float32) for k in (scale_key, bias_key))
        return jax.nn.relu(x * scale + bias)

    device = np.ravel(accelerators.topology(chip).devices)[0]
    here = SingleDeviceSharding(device)
    args = (
        accelerators.abstract(jax.eval_shape(lambda: jax.random.key(0)), here),
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=here),
    )
    text = jax.jit(network).lower(*args).compile().as_text()
    *computations, _ = re.split(r"\n(?=%|ENTRY)", text)
    fused = [c for c in computations if f"f32[512,{size}]" in c]
    assert fused
    assert max(c.count("shift-left(") for c in fused) == 0


@with_compilers
@pytest.mark.parametrize(("case", "system", "bounds"), BOUNDS, ids=str)
def test_step_keeps_within_its_bounds(case, system, bounds):
    """Both compilers fuse the noise into theta: no array of bits is in memory."""
    ours, adamw = program(case, system), program(case, "AdamW")
    numbers = (accelerators.numbers(case, *x) for x in (ours, adamw))
    row = accelerators.record(case, system, *numbers)
    for name, bound in bounds.items():
        assert row[name] <= bound, row
    words = [
        instruction
        for instruction in programs.stored(ours[0].as_text())
        if WEIGHTS.match(instruction.shape)
    ]
    assert words == []


@functools.cache
def program(case, system):
    return accelerators.compile_step(case, system, Config())
