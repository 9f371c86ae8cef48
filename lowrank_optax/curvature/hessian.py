"""Products of the Hessian with probes, and the curvature that averages them."""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_least, require
from lowrank_optax._core.functions import scalar_loss
from lowrank_optax._core.layout import Layout, stack
from lowrank_optax._core.types import Correction, Outside, Vector
from lowrank_optax.curvature._curvature import (
    Curvature,
    Evidence,
    across,
    flat,
    need_params,
    params_row,
    recall,
    remember,
    scale,
    select,
)


class Probe(abc.ABC):
    """Chooses the vector ``z`` that the Hessian is multiplied with."""

    steps: ClassVar[bool] = False
    """Whether it reads the step that was taken."""
    random: ClassVar[bool] = True
    """Whether a second draw of one step is another vector."""

    @abc.abstractmethod
    def draw(self, layout: Layout, key: jax.Array, g: Vector, step: Vector | None) -> Vector:
        """``z``, given the gradient and, where ``steps``, the step since the last update."""


@dataclasses.dataclass(frozen=True)
class NormalProbe(Probe):
    """``z ~ N(0, I)``: ``E[z z^T] = I``."""

    def draw(self, layout: Layout, key: jax.Array, g: Vector, step: Vector | None) -> Vector:
        return [
            jax.random.normal(k, (size,), layout.dtype)
            for k, size in zip(jax.random.split(key, len(g)), layout.sizes, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class RademacherProbe(Probe):
    """Entries ``±1`` with equal odds: ``E[z z^T] = I``, with the least variance of the trace."""

    def draw(self, layout: Layout, key: jax.Array, g: Vector, step: Vector | None) -> Vector:
        return [
            jax.random.rademacher(k, (size,), layout.dtype)
            for k, size in zip(jax.random.split(key, len(g)), layout.sizes, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class StepProbe(Probe):
    """``z = x - x_prev`` since the last update of the basis; the gradient before there is a step.

    Memory ``d``: the parameters of the last update, in their own dtype.
    """

    steps: ClassVar[bool] = True
    random: ClassVar[bool] = False

    def draw(self, layout: Layout, key: jax.Array, g: Vector, step: Vector | None) -> Vector:
        return g if step is None else select(layout, layout.inner(step, step) > 0, step, g)


@dataclasses.dataclass(frozen=True)
class GradientProbe(Probe):
    """``z = g``."""

    random: ClassVar[bool] = False

    def draw(self, layout: Layout, key: jax.Array, g: Vector, step: Vector | None) -> Vector:
        return [x.astype(layout.dtype) for x in g]


@dataclasses.dataclass(frozen=True)
class MixedProbe(Probe):
    """One of several probes, chosen with equal odds at every update.

    Args:
      probes: at least one; by default one of each kind.

    Raises:
      ValueError: for no probes, or something that is not a probe.
    """

    probes: tuple[Probe, ...] = (NormalProbe(), RademacherProbe(), StepProbe(), GradientProbe())

    def __post_init__(self):
        check(self.probes, "MixedProbe: probes is empty; pass at least one, such as NormalProbe().")
        for probe in self.probes:
            _check_is("MixedProbe", "probes", probe, Probe, "probes such as NormalProbe()")
        object.__setattr__(self, "probes", tuple(self.probes))

    @property
    def steps(self) -> bool:
        return any(probe.steps for probe in self.probes)

    @property
    def random(self) -> bool:
        return any(probe.random for probe in self.probes)

    def draw(self, layout: Layout, key: jax.Array, g: Vector, step: Vector | None) -> Vector:
        which, key = jax.random.split(key)
        draws = [lambda p=p: p.draw(layout, key, g, step) for p in self.probes]
        return lax.switch(jax.random.randint(which, (), 0, len(draws)), draws)


class Product(abc.ABC):
    """How ``H z`` is computed."""

    differences: ClassVar[bool] = False
    """Whether it is the change of the gradient over the step, not a product with a probe."""

    @abc.abstractmethod
    def multiply(self, owner: str, layout: Layout, evidence: Evidence, z: Vector) -> Vector:
        """``H z`` at the parameters; ``owner`` is named in errors."""


@dataclasses.dataclass(frozen=True)
class ExactProduct(Product):
    """``H z``, the derivative of the gradient along ``z``: ``jvp`` of ``grad`` of ``value_fn``.

    Cost: about two gradients.

    Source: Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 1994.
    """

    def multiply(self, owner: str, layout: Layout, evidence: Evidence, z: Vector) -> Vector:
        loss, params = _loss(owner, evidence)
        return flat(layout, jax.jvp(jax.grad(loss), (params,), (_like(layout, params, z),))[1])


@dataclasses.dataclass(frozen=True)
class ForwardDifference(Product):
    """``H z ≈ ‖z‖ (∇f(x + eps z/‖z‖) - g) / eps``, with ``g`` the gradient given to ``update``.

    So that gradient must be the one of ``value_fn``, not clipped or averaged.

    Args:
      eps: length of the step, in the parameters' units.

    Raises:
      ValueError: for a step that is not positive.

    Cost: one gradient. Error ``O(eps)``, and rounding of the gradient over ``eps``.
    """

    eps: float = 1e-3

    def __post_init__(self):
        check_least("ForwardDifference", "eps", self.eps, strict=True)

    def multiply(self, owner: str, layout: Layout, evidence: Evidence, z: Vector) -> Vector:
        size, beside = _displaced(owner, layout, evidence, z)
        return [
            size / self.eps * (a - b.astype(layout.dtype))
            for a, b in zip(beside(self.eps), evidence.g, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class CentralDifference(Product):
    """``H z ≈ ‖z‖ (∇f(x + eps z/‖z‖) - ∇f(x - eps z/‖z‖)) / (2 eps)``.

    Args:
      eps: length of the step, in the parameters' units.

    Raises:
      ValueError: for a step that is not positive.

    Cost: two gradients. Error ``O(eps²)``, and rounding of the gradient over ``eps``.
    """

    eps: float = 1e-3

    def __post_init__(self):
        check_least("CentralDifference", "eps", self.eps, strict=True)

    def multiply(self, owner: str, layout: Layout, evidence: Evidence, z: Vector) -> Vector:
        size, beside = _displaced(owner, layout, evidence, z)
        return [
            size / (2 * self.eps) * (a - b)
            for a, b in zip(beside(self.eps), beside(-self.eps), strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class GradientDifference(Product):
    """``y = g - g_prev`` over the step ``s = x - x_prev``: the secant pair of classical methods.

    Goes with `StepProbe` and needs no ``value_fn``. With mini-batches both gradients should be of
    the same one. There is no pair before there is a step, so it needs a ``complement`` to take one.

    Cost: ``d`` numbers, no gradient.

    Source: Nocedal and Wright, "Numerical Optimization", 2006, chapter 6.
    """

    differences: ClassVar[bool] = True

    def multiply(self, owner: str, layout: Layout, evidence: Evidence, z: Vector) -> Vector:
        raise TypeError("GradientDifference has no product with a given vector.")


class Last(NamedTuple):
    """The last update of the basis, as far as a pair needs it; ``()`` for what it does not need.

    Attributes:
      params: the parameters, a row ``(1, leaf.size)`` a leaf.
      g: the gradient, likewise.
      begun: ``(n,)`` whether there was one.
    """

    params: Any
    g: Any
    begun: Any


@dataclasses.dataclass(frozen=True)
class Probing(Curvature):
    """A curvature made from pairs ``(z, H z)``, one for each update of the basis.

    A basis leans towards the pair it absorbs, and along that lean the pair shows ``d/r`` times what
    there is. Inner parts that average the curvature themselves, such as `HutchinsonAdam`, therefore
    get a second pair, for which a random probe is drawn again; the second product is computed for
    such parts alone. A probe that is not random gives them the one pair there is.

    With several groups one product serves them all, so that what the other groups' parts of ``z``
    contribute is in it, as it is in a difference of gradients.
    """

    probe: Probe = RademacherProbe()
    product: Product = ExactProduct()
    orthogonalize: bool = False

    provides: ClassVar[frozenset[str]] = frozenset({"probe"})
    functions: ClassVar[frozenset[str] | None] = frozenset({"value_fn"})

    def __post_init__(self):
        owner = type(self).__name__
        _check_is(owner, "probe", self.probe, Probe, "a probe such as RademacherProbe()")
        _check_is(owner, "product", self.product, Product, "a product such as ExactProduct()")
        check(
            not self.product.differences
            or (isinstance(self.probe, StepProbe) and not self.orthogonalize),
            f"{owner}: product is {self.product!r}, which knows only the step that was taken; "
            "pass probe=StepProbe() and orthogonalize=False, or product=ExactProduct().",
        )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"complement"} if self.product.differences else ())

    def start(self, layout: Layout) -> Last:
        """Nothing seen yet."""
        params, g = self.probe.steps, self.product.differences
        return Last(
            params_row(layout) if params else (),
            layout.store(layout.zeros(1)) if g else (),
            jnp.zeros(layout.n, bool) if params or g else (),
        )

    def pair(self, layout: Layout, last: Last, evidence: Evidence) -> tuple[Vector, Vector, Last]:
        """``z`` and ``H z``, both zero where there is none, and what to remember of this step."""
        owner, due = type(self).__name__, evidence.due
        new, step = last, None
        if self.probe.steps:
            x = flat(layout, need_params(owner, evidence.params))
            step = scale(
                layout,
                (last.begun & due).astype(layout.dtype),
                [a - b for a, b in zip(x, recall(layout, last.params), strict=True)],
            )
            new = new._replace(params=remember(layout, due, last.params, x), begun=last.begun | due)
        # A group that is not due may hold a gradient that is not finite.
        g = scale(layout, due.astype(layout.dtype), evidence.g)
        if step is not None and self.product.differences:
            y = [a - b for a, b in zip(g, recall(layout, last.g), strict=True)]
            y = scale(layout, (last.begun & due).astype(layout.dtype), y)
            return step, y, new._replace(g=remember(layout, due, last.g, g))
        z = scale(layout, due.astype(layout.dtype), self.probe.draw(layout, evidence.key, g, step))
        if self.orthogonalize:
            rest = [a - b for a, b in zip(z, evidence.project(z), strict=True)]
            floor = jnp.finfo(layout.dtype).eps * layout.inner(z, z)
            z = scale(layout, (layout.inner(rest, rest) > floor).astype(layout.dtype), rest)
        return z, across(evidence, self.product.multiply(owner, layout, evidence, z)), new

    def probed(
        self, layout: Layout, evidence: Evidence, correction: Correction, pair: tuple[Vector, ...]
    ) -> Correction:
        """The correction with the pair that is handed to inner parts; ``pair`` is its own."""
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
      last: the last update of the basis.
      square: ``(n,)`` average of the mean squared eigenvalue outside the basis.
      estimates: ``(n,)`` how many estimates are in it.
    """

    last: Last
    square: jax.Array
    estimates: jax.Array


class _Averaged(Probing):
    """What the two below share: an estimate of the Hessian outside the basis, for a complement."""

    learns: ClassVar[bool] = True

    def init(self, layout: Layout, window: int) -> Hessian:
        return Hessian(
            self.start(layout),
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

    def outside(self, state: Hessian) -> jax.Array:
        known = 1 - jnp.asarray(_KEEP, state.square.dtype) ** state.estimates
        size = jnp.sqrt(linalg.safe_divide(state.square, known))
        return jnp.where(size > 0, size, 1)


_KEEP = 0.99
"""Decay of what is known of the Hessian outside the basis, an update."""


@dataclasses.dataclass(frozen=True)
class HutchinsonHessian(_Averaged):
    r"""The Hessian by random products: the correction is the symmetric part of ``H z z^T``.

    .. math:: \mathbb{E}[H z z^T] = H \quad\text{for}\quad \mathbb{E}[z z^T] = I

    What of ``z`` lies outside the span of the basis and ``H z`` has mean zero there and is noise:
    ``‖z‖ ‖H z‖`` is about ``sqrt(d) ‖H‖_F``, far beyond any eigenvalue. So it is left out, and the
    correction is

    .. math:: (H z\,z^T P + P z\,z^T H)/2, \quad P\ \text{the projector on}\ [Q, H z]

    Eigenvalues can be negative, so it goes with `Eigen`, `RandomizedEigen`, `GGT` and `FullMatrix`.
    They are those of ``H`` but for the noise of an average over about ``1/(1 - beta)`` products;
    for Newton's step take ``Eigen(rank, beta=0.99, count_columns=False)`` or a larger ``beta``.
    `SquaredHessian` finds the same directions sooner, at less cost and in every basis.

    Outside the basis (``complement=lro.inner.LInv()``) the curvature is taken to be the root mean
    square eigenvalue there, from one more product an update.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> curvature = lro.curvature.HutchinsonHessian(probe=lro.curvature.NormalProbe())
      >>> tx = lro.scale_by_lre(curvature, lro.basis.Eigen(3), lro.inner.LInv())
      >>> loss = lambda x: jnp.sum(x**4)
      >>> x = jnp.ones(5); state = tx.init(x)
      >>> updates, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)

    Args:
      probe: how ``z`` is chosen.
      product: how ``H z`` is computed. All but `GradientDifference` need ``value_fn``
        (params -> loss) and ``params`` in ``update``.
      orthogonalize: take out of ``z`` what the basis already spans, at two more passes over the
        rows. A probe that lies in the basis corrects nothing.
      within: leave out of ``z`` what neither the basis nor ``H z`` spans, at six more passes over
        the rows; ``False`` keeps all of it, unbiased in every entry. The original LRE has
        ``within=False`` and the engine's ``symmetrize=True``.

    Raises:
      ValueError: for parts that do not fit together, and by ``update`` for a missing argument.

    Cost: one product on the steps that update the basis, and none on the others; a second one for
    inner parts that read products and for a complement that does.

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


@dataclasses.dataclass(frozen=True)
class SquaredHessian(_Averaged):
    r"""The square of the Hessian by random products: the correction is ``(H z)(H z)^T``.

    .. math:: \mathbb{E}[H z\,(H z)^T] = H^2 \quad\text{for}\quad \mathbb{E}[z z^T] = I

    Its eigenvectors are those of ``H``, leading by size, and its eigenvalues the squares: a step
    with ``LInvSqrt()`` is ``|H|^{-1} g``, in which negative curvature is no way up. One column,
    which is never negative, goes with every basis; directions that stand out do so with the square
    of their eigenvalue. With a probe that is not random it is still made of curvature alone.

    Outside the basis (``complement=lro.inner.LInvSqrt()``) the square is taken to be the mean
    square eigenvalue there, from one more product an update.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.scale_by_lre(
      ...     lro.curvature.SquaredHessian(), lro.basis.Eigen(3), lro.inner.LInvSqrt())
      >>> loss = lambda x: jnp.sum(x**4)
      >>> x = jnp.ones(5); state = tx.init(x)
      >>> updates, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)

    Args:
      probe: how ``z`` is chosen.
      product: how ``H z`` is computed. All but `GradientDifference` need ``value_fn``
        (params -> loss) and ``params`` in ``update``.
      orthogonalize: take out of ``z`` what the basis already spans, at two more passes over the
        rows.

    Raises:
      ValueError: for parts that do not fit together, and by ``update`` for a missing argument.

    Cost: one product on the steps that update the basis, and none on the others; a second one for
    inner parts that read products and for a complement that does.

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
        return super().outside(state) ** 2


def _inside(layout: Layout, evidence: Evidence, z: Vector, hz: Vector) -> Vector:
    """What of ``z`` lies in the span of the basis and ``H z``."""
    less = lambda a, b: [x - y for x, y in zip(a, b, strict=True)]
    known = evidence.project(z)
    rest = less(hz, evidence.project(hz))
    rest = less(rest, evidence.project(rest))  # twice is enough
    size = layout.inner(rest, rest)
    some = size > 1e3 * jnp.finfo(layout.dtype).eps * layout.inner(hz, hz)
    along = jnp.where(some, linalg.safe_divide(layout.inner(rest, z), size), 0)
    return [a + b for a, b in zip(known, scale(layout, along, rest), strict=True)]


def _check_is(owner: str, name: str, value: Any, kind: type, what: str) -> None:
    check(isinstance(value, kind), f"{owner}: {name} is {value!r}; pass {what}.")


def _loss(owner: str, evidence: Evidence):
    """``value_fn`` and the parameters."""
    return (
        scalar_loss(
            owner, "value_fn", require(owner, evidence.extra, "value_fn", "params -> loss")
        ),
        need_params(owner, evidence.params),
    )


def _like(layout: Layout, params: Any, z: Vector) -> Any:
    """A vector as a tree in the dtypes of the parameters."""
    return layout.tree(
        [
            jnp.reshape(x, jnp.shape(p)).astype(jnp.result_type(p))
            for p, x in zip(layout.leaves(params), z, strict=True)
        ]
    )


def _displaced(owner: str, layout: Layout, evidence: Evidence, z: Vector):
    """``‖z‖``, and the gradient as a function of how far to go along ``z/‖z‖``."""
    loss, params = _loss(owner, evidence)
    size = jnp.sqrt(jnp.sum(layout.inner(z, z)))
    z = [linalg.safe_divide(x, size) for x in z]

    def beside(distance: float) -> Vector:
        x = [p + distance * t for p, t in zip(flat(layout, params), z, strict=True)]
        return flat(layout, jax.grad(loss)(_like(layout, params, x)))

    return size, beside
