"""Loops that compile to little: now and then, while, for."""

from collections.abc import Callable
from typing import Any

import jax.core
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun


def traced(tree: Any) -> bool:
    """Whether an array of the tree is an unknown of a trace, or a trace is going on."""
    leaves = [*jax.tree.leaves(tree), jnp.zeros(())]
    return any(isinstance(x, jax.core.Tracer) for x in leaves)


def while_loop(condition: Callable[[Any], Any], body: Callable[[Any], Any], carry: Any) -> Any:
    """`jax.lax.while_loop`.

    Outside of a trace it is a loop of Python: XLA would compile a body anew at every call, since
    the functions that make it up are other objects each time.
    """
    if traced(carry):
        return lax.while_loop(condition, body, carry)
    while condition(carry):
        carry = body(carry)
    return carry


def for_range(start: int, stop: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`jax.lax.fori_loop`, and outside of a trace a loop of Python, as in `while_loop`."""
    if traced(carry):
        return lax.fori_loop(start, stop, body, carry)
    for i in range(start, stop):
        carry = body(i, carry)
    return carry


def now_and_then(times: jax.Array, body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """Runs ``body(i, carry)`` a traced number of times, mostly zero or one.

    The engine's only form of "now and then": `lax.cond` makes XLA copy big buffers through both of
    its branches, a loop updates its carry in place and costs nothing when it does not run. Under
    `jax.vmap` it runs as often as any of the batch asks for, since separate counts would copy the
    carry: ``body`` leaves alone what does not ask, as it has to for groups. Outside of a trace it
    is a loop of Python, as XLA would compile the body at every call.
    """
    if not traced((times, carry)):
        for i in range(int(times)):
            carry = body(jnp.int32(i), carry)
        return carry
    start, treedef = jax.tree.flatten(carry)

    def flat(i, *leaves):
        return jax.tree.leaves(body(i, treedef.unflatten(leaves)))

    inside = jax.make_jaxpr(flat)(jnp.zeros((), jnp.int32), *start)

    def run(i, leaves):
        # XLA takes out of a loop what does not depend on it, and would do at every step what is to
        # be done now and then.
        known, i = lax.optimization_barrier((inside.consts, i))
        return jaxpr_as_fun(inside.replace(consts=known))(i, *leaves)

    return treedef.unflatten(lax.fori_loop(0, _most(times.astype(jnp.int32)), run, start))


def traced_once(f: Callable[[Any], Any], given: Any) -> tuple[Callable[[Any], Any], Any]:
    """``f`` as jax traced it, for whatever has the form of ``given``, and the form of its result.

    A user's function inside may take long to trace. Outside of a trace it is ``f`` itself: loops
    in what jax traced would be compiled anew at every call.
    """
    if not traced(given):
        return f, jax.eval_shape(f, given)
    inside, out = jax.make_jaxpr(f, return_shape=True)(given)
    treedef = jax.tree.structure(out)

    def run(given: Any) -> Any:
        return treedef.unflatten(jaxpr_as_fun(inside)(*jax.tree.leaves(given)))

    return run, out


def in_one_place(run: Callable[[Any], Any], given: Any, count: jax.Array) -> Any:
    """``run(given)``, which cuts arrays into parts, in a place of its own in a CPU's program.

    XLA makes one program for all operations of one form. What reads a part of a larger array has a
    form of its own, by the place of the part, and so has everything fused with it. Behind this,
    leaves of one shape share programs, and compile in a fraction of the time. ``count`` is any
    number that is not negative, which XLA does not know. Outside of a trace it is the plain call.
    """

    def apart(given: Any) -> Any:
        zeros = lambda given: jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, given)
        )
        return lax.cond(count >= 0, run, zeros, given)

    return lax.platform_dependent(given, cpu=apart, default=run) if traced(given) else run(given)


@jax.custom_batching.custom_vmap
def _most(times: jax.Array) -> jax.Array:
    """``times``, and under `jax.vmap` the largest of the batch, the same for all."""
    return times


@_most.def_vmap
def _(size, batched, times):
    return jnp.max(times), False
