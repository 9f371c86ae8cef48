"""Functions that users pass to ``update``: what they may return, checked when they are called.

Each wrapper returns a function of the parameters alone. For anything else than what it describes it
raises ``ValueError`` with the argument's name. Values that are not finite pass: they are known only
when the program runs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core.checks import check
from lowrank_optax._core.precision import callers_precision

Function = Callable[[Any], jax.Array]


def scalar_loss(owner: str, name: str, fn: Any) -> Function:
    """``params -> loss``: a real number, an array with one entry, or ``(loss, aux)``."""
    meaning = "a function params -> loss, a real floating-point scalar, or (loss, aux)"

    def read(out: Any) -> jax.Array:
        loss = _array(out[0] if _is_pair(out) else out)
        fits = loss.size == 1 and jnp.issubdtype(loss.dtype, jnp.floating)
        _expect(fits, owner, name, out, meaning)
        return jnp.reshape(loss, ())

    return _wrap(owner, name, fn, meaning, read)


def example_losses(owner: str, name: str, fn: Any) -> Function:
    """``params -> losses (k,)``: a real array with one axis longer than 1, or ``(losses, aux)``."""
    meaning = (
        "a function params -> losses (k,), real and floating-point, one for every example (of "
        "losses with more axes take the sum or mean of each example, or ravel them)"
    )

    def read(out: Any) -> jax.Array:
        losses = _array(out[0] if _is_pair(out) else out)
        fits = jnp.issubdtype(losses.dtype, jnp.floating)
        fits = fits and losses.ndim > 0 and losses.size in (0, *losses.shape)
        _expect(fits, owner, name, out, meaning)
        return jnp.ravel(losses)

    return _wrap(owner, name, fn, meaning, read)


def flat_residuals(owner: str, name: str, fn: Any) -> Function:
    """``params -> residuals``: any tree of arrays, joined leaf by leaf into one ``(k,)``.

    A complex leaf gives its real parts and then its imaginary ones, so that ``‖r‖²`` is the sum of
    ``|r|²``. A tuple is a tree like any other, so there is no room for auxiliary output.
    """
    meaning = (
        "a function params -> residuals, an array or a tree of arrays, floating-point or complex "
        "(without auxiliary output: lambda params: fn(params)[0])"
    )

    def read(out: Any) -> jax.Array:
        leaves = [_array(x) for x in jax.tree.leaves(out)]
        fits = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
        _expect(fits and all(fits), owner, name, out, meaning)
        parts = []
        for x in leaves:
            x = jnp.ravel(x)
            parts += [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
        dtype = functools.reduce(jnp.promote_types, [x.dtype for x in parts])
        return jnp.concatenate([x.astype(dtype) for x in parts])

    return _wrap(owner, name, fn, meaning, read)


def _wrap(owner: str, name: str, fn: Any, meaning: str, read: Callable[[Any], Any]) -> Function:
    check(callable(fn), f"{owner}: {name} is {fn!r}; pass {meaning}.")
    fn = callers_precision(fn)
    return lambda params: read(fn(params))


def _is_pair(out: Any) -> bool:
    return isinstance(out, tuple) and len(out) == 2


def _array(x: Any) -> jax.Array:
    """What a user returned as an array; one of booleans, which nothing takes, where it is none."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError):
        return jnp.zeros(0, bool)


def _expect(condition: Any, owner: str, name: str, out: Any, meaning: str) -> None:
    if condition:
        return
    kind = lambda x: f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else repr(x)
    got = jax.tree.map(kind, out, is_leaf=lambda x: x is None)
    got = got if isinstance(got, str) else str(got).replace("'", "")
    check(False, f"{owner}: {name} returned {got}; pass {meaning}.")
