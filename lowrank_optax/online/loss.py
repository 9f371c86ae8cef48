"""The composite loss of a learner, and its gradient from the purposes' factors."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.types import Columns
from lowrank_optax.online.purposes import Purpose, View


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def composite(
    purposes: tuple[Purpose, ...],
    tangent: bool,
    weights: tuple[Any, ...],
    rows: Any,
    theta: tuple[Any, ...],
    view: View,
    memory: tuple[Any, ...],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    r"""The sum of the purposes' losses, with a gradient that is put together from their factors.

    .. math:: L = \sum_i w_i L_i, \qquad \partial A = \sum_i w_i \sum_j a_{ij} b_{ij}^T

    The backward pass needs rows, vectors, codes and moments, and nothing else.

    Args:
      purposes: the purposes, which give value and gradient of the ``L_i``.
      tangent: whether the gradient is that on orthonormal rows: ``∂A - ∂A A^T A``, and ``∂A -
        sym(∂A A^T) A`` of a gradient that a purpose gives as a whole.
      weights: weight ``w_i`` of every purpose, a number or an array.
      rows: the rows ``A``, shaped like those of ``view.operator``; differentiable.
      theta: the purposes' own parameters, one tree for each; differentiable.
      view: the state and the batch.
      memory: the purposes' memories, one for each.

    Returns:
      ``L`` and the ``L_i``.

    Cost: that of the purposes' terms, twice where the gradient is taken.
    """
    return _values(purposes, weights, rows, theta, view, memory)[:2]


def _values(purposes, weights, rows, theta, view, memory):
    view = view._replace(operator=dataclasses.replace(view.operator, rows=rows))
    terms = [
        p.terms(view._replace(memory=m), t) for p, m, t in zip(purposes, memory, theta, strict=True)
    ]
    values = tuple(t.value for t in terms)
    total = jnp.stack([w * v for w, v in zip(weights, values, strict=True)]).sum()
    return total, values, terms


def _forward(purposes, tangent, weights, rows, theta, view, memory):
    out = _values(purposes, weights, rows, theta, view, memory)[:2]
    return out, (weights, rows, theta, view, memory)


def _backward(purposes, tangent, saved, cotangents):
    weights, rows, theta, view, memory = saved
    terms = _values(purposes, weights, rows, theta, view, memory)[2]
    bars = [cotangents[0] * w + v for w, v in zip(weights, cotangents[1], strict=True)]
    layout, leaves = view.operator.layout, view.operator.layout.leaves(rows)
    total = [jnp.zeros(w.shape, layout.dtype) for w in leaves]
    factors = [
        (b * t.left, t.right, t.inside)
        for b, t in zip(bars, terms, strict=True)
        if t.left is not None
    ]
    if factors:
        left, inside = (jnp.concatenate([f[i] for f in factors]) for i in (0, 2))
        right = [jnp.concatenate(c) for c in zip(*(f[1] for f in factors), strict=True)]
        total = _outer(layout, left, right, inside if tangent else None, leaves)
    dense = [(b, t.dense) for b, t in zip(bars, terms, strict=True) if t.dense is not None]
    for bar, gradient in dense:
        if tangent:
            within = layout.combine(
                linalg.symmetrize(layout.dot(gradient, leaves)[0])[None], leaves
            )
            gradient = [g.astype(i.dtype) - i for g, i in zip(gradient, within, strict=True)]
        total = [x + bar * g.astype(x.dtype) for x, g in zip(total, gradient, strict=True)]
    out = [x.astype(w.dtype) for x, w in zip(total, leaves, strict=True)]
    bar_theta = tuple(
        jax.tree.map(lambda x, b=b: b * x, t.theta) for b, t in zip(bars, terms, strict=True)
    )
    return None, layout.tree(out), bar_theta, None, None


composite.defvjp(_forward, _backward)


def _outer(layout, left, right, inside, rows) -> Columns:
    """``sum_j a_j b_j^T``; where the codes of the ``b_j`` are given, of ``b_j - A^T A b_j``."""
    if inside is None:
        return layout.combine(left.T[None], right)
    if left.shape[0] < left.shape[1]:  # projecting few vectors is cheaper than projecting their sum
        within = layout.combine(inside[None], rows)
        right = [b.astype(i.dtype) - i for b, i in zip(right, within, strict=True)]
        return layout.combine(left.T[None], right)
    total = layout.combine(left.T[None], right)
    within = layout.combine((left.T @ inside)[None], rows)
    return [g - i for g, i in zip(total, within, strict=True)]
