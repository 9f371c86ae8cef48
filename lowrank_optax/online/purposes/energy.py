"""Purposes about the energy of streams inside and outside the subspace."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.types import Columns
from lowrank_optax.online.purposes._purpose import (
    Purpose,
    Terms,
    View,
    less,
    scaled,
    stream_and_codes,
    through,
)


@dataclasses.dataclass(frozen=True)
class Reconstruction(Purpose):
    r"""Energy that the subspace loses: the purpose that PCA has.

    .. math:: L = E‖v - A^T A v‖^2 / E, \qquad
              \partial A = -2 (z \rho^T + (A\rho) v^T) / E, \quad \rho = v - A^T z

    Its minimum is the leading eigenspace with orthonormal rows. Adding it as an anchor to another
    purpose can stop that one: `Dynamics` below a critical weight loses against it and learns
    nothing.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.online.learner(2).purposes                # the learner adds it by itself
      (Reconstruction(weight=1.0, stream=None),)

    Args:
      weight: share of the loss, a number of at least 0 or a schedule of the number of updates;
        default 1.
      stream: name of the extra stream whose energy is meant; default ``None``, the main stream.

    Raises:
      ValueError: for a negative weight.

    Cost: ``8 k r d`` flops.

    Source: Oja, "Neural networks, principal components, and subspaces", 1989.
    """

    stream: str | None = None

    def terms(self, view: View, theta: Any) -> Terms:
        return lost(view, self.stream)


@dataclasses.dataclass(frozen=True)
class OldTask(Purpose):
    r"""Old-task relevance: the subspace is to hold the vectors ``u`` on which old tasks depend.

    .. math:: L = E‖u - A^T A u‖^2 / E

    This is `Reconstruction` of a stream of its own, ``update(state, v, old=u)``: per-example
    Jacobians of old outputs, or the activations that fed an old layer. Together with the
    reconstruction of the main stream, and with orthonormal rows, its optimum is the leading
    eigenspace of ``C + weight F`` with ``F = E u u^T``, which `signed_pca` gives in closed form.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.online.OldTask(2.0).streams               # update(state, v, old=u)
      ('old',)

    Args:
      weight: share of the loss, a number of at least 0 or a schedule of the number of updates;
        default 1.
      stream: name under which the vectors are passed to ``update``, default ``"old"``.

    Raises:
      ValueError: for a negative weight.

    Cost: ``8 k r d`` flops.

    Source: Saha, Garg and Roy, "Gradient projection memory for continual learning", ICLR 2021.
    """

    stream: str | None = "old"

    def terms(self, view: View, theta: Any) -> Terms:
        return lost(view, self.stream)


@dataclasses.dataclass(frozen=True)
class Avoidance(Purpose):
    r"""Energy of a second stream that gets in: directions the subspace is to avoid.

    .. math:: L = E‖A w‖^2 / E, \qquad \partial A = 2 (A w) w^T / E

    With orthonormal rows and `Reconstruction` its optimum is the leading eigenspace of ``C - weight
    E w w^T``, a signed covariance, which `signed_pca` gives in closed form.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.online.Avoidance(0.5).streams             # update(state, v, avoid=w)
      ('avoid',)

    Args:
      weight: share of the loss, a number of at least 0 or a schedule of the number of updates;
        default 1.
      stream: name under which the vectors ``w`` are passed to ``update``, default ``"avoid"``.

    Raises:
      ValueError: for a negative weight.

    Cost: ``4 k r d`` flops.

    Source: Abid et al., "Exploring patterns enriched in a dataset with contrastive principal
    component analysis", Nature Communications 2018.
    """

    stream: str = "avoid"

    def terms(self, view: View, theta: Any) -> Terms:
        stream, codes = stream_and_codes(view, self.stream)
        value = jnp.sum(stream.weights * jnp.sum(codes**2, axis=1)) / view.energy
        left = 2 / view.energy * stream.weights[:, None] * codes
        return Terms(value, left, stream.columns, codes)


@dataclasses.dataclass(frozen=True)
class EditLocality(Purpose):
    r"""Edit localisation: a rank-one edit of a linear layer is to spare all other inputs.

    An edit gives the key ``k`` a new value by ``W <- W + (y - W k) k_⊥^T / (k_⊥^T k)`` with
    ``k_⊥ = k - A^T A k``. It changes the outputs of another input ``x`` in proportion to ``k_⊥^T
    x``. The mean square of that is minimised, with ``C = E x x^T`` over the main stream:

    .. math:: L = E_k \frac{k_⊥^T C k_⊥}{(k_⊥^T k)^2}, \qquad
              \frac{\partial L}{\partial k_⊥} =
              \frac{2 C k_⊥}{s^2} - \frac{2 q}{s^3} k, \quad q = k_⊥^T C k_⊥, \; s = k_⊥^T k

    Example:
      >>> import lowrank_optax as lro
      >>> lro.online.EditLocality().streams             # update(state, x, edits=keys)
      ('edits',)

    Args:
      weight: share of the loss, a number of at least 0 or a schedule of the number of updates;
        default 1.
      stream: name under which the keys are passed to ``update``, default ``"edits"``.

    Raises:
      ValueError: for a negative weight.

    Cost: ``(8 r + 4 k) e d`` flops for ``e`` keys and ``k`` vectors.

    Source: Meng et al., "Locating and editing factual associations in GPT", NeurIPS 2022; Fang et
    al., "AlphaEdit: null-space constrained knowledge editing for language models", ICLR 2025.
    """

    stream: str = "edits"

    def terms(self, view: View, theta: Any) -> Terms:
        layout = view.operator.layout
        (keys, weights), codes = stream_and_codes(view, self.stream)
        outside = less(keys, view.operator.columns(codes))
        along = layout.dot(outside, view.stream.columns)[0]  # (e, k)
        q = jnp.sum(along**2 * view.stream.weights[None], axis=1)
        s = _inner(view, outside, keys)
        value = jnp.sum(weights * linalg.safe_divide(q, s**2))
        ck = layout.combine((along * view.stream.weights[None])[None], view.stream.columns)
        # The cotangent of A^T A k is that of k_⊥ with the other sign.
        one = -2 * weights * linalg.safe_divide(1.0, s**2)
        two = 2 * weights * linalg.safe_divide(q, s**3)
        cotangent = [a + b for a, b in zip(scaled(ck, one), scaled(keys, two), strict=True)]
        return Terms(value, *through(view, keys, codes, cotangent))


def lost(view: View, name: str | None) -> Terms:
    """The energy of a stream that ``A^T A`` loses, over that of the main stream."""
    stream, codes = stream_and_codes(view, name)
    rho = less(stream.columns, view.operator.columns(codes))
    value = jnp.sum(stream.weights * view.operator.layout.squares(rho))
    cotangent = scaled(rho, -2 * stream.weights / view.energy)
    return Terms(value / view.energy, *through(view, stream.columns, codes, cotangent))


def _inner(view: View, a: Columns, b: Columns) -> jax.Array:
    """The inner products ``(k,)`` of columns with columns."""
    dtype = view.operator.layout.dtype
    parts = [jnp.sum(x.astype(dtype) * y.astype(dtype), axis=1) for x, y in zip(a, b, strict=True)]
    return sum(parts[1:], parts[0])
