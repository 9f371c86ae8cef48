"""How much memory an optimizer's state will take, before there is one."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core.devices import shardings


class Memory(NamedTuple):
    """Bytes of an optimizer's state, before there is one. Printed, it is a table.

    Attributes:
      parts: bytes by the name of what is stored, such as ``"0.basis.rows"``; the number is the
        place in a chain.
      leaves: bytes that each parameter adds, by its path, with what all parameters share left out;
        empty where the optimizer takes nothing but the whole tree.
      total: bytes of the whole state.
      per_device: bytes on the device that holds most; the total where parameters have no sharding.
      adam: bytes of the state of `optax.adam` for the same parameters.
      adam_per_device: the same on one device.
    """

    parts: dict[str, int]
    leaves: dict[str, int]
    total: int
    per_device: int
    adam: int
    adam_per_device: int

    def __str__(self) -> str:
        over = self.total / self.adam if self.adam else math.nan
        large = {k: size for k, size in self.parts.items() if 1000 * size >= self.total}
        rows = [*large.items(), ("everything else", self.total - sum(large.values()))]
        rows += [("total", self.total), ("on a device", self.per_device)]
        rows += [("Adam", self.adam), ("Adam, on a device", self.adam_per_device)]
        width = max(len(name) for name, _ in rows)
        unit, name_of = (1e3, "kB") if self.total < 1e7 else (1e6, "MB")
        lines = [f"{name:<{width}}  {size / unit:>12,.1f} {name_of}" for name, size in rows]
        return "\n".join([*lines, f"{over:.2f} times Adam's"])


def memory(params: Any, tx: optax.GradientTransformation) -> Memory:
    """How many bytes an optimizer's state will take. Nothing is allocated.

    What a step needs for a moment, such as the Jacobian of `levenberg_marquardt`, is not counted.

    Args:
      params: the parameters: a tree of arrays or of `jax.ShapeDtypeStruct`, with shardings where
        the figures for one device are wanted.
      tx: any optax transformation.

    Returns:
      A `Memory`, by parts, by leaves and in all, beside Adam's.

    Cost: one abstract evaluation of ``tx.init``, and one more for every leaf.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"w": jax.ShapeDtypeStruct((1000, 200), jnp.float32)}
      >>> found = lro.diagnose.memory(params, lro.whitened_adam(1e-2, rank=20))
      >>> found.parts["0.basis.rows"], found.adam
      (16000000, 1600004)
    """
    state = jax.eval_shape(tx.init, params)
    adam = optax.adam(1.0)
    parts: dict[str, int] = {}
    leaves = {path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0] if path}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = _part(path, leaves)
        parts[name] = parts.get(name, 0) + _bytes(leaf)
    return Memory(
        parts,
        _by_leaf(params, tx),
        sum(parts.values()),
        _on_a_device(params, tx, state),
        _total(jax.eval_shape(adam.init, params)),
        _on_a_device(params, adam, jax.eval_shape(adam.init, params)),
    )


def _bytes(x: Any) -> int:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.eval_shape(jax.random.key_data, x)
    return math.prod(x.shape) * x.dtype.itemsize


def _total(tree: Any) -> int:
    return sum(_bytes(x) for x in jax.tree.leaves(tree))


def _part(path: Any, leaves: set[Any]) -> str:
    """The place in a chain and the fields on the way to an array; for matrices also their shape.

    What follows where the array belongs to a parameter is that parameter's own path.
    """
    path = next((path[:i] for i in range(len(path)) if path[i:] in leaves), path)
    names: list[str] = []
    for key in path:
        if hasattr(key, "name") or not names or names[-1] == "matrices":
            names.append(jax.tree_util.keystr((key,), simple=True))
    return ".".join(names)


def _by_leaf(params: Any, tx: Any) -> dict[str, int]:
    """What the state of each leaf alone has over the state of none."""
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    alone = lambda i: tree.unflatten([x if i == j else None for j, (_, x) in enumerate(flat)])
    try:
        none = _total(jax.eval_shape(tx.init, alone(-1)))
        sizes = [_total(jax.eval_shape(tx.init, alone(i))) - none for i in range(len(flat))]
    except (ValueError, TypeError, KeyError):  # such as a mask that is a tree
        return {}
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    return dict(zip(names, sizes, strict=True))


def _on_a_device(params: Any, tx: Any, state: Any) -> int:
    """Bytes of a state on one device, by the shardings that it will have."""
    placed = [getattr(x, "sharding", None) for x in jax.tree.leaves(params)]
    if not any(isinstance(s, jax.sharding.NamedSharding) for s in placed):
        return _total(state)
    places = jax.tree.leaves(shardings(tx.init, params))
    sizes = 0
    for x, place in zip(jax.tree.leaves(state), places, strict=True):
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        whole = x if key else jax.ShapeDtypeStruct(place.shard_shape(x.shape), x.dtype)
        sizes += _bytes(whole)
    return sizes
