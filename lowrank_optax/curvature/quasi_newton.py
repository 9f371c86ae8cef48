"""Quasi-Newton curvatures: corrections that make the kept matrix agree with the last product.

The kept matrix is ``B = Q diag(lam) Q^T + gamma (I - Q Q^T)``, ``s`` is a probe (by default the
last step) and ``y = H s``. They need a basis that adds corrections up, such as `Eigen` with
``beta=None``: a correction makes ``B`` fit ``y`` exactly, and an average would take in a share of
it only.
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
from lowrank_optax.curvature.hessian import LastUpdate, Probing
from lowrank_optax.curvature.probes import Probe, StepProbe
from lowrank_optax.curvature.products import ExactProduct, Product


class Secant(NamedTuple):
    """State of a quasi-Newton curvature.

    Attributes:
      last: what is needed of the last update of the basis.
      gamma: ``(n,)`` curvature assumed outside the basis; 0 until a pair has told it.
    """

    last: LastUpdate
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
            self.no_update(layout),
            jnp.full(layout.n, 0 if self.gamma is None else self.gamma, layout.dtype),
        )

    def outside(self, state: Secant) -> jax.Array:
        return jnp.where(state.gamma > 0, state.gamma, 1)

    def correct(self, layout: Layout, state: Secant, evidence: Evidence):
        s, y, last = self.pair(layout, state.last, evidence)
        # NaN passes every comparison below. So the basis rejects the pair, and it is counted.
        fine = layout.to_pieces(jnp.isfinite(layout.inner(y, y)))
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
        """Columns and their weights ``(n, k)``, 0 where the pair is skipped.

        A ``y`` that is not finite arrives as NaN. It must not be skipped, or it is not counted.
        """

    def rescale(self, old: jax.Array, new: jax.Array) -> jax.Array:
        """``gamma`` after a pair that suggests ``new``; ``old`` is 0 where no pair came before."""
        return new

    def _rescaled(self, layout: Layout, state: Secant, s: Vector, y: Vector) -> jax.Array:
        """``gamma`` after a pair: ``y·y / y·s`` is suggested where it is a positive curvature."""
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
    ``B = gamma I``, also for a ``complement=lro.inner.LInv()``. There ``gamma`` is ``y·y/y·s`` of
    the last pair, and 1 before there is one. A pair is skipped where ``s = 0`` or ``y·s`` is too
    small in spite of the damping.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> curvature = lro.curvature.BFGS(lro.curvature.GradientProbe())
      >>> tx = lro.scale_by_lre(curvature, lro.basis.FullMatrix(None), lro.inner.LInv())
      >>> h, x = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0]); state = tx.init(x)
      >>> step = jax.jit(lambda x, s: tx.update(h * x, s, x, value_fn=lambda x: h @ x**2 / 2))
      >>> b = step(x, state)[1].basis.matrix[0]
      >>> print((b @ jnp.array([1.0, 2.0])).round(2))    # B s = y for s = g = (1, 2)
      [1. 4.]

    Args:
      probe: `Probe` that chooses ``s``, by default `StepProbe`.
      product: `Product` that computes ``y``, by default `ExactProduct`; `GradientDifference` needs
        no ``value_fn``.
      orthogonalize: whether the part of ``s`` in the basis is taken out; ``False`` by default.
      damping: share ``c`` of ``s·Bs``, in (0, 1), below which ``y·s`` is not let; ``None`` for no
        damping.
      gamma: positive curvature outside the basis; ``None`` (the default) takes it from the pairs.

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
            y = [t * a + (1 - t) * c for t, a, c in zip(layout.to_pieces(theta), y, b, strict=True)]
            sy = theta * sy + (1 - theta) * sbs
        least = _SLACK * jnp.sqrt(layout.inner(s, s)) * jnp.sqrt(layout.inner(y, y))
        skip = (sbs <= 0) | (sy <= least)
        signs = jnp.where(skip[:, None], 0, jnp.array([1, -1], layout.dtype))
        return [scale(layout, _root_inverse(sy), y), scale(layout, _root_inverse(sbs), b)], signs


@dataclasses.dataclass(frozen=True)
class SR1(QuasiNewton):
    r"""Symmetric rank one: the correction is ``± v v^T``, after which ``B s = y``.

    .. math:: v = (y - B s)/\sqrt{|(y - B s) \cdot s|}, \quad \text{sign of } (y - B s) \cdot s

    On a quadratic, ``B`` is its Hessian after ``d`` independent probes. A pair is skipped where
    ``|(y - Bs)·s| <= tol ‖y - Bs‖ ‖s‖``, and where ``y - B s`` is within rounding of zero.

    Outside the basis ``B = gamma I``. There ``gamma`` is ``2 y·y/y·s`` of the first pair with
    ``y·s > 0``, and 1 before it. A smaller one, from ``y·s/s·s`` up to ``y·y/y·s`` itself, would
    make ``B`` indefinite or singular in the first update. Later pairs do not change ``gamma``,
    because that would undo what ``B`` learned from the earlier ones.

    Eigenvalues can be negative: ``Eigen(..., update_abs=True)`` makes a step descend.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> curvature = lro.curvature.SR1(lro.curvature.NormalProbe())
      >>> tx = lro.scale_by_lre(curvature, lro.basis.FullMatrix(None), lro.inner.LInv())
      >>> h, x = jnp.array([1.0, -2.0]), jnp.array([1.0, 1.0]); state = tx.init(x)
      >>> step = jax.jit(lambda x, s: tx.update(h * x, s, x, value_fn=lambda x: h @ x**2 / 2))
      >>> for _ in range(2):
      ...     _, state = step(x, state)
      >>> bool(jnp.allclose(state.basis.matrix[0], jnp.diag(h), atol=1e-3))
      True

    Args:
      probe: `Probe` that chooses ``s``, by default `StepProbe`.
      product: `Product` that computes ``y``, by default `ExactProduct`; `GradientDifference` needs
        no ``value_fn``.
      orthogonalize: whether the part of ``s`` in the basis is taken out; ``False`` by default.
      tol: smallest cosine between ``y - B s`` and ``s`` of a pair that is not skipped.
      gamma: positive curvature outside the basis; ``None`` (the default) takes it from the first
        pair.

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
    inverse of a curvature: a step multiplies by it (``lro.inner.LPower(1.0)``). Along a direction
    that was shrunk the eigenvalue is small. The basis has to hold all of these directions, because
    one that it drops goes back to ``gamma``. Experimental.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> curvature = lro.curvature.ShorR(lro.curvature.GradientProbe(), alpha=0.5)
      >>> tx = lro.scale_by_lre(curvature, lro.basis.FullMatrix(None), lro.inner.LPower(1.0))
      >>> h, x = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0]); state = tx.init(x)
      >>> step = jax.jit(lambda x, s: tx.update(h * x, s, x, value_fn=lambda x: h @ x**2 / 2))
      >>> y = jnp.array([1.0, 4.0])               # H g
      >>> print((step(x, state)[1].basis.matrix[0] @ y / y).round(2))    # alpha² along y
      [0.25 0.25]

    Args:
      probe: `Probe` that chooses ``s``, by default `StepProbe`.
      product: `Product` that computes ``y``, by default `ExactProduct`; `GradientDifference` needs
        no ``value_fn``.
      orthogonalize: whether the part of ``s`` in the basis is taken out; ``False`` by default.
      alpha: factor by which space shrinks along ``B^{1/2} y``, in (0, 1).
      gamma: positive metric outside the basis.

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
