"""The rooms of the package, a module or folder each, stand on floors.

    python tests/test_rooms.py

prints them: each room on the lowest floor above all that it imports.
"""

import ast
import pathlib
import re
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "ivon_jax"
HIGHEST = 7
# From the ground up; docs/design.md says what each is for.
FLOORS = [
    {"_update_rules", "_arrays", "_checks"},
    {"_distributions"},
    {"_evaluation", "_optimizer", "settings"},
    {
        *("predictive", "calibration", "tuning"),
        *("sensitivity", "merging", "pruning"),
        *("metrics", "diagnostics", "flax"),
    },
]


def imports(source, path):
    """Yield what a module imports, as absolute names: ``ivon_jax._arrays.dtypes``.

    `path` is the module's, with the package in it: ``ivon_jax/_arrays/loops.py``.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Of a module, level 1 is its folder; so it is of a folder's __init__.
            base = path.parent.parts[: len(path.parent.parts) - node.level + 1]
            origin = [*(base if node.level else ()), *(node.module or "").split(".")]
            origin = ".".join(filter(None, origin))
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def modules():
    """Map each module's path to its source."""
    paths = PACKAGE.rglob("*.py")
    return {path.relative_to(PACKAGE.parent): path.read_text() for path in paths}


def room_of(path):
    """Return the room of a module, None for the front door, ``ivon_jax/__init__``."""
    room = path.parts[1].removesuffix(".py")
    return None if room == "__init__" else room


def arrows(modules):
    """Map each room to the others that it imports from."""
    rooms = {room: set() for room in map(room_of, modules) if room}
    for path, source in modules.items():
        for name in imports(source, path):
            package, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if package == "ivon_jax" and room_of(path) not in (None, target):
                assert target in rooms, f"{path} imports {name}, of the front door"
                rooms[room_of(path)].add(target)
    return rooms


def floors(arrows):
    """Return the rooms of each floor, from the ground up; a circle has none."""
    placed, found = set(), []
    while placed != arrows.keys():
        floor = {r for r in arrows.keys() - placed if arrows[r] <= placed}
        if not floor:
            raise ValueError(f"A circle: {sorted(arrows.keys() - placed)}")
        found.append(floor)
        placed |= floor
    return found


def test_every_room_stands_above_what_it_imports():
    """A new arrow up, or a new room, is a decision: draw it in FLOORS and the docs."""
    assert floors(arrows(modules())) == FLOORS
    assert len(FLOORS) <= HIGHEST


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md"])
def test_pages_show_these_floors(page):
    text = (PACKAGE.parent / page).read_text()
    lines = re.findall(r"^(\d)   (\S.*)$", text, re.MULTILINE)
    for (number, line), floor in zip(lines, reversed(FLOORS), strict=True):
        assert number == str(FLOORS.index(floor))
        assert set(re.findall(r"(\w+)(?:\.py|/)", line)) == floor


def test_flax_is_imported_in_one_room_alone():
    users = {
        room_of(path)
        for path, source in modules().items()
        for name in imports(source, path)
        if name.split(".")[0] == "flax" or name.startswith("ivon_jax.flax")
    }
    assert users == {"flax"}


def test_the_core_imports_jax_optax_and_the_standard_library():
    """NumPy comes with jax; tqdm and Flax are asked for where they are wanted."""
    found = {n.split(".")[0] for p, s in modules().items() for n in imports(s, p)}
    outside = found - set(sys.stdlib_module_names)
    assert outside == {"ivon_jax", "jax", "optax", "numpy", "flax", "tqdm"}


@pytest.mark.parametrize("folder", sorted(p.name for p in PACKAGE.glob("*/")))
def test_modules_of_a_room_make_no_circle(folder):
    """Its ``__init__`` imports them and is imported by none of them."""
    found = {p: s for p, s in modules().items() if p.parts[1] == folder}
    names = {".".join(path.with_suffix("").parts): path for path in found}
    inner = {name: set() for name in names if not name.endswith("__init__")}
    for name in inner:
        for target in imports(found[names[name]], names[name]):
            hit = {target, target.rpartition(".")[0]} & inner.keys() - {name}
            inner[name] |= hit
    floors(inner)


def test_relative_imports_are_seen():
    """Of all three kinds, or the other tests see nothing."""
    source = (
        "from .. import _checks\nfrom .._arrays.dtypes import wide\nfrom . import a"
    )
    found = list(imports(source, pathlib.Path("ivon_jax/_optimizer/state.py")))
    assert found == [
        "ivon_jax._checks",
        "ivon_jax._arrays.dtypes.wide",
        "ivon_jax._optimizer.a",
    ]


def test_a_circle_is_found():
    with pytest.raises(ValueError, match=r"A circle: \['a', 'b'\]"):
        floors({"a": {"b"}, "b": {"a"}, "c": set()})


def picture():
    """Return the floors from the top down, each room with what it imports."""
    found = arrows(modules())
    lines = []
    for number, floor in reversed(list(enumerate(floors(found)))):
        lines += [
            f"{number}  {r}: {', '.join(sorted(found[r]))}" for r in sorted(floor)
        ]
    total = sum(map(len, found.values()))
    return "\n".join(
        [*lines, f"{len(found)} rooms, {len(floors(found))} floors, {total} arrows"]
    )


if __name__ == "__main__":
    print(picture())
