"""GPT-2's and ResNet's training steps as the compilers of TPUs and GPUs see them.

    pip install -e ".[accelerators]"             # the compilers; no chip is needed
    python benchmarks/accelerators.py            # 40 min on two CPU cores
    python benchmarks/accelerators.py --only "v5e:2x2 small"    # rows with these words

Nothing runs and no array is made: the step of examples/gpt2 (or of resnet20.py) is
compiled for the devices of a slice or pod, and the program is read. Memory is that of
one device: arguments, new outputs and temporaries; "more" is beyond AdamW's, in float32
buffers as large as a device's share of the parameters. "Mcycles" are the TPU compiler's
own estimate of a step, with loops counted as often as they run; it leaves out what
collectives take. "sent" is the bytes of all collectives, and "overlapped" the share of
them that begins and ends apart. "FLOP" is two for each product of a matrix
multiplication or convolution, of the step before any compiler, on one device. "bytes"
is what operations read and write, with the body of a loop counted once.

What to see: with one sample for all replicas, in bfloat16 and on a batch in one piece,
IVON has AdamW's memory, and in data parallel its traffic to the byte. A sample per
replica reduces h_hat, too. Micro-batches keep theta and a sum of h_hat.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import resnet20
from common import flags, gpt2, programs, results
from common.flags import Count, Results
from flax import nnx
from jax.experimental import topologies
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from tqdm import tqdm
from zoo.resnet import ResNet

import ivon_jax

H100 = pathlib.Path(__file__).parent / "common" / "h100.txt"
NEEDED = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda12"}
# The TPU's library looks for chips, and lets one process have them, unless told.
NO_CHIP = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    only: str = ""  # words that a row's chip, mesh, network and dtype must have
    block: Count = 1024  # tokens in a sequence
    vocabulary: Count = 50304
    results: Results = "accelerators.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """A step for some devices."""

    chip: str  # such as v5e:2x2, or h100:8 for the number of devices
    mesh: str = "data=1"
    network: str = "small"  # a size of GPT-2, or resnet20, resnet50
    dtype: str = "bfloat16"
    batch: int = 4  # sequences or images for each device of the batch
    microbatches: int = 1
    samples: int = 1
    remat: int = 0
    keys: str = "threefry2x32"

    @property
    def label(self):
        """What it is, in words."""
        batch = f"{self.batch}" + f" in {self.microbatches}" * (self.microbatches > 1)
        network = f"{self.network}{', remat' * self.remat}"
        row = {"chip": self.chip, "mesh": self.mesh, "network": network}
        row |= {"dtype": self.dtype, "batch": batch}
        return row | {"samples": self.samples, "keys": self.keys}

    @property
    def sizes(self):
        """The mesh's axes, those of size one left out."""
        return {k: int(n) for k, n in (x.split("=") for x in self.mesh.split(","))}

    @property
    def replicas(self):
        """How many devices may have samples of their own."""
        return self.sizes.get("data", 1)


POD = dict(mesh="data=8,fsdp=8", network="large", remat=1)
CASES = (
    Case("v5e:2x2", "data=4"),
    Case("v5e:4x4", "data=16"),
    Case("v5e:2x2", "data=4", batch=8, microbatches=2),
    Case("v5e:8x8", **POD),
    Case("h100:1", batch=8),
    Case("h100:1", batch=8, microbatches=2),
    Case("h100:1", batch=8, samples=2),
    Case("h100:1", batch=8, dtype="float32"),
    Case("h100:1", batch=8, dtype="float32", microbatches=2),
    Case("h100:8", "data=8", network="large", remat=1),
    Case("h100:64", **POD),
    Case("v5e:2x2", "data=4", dtype="float32"),
    Case("v5e:2x2", "data=4", keys="rbg"),
    Case("v5p:2x2x1", "data=4"),
    Case("v6e:2x2", "data=4"),
    Case("v5e:2x2", "fsdp=4"),
    Case("v5e:2x2", "model=4"),
    Case("v5e:2x2", "data=4", samples=2),
    Case("h100:1", network="resnet20", dtype="float32", batch=128),
    Case("h100:1", network="resnet50", dtype="float32", batch=128),
)
SYSTEMS = {
    "AdamW": ("adamw", "shared"),
    "IVON, one sample": ("ivon", "shared"),
    "IVON, a sample per replica": ("ivon", "replica"),
}
DIGITS = {"GiB": 3, "GiB / AdamW": 3, "more": 2, "Mcycles": 2, "Mcycles / AdamW": 3}
DIGITS |= {
    "sent, MB": 1,
    "sent / AdamW": 2,
    "overlapped": 2,
    "TFLOP": 3,
    "bytes, GB": 1,
}


