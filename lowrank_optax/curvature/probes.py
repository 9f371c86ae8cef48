"""Probes: the vectors that a Hessian is multiplied with."""

import abc
import dataclasses
from typing import ClassVar

import jax
from jax import lax

from lowrank_optax._core.checks import check
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import Vector
from lowrank_optax.curvature._curvature import check_is, select


class Probe(abc.ABC):
    """Chooses the vector ``z`` that the Hessian is multiplied with.

    Attributes:
      steps: whether it reads the step since the last update of the basis.
      random: whether a second draw in the same step is another vector.
    """

    steps: ClassVar[bool] = False
    random: ClassVar[bool] = True

    @abc.abstractmethod
    def draw(self, layout: Layout, key: jax.Array, g: Vector, step: Vector | None) -> Vector:
        """``z``, given the gradient and, where ``steps``, the step since the last update."""


@dataclasses.dataclass(frozen=True)
class NormalProbe(Probe):
    """A normal vector, ``z ~ N(0, I)``, with ``E[z z^T] = I``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> curvature, x = lro.curvature.SquaredHessian(lro.curvature.NormalProbe()), jnp.ones(2)
      >>> @jax.jit
      ... def step(seed):                         # 1 + z², since the Hessian is I
      ...     whole, inner = lro.basis.FullMatrix(None), lro.inner.LInvSqrt()
      ...     tx = lro.scale_by_lre(curvature, whole, inner, seed=seed)
      ...     _, state = tx.update(x, tx.init(x), x, value_fn=lambda x: x @ x / 2)
      ...     return state.basis.matrix[0].diagonal()
      >>> bool(jnp.all(step(0) != step(1)))       # another seed is another vector
      True

    Cost: ``d`` random numbers.

    Source: Hutchinson, "A stochastic estimator of the trace", 1990, for the estimator.
    """

    def draw(self, layout: Layout, key: jax.Array, g: Vector, step: Vector | None) -> Vector:
        return [
            jax.random.normal(k, (size,), layout.dtype)
            for k, size in zip(jax.random.split(key, len(g)), layout.sizes, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class RademacherProbe(Probe):
    """A vector of signs, ``±1`` with equal odds, with ``E[z z^T] = I``.

    Of all such vectors it estimates the trace with the least variance.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> curvature = lro.curvature.SquaredHessian(lro.curvature.RademacherProbe())
      >>> tx = lro.scale_by_lre(curvature, lro.basis.FullMatrix(None), lro.inner.LInvSqrt())
      >>> h, x = jnp.array([1.0, 2.0]), jnp.ones(2); state = tx.init(x)
      >>> step = jax.jit(lambda x, s: tx.update(h * x, s, x, value_fn=lambda x: h @ x**2 / 2))
      >>> print(step(x, state)[1].basis.matrix[0].diagonal())    # 1 + h² whatever the signs
      [2. 5.]

    Cost: ``d`` random numbers.

    Source: Hutchinson, "A stochastic estimator of the trace", 1990.
    """

    def draw(self, layout: Layout, key: jax.Array, g: Vector, step: Vector | None) -> Vector:
        return [
            jax.random.rademacher(k, (size,), layout.dtype)
            for k, size in zip(jax.random.split(key, len(g)), layout.sizes, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class StepProbe(Probe):
    """The step since the last update of the basis, ``z = x - x_prev``.

    Before there is a step it is the gradient.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> curvature = lro.curvature.SquaredHessian(lro.curvature.StepProbe())
      >>> tx = lro.scale_by_lre(curvature, lro.basis.FullMatrix(None), lro.inner.LInvSqrt())
      >>> h, x = jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0]); state = tx.init(x)
      >>> step = jax.jit(lambda x, s: tx.update(h * x, s, x, value_fn=lambda x: h @ x**2 / 2))
      >>> for x in jnp.array([[1.0, 0.0], [1.0, 3.0]]):
      ...     _, state = step(x, state)
      >>> print(state.basis.matrix[0])            # z = g = (1, 0), then z = (0, 3)
      [[ 2.  0.]
       [ 0. 37.]]

    Cost: ``d`` numbers, the parameters at the last update in their own dtype.

    Source: Nocedal and Wright, "Numerical Optimization", 2006, chapter 6, for the step ``s``.
    """

    steps: ClassVar[bool] = True
    random: ClassVar[bool] = False

    def draw(self, layout: Layout, key: jax.Array, g: Vector, step: Vector | None) -> Vector:
        return g if step is None else select(layout, layout.inner(step, step) > 0, step, g)


@dataclasses.dataclass(frozen=True)
class GradientProbe(Probe):
    """The gradient, ``z = g``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> curvature = lro.curvature.SquaredHessian(lro.curvature.GradientProbe())
      >>> tx = lro.scale_by_lre(curvature, lro.basis.FullMatrix(None), lro.inner.LInvSqrt())
      >>> h, x = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0]); state = tx.init(x)
      >>> step = jax.jit(lambda x, s: tx.update(h * x, s, x, value_fn=lambda x: h @ x**2 / 2))
      >>> print(step(x, state)[1].basis.matrix[0])    # I + (H g)(H g)^T, g = (1, 2)
      [[ 2.  4.]
       [ 4. 17.]]

    Cost: none.

    Source: the original LRE.
    """

    random: ClassVar[bool] = False

    def draw(self, layout: Layout, key: jax.Array, g: Vector, step: Vector | None) -> Vector:
        return [x.astype(layout.dtype) for x in g]


@dataclasses.dataclass(frozen=True)
class MixedProbe(Probe):
    """One of several probes, drawn with equal odds at every update of the basis.

    Example:
      >>> from lowrank_optax.curvature import GradientProbe, MixedProbe, NormalProbe, StepProbe
      >>> still, noisy = MixedProbe((GradientProbe(), StepProbe())), MixedProbe((NormalProbe(),))
      >>> (still.random, still.steps), (noisy.random, noisy.steps)    # what any of them is
      ((False, True), (True, False))

    Args:
      probes: sequence of probes, at least one; by default one of each kind.

    Raises:
      ValueError: for no probes, or something that is not a probe.

    Cost: that of the probe that is drawn, and the numbers of state of a `StepProbe` among them.

    Source: the original LRE.
    """

    probes: tuple[Probe, ...] = (NormalProbe(), RademacherProbe(), StepProbe(), GradientProbe())

    def __post_init__(self):
        check(self.probes, "MixedProbe: probes is empty; pass at least one, such as NormalProbe().")
        for probe in self.probes:
            check_is("MixedProbe", "probes", probe, Probe, "probes such as NormalProbe()")
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
