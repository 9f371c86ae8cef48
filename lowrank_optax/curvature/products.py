"""Products: how a Hessian is multiplied with a probe."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_least, require
from lowrank_optax._core.functions import scalar_loss
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import Vector
from lowrank_optax.curvature._curvature import Evidence, flat, need_params


class Product(abc.ABC):
    """How ``H z`` is computed.

    Attributes:
      differences: whether it is the change of the gradient over the last step, which leaves no
        choice of ``z``.
    """

    differences: ClassVar[bool] = False

    @abc.abstractmethod
    def multiply(self, owner: str, layout: Layout, evidence: Evidence, z: Vector) -> Vector:
        """``H z`` at the parameters; ``owner`` is named in errors."""


@dataclasses.dataclass(frozen=True)
class ExactProduct(Product):
    """The derivative of the gradient along ``z``: ``jvp`` of ``grad`` of ``value_fn``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> C = lro.curvature
      >>> curvature = C.SquaredHessian(C.GradientProbe(), C.ExactProduct())
      >>> tx = lro.scale_by_lre(curvature, lro.basis.FullMatrix(None), lro.inner.LInvSqrt())
      >>> h, x = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0]); state = tx.init(x)
      >>> step = jax.jit(lambda x, s: tx.update(h * x, s, x, value_fn=lambda x: h @ x**2 / 2))
      >>> print(step(x, state)[1].basis.matrix[0].diagonal())    # 1 + (H g)², H g = (1, 4)
      [ 2. 17.]

    Cost: about two gradients.

    Source: Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 1994.
    """

    def multiply(self, owner: str, layout: Layout, evidence: Evidence, z: Vector) -> Vector:
        loss, params = _loss(owner, evidence)
        return flat(layout, jax.jvp(jax.grad(loss), (params,), (_like(layout, params, z),))[1])


@dataclasses.dataclass(frozen=True)
class ForwardDifference(Product):
    r"""A forward difference of gradients along ``z``.

    .. math:: H z \approx \frac{\|z\|}{\epsilon}
              \Bigl(\nabla f\bigl(x + \epsilon \tfrac{z}{\|z\|}\bigr) - g\Bigr)

    ``g`` is the gradient given to ``update``. It has to be the one of ``value_fn``, not clipped or
    averaged.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> C = lro.curvature
      >>> curvature = C.SquaredHessian(C.GradientProbe(), C.ForwardDifference(eps=1e-2))
      >>> tx = lro.scale_by_lre(curvature, lro.basis.FullMatrix(None), lro.inner.LInvSqrt())
      >>> h, x = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0]); state = tx.init(x)
      >>> step = jax.jit(lambda x, s: tx.update(h * x, s, x, value_fn=lambda x: h @ x**2 / 2))
      >>> matrix = step(x, state)[1].basis.matrix[0]             # 1 + (H g)², H g = (1, 4)
      >>> bool(jnp.allclose(matrix.diagonal(), jnp.array([2.0, 17.0]), rtol=1e-2))
      True

    Args:
      eps: length of the step in parameters, in their units; positive.

    Raises:
      ValueError: for a step that is not positive.

    Cost: one gradient. The error is ``O(eps)``, and the rounding of the gradient over ``eps``.

    Source: elementary.
    """

    eps: float = 1e-3

    def __post_init__(self):
        check_least("ForwardDifference", "eps", self.eps, strict=True)

    def multiply(self, owner: str, layout: Layout, evidence: Evidence, z: Vector) -> Vector:
        size, gradient_at = _along(owner, layout, evidence, z)
        return [
            size / self.eps * (a - b.astype(layout.dtype))
            for a, b in zip(gradient_at(self.eps), evidence.g, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class CentralDifference(Product):
    r"""A central difference of gradients along ``z``.

    .. math:: H z \approx \frac{\|z\|}{2 \epsilon}
              \Bigl(\nabla f\bigl(x + \epsilon \tfrac{z}{\|z\|}\bigr)
              - \nabla f\bigl(x - \epsilon \tfrac{z}{\|z\|}\bigr)\Bigr)

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> C = lro.curvature
      >>> curvature = C.SquaredHessian(C.GradientProbe(), C.CentralDifference(eps=1e-2))
      >>> tx = lro.scale_by_lre(curvature, lro.basis.FullMatrix(None), lro.inner.LInvSqrt())
      >>> h, x = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0]); state = tx.init(x)
      >>> step = jax.jit(lambda x, s: tx.update(h * x, s, x, value_fn=lambda x: h @ x**2 / 2))
      >>> matrix = step(x, state)[1].basis.matrix[0]             # 1 + (H g)², H g = (1, 4)
      >>> bool(jnp.allclose(matrix.diagonal(), jnp.array([2.0, 17.0]), rtol=1e-2))
      True

    Args:
      eps: length of the step in parameters, in their units; positive.

    Raises:
      ValueError: for a step that is not positive.

    Cost: two gradients. The error is ``O(eps²)``, and the rounding of the gradient over ``eps``.

    Source: elementary.
    """

    eps: float = 1e-3

    def __post_init__(self):
        check_least("CentralDifference", "eps", self.eps, strict=True)

    def multiply(self, owner: str, layout: Layout, evidence: Evidence, z: Vector) -> Vector:
        size, gradient_at = _along(owner, layout, evidence, z)
        return [
            size / (2 * self.eps) * (a - b)
            for a, b in zip(gradient_at(self.eps), gradient_at(-self.eps), strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class GradientDifference(Product):
    """The change ``y = g - g_prev`` of the gradient over the step ``s = x - x_prev``.

    This is the secant pair of the classical methods. It goes with `StepProbe` and needs no
    ``value_fn``. With mini-batches both gradients should be of the same batch. Before the first
    step there is no pair; a ``complement`` has to take that step.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> curvature = lro.curvature.BFGS(product=lro.curvature.GradientDifference())
      >>> whole, part = lro.basis.FullMatrix(None), lro.inner.LInv()
      >>> tx = lro.scale_by_lre(curvature, whole, part, complement=1.0)
      >>> h, state = jnp.array([1.0, 2.0]), tx.init(jnp.zeros(2))
      >>> for x in jnp.array([[1.0, 1.0], [2.0, 3.0]]):
      ...     _, state = tx.update(h * x, state, x)
      >>> print((state.basis.matrix[0] @ jnp.array([1.0, 2.0])).round(2))    # y of s = (1, 2)
      [1. 4.]

    Cost: ``d`` numbers, no gradient.

    Source: Nocedal and Wright, "Numerical Optimization", 2006, chapter 6.
    """

    differences: ClassVar[bool] = True

    def multiply(self, owner: str, layout: Layout, evidence: Evidence, z: Vector) -> Vector:
        raise TypeError("GradientDifference has no product with a given vector.")


def _loss(owner: str, evidence: Evidence) -> tuple[Callable[[Any], jax.Array], Any]:
    """``value_fn`` and the parameters."""
    fn = require(owner, evidence.extra, "value_fn", "params -> loss")
    return scalar_loss(owner, "value_fn", fn), need_params(owner, evidence.params)


def _like(layout: Layout, params: Any, z: Vector) -> Any:
    """A vector as a tree in the dtypes of the parameters."""
    return layout.tree(
        [
            jnp.reshape(x, jnp.shape(p)).astype(jnp.result_type(p))
            for p, x in zip(layout.leaves(params), layout.part(z), strict=True)
        ]
    )


def _along(
    owner: str, layout: Layout, evidence: Evidence, z: Vector
) -> tuple[jax.Array, Callable[[float], Vector]]:
    """``‖z‖``, and the gradient at a distance from the parameters along ``z/‖z‖``."""
    loss, params = _loss(owner, evidence)
    size = jnp.sqrt(jnp.sum(layout.inner(z, z)))
    z = [linalg.safe_divide(x, size) for x in z]

    def gradient_at(distance: float) -> Vector:
        x = [p + distance * t for p, t in zip(flat(layout, params), z, strict=True)]
        return flat(layout, jax.grad(loss)(_like(layout, params, x)))

    return size, gradient_at
