"""Trackers that find one eigenvector after the other, each in what the others before it leave."""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_least
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import Columns, Vector
from lowrank_optax.online.trackers._tracker import Forgetting


@dataclasses.dataclass(frozen=True)
class Ascent(Forgetting):
    r"""Hebb's rule, one row after the other, with steps relative to the moments.

    .. math:: \eta = \frac{c}{\max_i \sum_t a_i^2 + c ‖v‖^2}, \qquad a = A v

    Without forgetting the step falls like ``c / (lam_max t)``. The first step is ``1/‖v‖²``, that
    of normalised least mean squares.

    Args:
      learning_rate: step ``c``, without unit, above 0, default 8.
    """

    learning_rate: float = 8.0

    def __post_init__(self):
        Forgetting.__post_init__(self)
        owner = type(self).__name__
        check_least(owner, "learning_rate", self.learning_rate, strict=True)

    @abc.abstractmethod
    def ascend(
        self, layout: Layout, w: Vector, rest: Vector, a: jax.Array, eta: jax.Array
    ) -> Vector:
        """The row ``w`` after ``v``.

        ``rest`` is what the rows before it left of ``v``; ``a = w · v``; ``eta`` is the step.
        """

    def begin(self, layout, rows, lam, weight):
        return rows, lam * weight

    def step(self, layout, rows, small, v, weight):
        most, size = self.decay * jnp.max(small), layout.inner(v, v)[0]
        eta = linalg.safe_divide(self.learning_rate, most + self.learning_rate * size)

        def one(rest: Vector, w: Vector):
            a = layout.inner(w, v)[0]
            return _plus(rest, -a, w), (self.ascend(layout, w, rest, a, eta), a)

        _, (rows, a) = lax.scan(one, v, rows)
        return rows, self.decay * small + a**2

    def read(self, layout, rows, small, weight):
        return rows, jnp.diag(small / weight)


@dataclasses.dataclass(frozen=True)
class Sanger(Ascent):
    r"""The generalised Hebbian algorithm.

    .. math:: w_i \leftarrow w_i + \eta\, a_i (v - \sum_{j \le i} a_j w_j), \qquad a = A v, \qquad
              \eta = \frac{c}{\max_i \sum_t a_i^2 + c ‖v‖^2}

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tracker = lro.online.trackers.Sanger(2)
      >>> state = jax.eval_shape(tracker.init, jax.random.key(0), jnp.zeros(100))
      >>> print(state.memory.rows[0].shape, state.memory.small.shape)      # rows and moments
      (2, 100) (2,)

    Args:
      rank: number ``r`` of eigenvectors, at least 1.
      beta: decay per vector of the moments that scale the step, in [0, 1); ``None``, the default,
        sums them.
      learning_rate: step ``c``, without unit, above 0, default 8. It has to exceed about half the
        ratio of the largest eigenvalue to the smallest difference between two that are to be told
        apart.

    Raises:
      ValueError: for a rank below 1, and numbers out of range.

    Cost: memory ``r d``; ``6 r d`` flops a vector.

    Source: Sanger, "Optimal unsupervised learning in a single-layer linear feedforward neural
    network", Neural Networks 1989.
    """

    def ascend(self, layout, w, rest, a, eta):
        return _plus(w, eta * a, _plus(rest, -a, w))


@dataclasses.dataclass(frozen=True)
class EigenGame(Ascent):
    r"""The mu-EigenGame: players on spheres, penalised for aligning with the players before them.

    .. math:: \nabla_i = a_i (v - \sum_{j < i} a_j w_j), \qquad
              w_i \leftarrow \mathrm{unit}(w_i + \eta (\nabla_i - (\nabla_i \cdot w_i) w_i))

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tracker = lro.online.trackers.EigenGame(2)
      >>> state = jax.eval_shape(tracker.init, jax.random.key(0), jnp.zeros(100))
      >>> print(state.memory.rows[0].shape, state.memory.small.shape)      # rows and moments
      (2, 100) (2,)

    Args:
      rank: number ``r`` of players, at least 1.
      beta: decay of the moments, as in `Sanger`.
      learning_rate: step, as in `Sanger`.

    Raises:
      ValueError: as `Sanger`.

    Cost: memory ``r d``; ``12 r d`` flops a vector.

    Source: Gemp, McWilliams, Vernade and Graepel, "EigenGame unloaded: when playing games is better
    than optimizing", ICLR 2022.
    """

    def ascend(self, layout, w, rest, a, eta):
        new = _plus(w, eta * a, _plus(rest, -layout.inner(rest, w)[0], w))
        length = jnp.sqrt(layout.inner(new, new)[0])
        return _plus([jnp.zeros_like(x) for x in w], linalg.safe_divide(1.0, length), new)


