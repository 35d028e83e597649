"""Read a compiled program: memory, collectives, and the compiler's own cycles.

What stands in a loop counts as often as it runs. The bytes of a collective are those of
its result (all-reduce, all-gather, all-to-all) or of its operand (reduce-scatter), on
one device. "ring" is what one device sends when n of them do it in a ring:
2 (n - 1) / n of these bytes in an all-reduce, (n - 1) / n otherwise.
"""

import collections
import dataclasses
import math
import re

COLLECTIVES = "all-reduce", "all-gather", "reduce-scatter", "other"
OTHERS = "all-to-all", "collective-permute", "collective-broadcast"
BITS = {"pred": 8, "token": 0}  # of others the number at the end
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
CONDITION = re.compile(r"condition=%?([\w.-]+)")
MESH_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\].*? \{('.*?)\}")
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
INTEGER = re.compile(r"constant [su]32\[\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a compiled program."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


@dataclasses.dataclass(frozen=True)
class Program:
    """What one device holds and does in one step."""

    peak: int  # bytes: arguments, new outputs and temporaries
    sent: dict  # {kind of collective: bytes}
    ring: float  # bytes
    overlapped: int  # bytes of collectives that begin and end apart
    cycles: int  # as the compiler estimates them; 0 if it doesn't


def read(compiled):
    """Return the Program of what jax compiled."""
    sent, overlapped, ring, cycles = collections.Counter(), 0, 0.0, 0
    for times, instruction in executed(compiled.as_text()):
        if found := CYCLES.search(instruction.rest):
            cycles += times * int(found[1])
        opcode = instruction.opcode.removesuffix("-start")
        if opcode not in (*COLLECTIVES, *OTHERS):
            continue
        if not times:
            raise ValueError(f"No one knows how often {instruction.name} runs.")
        apart = opcode != instruction.opcode
        kind, size, sent_in_ring = collective(opcode, apart, instruction)
        sent[kind] += times * size
        overlapped += times * size * apart
        ring += times * sent_in_ring
    return Program(peak_memory(compiled), dict(sent), ring, overlapped, cycles)


def peak_memory(compiled):
    """Return the bytes of arguments, new outputs and temporaries."""
    used = compiled.memory_analysis()
    peak = used.argument_size_in_bytes + used.temp_size_in_bytes
    return peak + used.output_size_in_bytes - used.alias_size_in_bytes


def stored(text):
    """Yield the instructions whose result is in memory: not those within a fusion."""
    computations, _ = parse(text)
    instructions = [i for body in computations.values() for i in body]
    within = {
        name
        for i in instructions
        if i.opcode == "fusion"
        for name in CALLED.findall(i.rest)
    }
    for name, body in computations.items():
        if name not in within:
            yield from body


def executed(text):
    """Yield (how often it runs, instruction) of all that a program calls.

    It is zero times in a loop that nobody could count.
    """
    computations, entry = parse(text)

    def walk(name, times):
        for instruction in computations.get(name, []):
            yield times, instruction
            inner = times
            if instruction.opcode == "while":
                inner = times * trip_count(instruction, computations)
            for called in CALLED.findall(instruction.rest):
                yield from walk(called, inner)

    return walk(entry, 1)


def trip_count(loop, computations):
    """Return what the compiler says, or where the loop's condition ends it."""
    if found := TRIP_COUNT.search(loop.rest):
        return int(found[1])
    condition = computations[CONDITION.search(loop.rest)[1]]
    ends = [i.rest for i in condition if INTEGER.match(f"{i.opcode} {i.shape}")]
    return int(ends[0].partition(")")[0]) if len(ends) == 1 else 0


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
    """Return [bytes] of an array's shape or of a tuple's."""
    found = re.findall(r"([a-z]+(\d*))\w*\[([\d,]*)\]", shape)
    return [
        BITS.get(dtype, int(bits or 0))
        * math.prod(int(d) for d in dims.split(",") if d)
        // 8
        for dtype, bits, dims in found
    ]


def collective(opcode, apart, instruction):
    """Return kind, bytes, and bytes sent in a ring."""
    sizes = arrays(instruction.shape)
    size, n = sum(sizes), group_size(instruction.rest)
    kind = "other" if opcode in OTHERS else opcode
    if apart and kind != "all-reduce":  # its shape has the operands, too
        size = sum(sizes[len(sizes) // 2 :]) if len(sizes) > 1 else size
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
