"""How every leaf of a tree is seen: as matrices, or left to the optimizer of the rest."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from lowrank_optax.engine.axes import MatrixAxes, as_axes
from lowrank_optax.engine.usual_layers import Treatment, Tree

View = Callable[[Any, tuple[int, ...]], MatrixAxes | None]
"""A function of a leaf's path and shape to the axes of the matrices it is seen as, or ``None``."""


class LeafPath(tuple):
    """A key path that knows the tree it is of."""

    tree: Tree
    place: int


def default_matrix_view(
    path: Any, shape: tuple[int, ...], *, embeddings: bool = True, heads: bool = True
) -> MatrixAxes | None:
    """How a leaf of flax's or equinox's usual modules is seen as matrices.

    =========================================== ==================== ==========================
    leaf                                        shape                seen as
    =========================================== ==================== ==========================
    dense kernel, gates of a recurrent cell     (m, n)               m x n
    query, key, value of attention              (d, heads, k)        d x (heads k)
    output of attention                         (heads, k, d)        (heads k) x d
    convolution, flax                           (h, w, in, out)      (h w in) x out
    convolution, equinox                        (out, in, h, w)      (in h w) x out
    convolution of one input channel            (h, w, 1, out)       rest
    layers of a scan, experts                   (L, ...)             L times as above
    embedding, also of positions                (count, d)           count x d
    head, the last layer                        (d, classes)         d x classes
    bias, scale                                 (n,), (heads, k)     rest
    one row or column, no entries               (1, n), (0, n)       rest
    anything else                               (a, b, c)            the squarest split
    =========================================== ==================== ==========================

    Leading axes are a batch where the biases or scales of the same module have them, too, where a
    name says that a module is a scan, a vmap or experts, and where an array ``(E, b, a)`` is beside
    one ``(E, a, b)``. Convolutions of one input channel are depthwise, or those of a first layer on
    gray images, which nothing tells from them. Fused projections and gates are one matrix. What
    `optax.masked` hides tells nothing: with masks, pass a view for layers stacked without a name.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> def view(path, shape):
      ...     if "router" in jax.tree_util.keystr(path):
      ...         return None
      ...     return lro.default_matrix_view(path, shape, embeddings=False)
      >>> tx = lro.soap_muon(1e-2, view=view)
      >>> lro.default_matrix_view((), (64, 4, 16))          # of a leaf without a name
      MatrixAxes(rows=(0,), columns=(1, 2), batch=())

    Args:
      path: the leaf's path as a view gets it, which knows the leaves beside it. With any other key
        path, such as ``()``, the leaf is judged by itself.
      shape: the leaf's shape.
      embeddings: whether embeddings are seen as matrices (the default) or go to the rest. They are
        known by names such as ``embedding``, ``wte`` and ``positions``.
      heads: whether heads are seen as matrices (the default) or go to the rest. They are known by
        names such as ``head``, ``logits`` and ``classifier``, or by the sizes of an embedding.

    Returns:
      The axes, or ``None`` for a leaf that goes to the rest.
    """
    known = isinstance(path, LeafPath)
    tree, place = (path.tree, path.place) if known else (Tree.of([path], [shape]), 0)
    return tree.treatment(place, embeddings, heads).axes


def see(owner: str, paths: Sequence[Any], shapes: Any, view: View | None) -> list[Treatment]:
    """How every leaf of a tree is seen; ``owner`` begins messages about the view."""
    tree = Tree.of(paths, shapes)
    if view is None:
        return [tree.treatment(i) for i in range(len(paths))]
    found = []
    for place, keys in enumerate(paths):
        path, shape = LeafPath(keys), tree.leaves[place].shape
        path.tree, path.place = tree, place
        axes = as_axes(owner, view(path, shape), jax.tree_util.keystr(keys), shape)
        found.append(Treatment(axes, "by the view"))
    return found