@dataclasses.dataclass(frozen=True)
class CCIPCA(Forgetting):
    r"""Candid covariance-free incremental PCA: rows are eigenvectors times their eigenvalues.

    With ``u_1 = v`` and ``t`` vectors seen, one row after the other

    .. math:: w_i \leftarrow (1 - \rho) w_i + \rho\, u_i (u_i \cdot w_i) / ‖w_i‖, \qquad
              \rho = \min\{1, (1 + l) / t\}

    .. math:: u_{i+1} = u_i - (u_i \cdot w_i) w_i / ‖w_i‖^2

    The first ``u_i`` that is not zero becomes the row ``w_i``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tracker = lro.online.trackers.CCIPCA(1)
      >>> state = tracker.init(jax.random.key(0), jnp.zeros(2))
      >>> state = jax.jit(tracker.update)(state, jnp.array([3., 4.]))
      >>> print(state.memory.rows[0])               # the first vector is the first row
      [[3. 4.]]

    Args:
      rank: number ``r`` of eigenvectors, at least 1.
      beta: decay per vector, in [0, 1), with which ``t`` is replaced by ``sum_s beta^s``; ``None``,
        the default, never forgets.
      amnesia: exponent ``l`` of time by which new vectors count more than old ones, because the
        first vectors were sorted along rows that had not settled. At least 0, default 2; 0 is a
        plain average.

    Raises:
      ValueError: for a rank below 1, and numbers out of range.

    Cost: memory ``r d``; ``10 r d`` flops a vector.

    Source: Weng, Zhang and Hwang, "Candid covariance-free incremental principal component
    analysis", IEEE Transactions on Pattern Analysis and Machine Intelligence 2003.
    """

    amnesia: float = 2.0

    def __post_init__(self):
        Forgetting.__post_init__(self)
        check_least("CCIPCA", "amnesia", self.amnesia)

    def begin(self, layout, rows, lam, weight):
        return [w * lam[:, None].astype(w.dtype) for w in rows], lam

    def step(self, layout, rows, small, v, weight):
        size = layout.inner(v, v)[0]
        # What is left may be rounding errors, which have no direction.
        enough = 1e3 * jnp.finfo(layout.dtype).eps * size
        gain = jnp.minimum(1.0, (1 + self.amnesia) / weight)

        def one(u: Vector, row):
            w, length = row
            along = linalg.safe_divide(layout.inner(u, w)[0], length)
            left = layout.inner(u, u)[0]
            fresh = (length == 0) & (left > enough)
            keep = jnp.where(length == 0, 0, 1 - gain)
            take = jnp.where(length == 0, fresh, gain * along)
            w = _plus([keep.astype(x.dtype) * x for x in w], take, u)
            squared = layout.inner(w, w)[0]
            u = _plus(u, -linalg.safe_divide(layout.inner(u, w)[0], squared), w)
            return u, (w, jnp.sqrt(squared))

        return lax.scan(one, v, (rows, small))[1]

    def read(self, layout, rows, small, weight):
        scale = linalg.safe_divide(1.0, small)[:, None]
        return [(scale * w).astype(w.dtype) for w in rows], jnp.diag(small)


def _plus(x: Columns, factor: jax.Array, y: Columns) -> Columns:
    """``x + factor y``, leaf by leaf, in the dtypes of ``x``."""
    return [a + factor.astype(a.dtype) * b.astype(a.dtype) for a, b in zip(x, y, strict=True)]
