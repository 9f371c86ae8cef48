"""The tables of docs/methods.md say what the recipes are made of."""

import inspect
import re
from pathlib import Path

import pytest

import lowrank_optax as lro
from lowrank_optax.inner import as_inner

PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
OPTIONS = ("update_every", "warmup_steps", "symmetrize")


def rows(heading, same):
    """Cells of the rows of a table that name recipes, by recipe.

    "the same" is the cell ``same(above, cells, i)``, such as that of the row above.
    """
    lines = iter(PAGE.split(heading)[1].splitlines()[2:])
    found, above = [], None
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for i, cell in enumerate(cells):
            cells[i] = same(above, cells, i) if cell == "the same" else cell
        above = cells
        found += [(name, cells[1:]) for name in re.findall(r"\*\*`lro\.(\w+)`\*\*", cells[0])]
    return found


def code(cell):
    """The expressions of a cell: the first is a part, the others are options of the engine."""
    return re.findall(r"`([^`]+)`", cell)


def made(name, **kwargs):
    """The recipe's parts, and the names that the page's expressions use."""
    maker = getattr(lro, name)
    given = {n: p.default for n, p in inspect.signature(maker).parameters.items()}
    given = {n: x for n, x in given.items() if x is not inspect.Parameter.empty}
    kwargs |= (
        {"learning_rate": 1.0} if "learning_rate" in inspect.signature(maker).parameters else {}
    )
    parts = lro.diagnose.parts(maker(**kwargs))
    kept = parts.get("basis") or parts.get("short")
    given |= {"rank": getattr(kept, "rank", None), "beta": getattr(kept, "beta", None)}
    given["batch"] = given["rank"]
    return parts, given | {"C": lro.curvature, "B": lro.basis, "I": lro.inner}


def options(cells, names):
    """What the cells say of `OPTIONS`."""
    said = [x.split("=", 1) for cell in cells for x in code(cell)[1:] if "=" in x]
    return {name: eval(value, dict(names)) for name, value in said if name in OPTIONS}


VECTORS = rows(
    "| method | curvature | basis | inner | complement | needs |", lambda above, _, i: above[i]
)
MATRICES = rows(
    "| method | short side | long side | inner | then |", lambda _, cells, i: cells[i - 1]
)
KRONECKER = rows(
    "| method | directions | inner | root mean square of orthogonal updates | turn every |",
    lambda above, _, i: above[i],
)


def test_every_recipe_has_its_row():
    special = {"levenberg_marquardt", "spring"}  # their curvature is their own
    recipes = {
        name
        for name in lro.__all__
        if "lowrank_optax.recipes" in getattr(getattr(lro, name), "__module__", "")
    }
    assert {name for name, _ in VECTORS + MATRICES + KRONECKER} - special == recipes


@pytest.mark.parametrize("name, cells", VECTORS, ids=lambda x: x if isinstance(x, str) else "")
def test_rows_of_vectors(name, cells):
    if name in ("levenberg_marquardt", "spring"):
        return
    curvature, basis, inner, complement, _ = cells
    kwargs = {}
    if name == "lowrank_newton":
        kwargs["curvature"] = eval(code(curvature)[0], {"C": lro.curvature})
    parts, names = made(name, **kwargs)
    read = lambda cell: eval(code(cell)[0], dict(names))
    assert read(curvature) == parts["curvature"]
    assert read(basis) == parts["basis"]
    assert as_inner(read(inner)) == parts["inner"]
    assert (read(complement) if complement else None) == parts.get("complement")
    assert options(cells, names) == {n: x for n, x in parts.items() if n in OPTIONS}


@pytest.mark.parametrize("name, cells", MATRICES, ids=lambda x: x if isinstance(x, str) else "")
def test_rows_of_matrices(name, cells):
    short, long, inner, _ = cells
    parts, names = made(name)
    for cell, side in ((short, "short"), (long, "long")):
        want = eval(code(cell)[0], dict(names)) if cell else None
        assert want == parts[side]
    if code(inner):
        kept = parts["inner"]
        kept = kept.parts[0] if isinstance(kept, lro.inner.Chain) else kept
        assert eval(code(inner)[0], dict(names)) == kept
    assert options(cells, names) == {n: x for n, x in parts.items() if n in OPTIONS}


@pytest.mark.parametrize("name, cells", KRONECKER, ids=lambda x: x if isinstance(x, str) else "")
def test_rows_of_momentum(name, cells):
    parts, names = made(name, **{"rank": 5} if name not in ("muon", "normuon") else {})
    read = lambda cell: eval(code(cell)[0], dict(names) | {"rank": 5}) if cell else None
    directions, inner, orthogonal, turns = cells
    assert (read(directions),) * 2 == (parts["short"], parts["long"])
    assert as_inner(read(inner)) == parts["inner"]
    assert read(orthogonal) == parts.get("orthogonal")
    assert (read(turns) or 1) == parts.get("update_every", 1)
    assert ("128" in directions) == (parts.get("largest") == 128)
