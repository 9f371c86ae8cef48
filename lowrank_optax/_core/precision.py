"""Full precision inside the package; outside functions keep the precision of their caller."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax.core

from lowrank_optax._core.linalg import _outside


def full_precision(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` with products of float32 numbers in float32 on every device.

    GPUs multiply them in TF32 and TPUs in bfloat16 unless they are asked not to, and then a basis
    is orthogonal to three digits and a Gram matrix blind below that. `callers_precision` is the
    exception.
    """

    @functools.wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _exactly():
            return f(*args, **kwargs)

    return run


def callers_precision(f: Callable[..., Any]) -> Callable[..., Any]:
    """A user's function: its products keep the caller's precision inside `full_precision`, too."""

    @functools.wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _as_outside():
            return f(*args, **kwargs)

    return run


@contextlib.contextmanager
def _exactly() -> Iterator[None]:
    """Full precision, within which `callers_precision` knows what was set outside."""
    token = _outside.set(jax.config.jax_default_matmul_precision)  # pyright: ignore
    try:
        with jax.default_matmul_precision("highest"):
            yield
    finally:
        _outside.reset(token)


@contextlib.contextmanager
def _as_outside() -> Iterator[None]:
    """The precision that was set outside of `full_precision`."""
    inside = jax.config.jax_default_matmul_precision  # pyright: ignore
    with jax.default_matmul_precision(_outside.get(inside)):
        yield
