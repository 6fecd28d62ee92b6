"""What users import, and which way imports point: never in a circle, never back up."""

import ast
import itertools
from pathlib import Path

import pallas
import rattn_eqx

ROOT = Path(__file__).parents[1]
SURFACE = {  # what is importable from the top of each package
    pallas: "BlockSizes StepCache feature_map rattention rattention_step residual_linear_attention "
    "sliding_window_attention sliding_window_attention_step",
    rattn_eqx: "Block GlobalAttention LanguageModel ModelConfig RAttention generate load presets",
}
# Each room may import those before it, none after it; a file of a package's top level is a room of its own.
ROOMS = {
    "pallas": "checked dependence feature_map numerics segments block_sizes batching step_cache checks final_state "
    "reference chunked hopper tpu ops sharded __init__ tools __main__",
    "rattn_eqx": "data.files data.programs model data tasks training.config inference evaluation training weights "
    "ablation figures conversion __init__ pretrain interrupt console arguments commands __main__",
}


def test_what_users_import():
    for package, names in SURFACE.items():
        assert sorted(package.__all__) == names.split()
        for name in names.split():
            assert getattr(package, name) is not None


def modules() -> dict[str, ast.Module]:
    files = itertools.chain(*((ROOT / package).rglob("*.py") for package in ROOMS))
    dotted = lambda file: ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return {dotted(file): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of ours that a module imports, in functions too, but for names that are put together at run time."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            assert node.module
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if {name, f"{name}.__init__"} & known else node.module for name in names}
    return {name if name in known else f"{name}.__init__" for name in found if {name, f"{name}.__init__"} & known}


def room_of(module: str) -> tuple[str, int]:
    """A module's package, and the place of its room in the package's order."""
    package, _, rest = module.partition(".")
    rooms = ROOMS[package].split()
    longest = max((room for room in rooms if f"{rest}.".startswith(f"{room}.")), key=len, default=None)
    assert longest is not None, f"{module} belongs to no room in ROOMS"
    return package, rooms.index(longest)


def test_no_arrow_points_back_up():
    trees = modules()
    wrong = []
    for module, tree in trees.items():
        package, room = room_of(module)
        for imported in imports(tree, set(trees)) - {module}:
            of, other = room_of(imported)
            if (of, package) == ("rattn_eqx", "pallas") or (of == package and other > room):
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_no_circle():
    trees = modules()
    graph = {module: imports(tree, set(trees)) - {module} for module, tree in trees.items()}
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "a circle: " + " > ".join([*path[path.index(module) :], module])
        if module not in finished:
            for imported in sorted(graph[module]):
                if not imported.endswith("__init__"):  # a package's own file imports its parts, to pass them on
                    visit(imported, (*path, module))
            finished.add(module)

    for module in sorted(graph):
        visit(module, ())
