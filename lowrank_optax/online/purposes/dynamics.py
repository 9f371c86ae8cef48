"""Dynamics: the next vector is to be predicted from the code of this one."""

import dataclasses
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_least
from lowrank_optax._core.precision import callers_precision
from lowrank_optax.online.operator import Operator
from lowrank_optax.online.purposes._purpose import Purpose, Terms, View, less, pairs_of


class Lagged(NamedTuple):
    """Running moments of a sequence of codes.

    Attributes:
      past: second moments ``E z z^T`` of the sources, ``(r, r)``.
      lag: moments ``E z' z^T`` between what follows and the sources, ``(r, r)``.
      whole: ``E v'^T v``, inside the subspace and outside, a number.
    """

    past: jax.Array
    lag: jax.Array
    whole: Any = 0.0


@dataclasses.dataclass(frozen=True)
class Dynamics(Purpose):
    r"""The next vector is to be predicted from this one's code.

    .. math:: L = E‖v' - A^T f(z)‖^2 / E, \qquad
              \partial A = -2 (f(z) e^T + J_f^T (A e) v^T) / E, \quad e = v' - A^T f(z)

    By default ``f(z) = M z`` is the best linear map for the present ``A``, from running moments:
    ``M = S^{-1} E[z' z^T] E[z z^T]^{-1}``, so that there is nothing to tune. A flax module, or a
    pair ``(init, apply)``, learns any other ``f`` with the learner's optimizer; its gradient is
    ``-2 J_θ^T A e / E``.

    Where nothing is predicted yet, that loss has hardly a gradient, because a direction enters it
    with its fourth power, and any loud direction is a trap. So ``f`` is lifted where the codes are
    hardly correlated: ``f(z) = (M + τ s (I - K K^T / τ²)_+) z``, with their coherence ``K = E[z
    z^T]^{-1/2} E[z' z^T] E[z z^T]^{-1/2}``, the lift ``τ`` and the sign ``s`` of what remains of
    ``E v'^T v`` outside the subspace. For such a direction ``a`` the loss is that of a quadratic
    form, ``a^T (τ² C_0 - 2 τ s C_1) a`` with ``C_0 = E v v^T`` and ``C_1 = E v' v^T``, which has
    no traps. Directions with a coherence above ``τ`` are not lifted at all. `Reconstruction` as an
    anchor would bring the traps back, so by default there is none.

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
    lift: float = 0.8
    pairs: ClassVar[bool] = True
    alone: ClassVar[bool] = True

    def __post_init__(self):
        Purpose.__post_init__(self)
        check_least("Dynamics", "ridge", self.ridge)
        check(0 <= self.lift <= 1, f"Dynamics: lift is {self.lift}; pass a number in [0, 1].")
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
        zeros = lambda *shape: jnp.zeros(shape, dtype)
        return Lagged(zeros(rank, rank), zeros(rank, rank), zeros())

    def remember(self, memory: Lagged, view: View, rate: jax.Array) -> Lagged:
        pairs = pairs_of(view)
        after = view.operator.codes(pairs.targets.columns)
        weighted = pairs.targets.weights[:, None] * pairs.codes
        some = rate * jnp.sum(pairs.targets.weights)
        blend = lambda old, new: (1 - some) * old + rate * new
        whole = sum(
            jnp.sum(pairs.targets.weights[:, None] * (a * b).astype(after.dtype))
            for a, b in zip(pairs.sources, pairs.targets.columns, strict=True)
        )
        return Lagged(
            blend(memory.past, weighted.T @ pairs.codes),
            blend(memory.lag, after.T @ weighted),
            blend(memory.whole, whole),
        )

    def move(self, memory: Lagged, c: jax.Array) -> Lagged:
        return Lagged(c @ memory.past @ c.T, c @ memory.lag @ c.T, memory.whole)

    def linear(self, memory: Lagged, gram: jax.Array) -> jax.Array:
        """``M``, ``(r, r)``, the best linear map of codes for the moments."""
        r = gram.shape[0]
        ridge = self.ridge * jnp.trace(memory.past) / r
        shrunk = memory.past + jnp.where(ridge > 0, ridge, 1) * jnp.eye(r, dtype=gram.dtype)
        back = jnp.linalg.solve(shrunk, memory.lag.T).T
        return linalg.matrix_power(gram, -1.0, damping=0, rdamping=0) @ back

    def modes(self, operator: Operator, memory: Lagged) -> tuple[np.ndarray, Any]:
        """Online dynamic mode decomposition: eigenpairs of ``v -> A^T M A v``, outside of ``jit``.

        Args:
          operator: the learner's operator.
          memory: this purpose's memory in the learner's state.

        Returns:
          Eigenvalues ``(r,)``, complex, the largest first, and modes of length one as leaves
          ``(r, *shape)``. A mode oscillates with the angle of its eigenvalue per vector and decays
          with its modulus.

        Raises:
          ValueError: for a purpose with an ``f`` of its own.
        """
        check(self.f is None, "Dynamics.modes: f is not linear; pass Dynamics() without f.")
        gram = np.asarray(operator.gram, float)
        m = np.asarray(self.linear(memory, operator.gram), float)
        lam, w = np.linalg.eig(m @ gram)
        # A mode A^T w has the squared length w^* S w, and A A^T w = S w.
        w = w / np.sqrt(np.real(np.einsum("ij,ik,kj->j", w.conj(), gram, w)))
        order = np.argsort(-np.abs(lam))
        decode = lambda z: operator.decode(jnp.asarray(z, operator.gram.dtype))
        real, imaginary = decode(w.real.T[order]), decode(w.imag.T[order])
        join = lambda a, b: np.asarray(a) + 1j * np.asarray(b)
        return lam[order], jax.tree.map(join, real, imaginary)

    def lifted(self, memory: Lagged, gram: jax.Array) -> jax.Array:
        """``M``, ``(r, r)``, lifted where codes are hardly correlated."""
        m = self.linear(memory, gram)
        if isinstance(self.lift, float | int) and self.lift == 0:
            return m
        root = partial(linalg.matrix_power, damping=0, rdamping=0)
        white, back = root(memory.past, -0.5), root(gram, -0.5)
        k = white @ memory.lag @ white
        square, v = linalg.eigh(linalg.symmetrize(k @ k.T))
        outside = memory.whole - jnp.trace(back @ memory.lag @ back)
        size = jnp.where(outside < 0, -self.lift, self.lift)
        more = (v.T * jnp.maximum(0, 1 - square / self.lift**2)) @ v
        return m + size * back @ more @ back

    def terms(self, view: View, theta: Any) -> Terms:
        pairs = pairs_of(view)
        sources, codes, (targets, weights) = pairs
        if self.f is None:
            theta = self.lifted(view.memory, view.operator.gram)
        fz, back = jax.vjp(self._predict, theta, codes)
        e = less(targets, view.operator.columns(fz))
        value = jnp.sum(weights * view.operator.layout.squares(e)) / view.energy
        scale = -2 * weights / view.energy
        within = view.operator.codes(e)
        bar, before = back(scale[:, None] * within)
        left = jnp.concatenate([scale[:, None] * fz, before])
        right = [jnp.concatenate(pair) for pair in zip(e, sources, strict=True)]
        inside = jnp.concatenate([within, codes])
        if self.f is not None:
            return Terms(value, left, right, inside, bar)
        spread = jnp.trace(view.memory.past) / codes.shape[1]
        bend = (fz.T * weights[None]) @ fz + spread * theta.T @ theta
        return Terms(value, left, right, inside, curvature=2 * bend / view.energy)

    def _predict(self, theta: Any, codes: jax.Array) -> jax.Array:
        if self.f is None:
            return codes @ theta.T
        apply = self.f[1] if isinstance(self.f, tuple) else self.f.apply
        return jax.vmap(callers_precision(lambda z: apply(theta, z)))(codes)
