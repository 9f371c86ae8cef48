"""Curvatures made from products of the Hessian with probes."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check
from lowrank_optax._core.layout import Layout, stack
from lowrank_optax._core.types import Correction, Outside, Vector
from lowrank_optax.curvature._curvature import (
    Curvature,
    Evidence,
    across,
    check_is,
    empty_params_row,
    flat,
    need_params,
    read_row,
    replace_row,
    scale,
)
from lowrank_optax.curvature.probes import Probe, RademacherProbe, StepProbe
from lowrank_optax.curvature.products import ExactProduct, Product


class LastUpdate(NamedTuple):
    """What a pair needs of the last update of the basis; ``()`` for what it does not need.

    Attributes:
      params: parameters of that step, a row ``(1, size)`` for every piece.
      g: gradient of that step, a row likewise.
      begun: ``(n,)`` booleans, true once there was an update.
    """

    params: Any
    g: Any
    begun: Any


@dataclasses.dataclass(frozen=True)
class Probing(Curvature):
    """A curvature made from pairs ``(z, H z)``, one for each update of the basis.

    A basis turns towards the pair that it absorbs. In the new basis that pair overestimates the
    curvature, up to ``d/r`` times. So inner parts that average the curvature themselves, such as
    `HutchinsonAdam`, get a second pair with a new random probe. Its product is computed for such
    parts alone. A probe that is not random gives them the first pair.

    All groups share one product ``H z``. What a group sees of it has contributions from the other
    groups' parts of ``z``, as a difference of gradients has.
    """

    probe: Probe = RademacherProbe()
    product: Product = ExactProduct()
    orthogonalize: bool = False

    provides: ClassVar[frozenset[str]] = frozenset({"probe"})
    functions: ClassVar[frozenset[str] | None] = frozenset({"value_fn"})

    def __post_init__(self):
        owner = type(self).__name__
        check_is(owner, "probe", self.probe, Probe, "a probe such as RademacherProbe()")
        check_is(owner, "product", self.product, Product, "a product such as ExactProduct()")
        check(
            not self.product.differences
            or (isinstance(self.probe, StepProbe) and not self.orthogonalize),
            f"{owner}: product is {self.product!r}, which knows only the step that was taken; "
            "pass probe=StepProbe() and orthogonalize=False, or product=ExactProduct().",
        )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"complement"} if self.product.differences else ())

    def no_update(self, layout: Layout) -> LastUpdate:
        """What is known before the first update of the basis."""
        params, g = self.probe.steps, self.product.differences
        return LastUpdate(
            empty_params_row(layout) if params else (),
            layout.store(layout.zeros(1)) if g else (),
            jnp.zeros(layout.n, bool) if params or g else (),
        )

    def pair(
        self, layout: Layout, last: LastUpdate, evidence: Evidence
    ) -> tuple[Vector, Vector, LastUpdate]:
        """``z`` and ``H z``, both zero where there is none, and this step as the last update."""
        owner, due = type(self).__name__, evidence.due
        new, step = last, None
        if self.probe.steps:
            x = flat(layout, need_params(owner, evidence.params))
            step = scale(
                layout,
                (last.begun & due).astype(layout.dtype),
                [a - b for a, b in zip(x, read_row(layout, last.params), strict=True)],
            )
            new = new._replace(
                params=replace_row(layout, due, last.params, x), begun=last.begun | due
            )
        # A group that is not due may hold a gradient that is not finite.
        g = scale(layout, due.astype(layout.dtype), evidence.g)
        if step is not None and self.product.differences:
            y = [a - b for a, b in zip(g, read_row(layout, last.g), strict=True)]
            y = scale(layout, (last.begun & due).astype(layout.dtype), y)
            return step, y, new._replace(g=replace_row(layout, due, last.g, g))
        z = scale(layout, due.astype(layout.dtype), self.probe.draw(layout, evidence.key, g, step))
        if self.orthogonalize:
            rest = [a - b for a, b in zip(z, evidence.project(z), strict=True)]
            floor = jnp.finfo(layout.dtype).eps * layout.inner(z, z)
            z = scale(layout, (layout.inner(rest, rest) > floor).astype(layout.dtype), rest)
        return z, across(evidence, self.product.multiply(owner, layout, evidence, z)), new

    def probed(
        self, layout: Layout, evidence: Evidence, correction: Correction, pair: tuple[Vector, ...]
    ) -> Correction:
        """The correction, made of ``pair``, with the pair that inner parts are to read."""
        z, hz = pair
        if not evidence.probed or self.product.differences or not self.probe.random:
            return correction._replace(probe=(z, hz))
        key = jax.random.fold_in(evidence.key, 1)
        g = scale(layout, evidence.due.astype(layout.dtype), evidence.g)
        z = self.probe.draw(layout, key, g, None)
        z = scale(layout, evidence.due.astype(layout.dtype), z)
        hz = across(evidence, self.product.multiply(type(self).__name__, layout, evidence, z))
        return correction._replace(probe=(z, hz), independent=True)


class Hessian(NamedTuple):
    """State of `HutchinsonHessian` and `SquaredHessian`.

    Attributes:
      last: what is needed of the last update of the basis.
      square: ``(n,)`` average of the mean square eigenvalue outside the basis.
      estimates: ``(n,)`` number of estimates in that average.
    """

    last: LastUpdate
    square: jax.Array
    estimates: jax.Array


class _Averaged(Probing):
    """What the two curvatures below share: an estimate of the Hessian outside the basis."""

    learns: ClassVar[bool] = True

    def init(self, layout: Layout, window: int) -> Hessian:
        return Hessian(
            self.no_update(layout),
            jnp.zeros(layout.n, layout.dtype),
            jnp.zeros(layout.n, jnp.int32),
        )

    def learn(self, layout: Layout, state: Hessian, due: jax.Array, seen: Outside) -> Hessian:
        some = due & (seen.probe > 0)
        new = _KEEP * state.square + (1 - _KEEP) * linalg.safe_divide(seen.product, seen.probe)
        return state._replace(
            square=jnp.where(some, new, state.square),
            estimates=linalg.tally(state.estimates, some),
        )

    def root_mean_square(self, state: Hessian) -> jax.Array:
        """The root mean square eigenvalue outside the basis, ``(n,)``; 1 while it is unknown."""
        known = 1 - jnp.asarray(_KEEP, state.square.dtype) ** state.estimates
        size = jnp.sqrt(linalg.safe_divide(state.square, known))
        return jnp.where(size > 0, size, 1)


_KEEP = 0.99
"""Decay of the average outside the basis, an update."""


@dataclasses.dataclass(frozen=True)
class HutchinsonHessian(_Averaged):
    r"""The Hessian by random products: the correction is the symmetric part of ``H z z^T``.

    .. math:: \mathbb{E}[H z z^T] = H \quad\text{for}\quad \mathbb{E}[z z^T] = I

    The part of ``z`` outside the span of the basis and ``H z`` contributes noise of mean zero. Its
    size, ``‖z‖ ‖H z‖``, is about ``sqrt(d) ‖H‖_F``, far beyond any eigenvalue. So that part is left
    out, and the correction is

    .. math:: (H z\,z^T P + P z\,z^T H)/2, \quad P\ \text{the projector on}\ [Q, H z]

    Eigenvalues can be negative, so the curvature goes with `Eigen`, `RandomizedEigen`, `GGT` and
    `FullMatrix`. They are those of ``H`` with the noise of an average over about ``1/(1 - beta)``
    products. For Newton's step take ``Eigen(rank, beta=0.99, count_columns=False)`` or a larger
    ``beta``. `SquaredHessian` finds the same directions sooner, at less cost and in every basis.

    Outside the basis (``complement=lro.inner.LInv()``) the curvature is taken to be the root mean
    square eigenvalue there, from one more product an update.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> curvature = lro.curvature.HutchinsonHessian(lro.curvature.GradientProbe(), within=False)
      >>> tx = lro.scale_by_lre(curvature, lro.basis.FullMatrix(None), lro.inner.LInv())
      >>> h, x = jnp.array([1.0, -2.0]), jnp.array([1.0, 1.0]); state = tx.init(x)
      >>> step = jax.jit(lambda x, s: tx.update(h * x, s, x, value_fn=lambda x: h @ x**2 / 2))
      >>> matrix = step(x, state)[1].basis.matrix[0]
      >>> print(matrix.round(2))                  # I + (H g g^T + g g^T H)/2, g = (1, -2)
      [[ 2.  1.]
       [ 1. -7.]]

    Args:
      probe: `Probe` that chooses ``z``, by default `RademacherProbe`.
      product: `Product` that computes ``H z``, by default `ExactProduct`. All but
        `GradientDifference` need ``value_fn`` (params -> loss) and ``params`` in ``update``.
      orthogonalize: whether the part of ``z`` in the basis is taken out, at two more passes over
        the rows; ``False`` by default. A probe inside the basis then corrects nothing.
      within: whether the part of ``z`` outside the basis and ``H z`` is left out, at six more
        passes over the rows; ``True`` by default. ``False`` keeps it, unbiased in every entry. The
        original LRE has ``within=False`` and the engine's ``symmetrize=True``.

    Raises:
      ValueError: for parts that do not fit together, and by ``update`` for a missing argument.

    Cost: one product on the steps that update the basis, and none on the others; a second one where
    an inner part or the complement reads products.

    Source: Martens, Sutskever and Swersky, "Estimating the Hessian by Back-propagating Curvature",
    ICML 2012; Hutchinson, "A stochastic estimator of the trace", 1990.
    """

    within: bool = dataclasses.field(default=True, kw_only=True)
    provides: ClassVar[frozenset[str]] = frozenset({"probe", "outside"})

    def correct(self, layout: Layout, state: Hessian, evidence: Evidence):
        z, hz, last = self.pair(layout, state.last, evidence)
        some = (layout.inner(z, z) > 0).astype(layout.dtype)
        right = _inside(layout, evidence, z, hz) if self.within else z
        correction = Correction(stack(hz), right=stack(right), weights=some[:, None])
        return self.probed(layout, evidence, correction, (z, hz)), state._replace(last=last)

    def outside(self, state: Hessian) -> jax.Array:
        return self.root_mean_square(state)


@dataclasses.dataclass(frozen=True)
class SquaredHessian(_Averaged):
    r"""The square of the Hessian by random products: the correction is ``(H z)(H z)^T``.

    .. math:: \mathbb{E}[H z\,(H z)^T] = H^2 \quad\text{for}\quad \mathbb{E}[z z^T] = I

    Its eigenvectors are those of ``H``, in the order of ``|lam|``, and its eigenvalues are the
    squares. A step with ``LInvSqrt()`` is ``|H|^{-1} g``, which descends along negative curvature,
    too. The correction is one column and never negative, so it goes with every basis. Leading
    directions are found soon, because they stand out by the square of their eigenvalue.

    Outside the basis (``complement=lro.inner.LInvSqrt()``) the square is taken to be the mean
    square eigenvalue there, from one more product an update.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> curvature = lro.curvature.SquaredHessian(lro.curvature.GradientProbe())
      >>> tx = lro.scale_by_lre(curvature, lro.basis.FullMatrix(None), lro.inner.LInvSqrt())
      >>> h, x = jnp.array([1.0, -2.0]), jnp.array([1.0, 1.0]); state = tx.init(x)
      >>> step = jax.jit(lambda x, s: tx.update(h * x, s, x, value_fn=lambda x: h @ x**2 / 2))
      >>> print(step(x, state)[1].basis.matrix[0])    # I + (H g)(H g)^T, H g = (1, 4)
      [[ 2.  4.]
       [ 4. 17.]]

    Args:
      probe: `Probe` that chooses ``z``, by default `RademacherProbe`. One that is not random still
        gives columns made of curvature alone.
      product: `Product` that computes ``H z``, by default `ExactProduct`. All but
        `GradientDifference` need ``value_fn`` (params -> loss) and ``params`` in ``update``.
      orthogonalize: whether the part of ``z`` in the basis is taken out, at two more passes over
        the rows; ``False`` by default.

    Raises:
      ValueError: for parts that do not fit together, and by ``update`` for a missing argument.

    Cost: one product on the steps that update the basis, and none on the others; a second one where
    an inner part or the complement reads products.

    Source: the range finder of Halko, Martinsson and Tropp, "Finding structure with randomness",
    SIAM Review 2011, as a running average.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"probe", "outside"})

    def correct(self, layout: Layout, state: Hessian, evidence: Evidence):
        z, hz, last = self.pair(layout, state.last, evidence)
        some = (layout.inner(z, z) > 0).astype(layout.dtype)
        correction = Correction(stack(hz), weights=some[:, None])
        return self.probed(layout, evidence, correction, (z, hz)), state._replace(last=last)

    def outside(self, state: Hessian) -> jax.Array:
        return self.root_mean_square(state) ** 2


def _inside(layout: Layout, evidence: Evidence, z: Vector, hz: Vector) -> Vector:
    """The part of ``z`` in the span of the basis and ``H z``."""
    less = lambda a, b: [x - y for x, y in zip(a, b, strict=True)]
    known = evidence.project(z)
    rest = less(hz, evidence.project(hz))
    rest = less(rest, evidence.project(rest))  # twice is enough
    size = layout.inner(rest, rest)
    some = size > 1e3 * jnp.finfo(layout.dtype).eps * layout.inner(hz, hz)
    along = jnp.where(some, linalg.safe_divide(layout.inner(rest, z), size), 0)
    return [a + b for a, b in zip(known, scale(layout, along, rest), strict=True)]
