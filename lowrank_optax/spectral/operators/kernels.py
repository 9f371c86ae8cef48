"""Integral operators of kernels, whose integral is a mean over the batch."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core.checks import check
from lowrank_optax.spectral.operators._operator import (
    Function,
    SampledOperator,
    blocks,
    check_held_out,
    check_rows,
    held_rows,
)


@dataclasses.dataclass(frozen=True, eq=False)
class KernelIntegral(SampledOperator):
    """The integral operator of a kernel, ``(T f)(x) = E_y[k(x, y) f(y)]`` over the data.

    The mean is over the other half of the batch. This leaves out a point's pairing with itself and
    keeps both halves of the batch unbiased.

    Args:
      kernel: a symmetric function of two points, with a scalar value.
      data: the points, ``(n, ...)``.
      groups: the number of a group for each point, ``(n,)``, by which they are held out; by
        default, ``None``, a twentieth of the points in their order is a group.
      held_out_part: the part of the groups that the fit does not learn from and is read from, in
        [0, 1), 0.2 by default; with 0, and with fewer than 20 points, it is read from the same.

    Raises:
      ValueError: for data that are not finite, a kernel that is not symmetric; by
        ``apply``, for a batch of fewer than 2 points.

    Cost: ``B²/2`` kernel values a batch, and ``B² L`` flops.

    Source: Deng, Shi and Zhu, "NeuralEF: deconstructing kernels by deep neural networks", ICML
    2022.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> data = jnp.array([1.0, 2.0, 3.0, 4.0])
      >>> operator = spectral.operators.KernelIntegral(lambda x, y: x * y, data)
      >>> _, image = operator.apply(lambda x: jnp.ones(1), data)
      >>> print(image[:, 0])  # x times the mean of the other half
      [3.5 7.  4.5 6. ]
    """

    kernel: Callable[[Any, Any], jax.Array]
    data: Any
    groups: Any = None
    held_out_part: float = 0.2
    exact: ClassVar[bool] = False

    def __post_init__(self):
        owner = type(self).__name__
        object.__setattr__(
            self, "data", check_rows(owner, "data", self.data, max(1, jnp.ndim(self.data)))
        )
        check_held_out(owner, self)
        self._check_kernel()

    def _check_kernel(self) -> None:
        check(
            callable(self.kernel) and not isinstance(self.kernel, type),
            f"KernelIntegral: kernel is {self.kernel!r}; pass a function of two points.",
        )
        x, y = self.data[:8], self.data[::-1][:8]
        forth, back = (np.asarray(jax.vmap(self.kernel)(*pair)) for pair in ((x, y), (y, x)))
        check(
            forth.ndim == 1,
            f"KernelIntegral: kernel gives values of shape {forth.shape[1:]}; pass one that gives "
            "a scalar.",
        )
        check(
            np.isfinite(forth).all(),
            "KernelIntegral: kernel gives values that are not finite between its data; pass one "
            "that is finite there.",
        )
        check(
            np.allclose(forth, back, rtol=1e-3, atol=1e-4 * np.abs(forth).max()),
            "KernelIntegral: kernel is not symmetric; pass (k(x, y) + k(y, x)) / 2.",
        )

    @property
    def rows(self) -> int:
        """The number of points."""
        return len(self.data)

    def _blocks(self, rows: np.ndarray) -> np.ndarray:
        """Eight batches: pairs lie within a batch, so that small ones would leave out most."""
        return blocks(rows, least=max(8, len(rows) // 8))

    def held_out(self) -> tuple["KernelIntegral", Any]:
        rows, held = held_rows(self.rows, self.held_out_part, self.groups)
        batches = self.data[self._blocks(held if len(held) else rows)]
        if not len(held):
            return self, batches
        left = {"data": self.data[rows], "groups": None, "held_out_part": 0.0}
        return dataclasses.replace(self, **left), batches

    def sample(self, key: jax.Array, size: int, state: Any = None) -> jax.Array:
        """Points drawn at random, or a permutation of all where there are no more."""
        if size >= len(self.data):
            return jax.random.permutation(key, self.data)
        return self.data[jax.random.randint(key, (size,), 0, len(self.data))]

    def apply(self, function: Function, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        check(len(batch) >= 2, f"{type(self).__name__}: pass a batch of at least 2 points.")
        f = jax.vmap(function)(batch)
        half = len(batch) // 2
        one, two = slice(None, half), slice(half, None)
        return f, jnp.concatenate(
            [
                self._mean(batch[one], batch[two], f[two]),
                self._mean(batch[two], batch[one], f[one]),
            ]
        )

    def _mean(self, x: jax.Array, y: jax.Array, f: jax.Array) -> jax.Array:
        """``mean_j k(x_i, y_j) f_j``."""
        rows = jax.vmap(lambda a: jax.vmap(lambda b: self.kernel(a, b))(y))(x)
        return rows @ f / len(y)


@dataclasses.dataclass(frozen=True, eq=False)
class NeuralTangentKernel(KernelIntegral):
    r"""The kernel ``k(x, y) = sum_p dF(x)/dp · dF(y)/dp`` of a network, never formed.

    .. math:: (T f)(x) = J(x)\, E_y[J(y)^T f(y)]

    by one product with the transposed Jacobian and one with the Jacobian for every mode. A network
    of several outputs is summed over them.

    Args:
      model: the network, ``(params, x) -> F``, with ``F`` of any shape.
      params: the parameters at which it is linearised, a pytree of ``p`` numbers.
      data: the points, ``(n, ...)``.

    Cost: ``L`` gradients and ``L`` forward derivatives of the network over the batch, for each of
    its outputs; memory ``L p``.

    Source: Jacot, Gabriel and Hongler, "Neural tangent kernel: convergence and generalization in
    neural networks", NeurIPS 2018.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> data = jnp.array([1.0, 2.0, 3.0, 4.0])
      >>> make, line = spectral.operators.NeuralTangentKernel, lambda slope, x: slope * x
      >>> operator = make(model=line, params=jnp.ones(()), data=data)  # the kernel is x y
      >>> print(operator.apply(lambda x: jnp.ones(1), data)[1][:, 0])
      [3.5 7.  4.5 6. ]
    """

    kernel: Any = dataclasses.field(init=False, default=None)
    data: Any
    groups: Any = dataclasses.field(init=False, default=None)
    held_out_part: float = dataclasses.field(init=False, default=0.2)
    model: Callable[[Any, Any], jax.Array]
    params: Any

    def held_out(self) -> tuple["NeuralTangentKernel", Any]:
        rows, held = held_rows(self.rows, self.held_out_part, None)
        batches = self.data[self._blocks(held if len(held) else rows)]
        return (dataclasses.replace(self, data=self.data[rows]) if len(held) else self), batches

    def _check_kernel(self) -> None:
        check(callable(self.model), "NeuralTangentKernel: pass a model, (params, x) -> F.")

    def _mean(self, x: jax.Array, y: jax.Array, f: jax.Array) -> jax.Array:
        out = jax.eval_shape(lambda x: self.model(self.params, x), x[0])
        many = max(1, out.size)
        at = lambda points: (
            lambda params: jax.vmap(lambda x: jnp.reshape(self.model(params, x), many))(points)
        )
        back = jax.vjp(at(y), self.params)[1]

        def mode(weights: jax.Array) -> jax.Array:
            # The trace over outputs: one direction of the parameters for each.
            def output(unit: jax.Array) -> jax.Array:
                (along,) = back(weights[:, None] * unit[None])
                return jax.jvp(at(x), (self.params,), (along,))[1] @ unit

            return jnp.sum(jax.vmap(output)(jnp.eye(many)), 0)

        return jax.vmap(mode, in_axes=1, out_axes=1)(f) / len(y)
