"""A recipe: an engine and what stands behind it, as one optimizer that takes a step or does not."""

import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from lowrank_optax._core.checks import check_least
from lowrank_optax._core.entry import own_arguments
from lowrank_optax._core.states import advance_where_taken, at_least_float32

OWNER = "recipe"


def recipe(
    engine: Any, *behind: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """``engine``, then optax transformations, which a bad step leaves as they were.

    A leaf that the engine drops, because something was not finite, gets a zero update: no weight
    decay, no step of a momentum, and the states behind the engine stay as they were for it. What
    stands behind the engine sees its updates in float32 at least, whatever the parameters' dtype,
    since optax's ``eps`` of 1e-8 is zero in float16. The updates that come out have the dtype to
    which gradient and parameter promote, as optax's own.

    The state is that of ``optax.chain(engine, *behind)``.
    """
    chain: Any = optax.chain(*behind)

    def init(params: Any):
        return engine.init(params), *chain.init(at_least_float32(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any):
        params, extra = own_arguments(OWNER, updates, params, extra)
        first, old = state[0], tuple(state[1:])
        step, first, dropped = engine.step(at_least_float32(updates), first, params, extra)
        if not dropped:
            return updates, (first, *old)
        layout = engine.layout(updates, state[0], params)
        on = [~bad for bad in dropped]
        visible = None if params is None else at_least_float32(params)
        step, new = chain.update(step, old, visible, **extra)
        step = [jnp.where(ok, x, 0) for ok, x in zip(on, layout.leaves(step), strict=True)]
        new = advance_where_taken(chain, layout, on, new, old)
        return layout.unflatten(step, updates), (first, *new)

    return optax.GradientTransformationExtraArgs(init, update)


def collects(make: Callable[..., Any]) -> Callable[..., Any]:
    """A maker whose ``**options`` may also come as one argument of that name.

    `optax.inject_hyperparams` hands collected keywords back in this way.
    """

    @functools.wraps(make)
    def run(*args: Any, options: dict[str, Any] | None = None, **kwargs: Any):
        return make(*args, **(options or {}), **kwargs)

    return run


def or_default(size: int | None, otherwise: int) -> int:
    """A size, which is ``None`` by default: `optax.inject_hyperparams` traces default numbers."""
    return otherwise if size is None else size


def decay_weights(strength: Any, mask: Any) -> optax.GradientTransformation:
    """Weight decay as in optax, which asks for params only if there is any to apply."""
    if not callable(strength):
        check_least("weight decay", "weight_decay", strength)
    rate: Any = strength
    inner = optax.add_decayed_weights(rate, mask)

    def update(updates, state, params=None):
        if params is None:
            if isinstance(strength, numbers.Real) and strength == 0:
                return updates, state
            raise ValueError(
                f"weight_decay is {strength}, which needs the parameters; call "
                "tx.update(grads, state, params)."
            )
        return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)
