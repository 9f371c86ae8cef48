"""Quasi-Newton curvatures: corrections that make the kept matrix agree with the last product.

With ``B = Q diag(lam) Q^T + gamma (I - Q Q^T)`` as it is kept, ``s`` a probe (by default the last
step) and ``y = H s``. They are meant for a basis that adds corrections up, `Eigen` with
``beta=None``: an average would weigh a change that was made to fit exactly.
"""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_least
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import Correction, Vector
from lowrank_optax.curvature._curvature import Evidence, scale
from lowrank_optax.curvature.hessian import (
    ExactProduct,
    Last,
    Probe,
    Probing,
    Product,
    StepProbe,
)


class Secant(NamedTuple):
    """State of a quasi-Newton curvature.

    Attributes:
      last: the last update of the basis.
      gamma: ``(n,)`` the curvature assumed outside the basis; 0 until a pair has told it.
    """

    last: Last
    gamma: jax.Array


@dataclasses.dataclass(frozen=True)
class QuasiNewton(Probing):
    """A correction of ``B`` by a pair ``(s, y)``."""

    probe: Probe = StepProbe()
    product: Product = ExactProduct()
    gamma: float | None = dataclasses.field(default=None, kw_only=True)

    provides: ClassVar[frozenset[str]] = frozenset({"probe", "outside"})

    def __post_init__(self):
        super().__post_init__()
        if self.gamma is not None:
            check_least(type(self).__name__, "gamma", self.gamma, strict=True)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"initial"}

    def init(self, layout: Layout, window: int) -> Secant:
        return Secant(
            self.start(layout),
            jnp.full(layout.n, 0 if self.gamma is None else self.gamma, layout.dtype),
        )

    def outside(self, state: Secant) -> jax.Array:
        return jnp.where(state.gamma > 0, state.gamma, 1)

    def correct(self, layout: Layout, state: Secant, evidence: Evidence):
        s, y, last = self.pair(layout, state.last, evidence)
        # NaN passes every comparison below, so that the basis rejects the pair and it is counted.
        fine = layout.to_leaves(jnp.isfinite(layout.inner(y, y)))
        y = [jnp.where(ok, x, jnp.nan) for ok, x in zip(fine, y, strict=True)]
        state = Secant(
            last, jnp.where(evidence.due, self._rescaled(layout, state, s, y), state.gamma)
        )
        gamma = self.outside(state)
        columns, weights = self.difference(layout, s, y, evidence, gamma)
        weights = jnp.where(layout.inner(s, s)[:, None] > 0, weights, 0)
        on = [(weights[:, j] != 0).astype(layout.dtype) for j in range(len(columns))]
        parts = [scale(layout, c, column) for c, column in zip(on, columns, strict=True)]
        correction = Correction(
            [jnp.stack(leaf) for leaf in zip(*parts, strict=True)],
            weights=weights,
            signed=True,
            initial=gamma,
        )
        return self.probed(layout, evidence, correction, (s, y)), state

    @abc.abstractmethod
    def difference(
        self, layout: Layout, s: Vector, y: Vector, evidence: Evidence, gamma: jax.Array
    ) -> tuple[list[Vector], jax.Array]:
        """Columns and their weights ``(n, k)``, 0 where the pair is to be skipped.

        A ``y`` that is not finite arrives as NaN, which must not be skipped.
        """

    def rescale(self, old: jax.Array, new: jax.Array) -> jax.Array:
        """``gamma`` after a pair that suggests ``new``; ``old`` is 0 if there was none before."""
        return new

    def _rescaled(self, layout: Layout, state: Secant, s: Vector, y: Vector) -> jax.Array:
        """``y·y / y·s`` where that is a curvature."""
        if self.gamma is not None:
            return state.gamma
        ss, sy, yy = layout.inner(s, s), layout.inner(s, y), layout.inner(y, y)
        new = linalg.safe_divide(yy, sy)
        good = (sy > _SLACK * jnp.sqrt(ss) * jnp.sqrt(yy)) & jnp.isfinite(new)
        return jnp.where(good, self.rescale(state.gamma, new), state.gamma)


