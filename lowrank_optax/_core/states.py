"""Checks of a state against what `init` gives, and steps taken leaf by leaf."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax._core.checks import check
from lowrank_optax._core.layout import Layout


def check_kind(owner: str, state: Any, kind: type) -> None:
    """Raises ``ValueError`` for a state of another class, such as the dictionary of a bare file."""
    check(
        isinstance(state, kind),
        f"{owner}: the state is a {type(state).__name__}, not a {kind.__name__}; pass what init "
        "returned. A checkpoint is to be restored with such a state as its target.",
    )


def check_fits(
    owner: str,
    state: Any,
    init: Callable[..., Any],
    example: tuple[Any, ...],
    known: set[Any] | None = None,
    but: tuple[str, ...] = (),
) -> None:
    """Raises ``ValueError`` where a state's arrays are not those of ``init(*example)``.

    What lies under the fields ``but`` may differ. ``known`` remembers what was found to fit, since
    finding out traces ``init``.
    """
    known = set() if known is None else known
    kinds = lambda tree: (
        jax.tree.structure(tree),
        tuple((np.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)),
    )
    key = kinds(state), kinds(example)
    if key in known:
        return
    like = jax.eval_shape(init, *example)
    check_kind(owner, state, type(like))
    read = lambda tree: {
        jax.tree_util.keystr(path): f"an array {np.shape(leaf)} {jnp.result_type(leaf)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if getattr(path[0], "name", None) not in but
    }
    got, needed = read(state), read(like)
    for path in (*needed, *got):
        check(
            got.get(path) == needed.get(path),
            f"{owner}: the state holds {got.get(path, 'nothing')} at {path}, where these gradients "
            f"({_listing(example)}) and parts need {needed.get(path, 'nothing')}. Pass gradients "
            "shaped like the "
            "parameters given to init, parameters of the dtypes given to init, and a state that "
            "the same parts made in the same version; or call init again.",
        )
    if len(known) > 64:
        known.clear()
    known.add(key)


def _listing(tree: Any, most: int = 4) -> str:
    """The first leaves of a tree, with names and shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path[1:]) or "one leaf"
    said = [f"{name(path)} {np.shape(x)}" for path, x in leaves[:most]]
    return ", ".join([*said, "..."] if len(leaves) > most else said)


def at_least_float32(tree: Any) -> Any:
    """The leaves in float32 at least, in which squares and small constants are not lost."""

    def one(x: Any) -> Any:
        dtype = jnp.promote_types(jnp.result_type(x), jnp.float32)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
        return jnp.asarray(x, dtype)

    return jax.tree.map(one, tree)


@dataclasses.dataclass(frozen=True, eq=False)
class _Opaque:
    """Whether a leaf's step was taken, in a container that may look at the shapes of arrays."""

    taken: Any


def advance_where_taken(tx: Any, layout: Layout, taken: Sequence[Any], new: Any, old: Any) -> Any:
    """The new state of an optax transformation where the leaves' steps were taken, else the old.

    ``taken`` has a boolean for every leaf of the layout, or several that multiply it, or
    `optax.MaskedNode`. What belongs to no leaf, such as a count, moves where any leaf does; what
    is not shaped like its leaf where all of it does.
    """
    hidden = lambda x: isinstance(x, optax.MaskedNode)
    flags = [x for x in taken if not hidden(x)]
    if not flags:
        return old
    some = jnp.any(jnp.stack([jnp.any(flag) for flag in flags]))
    which = optax.tree.map_params(
        tx,
        lambda x, flag: x if hidden(x) else flag,
        old,
        layout.tree([x if hidden(x) else _Opaque(x) for x in taken]),
        transform_non_params=lambda _: _Opaque(some),
        is_leaf=hidden,
    )

    def pick(flag: _Opaque, new: Any, old: Any) -> Any:
        own, full = np.shape(flag.taken), np.shape(new)
        same = len(own) == len(full) and all(a in (1, b) for a, b in zip(own, full, strict=True))
        return jnp.where(flag.taken if same or not own else jnp.all(flag.taken), new, old)

    each = lambda flag, *pair: jax.tree.map(partial(pick, flag), *pair)
    return jax.tree.map(each, which, new, old)
