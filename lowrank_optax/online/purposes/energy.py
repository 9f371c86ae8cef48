"""Purposes about the energy of streams inside and outside the subspace."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.types import Columns
from lowrank_optax.online.purposes._purpose import (
    Purpose,
    Terms,
    View,
    bend,
    less,
    scaled,
    stream_and_codes,
    through,
)


@dataclasses.dataclass(frozen=True)
class Scaled(Purpose):
    """A purpose with a stream of its own, whose running energy ``E‖u‖²`` is its unit."""

    def memory(self, rank: int, dtype: Any) -> jax.Array:
        return jnp.zeros((), dtype)

    def remember(self, memory: jax.Array, view: View, rate: jax.Array) -> jax.Array:
        name = getattr(self, "stream", None)
        return memory if name is None else _blend(memory, *_energy(view, name), rate)

    def unit(self, view: View, name: str) -> jax.Array:
        """The stream's energy, that of the batch while there is no other; 1 to keep units."""
        own = view.memory
        own = jnp.where(own > 0, own, _energy(view, name)[0])
        return jnp.where(view.relative & (own > 0), own, 1)


@dataclasses.dataclass(frozen=True)
class Reconstruction(Scaled):
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
        name = self.stream
        return lost(view, name, view.energy if name is None else self.unit(view, name))


@dataclasses.dataclass(frozen=True)
class OldTask(Scaled):
    r"""Old-task relevance: the subspace is to hold the vectors ``u`` on which old tasks depend.

    .. math:: L = E‖u - A^T A u‖^2 / E‖u‖^2

    This is `Reconstruction` of a stream of its own, ``update(state, v, old=u)``: per-example
    Jacobians of old outputs, or the activations that fed an old layer. Together with the
    reconstruction of the main stream, and with orthonormal rows, its optimum is the leading
    eigenspace of ``C / tr C + weight F / tr F`` with ``F = E u u^T``, which `signed_pca` gives in
    closed form. The stream's own energy is the unit, so that the unit of ``u`` decides nothing; a
    learner with ``relative=False`` keeps the units of all streams.

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

    stream: str = "old"

    def terms(self, view: View, theta: Any) -> Terms:
        return lost(view, self.stream, self.unit(view, self.stream))


@dataclasses.dataclass(frozen=True)
class Avoidance(Scaled):
    r"""Energy of a second stream that gets in: directions the subspace is to avoid.

    .. math:: L = E‖A w‖^2 / E‖w‖^2, \qquad \partial A = 2 (A w) w^T / E‖w‖^2

    With orthonormal rows and `Reconstruction` its optimum is the leading eigenspace of ``C / tr C -
    weight F / tr F`` with ``F = E w w^T``, a signed covariance, which `signed_pca` gives in closed
    form. Units are as in `OldTask`.

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
        energy = self.unit(view, self.stream)
        value = jnp.sum(stream.weights * jnp.sum(codes**2, axis=1)) / energy
        left = 2 / energy * stream.weights[:, None] * codes
        # The curvature is ``2 F`` from the right; none of its eigenvalues exceeds the trace.
        most = 2 * _energy(view, self.stream)[0] / energy
        each = most * jnp.eye(codes.shape[1], dtype=codes.dtype)
        return Terms(value, left, stream.columns, codes, curvature=each)


@dataclasses.dataclass(frozen=True)
class EditLocality(Scaled):
    r"""Edit localisation: a rank-one edit of a linear layer is to spare all other inputs.

    An edit gives the key ``k`` a new value by ``W <- W + (y - W k) k_⊥^T / (k_⊥^T k)`` with
    ``k_⊥ = k - A^T A k``. It changes the outputs of another input ``x`` in proportion to ``k_⊥^T
    x``. The mean square of that is minimised, with ``C = E x x^T`` over the main stream:

    .. math:: L = E_k \frac{k_⊥^T C k_⊥}{(k_⊥^T k)^2} \frac{E‖k‖^2}{E‖x‖^2}, \qquad
              \frac{\partial L}{\partial k_⊥} =
              \Big(\frac{2 C k_⊥}{s^2} - \frac{2 q}{s^3} k\Big) \frac{E‖k‖^2}{E‖x‖^2}, \quad
              q = k_⊥^T C k_⊥, \; s = k_⊥^T k

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
    alone: ClassVar[bool] = True

    def terms(self, view: View, theta: Any) -> Terms:
        layout = view.operator.layout
        (keys, weights), codes = stream_and_codes(view, self.stream)
        outside = less(keys, view.operator.columns(codes))
        along = layout.dot(outside, view.stream.columns)[0]  # (e, k)
        q = jnp.sum(along**2 * view.stream.weights[None], axis=1)
        s = _inner(view, outside, keys)
        scale = self.unit(view, self.stream) / view.energy
        weights = weights * scale
        value = jnp.sum(weights * linalg.safe_divide(q, s**2))
        ck = layout.combine((along * view.stream.weights[None])[None], view.stream.columns)
        # The cotangent of A^T A k is that of k_⊥ with the other sign.
        one = -2 * weights * linalg.safe_divide(1.0, s**2)
        two = 2 * weights * linalg.safe_divide(q, s**3)
        cotangent = [a + b for a, b in zip(scaled(ck, one), scaled(keys, two), strict=True)]
        curvature = bend(cotangent, outside, weights / scale, codes)
        return Terms(value, *through(view, keys, codes, cotangent), curvature=curvature)


def lost(view: View, name: str | None, energy: jax.Array) -> Terms:
    """The energy of a stream that ``A^T A`` loses, over ``energy``."""
    stream, codes = stream_and_codes(view, name)
    rho = less(stream.columns, view.operator.columns(codes))
    value = jnp.sum(stream.weights * view.operator.layout.squares(rho))
    cotangent = scaled(rho, -2 * stream.weights / energy)
    curvature = 2 / energy * (codes.T * stream.weights[None]) @ codes
    factors = through(view, stream.columns, codes, cotangent)
    return Terms(value / energy, *factors, curvature=curvature)


def _energy(view: View, name: str) -> tuple[jax.Array, jax.Array]:
    """The mean energy of a stream's batch, and 1, or 0 if the batch holds nothing."""
    stream = view.extra[name]
    squares = view.operator.layout.squares(stream.columns)
    return jnp.sum(stream.weights * squares), jnp.sum(stream.weights)


def _blend(memory: jax.Array, energy: jax.Array, some: jax.Array, rate: jax.Array) -> jax.Array:
    return jnp.where(memory > 0, memory + rate * (energy - some * memory), energy)


def _inner(view: View, a: Columns, b: Columns) -> jax.Array:
    """The inner products ``(k,)`` of columns with columns."""
    dtype = view.operator.layout.dtype
    parts = [jnp.sum(x.astype(dtype) * y.astype(dtype), axis=1) for x, y in zip(a, b, strict=True)]
    return sum(parts[1:], parts[0])
