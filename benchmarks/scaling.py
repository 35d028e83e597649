"""What GPT-2's training step sends, keeps and computes on 1 to 64 devices.

    python benchmarks/scaling.py               # 5 min on two CPU cores
    python benchmarks/scaling.py --full 1      # more sizes and meshes

Nothing is trained, and no array is made: the step of examples/gpt2 is compiled for
simulated CPU devices, in float32 (this backend would promote bfloat16 reductions), with
one sequence for each device of the batch, and read. The bytes of a collective are those
of its result (all-reduce, all-gather, all-to-all) or of its operand (reduce-scatter),
on one device, in one step; what stands in a loop counts as often as it runs. "ring" is
what one device sends when n of them do it in a ring: 2 (n - 1) / n of these bytes in an
all-reduce, (n - 1) / n otherwise. Units are the parameters' float32 bytes; "peak" is
arguments, new outputs and temporaries, among them this backend's activations. "6PT" is
6 x parameters x tokens.

What to see: with one sample IVON sends what AdamW sends, to the byte, on every mesh.
With a sample per replica it reduces h_hat, too, exactly as many bytes as the gradient
has on a device: 2.00 times AdamW's in data parallel, 1.45 and 1.02 times where model=4
and fsdp=16 have cut the small network's gradient before. That is beside an AdamW whose
gradient is reduced as a whole ("in shard_map"). Left to itself, XLA reduces the tied
embeddings' two gradients apart, 1.31 instead of 1 for the small network, and IVON's 2
are 1.53 times that. The FLOPs of IVON's matrix products are AdamW's; its state is as
large, too. This backend has no reduce-scatter: FSDP's gradients are all-reduced and
cut, where GPUs and TPUs send half of that.
"""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
from common import flags, gpt2, results
from common.flags import Count, Results
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tqdm import tqdm

DEFAULT = {
    "small": (
        "data=1",
        "data=8",
        "fsdp=8",
        "data=4,fsdp=2",
        "model=4",
        "data=2,model=4",
        "data=64",
        "fsdp=64",
        "data=4,fsdp=16",
        "data=16,model=4",
    ),
    "large": ("data=64", "fsdp=64", "data=4,fsdp=16", "data=16,model=4"),
}
FULL = {
    "small": ("data=2,fsdp=4", "data=32", "fsdp=32", "data=8,fsdp=4,model=2"),
    "medium": ("data=1", "data=8", "fsdp=8", "model=8", "data=64", "data=8,model=8"),
    "large": ("data=8", "fsdp=8", "data=2,model=4", "data=8,fsdp=2,model=4"),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "other")
