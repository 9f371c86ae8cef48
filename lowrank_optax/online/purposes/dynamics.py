"""Dynamics: the next vector is to be predicted from the code of this one."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_least
from lowrank_optax._core.precision import callers_precision
from lowrank_optax.online.purposes._purpose import Purpose, Terms, View, less, pairs_of


class Lagged(NamedTuple):
    """Running moments of a sequence of codes.

    Attributes:
      past: second moments ``E z z^T`` of the sources, ``(r, r)``.
      lag: moments ``E z' z^T`` between what follows and the sources, ``(r, r)``.
    """

    past: jax.Array
    lag: jax.Array


@dataclasses.dataclass(frozen=True)
class Dynamics(Purpose):
    r"""The next vector is to be predicted from this one's code.

    .. math:: L = E‖v' - A^T f(z)‖^2 / E, \qquad
              \partial A = -2 (f(z) e^T + J_f^T (A e) v^T) / E, \quad e = v' - A^T f(z)

    By default ``f(z) = M z`` is the best linear map for the present ``A``, from running moments:
    ``M = S^{-1} E[z' z^T] E[z z^T]^{-1}``, so that there is nothing to tune. A flax module, or a
    pair ``(init, apply)``, learns any other ``f`` with the learner's optimizer; its gradient is
    ``-2 J_θ^T A e / E``.

    Where nothing is predicted yet, there is hardly a gradient, because a direction enters the loss
    with its fourth power. Three things let all directions be found sooner: batches of 50 vectors
    and more; learning rates like Adam's 0.03 that fall later; a learner whose ``decay`` forgets
    ``M`` within a few updates. `Reconstruction` as an anchor should come after that, by a schedule.

    Vectors follow one another in the order in which they are passed, within a batch and across
    batches. Alternatively their successors are passed: ``update(state, v, next=v')``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> purpose = lro.online.Dynamics()
      >>> moments = purpose.memory(2, jnp.float32)._replace(
      ...     past=jnp.diag(jnp.array([4., 2.])), lag=jnp.diag(jnp.array([2., 1.])))
      >>> print(purpose.linear(moments, jnp.eye(2)).round(2))     # every code is halved
      [[0.5 0. ]
       [0.  0.5]]

    Args:
      weight: share of the loss, a number of at least 0 or a schedule of the number of updates;
        default 1.
      f: map of a code ``(r,)`` to the next one: ``None`` (the default) for the linear map, a flax
        module, or a pair ``(init, apply)`` with ``init(key, z) -> theta`` and ``apply(theta, z) ->
        (r,)``.
      ridge: number added to ``E[z z^T]``, relative to its mean eigenvalue, without unit; at least
        0, default 1e-4.

    Raises:
      ValueError: for a negative weight or ridge, or an ``f`` that is none of these.

    Cost: ``8 k r d`` flops, and one vector of memory.

    Source: Schmid, "Dynamic mode decomposition of numerical and experimental data", Journal of
    Fluid Mechanics 2010; with the subspace optimised, Wynn et al., "Optimal mode decomposition for
    unsteady flows", Journal of Fluid Mechanics 2013.
    """

    f: Any = None
    ridge: float = 1e-4
    pairs: ClassVar[bool] = True

    def __post_init__(self):
        Purpose.__post_init__(self)
        check_least("Dynamics", "ridge", self.ridge)
        pair = isinstance(self.f, tuple) and len(self.f) == 2 and all(map(callable, self.f))
        check(
            self.f is None or pair or (hasattr(self.f, "init") and hasattr(self.f, "apply")),
            f"Dynamics: f is {self.f!r}; pass None, a flax module or a pair (init, apply).",
        )

    def theta(self, key: jax.Array, rank: int, dtype: Any) -> Any:
        if self.f is None:
            return ()
        init = self.f[0] if isinstance(self.f, tuple) else self.f.init
        return init(key, jnp.zeros(rank, dtype))

    def memory(self, rank: int, dtype: Any) -> Lagged:
        return Lagged(jnp.zeros((rank, rank), dtype), jnp.zeros((rank, rank), dtype))

    def remember(self, memory: Lagged, view: View, rate: jax.Array) -> Lagged:
        pairs = pairs_of(view)
        after = view.operator.codes(pairs.targets.columns)
        weighted = pairs.targets.weights[:, None] * pairs.codes
        some = rate * jnp.sum(pairs.targets.weights)
        blend = lambda old, new: (1 - some) * old + rate * new
        return Lagged(
            blend(memory.past, weighted.T @ pairs.codes), blend(memory.lag, after.T @ weighted)
        )

    def move(self, memory: Lagged, c: jax.Array) -> Lagged:
        return Lagged(c @ memory.past @ c.T, c @ memory.lag @ c.T)

    def linear(self, memory: Lagged, gram: jax.Array) -> jax.Array:
        """``M``, ``(r, r)``, the best linear map of codes for the moments."""
        r = gram.shape[0]
        ridge = self.ridge * jnp.trace(memory.past) / r
        shrunk = memory.past + jnp.where(ridge > 0, ridge, 1) * jnp.eye(r, dtype=gram.dtype)
        back = jnp.linalg.solve(shrunk, memory.lag.T).T
        return linalg.matrix_power(gram, -1.0, damping=0, rdamping=0) @ back

    def terms(self, view: View, theta: Any) -> Terms:
        pairs = pairs_of(view)
        sources, codes, (targets, weights) = pairs
        if self.f is None:
            theta = self.linear(view.memory, view.operator.gram)
        fz, back = jax.vjp(self._predict, theta, codes)
        e = less(targets, view.operator.columns(fz))
        value = jnp.sum(weights * view.operator.layout.squares(e)) / view.energy
        scale = -2 * weights / view.energy
        within = view.operator.codes(e)
        bar, before = back(scale[:, None] * within)
        left = jnp.concatenate([scale[:, None] * fz, before])
        right = [jnp.concatenate(pair) for pair in zip(e, sources, strict=True)]
        inside = jnp.concatenate([within, codes])
        return Terms(value, left, right, inside, () if self.f is None else bar)

    def _predict(self, theta: Any, codes: jax.Array) -> jax.Array:
        if self.f is None:
            return codes @ theta.T
        apply = self.f[1] if isinstance(self.f, tuple) else self.f.apply
        return jax.vmap(callers_precision(lambda z: apply(theta, z)))(codes)