def platform(chip):
    """Return jax's name of it."""
    return "cuda" if chip.startswith("h100") else "tpu"


@functools.cache
def topology(chip):
    """Return the devices that a compiler knows, without one of them being here."""
    needed, size = NEEDED[platform(chip)], chip.partition(":")[2]
    if importlib.util.find_spec(needed) is None:
        raise SystemExit(
            f"{chip} needs the compiler {needed}. Install it with "
            'pip install -e ".[accelerators]"'
        )
    if platform(chip) == "tpu":
        for name, value in NO_CHIP.items():
            os.environ.setdefault(name, value)
        return topologies.get_topology_desc(chip, "tpu")
    hosts, each = max(1, int(size) // 8), min(8, int(size))
    return topologies.get_topology_desc(
        "h100",
        "cuda",
        topology=f"1x{hosts}x{each}",
        target_config=H100.read_text(),
    )


def create_mesh(case):
    """Return the mesh of a case, of devices that are not here."""
    shape = [case.sizes.get(name, 1) for name in gpt2.AXES]
    found, count = topology(case.chip), math.prod(shape)
    if platform(case.chip) == "cuda":
        devices = np.array(found.devices[:count]).reshape(shape)
    else:
        devices = topologies.make_mesh(found, shape, gpt2.AXES).devices
    return Mesh(devices, gpt2.AXES, axis_types=(AxisType.Auto,) * len(shape))


def compile_step(case, system, config):
    """Return the compiled step, its parameters' shapes, and a device's FLOPs."""
    mesh = create_mesh(case)
    create = resnet_step if case.network.startswith("resnet") else gpt2_step
    with jax.set_mesh(mesh):
        step, state, batch = create(case, system, mesh, config)
        everywhere = NamedSharding(mesh, P())
        shardings = gpt2.parameter_shardings(state, mesh)
        key = jax.eval_shape(lambda: jax.random.key(0, impl=case.keys))
        split = NamedSharding(mesh, P(("data", "fsdp")))
        args = (
            *jax.tree.map(abstract, state, shardings),
            *(abstract(x, split) for x in batch),
            abstract(key, everywhere),
        )
        step = jax.jit(
            step,
            donate_argnums=(0, 1),
            out_shardings=(*shardings, None),
            compiler_options=gpt2.compiler_options(platform(case.chip)),
        )
        traced = step.trace(*args)
        flop = matrix_flop(traced.jaxpr) / mesh.size
        return traced.lower().compile(), state[0], flop


def abstract(x, sharding):
    """Return the shape of an array and where it would lie."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def gpt2_step(case, system, mesh, config):
    """Return the step of examples/gpt2, and the shapes of its state and batch."""
    optimizer, noise = SYSTEMS[system]
    size = case.batch * mesh.shape["data"] * mesh.shape["fsdp"]
    names = dict(size=case.network, optimizer=optimizer, noise=noise, batch_size=size)
    names |= dict(dtype=case.dtype, microbatches=case.microbatches, remat=case.remat)
    names |= dict(block=config.block, mc_samples=case.samples)
    run = gpt2.parse_args([f"--{name}={value}" for name, value in names.items()])
    network = nnx.eval_shape(lambda: gpt2.GPT(run, config.vocabulary, nnx.Rngs(0)))
    graphdef, params = nnx.split(network)
    loss_fn, _ = gpt2.create_losses(graphdef)
    tx = gpt2.create_optimizer(run)
    tokens = jax.ShapeDtypeStruct((size, config.block + 1), jnp.int32)
    step = gpt2.create_train_step(loss_fn, tx, run, mesh)
    return step, (params, jax.eval_shape(tx.init, params)), [tokens]


def resnet_step(case, system, mesh, config):
    """Return the step of a ResNet with filter response normalisation, on one device."""
    del mesh, config
    depth = int(case.network.removeprefix("resnet"))
    model = nnx.eval_shape(lambda: ResNet(depth, 16, 10, nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    is_ivon = system != "AdamW"
    tx = ivon_jax.ivon(0.2, ess=50_000) if is_ivon else optax.adamw(1e-3)

    def loss_fn(params, images, labels):
        return resnet20.loss_fn(nnx.merge(graphdef, params), images, labels)

    def step(params, opt_state, images, labels, key):
        if is_ivon:
            grad_fn = ivon_jax.value_and_grad(loss_fn)
            loss, estimate = grad_fn(key, params, opt_state, images, labels)
            updates, opt_state = estimate.update(tx, opt_state, params)
        else:
            loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
            updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    images = jax.ShapeDtypeStruct((case.batch, 32, 32, 3), jnp.uint8)
    labels = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    return step, (params, jax.eval_shape(tx.init, params)), [images, labels]


def matrix_flop(jaxpr):
    """Count two for each product of a matrix multiplication or convolution."""
    total = 0
    for equation in jaxpr.eqns:
        times = repetitions(equation)
        for value in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(value):
                inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
                total += times * matrix_flop(inner)
        total += products(equation)
    return total


def repetitions(equation):
    """Return how often the programs within an instruction run, over all devices."""
    match equation.primitive.name:
        case "scan":
            return equation.params["length"]
        case "shard_map":
            params = equation.params  # the axes have another name in later versions
            axes = params.get("manual_axes") or params["newly_manual_axes"]
            return math.prod(params["mesh"].shape[axis] for axis in axes)
    return 1


def is_jaxpr(value):
    """Tell a program within an instruction."""
    return isinstance(value, ClosedJaxpr | Jaxpr)


def products(equation):
    """Return twice the products of one instruction."""
    if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
        return 0
    left, right = (x.aval.shape for x in equation.invars)
    dimensions = equation.params["dimension_numbers"]
    if equation.primitive.name == "dot_general":
        each = math.prod(left[axis] for axis in dimensions[0][0])
    else:
        each = math.prod(right) // right[dimensions.rhs_spec[0]]
    return 2 * math.prod(equation.outvars[0].aval.shape) * each


def numbers(case, compiled, params, flop):
    """Return what a row says of one program."""
    program = programs.read(compiled)
    sent = sum(program.sent.values())
    cost, devices = compiled.cost_analysis() or {}, math.prod(case.sizes.values())
    return {
        "GiB": program.peak / 2**30,
        "Mcycles": program.cycles / 1e6 or None,
        "sent, MB": sent / 1e6,
        "overlapped": program.overlapped / sent if sent else None,
        "TFLOP": flop / 1e12,
        "bytes, GB": cost.get("bytes accessed", 0) / 1e9 or None,
        "share": 4 * optax.tree.size(params) * case.replicas / devices / 2**30,
    }


def compare(case, config, bar):
    """Return a record of each system, AdamW's first."""
    rows, first = [], None
    for system in SYSTEMS:
        if system.endswith("replica") and case.replicas == 1:
            bar.update()
            continue
        bar.set_postfix_str(f"{case.chip} {case.network} {system}")
        found = numbers(case, *compile_step(case, system, config))
        first = first or found
        rows.append(record(case, system, found, first))
        bar.update()
    return rows


def record(case, system, found, adamw):
    """Return the row of what was `found` of a system, beside AdamW's."""
    row = case.label | {"system": system, "GiB": found["GiB"]}
    row["GiB / AdamW"] = found["GiB"] / adamw["GiB"]
    row["more"] = (found["GiB"] - adamw["GiB"]) / found["share"]
    row["Mcycles"] = found["Mcycles"]
    row["Mcycles / AdamW"] = ratio(found["Mcycles"], adamw["Mcycles"])
    row["sent, MB"] = found["sent, MB"]
    row["sent / AdamW"] = ratio(found["sent, MB"], adamw["sent, MB"])
    return row | {name: found[name] for name in ("overlapped", "TFLOP", "bytes, GB")}


def ratio(value, baseline):
    """Return None where there is nothing to compare."""
    return value / baseline if baseline else None


def selected(config):
    """Return the cases that have all words of `--only`."""
    words = config.only.split()
    labels = {case: " ".join(map(str, case.label.values())) for case in CASES}
    found = [case for case, label in labels.items() if all(w in label for w in words)]
    if not found:
        known = "\n".join(sorted(labels.values()))
        raise SystemExit(f"`--only` must be words of one of these:\n{known}")
    return found


def main():
    """Compile all, and keep each case as it comes."""
    jax.config.update("jax_platforms", "cpu")
    jax.devices()  # finds the plugins of the compilers
    config = flags.parse(Config, __doc__)
    cases = selected(config)
    for case in cases:
        topology(case.chip)  # a missing compiler is better known now
    study, rows = results.Study(config), []
    with tqdm(total=len(SYSTEMS) * len(cases), unit="program") as bar:
        for case in cases:
            rows += compare(case, config, bar)
            study.table("step", rows, DIGITS)


if __name__ == "__main__":
    main()