@dataclasses.dataclass(frozen=True)
class BFGS(QuasiNewton):
    r"""Damped BFGS: the correction is ``+ u u^T - v v^T``, after which ``B s = y``.

    .. math:: u = y/\sqrt{y \cdot s}, \qquad v = B s/\sqrt{s \cdot B s}

    Where ``y·s < c s·Bs``, ``y`` is first replaced by ``theta y + (1-theta) B s`` with
    ``theta = (1-c) s·Bs / (s·Bs - y·s)``, which keeps ``B`` positive definite. Outside the basis
    ``B = gamma I``, also for a ``complement=lro.inner.LInv()``, with ``gamma = y·y/y·s`` of the
    last pair, 1 before there is one. Skipped while ``s = 0`` or where ``y·s`` stays too small.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.lre(1.0, lro.curvature.BFGS(), lro.basis.Eigen(8, None, eig_tol=0.),
      ...              lro.inner.LInv(), complement=lro.inner.LInv())
      >>> loss = lambda x: jnp.sum(jnp.arange(1., 6.) * (x - 1)**2)
      >>> x = jnp.zeros(5); state = tx.init(x)
      >>> update = jax.jit(lambda g, state, x: tx.update(g, state, x, value_fn=loss))
      >>> for _ in range(12):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = x + updates
      >>> bool(loss(x) < 1e-6)
      True

    Args:
      probe: how ``s`` is chosen.
      product: how ``y`` is computed; `GradientDifference` needs no ``value_fn``.
      orthogonalize: take out of ``s`` what the basis already spans.
      damping: ``c``, the share of ``s·Bs`` that ``y·s`` is held to; ``None`` for no damping.
      gamma: curvature outside the basis; ``None`` takes it from the pairs.

    Raises:
      ValueError: for a damping outside (0, 1), a ``gamma`` that is not positive, parts that do not
        fit together, and by ``update`` for a missing argument.

    Cost: one product and two passes over the rows on the steps that update the basis.

    Source: Nocedal and Wright, "Numerical Optimization", 2006, chapters 6 and 18.3 (Powell's
    damping).
    """

    damping: float | None = dataclasses.field(default=0.2, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.damping is not None:
            check_least("BFGS", "damping", self.damping, strict=True)
            check(
                self.damping < 1,
                f"BFGS: damping is {self.damping!r}; pass a number in (0, 1) or None.",
            )

    def difference(
        self, layout: Layout, s: Vector, y: Vector, evidence: Evidence, gamma: jax.Array
    ) -> tuple[list[Vector], jax.Array]:
        b = evidence.apply(s, gamma)
        sy, sbs = layout.inner(s, y), layout.inner(s, b)
        if self.damping is not None:
            theta = jnp.where(
                sy < self.damping * sbs, (1 - self.damping) * linalg.safe_divide(sbs, sbs - sy), 1
            )
            y = [t * a + (1 - t) * c for t, a, c in zip(layout.to_leaves(theta), y, b, strict=True)]
            sy = theta * sy + (1 - theta) * sbs
        least = _SLACK * jnp.sqrt(layout.inner(s, s)) * jnp.sqrt(layout.inner(y, y))
        skip = (sbs <= 0) | (sy <= least)
        signs = jnp.where(skip[:, None], 0, jnp.array([1, -1], layout.dtype))
        return [scale(layout, _root_inverse(sy), y), scale(layout, _root_inverse(sbs), b)], signs


@dataclasses.dataclass(frozen=True)
class SR1(QuasiNewton):
    r"""Symmetric rank one: the correction is ``± v v^T``, after which ``B s = y``.

    .. math:: v = (y - B s)/\sqrt{|(y - B s) \cdot s|}, \quad \text{sign of } (y - B s) \cdot s

    On a quadratic, ``B`` is its Hessian after ``d`` independent probes. Skipped where
    ``|(y - Bs)·s| <= tol ‖y - Bs‖ ‖s‖``, and where ``y - B s`` is within rounding of zero. Outside
    the basis ``B = gamma I`` with ``gamma = 2 y·y/y·s`` of the first pair in which ``y·s > 0``, 1
    before that: from ``y·s/s·s`` to ``y·y/y·s`` itself the first update would make ``B`` indefinite
    or singular. Later pairs do not change it: they would undo what ``B`` learned of earlier ones.

    Eigenvalues can be negative: ``Eigen(..., update_abs=True)`` makes a step descend.

    Args:
      probe: how ``s`` is chosen.
      product: how ``y`` is computed; `GradientDifference` needs no ``value_fn``.
      orthogonalize: take out of ``s`` what the basis already spans.
      tol: of the rule for skipping.
      gamma: curvature outside the basis; ``None`` takes it from the first pair.

    Raises:
      ValueError: for a negative ``tol``, a ``gamma`` that is not positive, parts that do not fit
        together, and by ``update`` for a missing argument.

    Cost: one product and two passes over the rows on the steps that update the basis.

    Source: Nocedal and Wright, "Numerical Optimization", 2006, section 6.2.
    """

    tol: float = dataclasses.field(default=1e-8, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        check_least("SR1", "tol", self.tol)

    def rescale(self, old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(old > 0, old, 2 * new)

    def difference(
        self, layout: Layout, s: Vector, y: Vector, evidence: Evidence, gamma: jax.Array
    ) -> tuple[list[Vector], jax.Array]:
        rest = [a - b for a, b in zip(y, evidence.apply(s, gamma), strict=True)]
        norm = lambda v: jnp.sqrt(layout.inner(v, v))
        size, fit = norm(rest), layout.inner(rest, s)
        rounding = jnp.finfo(layout.dtype).eps ** (2 / 3) * norm(y)  # it adds up in B
        skip = (jnp.abs(fit) <= self.tol * size * norm(s)) | (size <= rounding)
        signs = jnp.where(skip, 0, jnp.where(fit < 0, -1, 1).astype(layout.dtype))
        return [scale(layout, _root_inverse(jnp.abs(fit)), rest)], signs[:, None]


@dataclasses.dataclass(frozen=True)
class ShorR(QuasiNewton):
    r"""Shor's r-algorithm: the correction is ``-(1 - alpha²) (B y)(B y)^T / y·By``.

    Space is shrunk along the change ``y`` of the gradient. Here ``B`` is the metric itself, the
    inverse of a curvature: a step multiplies by it, ``lro.inner.LPower(1.0)``, and where it is not
    the identity its eigenvalues are small. So the basis has to hold every direction that was
    shrunk: one that it drops goes back to ``gamma``. Experimental.

    Args:
      probe: how ``s`` is chosen.
      product: how ``y`` is computed; `GradientDifference` needs no ``value_fn``.
      orthogonalize: take out of ``s`` what the basis already spans.
      alpha: the factor by which space shrinks along ``B^{1/2} y``.
      gamma: the metric outside the basis.

    Raises:
      ValueError: for an ``alpha`` outside (0, 1), a ``gamma`` that is not positive, parts that do
        not fit together, and by ``update`` for a missing argument.

    Cost: one product and two passes over the rows on the steps that update the basis.

    Source: Burke, Lewis and Overton, "The speed of Shor's R-algorithm", IMA Journal of Numerical
    Analysis 2008.
    """

    alpha: float = dataclasses.field(default=0.5, kw_only=True)
    gamma: float | None = dataclasses.field(default=1.0, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        check(self.gamma is not None, "ShorR: gamma is None; pass a positive number.")
        check_least("ShorR", "alpha", self.alpha, strict=True)
        check(self.alpha < 1, f"ShorR: alpha is {self.alpha!r}; pass a number in (0, 1).")

    def difference(
        self, layout: Layout, s: Vector, y: Vector, evidence: Evidence, gamma: jax.Array
    ) -> tuple[list[Vector], jax.Array]:
        b = evidence.apply(y, gamma)
        yby = layout.inner(y, b)
        weight = jnp.where(yby <= 0, 0, self.alpha**2 - 1).astype(layout.dtype)
        return [scale(layout, _root_inverse(yby), b)], weight[:, None]


_SLACK = 1e-8
"""The cosine between ``s`` and ``y`` below which a pair tells no curvature."""


def _root_inverse(a: jax.Array) -> jax.Array:
    """``1/sqrt(a)``, 0 where ``a <= 0``; what is not finite stays so."""
    return jnp.where(a <= 0, 0, 1 / jnp.sqrt(jnp.where(a <= 0, 1, a)))