OTHERS = ("all-to-all", "collective-permute", "collective-broadcast")
COUNTED = ("dot", *COLLECTIVES, *OTHERS)
BYTES = {
    "pred": 1,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
}
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
MESH_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\].*? \{('.*?)\}")
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of this run; each field is also a command-line flag."""

    full: int = 0  # 1: more meshes and sizes
    block: Count = 1024  # tokens in a sequence
    vocabulary: Count = 50304
    devices: Count = 64  # to simulate
    results: Results = "scaling.json"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a compiled program."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


@dataclasses.dataclass(frozen=True)
class Step:
    """What one device does in one step of a compiled program, in bytes and FLOPs."""

    parameters: int  # bytes of all of them
    sent: dict  # {kind of collective: bytes}
    ring: float
    collectives: int  # instructions
    arguments: int
    peak: int
    flops: int
    tokens: float  # of the step over all devices, a device's share


def compile_step(size, mesh_text, optimizer, noise, config):
    """Return the step's compiled program, the parameters' shapes, and the tokens."""
    mesh = create_mesh(mesh_text)
    batch_size = mesh.shape["data"] * mesh.shape["fsdp"]
    flags = dict(
        size=size,
        optimizer=optimizer,
        noise=noise,
        dtype="float32",
        batch_size=batch_size,
        microbatches=1,
        block=config.block,
    )
    run = gpt2.parse_args([f"--{name}={value}" for name, value in flags.items()])
    with jax.set_mesh(mesh):
        create = functools.partial(gpt2.GPT, run, config.vocabulary)
        network = nnx.eval_shape(lambda: create(nnx.Rngs(0)))
        graphdef, params = nnx.split(network)
        loss_fn, _ = gpt2.create_losses(graphdef)
        tx = gpt2.create_optimizer(run)
        state = params, jax.eval_shape(tx.init, params)
        shardings = gpt2.parameter_shardings(state, mesh)
        tokens = jax.ShapeDtypeStruct((batch_size, config.block + 1), jnp.int32)
        if (optimizer, noise) == ("adamw", "replica"):
            train_step = create_explicit_step(loss_fn, tx, mesh)
        else:
            train_step = gpt2.create_train_step(loss_fn, tx, run, mesh)
        step = jax.jit(
            train_step,
            donate_argnums=(0, 1),
            out_shardings=(*shardings, None),
        )
        args = (
            *jax.tree.map(abstract, state, shardings),
            abstract(tokens, NamedSharding(mesh, P(("data", "fsdp")))),
            jax.eval_shape(lambda: jax.random.key(0)),
        )
        compiled = step.lower(*args).compile()
    return compiled, params, batch_size * config.block / mesh.size


def create_explicit_step(loss_fn, tx, mesh):
    """Return AdamW's step with gradients reduced as IVON's with noise per replica are.

    Left alone, the compiler reduces the two gradients of GPT-2's embeddings, which are
    the last layer, too, and adds them up after that.
    """

    def local_grad(params, tokens):
        return jax.lax.pmean(jax.value_and_grad(loss_fn)(params, tokens), "data")

    grad_fn = jax.shard_map(
        local_grad,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
        axis_names={"data"},
        check_vma=False,  # or parameters that are the same on all sum their gradients
    )

    def train_step(params, opt_state, tokens, key):
        del key
        loss, grads = grad_fn(params, tokens)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return train_step


def create_mesh(text):
    """Return the mesh of a text such as ``data=4,fsdp=2``, of the first devices."""
    sizes = dict(pair.split("=") for pair in text.split(","))
    shape = [int(sizes.get(name, 1)) for name in gpt2.AXES]
    return jax.make_mesh(
        shape,
        gpt2.AXES,
        axis_types=(AxisType.Auto,) * len(shape),
        devices=jax.devices()[: math.prod(shape)],
    )


def abstract(x, sharding):
    """Return the shape of an array and where it would lie."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def measure(compiled, params, tokens):
    """Read a compiled program."""
    sent, ring, collectives, flops = collections.Counter(), 0.0, 0, 0
    shapes = {}
    for times, instruction in executed(compiled.as_text()):
        shapes[instruction.name] = instruction.shape
        if not times and instruction.opcode in COUNTED:
            raise ValueError(f"No one knows how often {instruction.name} runs.")
        if instruction.opcode == "dot":
            flops += times * dot_flops(instruction, shapes)
        elif instruction.opcode in (*COLLECTIVES, *OTHERS):
            kind, size, sent_in_ring = collective(instruction)
            sent[kind] += times * size
            ring += times * sent_in_ring
            collectives += 1
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Step(
        parameters=4 * sum(x.size for x in jax.tree.leaves(params)),
        sent=dict(sent),
        ring=ring,
        collectives=collectives,
        arguments=arguments,
        peak=arguments + new + memory.temp_size_in_bytes,
        flops=flops,
        tokens=tokens,
    )


def executed(text):
    """Yield (how often it runs, instruction) of all that a program calls.

    It is zero times in a loop that the compiler could not count.
    """
    computations, entry = parse(text)

    def walk(name, times):
        for instruction in computations[name]:
            yield times, instruction
            inner = times
            if instruction.opcode == "while":
                [count] = TRIP_COUNT.findall(instruction.rest) or [0]
                inner = times * int(count)
            for called in CALLED.findall(instruction.rest):
                yield from walk(called, inner)

    return walk(entry, 1)


def parse(text):
    """Return {name of computation: its instructions}, and the name of the first."""
    computations, entry = {}, None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            first, _, rest = line.partition(" ")
            name = (rest.split(" ")[0] if first == "ENTRY" else first).lstrip("%")
            entry = name if first == "ENTRY" else entry
            computations[name] = []
        elif match := INSTRUCTION.match(line):
            computations[name].append(Instruction(*match.groups()))
    return computations, entry


def arrays(shape):
    """Return [(bytes of a number, dimensions)] of an array's shape or a tuple's."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return [
        (BYTES[dtype], [int(d) for d in dims.split(",") if d]) for dtype, dims in found
    ]


def collective(instruction):
    """Return kind, bytes, and bytes sent in a ring."""
    size = sum(width * math.prod(dims) for width, dims in arrays(instruction.shape))
    n = group_size(instruction.rest)
    kind = "other" if instruction.opcode in OTHERS else instruction.opcode
    if kind == "reduce-scatter":
        size *= n
    return kind, size, size * (2 if kind == "all-reduce" else 1) * (1 - 1 / n)


def group_size(attributes):
    """Return how many devices take part in a collective with each other.

    XLA writes groups as lists, as ``[groups, size]``, or as axes of a mesh.
    """
    if "source_target_pairs" in attributes:
        return math.inf  # each sends all it has
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    mesh, axes = MESH_GROUPS.search(attributes).groups()
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes)  # an axis or a part of it
    return math.prod(int(part or sizes[axis]) for axis, part in parts)


def dot_flops(instruction, shapes):
    """Return two for each product of a matrix multiplication.

    The compiler's own `cost_analysis` counts a loop's body once: of GPT-2 small, whose
    layers are a loop, it sees 0.39 of 6 x parameters x tokens (6PT). With the loops'
    counts it is 1.145, and should be: 6PT without the position embeddings, which are
    only added, plus 12 x layers x width x block for each token's attention.
    """
    [(_, result)] = arrays(instruction.shape)
    left = re.match(r".*?%([\w.-]+)", instruction.rest)[1]
    [(_, dims)] = arrays(shapes[left])
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
    return 2 * math.prod(result) * math.prod(dims[int(i)] for i in axes.split(","))


def measure_all(config):
    """Return {(size, mesh, optimizer, noise): Step}."""
    meshes = {size: [*DEFAULT.get(size, ())] for size in FULL}
    if config.full:
        meshes = {size: [*first, *FULL[size]] for size, first in meshes.items()}
    cases = [
        (size, mesh, optimizer, noise)
        for size, texts in meshes.items()
        for mesh in texts
        for noise in (("shared", "replica") if replicated(mesh) else ("shared",))
        for optimizer in ("adamw", "ivon")
    ]
    progress = tqdm(cases)
    steps = {}
    for case in progress:
        progress.set_postfix_str(" ".join(case))
        steps[case] = measure(*compile_step(*case, config))
    return steps


def replicated(mesh):
    """Tell whether there are several replicas to draw noise of their own."""
    return "data=" in mesh and "data=1," not in f"{mesh},"


def traffic(steps):
    """Yield what is sent; the last columns compare IVON with the AdamW right above."""
    for (size, mesh, optimizer, noise), step in steps.items():
        row = {"network": size, "mesh": mesh, "optimizer": label(optimizer, noise)}
        row |= {kind: units(step.sent.get(kind, 0), step) for kind in COLLECTIVES}
        row |= {"instructions": step.collectives, "ring": units(step.ring, step)}
        row["bytes / AdamW"] = ratio(step, steps[size, mesh, "adamw", "shared"])
        if optimizer == "ivon":
            above = steps[size, mesh, "adamw", noise]
            row["/ row above"] = ratio(step, above)
            row["bytes more"] = sum(step.sent.values()) - sum(above.sent.values())
        yield row


def ratio(step, baseline):
    """Return how many times as much is sent."""
    theirs = sum(baseline.sent.values())
    return sum(step.sent.values()) / theirs if theirs else None


def memory(steps):
    """Yield what is kept and computed."""
    for (size, mesh, optimizer, noise), step in steps.items():
        row = {"network": size, "mesh": mesh, "optimizer": label(optimizer, noise)}
        row["arguments"] = step.arguments / step.parameters
        row |= {"peak": units(step.peak, step), "peak, bytes": step.peak}
        ideal = 6 * step.parameters / 4 * step.tokens
        yield row | {"GFLOP": step.flops / 1e9, "/ 6PT": step.flops / ideal}


def units(size, step):
    """Return bytes as a multiple of the parameters'."""
    return size / step.parameters


def label(optimizer, noise):
    """Name a row's optimizer."""
    names = {
        ("adamw", "shared"): "AdamW",
        ("adamw", "replica"): "AdamW, in shard_map",
        ("ivon", "shared"): "IVON, one sample",
        ("ivon", "replica"): "IVON, a sample per replica",
    }
    return names[optimizer, noise]


def main():
    """Compile all, and keep both tables."""
    config = flags.parse(Config, __doc__)
    jax.config.update("jax_num_cpu_devices", config.devices)
    study, steps = results.Study(config), measure_all(config)
    digits = dict.fromkeys((*COLLECTIVES, "ring", "peak"), 3) | {"GFLOP": 1}
    digits |= dict.fromkeys(("bytes / AdamW", "/ row above", "arguments", "/ 6PT"), 4)
    study.table("traffic", traffic(steps), digits)
    study.table("memory", memory(steps), digits)


if __name__ == "__main__":
    main()
