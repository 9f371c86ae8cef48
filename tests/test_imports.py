"""Imports run one way, and the core needs jax, optax and numpy alone."""

import ast
import subprocess
import sys
from pathlib import Path

import lowrank_optax

ROOT = Path(lowrank_optax.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").strip("."): path
    for path in ROOT.rglob("*.py")
}

# A module imports only what stands in lines above its own; parts of one package each other.
LAYERS = (
    {"_core"},
    {"curvature", "basis", "inner"},
    {"engine", "online", "least_squares", "experimental"},
    {"recipes", "diagnose", "spectral"},
    {"training"},
)
ABOVE = {name: i for i, layer in enumerate(LAYERS) for name in layer}

CORE = {"jax", "optax", "numpy", "chex"}
EXTRAS = {
    "training": {"flax"},
    "plot": {"matplotlib"},
    "spectral._progress": {"rich"},
    "spectral.networks": {"flax"},
    "spectral.estimator": {"sklearn"},
}
APPLICATIONS = {"__main__", "demo"}
"""Programs on top of everything, which no module imports but they each other."""


def imported(path):
    """Full names of all that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path):
    """Top-level modules of this package that a file imports."""
    paths = [name.split(".") for name in imported(path)]
    return {parts[1] if len(parts) > 1 else "" for parts in paths if parts[0] == "lowrank_optax"}


def test_every_module_has_its_place():
    known = ABOVE.keys() | EXTRAS.keys() | APPLICATIONS | {""}
    assert {name.split(".")[0] for name in MODULES} <= known


def test_imports_run_one_way():
    for name, path in MODULES.items():
        top = name.split(".")[0]
        if top in APPLICATIONS or top == "":
            continue
        for other in ours(path) - {top}:
            assert other in ABOVE, f"{name} imports {other or 'the package itself'}"
            assert top not in ABOVE or ABOVE[other] < ABOVE[top], f"{name} imports {other}"


def test_nobody_imports_plots_programs_or_training():
    for name, path in MODULES.items():
        if name.split(".")[0] not in APPLICATIONS:
            assert not ours(path) & (APPLICATIONS | EXTRAS.keys()), name


def test_core_needs_little():
    for name, path in MODULES.items():
        top = name.split(".")[0]
        if top in APPLICATIONS:
            continue
        packages = {other.split(".")[0] for other in imported(path)} - {"lowrank_optax"}
        foreign = packages - sys.stdlib_module_names
        assert foreign <= CORE | EXTRAS.get(name, set()), f"{name} imports {foreign}"


def test_public_interfaces_only():
    for name, path in MODULES.items():
        attributes = (
            x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.Attribute)
        )
        assert "_src" not in {x.attr for x in attributes}, name
        assert not any("_src" in other.split(".") for other in imported(path)), name


def test_importing_the_package_is_light():
    command = [sys.executable, "-c", "import sys, lowrank_optax; print(*sys.modules)"]
    loaded = subprocess.check_output(command, text=True, cwd=ROOT.parent).split()
    assert "lowrank_optax.engine.vectors" in loaded
    heavy = {"flax", "matplotlib", "orbax", "rich", "sklearn"}
    heavy |= {f"lowrank_optax.{name}" for name in EXTRAS.keys() | APPLICATIONS}
    assert not heavy & set(loaded)


def test_extras_are_found_when_asked_for():
    assert lowrank_optax.training.TrainState and lowrank_optax.plot


def code_lines(function):
    """Lines of a function's body without its docstring."""
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else None
    start = first.lineno if first is not None else function.body[0].lineno
    return function.end_lineno - start + 1


def test_files_and_functions_fit_on_screens():
    for name, path in MODULES.items():
        text = path.read_text()
        assert len(text.splitlines()) <= 500, f"{name} is long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert code_lines(node) <= 60, f"{name}.{node.name} has {code_lines(node)} lines"
