"""Who may import whom: downwards only."""

import ast
from pathlib import Path

import pytest

import idl

ROOT = Path(idl.__file__).parent

BELOW = {
    # room: the rooms of idl that its files may import, besides their own
    "errors": "",
    "atomic": "",
    "checks": "errors",
    "transforms": "",
    "activations": "errors checks",
    "linalg": "errors checks transforms",
    "solvers": "errors checks activations linalg",
    "wellposed": "errors checks transforms activations linalg",
    "maps": "errors checks transforms activations linalg solvers.base",
    "recurrence": "errors checks transforms activations linalg solvers maps",
    "differentiation": "errors checks transforms activations linalg solvers maps recurrence",
    "equilibrium": "errors checks transforms activations linalg solvers maps differentiation",
    "fixed_points": "checks transforms solvers maps differentiation",
    "sequence": "errors checks transforms activations linalg solvers maps recurrence differentiation equilibrium",
    "functions": "errors checks transforms activations linalg solvers maps recurrence differentiation equilibrium "
    "sequence wellposed",
    "attention": "errors checks transforms activations linalg solvers maps differentiation equilibrium",
    "models": "errors checks transforms",
    "nn": "errors checks transforms activations linalg solvers maps recurrence differentiation equilibrium sequence "
    "wellposed functions attention models",
    "sim": "errors atomic checks activations linalg functions nn",
    "data": "errors checks",
    "training": "errors atomic checks transforms activations linalg solvers maps differentiation equilibrium wellposed "
    "functions attention models nn data",
}
EVERYTHING = {"__init__", "__main__", "cli"}
"""The front doors: they may import every room, and no room may import them."""

LIBRARY = [room for room in BELOW if room not in ("data", "training")]
FOUNDATION = {"torch", "jaxtyping", "numpy", "safetensors"}
"""What `pip install implicit-deep-learning` brings, as far as the library itself needs it."""

EXTRAS = {
    "sim/solvers/cvx.py": {"cvxpy"},
    "nn/conversion/convert.py": {"transformers"},
    "nn/conversion/huggingface.py": {"transformers"},
}
"""Files that may import what only an extra brings: inside a function, or imported inside of one themselves."""

FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def module_of(file):
    parts = Path(file).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(file) for file in FILES} | {Path(file).parent.as_posix().replace("/", ".") for file in FILES}


def room_of(module):
    return module.split(".")[0]


def imports(file):
    """Yield ``(line, module)`` for every import in a file, also inside functions; modules of idl without ``idl.``."""
    package = Path(file).parts[:-1]
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["idl", *package[: len(package) - node.level + 1], *filter(None, [node.module])])
            # `from idl import checks` names a module, `from idl.checks import one_of` does not.
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}".removeprefix("idl.") in MODULES else base
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            yield node.lineno, name


def imports_of_idl(file):
    for line, name in imports(file):
        if name == "idl":
            yield line, "__init__"
        elif name.startswith("idl."):
            yield line, name.removeprefix("idl.")


def allowed(importer, imported):
    room = room_of(importer)
    if room_of(imported) == room:
        return True
    return any(imported == below or imported.startswith(below + ".") for below in BELOW[room].split())


def test_every_file_has_a_room():
    assert {room_of(module_of(file)) for file in FILES} - EVERYTHING - set(BELOW) == set()


def test_the_table_has_no_circle_and_no_upward_entry():
    rooms = list(BELOW)
    for room, below in BELOW.items():
        assert all(rooms.index(room_of(b)) < rooms.index(room) for b in below.split())


@pytest.mark.parametrize("file", [file for file in FILES if room_of(module_of(file)) not in EVERYTHING])
def test_a_file_imports_only_from_rooms_below(file):
    upward = [
        f"{file}:{line} imports idl.{imported}"
        for line, imported in imports_of_idl(file)
        if not allowed(module_of(file), imported)
    ]
    assert upward == []


@pytest.mark.parametrize(
    ("room", "unknown"),
    [
        ("equilibrium", "wellposed"),
        ("solvers", "wellposed"),
        ("wellposed", "solvers"),
        ("linalg", "solvers"),
        ("linalg", "maps"),
        ("solvers", "maps"),
        ("solvers", "differentiation"),
        ("nn", "training"),
        ("nn", "data"),
        ("nn", "sim"),
        ("sim", "training"),
    ],
)
def test_a_room_does_not_know_another_even_through_a_third(room, unknown):
    known, new = set(), {room}
    while new:
        known |= new
        files = [file for file in FILES if room_of(module_of(file)) in new]
        new = {room_of(imported) for file in files for _, imported in imports_of_idl(file)} - known
    assert unknown not in known


@pytest.mark.parametrize("file", [file for file in FILES if room_of(module_of(file)) in LIBRARY])
def test_the_library_needs_torch_numpy_jaxtyping_and_safetensors_only(file):
    import sys

    foreign = {name.split(".")[0] for _, name in imports(file)} - FOUNDATION - {"idl"} - set(sys.stdlib_module_names)
    foreign -= EXTRAS.get(file, set())
    assert foreign == set()


def test_an_upward_import_would_be_found():
    assert not allowed("linalg.krylov", "solvers.base")
    assert not allowed("maps.affine", "solvers.iterate")
    assert not allowed("equilibrium", "wellposed.base")
    assert not allowed("nn.implicit_model", "__init__")
    assert allowed("maps.affine", "solvers.base")
    assert allowed("functions", "wellposed.base")
