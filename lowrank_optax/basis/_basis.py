"""What every basis offers the engine, and how bases with eigenvalues regularise them."""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_count, check_decay, check_least
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import BasisUpdate, Columns, Eigenbasis, SymmetricCorrection, Vector


class Basis(abc.ABC):
    r"""An eigenbasis ``Q^T = T W`` of ``m`` stored rows ``W`` and a small ``(r, m)`` matrix ``T``.

    A basis of your own defines the abstract methods below. Where its state has the fields ``rows``
    (what `Layout.store` gave), ``t`` ``(n, r, m)`` and ``lam`` ``(n, r)``, the other methods work
    as they are; otherwise it overrides them. A basis is a frozen dataclass, so that it compares and
    hashes by its values, and `jax.jit` does not compile the same step twice.

    Shapes: ``n`` groups of leaves, each with a basis of its own; ``r`` coordinates; ``m`` stored
    rows; ``k`` columns of one correction. Every small array has a leading axis of groups. A slot
    without a direction is dead: its eigenvalue is 0 and its row of ``T`` is zero.

    Example:
      A basis of one direction, that of the last column:

      >>> import dataclasses, typing, jax.numpy as jnp, lowrank_optax as lro
      >>> class State(typing.NamedTuple):
      ...     rows: typing.Any
      ...     t: typing.Any
      ...     lam: typing.Any
      >>> @dataclasses.dataclass(frozen=True)
      ... class LastColumn(lro.basis.Basis):
      ...     def coordinates(self, layout):
      ...         return 1
      ...     def init(self, layout, key):
      ...         zeros = lambda *shape: jnp.zeros((layout.n, *shape), layout.dtype)
      ...         return State(layout.store(layout.zeros(1)), zeros(1, 1), zeros(1))
      ...     def absorb(self, layout, state, correction, accept, key):
      ...         old = layout.stored(state.rows)
      ...         live = layout.to_pieces(correction.weights[:, -1] > 0)
      ...         last = [jnp.where(on, y[-1:].astype(w.dtype), 0)
      ...                 for on, y, w in zip(live, correction.columns, old)]
      ...         square, cross = layout.gram(last), layout.dot(last, old)
      ...         fine = jnp.isfinite(square[:, 0, 0])
      ...         ok = accept & fine & (square[:, 0, 0] > 0)
      ...         rows = [jnp.where(on, y, w)
      ...                 for on, y, w in zip(layout.to_pieces(ok), last, old)]
      ...         t = jnp.where(ok[:, None, None], 1 / jnp.sqrt(square), state.t)
      ...         lam = jnp.where(ok[:, None], correction.weights[:, -1:] * square[:, 0], state.lam)
      ...         new = State(layout.store(rows), t, lam)
      ...         c = jnp.where(ok[:, None, None], t * cross * state.t, 1)
      ...         u = self.project(layout, new, correction.columns)
      ...         return lro.BasisUpdate(new, c, u, accept & ~fine)
      ...     def eigenbasis(self, state):
      ...         return lro.Eigenbasis(state.lam, state.lam > 0)
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), LastColumn(), lro.inner.LInvSqrt())
      >>> g, state = jnp.array([3., 4.]), tx.init(jnp.zeros(2))
      >>> print(tx.update(g, state)[0].round(3))              # g / ‖g‖
      [0.6 0.8]

    Two class attributes tell the engine which combinations make sense:

    Attributes:
      provides: names of what the basis offers to the other parts, a frozen set. ``"eigenvalues"``
        says that ``lam`` are those of the curvature, ``"outside"`` that `outside` is defined,
        ``"initial"`` that `absorb` starts from the curvature ``correction.initial``. Default
        ``{"eigenvalues"}``.
      needs: names of what the other parts have to offer, a frozen set, default empty.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"eigenvalues"})
    needs: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def coordinates(self, layout: Layout) -> int:
        """The number ``r`` of coordinates, the same for every group and fixed for all steps."""

    @abc.abstractmethod
    def init(self, layout: Layout, key: jax.Array) -> Any:
        """The state before the first correction: a tree of arrays, all slots dead.

        Shapes and dtypes have to be those of every later state. No two leaves may share a buffer,
        since the state may be donated. ``key`` is for what is drawn once.
        """

    @abc.abstractmethod
    def absorb(
        self,
        layout: Layout,
        state: Any,
        correction: SymmetricCorrection,
        accept: jax.Array,
        key: jax.Array,
    ) -> BasisUpdate:
        """Takes in ``sum_j w_j y_j y_j^T`` for the groups that ``accept`` it.

        What must hold for the `BasisUpdate` that it returns:

        * A group that does not accept keeps its state to the bit. Its ``c`` and ``u`` are not read.
        * A group that accepts and gets something that is not finite keeps its state as well, its
          ``c`` is the identity, and ``failed`` is true for it.
        * Otherwise ``c`` is ``Q_new^T Q_old``, zero in the rows and columns of dead slots, and
          ``u`` are the columns in the new basis.
        * A column of weight 0 has no effect, whatever finite numbers it holds; its ``u`` is not
          read.
        * A basis that cannot take weights of both signs raises ``ValueError`` where
          ``correction.signed``, which is static, says that there may be some.

        It is called for all groups at once, also in a loop that runs now and then: the state keeps
        its shapes and dtypes.

        Args:
          layout: the leaves and their groups.
          state: the state before.
          correction: ``k`` columns and their weights ``(n, k)``.
          accept: booleans ``(n,)``.
          key: a random key of this step.

        Returns:
          `BasisUpdate` with a ``c`` of ``(n, r, r)``, a ``u`` of ``(n, r, k)`` and ``failed``
          ``(n,)``.
        """

    @abc.abstractmethod
    def eigenbasis(self, state: Any) -> Eigenbasis:
        """Eigenvalues ``(n, r)`` as a step is to see them, and which slots ``(n, r)`` are live.

        They may come in any order; largest first is what `diagnose` and plots show best. A live
        slot may have the eigenvalue 0.
        """

    def measured(self, state: Any) -> jax.Array:
        """Eigenvalues ``(n, r)`` as they were measured, before the step's own regularisation."""
        return state.lam

    def outside(self, state: Any) -> jax.Array:
        """The curvature ``(n,)`` that a step is to see outside the basis.

        Only for bases with ``"outside"`` in ``provides``.
        """
        raise AttributeError(f"{type(self).__name__} knows of no curvature outside the basis.")

    def project(self, layout: Layout, state: Any, vector: Vector | Columns) -> jax.Array:
        """``Q^T v``, ``(n, r)``, or ``(n, r, k)`` for columns: one pass over the rows."""
        return jnp.einsum(
            "nrm,nm...->nr...", state.t, layout.dot(layout.stored(state.rows), vector)
        )

    def unproject(self, layout: Layout, state: Any, u: jax.Array) -> Vector | Columns:
        """``Q u``: ``(n, r)`` gives a vector, ``(n, k, r)`` columns. One pass over the rows."""
        return layout.combine(jnp.einsum("n...r,nrm->n...m", u, state.t), layout.stored(state.rows))


