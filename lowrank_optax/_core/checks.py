"""Checks of arguments: each raises ``ValueError`` with what came and what to pass instead."""

import numbers
from collections.abc import Mapping
from typing import Any

import jax.core
import numpy as np


def check(condition: Any, message: str) -> None:
    """Raises ``ValueError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def check_count(owner: str, name: str, value: Any, least: int = 1) -> None:
    """A whole number of at least ``least``; traced values pass."""
    if isinstance(value, jax.core.Tracer):
        return
    number = _number(value)
    ok = isinstance(number, numbers.Integral) and int(number) >= least
    check(ok, f"{owner}: {name} is {value!r}; pass a whole number of at least {least}.")


def as_size(owner: str, name: str, value: Any, least: int = 1) -> int:
    """A whole number that shapes depend on; a concrete array passes for its number."""
    check(
        not isinstance(value, jax.core.Tracer),
        f"{owner}: {name} is traced, and shapes depend on it. Under optax.inject_hyperparams name "
        f"it in static_args: optax.inject_hyperparams(..., static_args=({name!r},)).",
    )
    check_count(owner, name, value, least)
    return int(_number(value))


def fix_size(part: Any, name: str, least: int = 1) -> None:
    """Makes a field of a frozen part the whole number that it stands for: shapes depend on it."""
    size = as_size(type(part).__name__, name, getattr(part, name), least)
    object.__setattr__(part, name, size)


def check_decay(owner: str, name: str, value: Any, closed: bool = False) -> None:
    """A decay in [0, 1), or in [0, 1] when ``closed``; traced values pass."""
    if isinstance(value, jax.core.Tracer):
        return
    number = _number(value)
    ok = number is not None and (0 <= number < 1 or (closed and number == 1))
    check(ok, f"{owner}: {name} is {value!r}; pass a number in [0, 1{']' if closed else ')'}.")


def check_least(
    owner: str, name: str, value: Any, least: float = 0.0, strict: bool = False
) -> None:
    """A real number at or (``strict``) above ``least``; traced values pass."""
    if isinstance(value, jax.core.Tracer):
        return
    number = _number(value)
    ok = number is not None and (number > least if strict else number >= least)
    check(
        ok,
        f"{owner}: {name} is {value!r}; pass a number {'above' if strict else 'of at least'} "
        f"{least:g}.",
    )


def check_finite(owner: str, name: str, value: Any) -> None:
    """A finite real number; traced values pass."""
    if isinstance(value, jax.core.Tracer):
        return
    number = _number(value)
    ok = number is not None and abs(number) < float("inf")
    check(ok, f"{owner}: {name} is {value!r}; pass a finite number such as -0.5.")


def require(owner: str, extra: Mapping[str, Any], name: str, meaning: str) -> Any:
    """The extra argument ``name``, or an error that says what to pass to ``update``."""
    value = extra.get(name)
    check(
        value is not None,
        f"{owner} needs `{name}` ({meaning}), which was not passed: call "
        f"tx.update(grads, state, params, {name}=...).",
    )
    return value


def _number(value: Any) -> Any:
    """A real number as Python's, a concrete array without axes as its number; else ``None``."""
    if isinstance(value, jax.Array | np.ndarray | np.generic) and np.ndim(value) == 0:
        value = np.asarray(value).item()
    real = isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value
    return value if real else None
