"""What a step is made of: states, the spaces that it runs in, and how inner states move."""

import abc
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core import linalg
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.states import at_least_float32
from lowrank_optax._core.types import Context, Eigenbasis, Inner, Law


class Events(NamedTuple):
    """How many steps were dropped, by reason: counters, ``(n,)`` each.

    The update of a dropped step is zero. Basis and inner state stay as they were, to the bit.

    Attributes:
      nonfinite: steps whose gradient or its square was not finite.
      zero: steps whose gradient was zero.
      eigh: steps whose small eigenproblem gave something that is not finite.
      inner: steps whose inner parts did. The gradient was sound, so here the basis did learn from
        it, and the inner state moved with the basis but took no step.
    """

    nonfinite: jax.Array
    zero: jax.Array
    eigh: jax.Array
    inner: jax.Array


class Metrics(NamedTuple):
    """What the last step saw, ``(n,)`` each, all from small arrays.

    Attributes:
      captured: ``‖Q^T g‖² / ‖g‖²``, the share of the gradient inside the basis.
      drift: ``1 - ‖C‖_F² / r_live``, the share of the old basis outside the new one.
      cosine: cosine of the angle between the gradient and the update inside the basis.
    """

    captured: jax.Array
    drift: jax.Array
    cosine: jax.Array


class GroupState(NamedTuple):
    """State of ``n`` problems of one form: groups of vectors, or matrices of one shape.

    Attributes:
      steps: steps taken, ``(n,)``.
      since: steps since the basis last took a correction in, and failures to, ``(n,)``.
      curvature: the curvature's state.
      basis: the basis's state; of matrices those of both sides, ``short`` and ``long``.
      inner: the inner parts' state, with a leading axis of problems.
      events: steps dropped by reason, `Events`.
      metrics: what the last step saw, `Metrics`.
    """

    steps: jax.Array
    since: jax.Array
    curvature: Any
    basis: Any
    inner: Any
    events: Events
    metrics: Metrics


class Given(NamedTuple):
    """What came with a step besides the gradient.

    Attributes:
      params: the parameters, or ``None``.
      extra: the extra arguments of ``update``.
      key: a random key of this step.
    """

    params: Any
    extra: Mapping[str, Any]
    key: jax.Array


class Seen(NamedTuple):
    """What a step knows before its basis turns.

    Attributes:
      g: the gradient, as the space reads it.
      square: its squared norm, ``(n,)``.
      accept: problems whose gradient is finite and not zero, ``(n,)``.
      due: problems whose basis is to be updated, ``(n,)``.
      turning: problems whose basis will change, ``(n,)``; some learn without it.
      broken: problems that failed already, ``(n,)``.
      measured: what the curvature and the basis made of the gradient; the space's own.
    """

    g: Any
    square: jax.Array
    accept: jax.Array
    due: jax.Array
    turning: jax.Array
    broken: jax.Array
    measured: Any


class Turned(NamedTuple):
    """Basis and inner state after phases 2 and 3; of a problem that was not due, as they were.

    Attributes:
      basis: the basis's state, as a loop carries it.
      curvature: the curvature's state.
      inner: the inner state in the new basis.
      failed: problems whose eigenproblem failed, ``(n,)``.
      drift: as in `Metrics`.
      told: what the correction tells the inner parts: the fields of `Context` after ``moved``.
    """

    basis: Any
    curvature: Any
    inner: Any
    failed: jax.Array
    drift: jax.Array
    told: tuple[Any, ...] = ()


