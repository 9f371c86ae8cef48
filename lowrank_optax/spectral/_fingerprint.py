"""A short text for an operator, a network or an optimizer that is the same in every process."""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DEPTH = 12
"""Of parts within parts; what lies deeper is told by its type alone."""


def fingerprint(part: Any) -> str:
    """A name and eight digits that change with the numbers, arrays and parts within.

    Functions count by their names and by what they close over, not by their code. Other objects
    count by their type. Nothing counts by its address, which changes with a restart.

    Args:
      part: anything that a fit is made of.

    Returns:
      The name and the digits.

    Cost: one pass over every array within.

    Example:
      >>> from lowrank_optax.spectral import operators
      >>> one, two = operators.Box(2, 1.0), operators.Box(2, 1.5)
      >>> fingerprint(one) == fingerprint(operators.Box(2, 1.0)), fingerprint(one)[:4]
      (True, 'Box-')
      >>> fingerprint(one) == fingerprint(two)
      False
    """
    return f"{_name(part)}-{zlib.crc32(_told(part, DEPTH).encode()):08x}"


def _name(part: Any) -> str:
    return getattr(part, "__qualname__", type(part).__qualname__)


def _told(part: Any, depth: int) -> str:
    if part is None or isinstance(part, bool | int | float | complex | str | bytes):
        return repr(part)
    if isinstance(part, np.ndarray | np.generic | jax.Array):
        return _array(part)
    inner: Any = ()
    if depth == 0:
        pass
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = (f.name for f in dataclasses.fields(part) if f.name not in ("parent", "name"))
        inner = [getattr(part, name, None) for name in fields]  # flax: its place in a tree
    elif isinstance(part, dict):
        inner = [x for pair in part.items() for x in pair]
    elif isinstance(part, tuple | list):
        inner = part
    elif isinstance(part, functools.partial):
        inner = [part.func, part.args, part.keywords]
    elif callable(part):
        inner = [getattr(part, "__self__", None), getattr(part, "__defaults__", None)]
        inner += [_content(cell) for cell in getattr(part, "__closure__", None) or ()]
    return f"{_name(part)}({', '.join(_told(x, depth - 1) for x in inner)})"


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a function that refers to itself before it is defined
        return None


def _array(part: Any) -> str:
    if jnp.issubdtype(part.dtype, jax.dtypes.prng_key):
        part = jax.random.key_data(part)
    data = np.asarray(part)
    return f"{data.dtype}{data.shape}{zlib.crc32(np.ascontiguousarray(data).tobytes()):08x}"


class Same:
    """An object that equals itself alone, for what cannot be compared."""

    def __init__(self, part: Any):
        self.part = part

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.part is other.part

    def __hash__(self) -> int:
        return id(self.part)


OWN = {"jax", "optax", "lowrank_optax", "flax", "chex"}
"""Packages whose functions do nothing but what their code and their closures say."""


def identity(part: Any, depth: int = 3 * DEPTH) -> Any:
    """Something hashable that is equal for parts of which the same program would be compiled.

    Functions of libraries are equal where their code and all they close over are, such as two
    optimizers made by the same call. Functions of the user equal themselves alone, since they may
    read what is defined elsewhere.

    Args:
      part: anything that a fit is made of.
      depth: the number of levels to look into.

    Returns:
      The key.

    Cost: one pass over the part.

    Example:
      >>> import optax
      >>> identity(optax.adam(1e-3)) == identity(optax.adam(1e-3))
      True
      >>> identity(optax.adam(1e-3)) == identity(optax.adam(1e-2))
      False
    """
    inner = functools.partial(identity, depth=depth - 1)
    if part is None or isinstance(part, bool | int | float | complex | str | bytes | type):
        return type(part), part
    if depth == 0:
        return Same(part)
    if isinstance(part, np.ndarray | np.generic | jax.Array):
        return _array(part) if part.size <= 1024 else Same(part)
    if isinstance(part, tuple | list):
        return type(part), *(inner(x) for x in part)
    if isinstance(part, dict):
        return dict, *((inner(k), inner(v)) for k, v in part.items())
    if isinstance(part, functools.partial):
        return functools.partial, inner(part.func), inner(part.args), inner(part.keywords)
    code = getattr(part, "__code__", None)
    if code is not None and str(part.__module__).split(".")[0] in OWN:
        held = [_content(cell) for cell in part.__closure__ or ()]
        # Schedules of optax make their whole numbers floats in their first call.
        held = [float(x) if type(x) is int else x for x in held]
        cells = tuple(inner(x) for x in held)
        more = part.__defaults__, part.__kwdefaults__
        return Same(code), cells, inner(more)  # code changes while it runs, and with it its hash
    if dataclasses.is_dataclass(part) and type(part).__eq__ is not object.__eq__:
        told = (f.name for f in dataclasses.fields(part) if f.name not in ("parent", "name"))
        return type(part), *(inner(getattr(part, name, None)) for name in told)
    return Same(part)