@dataclasses.dataclass(frozen=True)
class Regularization:
    """Which eigenvalues stay, and what is added to those; see `linalg.regularize` for the order."""

    eig_tol: float
    damping: float
    rdamping: float
    abs: bool
    truncate: int | None

    def check(self, owner: str, prefix: str) -> None:
        """Raises ``ValueError`` for values out of range; ``owner`` calls them ``prefix + name``."""
        check_decay(owner, prefix + "eig_tol", self.eig_tol)
        check_least(owner, prefix + "damping", self.damping)
        check_least(owner, prefix + "rdamping", self.rdamping)
        if self.truncate is not None:
            check_count(owner, prefix + "truncate", self.truncate)

    def apply(self, lam: jax.Array, live: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Eigenvalues ``(r,)``, 0 where they are dropped, and which slots ``(r,)`` stay live."""
        return linalg.regularize(
            lam,
            live,
            eig_tol=self.eig_tol,
            damping=self.damping,
            rdamping=self.rdamping,
            abs=self.abs,
            truncate=self.truncate,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regularized(Basis):
    """A basis whose eigenvalues are regularised twice, by two `Regularization` objects.

    The first one, ``stored``, acts on what the state keeps, so that its effect accumulates. The
    second one, ``used``, acts on what a single step reads, and leaves the state alone.

    Args:
      eig_tol: share of the largest eigenvalue at or below which an eigenvalue is dropped together
        with its direction; a number in [0, 1) without unit, default 1e-5.
      damping: number added to every eigenvalue that is stored, in units of the curvature, default
        0.
      rdamping: share of the largest eigenvalue that is added to every eigenvalue that is stored,
        without unit, default 0.
      abs: whether stored eigenvalues lose their signs, default no.
      truncate: number of eigenvalues that are stored at most, the largest ones; default ``None``,
        all.
      update_eig_tol: like ``eig_tol``, for what one step reads; default 0.
      update_damping: like ``damping``, for what one step reads; default 0.
      update_rdamping: like ``rdamping``, for what one step reads; default 0.
      update_abs: like ``abs``, for what one step reads; default no.
      update_truncate: like ``truncate``, for what one step reads; default ``None``.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"eigenvalues", "outside"})

    eig_tol: float = 1e-5
    damping: float = 0.0
    rdamping: float = 0.0
    abs: bool = False
    truncate: int | None = None
    update_eig_tol: float = 0.0
    update_damping: float = 0.0
    update_rdamping: float = 0.0
    update_abs: bool = False
    update_truncate: int | None = None

    def __post_init__(self):
        self.stored.check(type(self).__name__, "")
        self.used.check(type(self).__name__, "update_")

    @property
    def stored(self) -> Regularization:
        """What happens to eigenvalues before they are kept."""
        return Regularization(self.eig_tol, self.damping, self.rdamping, self.abs, self.truncate)

    @property
    def used(self) -> Regularization:
        """What happens to eigenvalues that are kept before one step reads them."""
        return Regularization(
            self.update_eig_tol,
            self.update_damping,
            self.update_rdamping,
            self.update_abs,
            self.update_truncate,
        )

    def eigenbasis(self, state: Any) -> Eigenbasis:
        read = lambda lam: self.used.apply(lam, lam != 0)
        return Eigenbasis(*jax.vmap(read)(self.measured(state)))

    def outside(self, state: Any) -> jax.Array:
        """The largest eigenvalue ``(n,)`` that may have been dropped, as one step sees it."""
        lam = self.measured(state)
        top = jnp.max(jnp.abs(lam), axis=1, initial=0)
        least = jnp.maximum(self.eig_tol, linalg.rounding(lam)) * top
        return least + self.update_damping + self.update_rdamping * top
