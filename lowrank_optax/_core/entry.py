"""What comes into a step: gradients, the parameters that are theirs, functions of all parameters.

A gradient's tree says which leaves are to be optimized. The parameters beside it may hold more:
functions and settings of a model, and leaves that `optax.masked` or `optax.partition` left to
another optimizer. An engine sees its own leaves only, and a function of the parameters as a
function of these, with the rest held fixed.
"""

import sys
from typing import Any

import jax
import optax

FUNCTIONS = ("value_fn", "losses_fn", "residuals_fn")
"""Extra arguments of ``update`` that are functions of the parameters."""


TREES = ("per_example_grads",)
"""Extra arguments of ``update`` that are trees like the gradients."""


def own_arguments(owner: str, updates: Any, params: Any, extra: dict[str, Any]) -> tuple[Any, dict]:
    """The parameters of the leaves of ``updates``, and ``extra`` in terms of these alone.

    Args:
      owner: name of the optimizer, for errors.
      updates: gradients; ``None`` or `optax.MaskedNode` stands where there is nothing to optimize.
      params: parameters, which may hold anything there; or ``None``.
      extra: extra arguments of ``update``.

    Raises:
      ValueError: where the trees do not match, and where a function needs parameters that a mask
        has hidden.
    """
    mine, treedef = jax.tree.flatten(updates, is_leaf=_nothing)
    own = lambda tree, name: [
        g if _nothing(g) else x
        for g, x in zip(mine, _leaves(owner, treedef, tree, name), strict=True)
    ]
    for name in TREES:
        if extra.get(name) is not None:
            extra = extra | {name: treedef.unflatten(own(extra[name], name))}
    if params is None or jax.tree.structure(params) == jax.tree.structure(updates):
        held = mine if params is None else _leaves(owner, treedef, params, "params")
    else:
        held = _leaves(owner, treedef, params, "params")
        params = treedef.unflatten(own(params, "params"))
    functions = [name for name in FUNCTIONS if callable(extra.get(name))]
    if params is None or not functions or not any(map(_nothing, mine)):
        return params, extra
    if any(isinstance(x, optax.MaskedNode) for x in held):
        held = _unmasked(treedef)
        if held is None:
            raise ValueError(
                f"{owner}: {functions[0]} is a function of all parameters, and a mask has hidden "
                "some of them. Pass a function of the visible ones alone, with the others held "
                "fixed inside it."
            )

    def whole(ours: Any) -> Any:
        parts = zip(mine, treedef.flatten_up_to(ours), held, strict=True)
        return treedef.unflatten([h if _nothing(g) else x for g, x, h in parts])

    bind = lambda fn: lambda ours: fn(whole(ours))
    return params, extra | {name: bind(extra[name]) for name in functions}


def check_one_replica(owner: str, extra: dict[str, Any]) -> None:
    """Raises ``ValueError`` for functions of the parameters where every device runs on its own.

    In `jax.pmap` and `jax.shard_map` a Hessian product is that of a device's own examples, also
    where the loss is a mean over the devices: the transpose of that mean is local again. The
    replicas would drift apart without a word.
    """
    functions = [name for name in (*FUNCTIONS, *TREES) if extra.get(name) is not None]
    axes: Any = tuple(jax.sharding.get_abstract_mesh().manual_axes) if functions else ()
    if axes:
        raise ValueError(
            f"{owner}: {functions[0]} came inside jax.pmap or jax.shard_map over {axes}, where "
            "each device would measure its own examples and the replicas drift apart. Pass "
            f"axis_name={axes if len(axes) > 1 else axes[0]!r} to the optimizer and a function of "
            "the device's own examples, or axis_name=() where replicas are to differ."
        )


def _nothing(x: Any) -> bool:
    """Whether a place in a gradient's tree has nothing to optimize."""
    return x is None or isinstance(x, optax.MaskedNode)


def _leaves(owner: str, treedef: Any, tree: Any, name: str) -> list[Any]:
    """What ``tree`` has in the places of a gradient's tree."""
    try:
        return treedef.flatten_up_to(tree)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{owner}: the tree of {name} is not that of the gradients ({error}). Pass both in the "
            "same containers, as jax.grad returns them; flax.core.unfreeze makes a dict of a "
            "FrozenDict."
        ) from error


def _unmasked(treedef: Any) -> list[Any] | None:
    """All parameters, from the call of the mask that hides some of them; ``None`` if there is none.

    `optax.masked` and `optax.partition` hand on the visible parameters only, and a Hessian product
    needs the others' values. They are the argument ``params`` of the wrapper that is calling, a few
    frames up, also while jax traces.
    """
    frame = sys._getframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("optax"):
            try:
                found = treedef.flatten_up_to(frame.f_locals.get("params"))
            except (ValueError, TypeError, KeyError):
                found = [optax.MaskedNode()]
            if not any(isinstance(x, optax.MaskedNode) for x in found):
                return found
        frame = frame.f_back
    return None