class Space(abc.ABC):
    """``n`` independent problems of one form, and what a step does with each of them."""

    n: int
    dtype: Any

    @abc.abstractmethod
    def read(self, leaves: list[jax.Array]) -> Any:
        """The gradient of these problems, from all leaves of the tree."""

    @abc.abstractmethod
    def square(self, g: Any) -> jax.Array:
        """``‖g‖²``, ``(n,)``."""

    @abc.abstractmethod
    def look(
        self, g: Any, square: Any, accept: Any, due: Any, old: GroupState, given: Given
    ) -> Seen:
        """What is done at every step, whether a basis is due or not."""

    @abc.abstractmethod
    def still(self, seen: Seen, old: GroupState) -> Turned:
        """Basis and inner state as they are, in the form in which a loop carries them."""

    @abc.abstractmethod
    def absorb(self, seen: Seen, now: Turned) -> tuple[Turned, jax.Array | None]:
        """Phases 2 and 3; also the gradient in the new basis where that costs nothing more."""

    @abc.abstractmethod
    def settle(self, seen: Seen, now: Turned, old: GroupState, again: jax.Array) -> Turned:
        """What is left to do after the loop; ``again``: a problem failed twice in a row."""

    @abc.abstractmethod
    def follow(self, seen: Seen, now: Turned) -> tuple[Any, jax.Array]:
        """The gradient that the step is to follow, and its squared norm."""

    @abc.abstractmethod
    def project(self, basis: Any, g: Any) -> jax.Array:
        """``Q^T g``, ``(n, r)``."""

    @abc.abstractmethod
    def eigenbasis(self, basis: Any) -> Eigenbasis:
        """Eigenvalues and live slots as the step is to see them, ``(n, r)``."""

    def shares(self, u0: jax.Array, u: jax.Array, square: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``captured`` and ``cosine`` of `Metrics`; coordinates came as ``u0`` and became ``u``."""
        captured = linalg.safe_divide(jnp.sum(u0**2, axis=1), square)
        size = jnp.linalg.norm(u, axis=1) * jnp.sqrt(square)
        return captured, linalg.safe_divide(jnp.sum(u * u0, axis=1), size)

    @abc.abstractmethod
    def each(self, values: jax.Array) -> Any:
        """One number a problem, ``(n,)``, in the form that multiplies ``g``."""

    @abc.abstractmethod
    def write(self, step: Any) -> dict[int, jax.Array]:
        """Flat leaves by their places in the tree: the inverse of `read`."""

    @property
    def cuts(self) -> bool:
        """Whether some leaves of `write` are parts of larger arrays."""
        return True

    def whole(self, step: Any) -> dict[int, jax.Array]:
        """The leaves of `write` that are no parts of larger arrays."""
        return {}

    @abc.abstractmethod
    def at(self, values: jax.Array) -> dict[int, jax.Array]:
        """One number a problem for each of its leaves, by their places in the tree.

        Where a leaf has several problems, an array of their numbers that multiplies the leaf.
        """


class LinearSpace(Space):
    """A space whose steps are linear in the coordinates: whatever is outside is a complement's."""

    @abc.abstractmethod
    def unproject(self, basis: Any, *us: jax.Array) -> list[Any]:
        """``Q u`` of each, in one pass over the rows."""


def begin(n: int, dtype: Any, curvature: Any, basis: Any, inner: Any) -> GroupState:
    """The state before the first step; ``inner`` is that of one problem."""
    ints = lambda: jnp.zeros(n, jnp.int32)
    floats = lambda: jnp.zeros(n, dtype)
    return GroupState(
        steps=ints(),
        since=ints(),
        curvature=curvature,
        basis=basis,
        inner=jax.tree.map(lambda x: jnp.array(jnp.broadcast_to(x, (n, *x.shape))), inner),
        events=Events(ints(), ints(), ints(), ints()),
        metrics=Metrics(floats(), floats(), floats()),
    )


def only(layout: Layout, places: Any, tree: Any) -> Any:
    """The tree's leaves at ``places`` in float32 at least, and masks in place of all others."""
    leaves = enumerate(layout.leaves(tree))
    return layout.tree(
        [at_least_float32(x) if i in places else optax.MaskedNode() for i, x in leaves]
    )


def drift(c: jax.Array, live: jax.Array, moved: jax.Array) -> jax.Array:
    """``1 - ‖C‖_F² / r_live``, ``(n,)``, of a change of basis; ``live`` are the old slots."""
    return jnp.where(moved, 1 - stayed(c, live), 0)


def stayed(c: jax.Array, live: jax.Array) -> jax.Array:
    """The share of the old basis inside the new one, ``(n,)``."""
    return linalg.safe_divide(jnp.sum(c**2 * live[:, None], axis=(1, 2)), jnp.sum(live, axis=1))


def carry(inner: Inner, c: Any, moved: jax.Array, state: Any) -> Any:
    """One problem's inner state in the new basis, if there is one; ``c`` as in `transport`."""
    is_law = lambda x: isinstance(x, Law)
    return jax.tree.map(partial(_move, c, moved), inner.laws, state, is_leaf=is_law)


def _move(c: Any, moved: jax.Array, law: Law, state: Any) -> Any:
    """A state carried to the new basis if there is one."""
    if law.axes == 0:
        return state
    to = partial(linalg.transport, law, c)
    new = to(state) if law.centred or law.surrounded else jax.tree.map(to, state)
    return jax.tree.map(lambda a, b: jnp.where(moved, a, b), new, state)


def step_inside(inner: Inner, u0: jax.Array, state: Any, context: Context, active: jax.Array):
    """One problem: the inner parts run, and what they give is kept where it is finite.

    What they give for dead slots is nobody's: it may be 0/0, and must not cost the others the step.
    Returns ``u``, the state, and whether both were finite.
    """
    u, new = inner.update(u0, state, context)
    u = jnp.where(context.basis.live, u, 0)
    fine = linalg.finite(
        u, *(x for x in jax.tree.leaves(new) if jnp.issubdtype(x.dtype, jnp.inexact))
    )
    keep = active & fine
    new = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, state)
    return jnp.where(keep, u, 0), new, fine
