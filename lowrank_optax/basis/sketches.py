"""Bases with a guarantee for the whole matrix: Frequent Directions and the Nyström sketch."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_decay
from lowrank_optax.basis._average import Average
from lowrank_optax.basis._frame import FrameState, Seen, Turn


@dataclasses.dataclass(frozen=True)
class FrequentDirections(Average):
    r"""Frequent Directions: a deterministic sketch whose error is bounded on every stream.

    ``[Q, rho/‖rho‖]`` is rotated by the eigenvectors of ``diag(lam, 0) + sum_j w_j a_j a_j^T``, and
    all eigenvalues lose the ``(r+1)``-th, ``delta``:

    .. math:: \lambda_i \leftarrow \lambda_i - \delta, \qquad
              ‖A^T A - Q\,\mathrm{diag}(\lambda)\,Q^T‖_2 \le \sum \delta
              \le \min_{k \le r} \frac{‖A - A_k‖_F^2}{r + 1 - k}

    where the columns are the rows of ``A`` and ``A_k`` is its best approximation of rank ``k``. The
    sum ``rho`` of the ``delta``, in ``state.memory``, is the escaped mass: it bounds the error.
    A share ``s`` of it can be given back as ``s rho I``. Inside the basis a step then sees ``lam +
    s rho``, and outside it a complement such as ``LInvSqrt()`` sees ``s rho``. Half of the mass
    (``robust``) halves error and bound; S-AdaGrad's guarantee needs all of it. The bound holds up
    to rounding; residuals below the resolution of `Frame` are not seen.

    Directions weaker than the tail divided by ``r`` are lost. Use this basis for its guarantee, and
    `Eigen` for the best eigenpairs.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> basis = lro.basis.FrequentDirections(20, escaped=1.0)         # S-AdaGrad
      >>> part = lro.inner.LInvSqrt()
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), basis, part, complement=part)
      >>> state = jax.eval_shape(tx.init, jnp.zeros(1000)).basis
      >>> print(basis.share, state.rows[0].shape, state.memory.shape)   # one escaped mass a group
      1.0 (28, 1000) (1,)

    Args:
      rank: number ``r`` of eigenpairs that are kept, at least 1.
      beta: decay of the average per correction, in [0, 1); ``None``, the default, sums. The bound
        holds for the sum, and likewise for an average.
      robust: whether half of the escaped mass is given back, as in Robust Frequent Directions;
        default no.
      escaped: share ``s`` of the escaped mass that is given back, in [0, 1]; default 1/2 with
        ``robust`` and 0 without. With 1 this is S-AdaGrad.
      buffer: number of columns between two rotations, default ``max(8, rank // 3)``; see `Frame`.
      eig_tol: share of the largest eigenvalue at or below which an eigenvalue is dropped, without
        unit; default 0, because the bound does not allow for more.

    The remaining keywords are those of `Regularized`.

    Raises:
      ValueError: for a rank below 1, a ``beta``, share or tolerance out of range, or corrections
        with weights of both signs.

    Cost: memory ``m d + m²``; a step two passes over the rows (``4 m d`` flops), ``eigh`` of size
    ``r + k``, and ``(2 m + 2 r) r d / buffer`` flops for the rotations.

    Source: Ghashami, Liberty, Phillips and Woodruff, "Frequent Directions", SIAM Journal on
    Computing 2016; Luo et al., "Robust Frequent Directions", JMLR 2019; with decay and the whole
    escaped mass Feinberg et al., "Sketchy: Memory-efficient Adaptive Regularization with Frequent
    Directions", NeurIPS 2023.
    """

    beta: float | None = None
    robust: bool = dataclasses.field(default=False, kw_only=True)
    escaped: float | None = dataclasses.field(default=None, kw_only=True)
    eig_tol: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self):
        Average.__post_init__(self)
        if self.escaped is not None:
            check_decay("FrequentDirections", "escaped", self.escaped, closed=True)

    def init_memory(self, dtype: Any) -> jax.Array:
        """The sum of what was cut from every eigenvalue so far."""
        return jnp.zeros((), dtype)

    def turn(self, memory: Any, lam: jax.Array, seen: Seen, signed: bool) -> Turn:
        decay, x = self.blend(seen, signed)
        b = jnp.diag(decay * jnp.pad(lam, (0, x.shape[1]))) + x @ x.T
        lam, z = linalg.eigh(linalg.symmetrize(b))
        cut = jnp.maximum(lam[self.rank], 0)
        lam = lam[: self.rank] - cut
        lam, live = self.stored.apply(lam, lam > 0)
        return Turn(jnp.where(live[:, None], z[: self.rank], 0), lam, decay * memory + cut)

    @property
    def share(self) -> float:
        """The share of the escaped mass that is given back."""
        return (0.5 if self.robust else 0.0) if self.escaped is None else self.escaped

    def eigenvalues(self, lam: jax.Array, memory: Any) -> jax.Array:
        return jnp.where(lam != 0, lam + self.share * memory, 0)

    def outside(self, state: FrameState) -> jax.Array:
        mass = self.debiased(self.share * state.memory, state.updates)
        top = jnp.max(self.measured(state), axis=1)
        return mass + self.update_damping + self.update_rdamping * top


class NystromMemory(NamedTuple):
    """Memory of `Nystrom`.

    Attributes:
      sketch: rows ``(r, r)`` of ``Y^T = Omega^T B`` in the coordinates of ``Q``.
      core: the matrix ``Omega^T B Omega``, ``(r, r)``.
      test: rows ``(r, r)`` of ``Omega^T`` in the coordinates of ``Q``.
    """

    sketch: jax.Array
    core: jax.Array
    test: jax.Array


@dataclasses.dataclass(frozen=True)
class Nystrom(Average):
    r"""Streaming Nyström approximation: only ``Y = B Omega`` is kept, for a Gaussian ``Omega``.

    .. math:: B \approx Y (\Omega^T Y)^+ Y^T, \qquad
              Y \leftarrow \beta Y + (1 - \beta) \sum_j w_j\, y_j\, (\Omega^T y_j)^T

    ``Y`` has rank ``r``, so ``Q = orth(Y)`` and the coordinates of ``Y`` in it lose nothing, and
    nothing is truncated between corrections. The approximation never exceeds ``B``. It needs more
    samples than there are eigenpairs to be trusted: for ``p`` good eigenpairs take a ``rank`` of
    about ``2 p``, and ``update_truncate=p`` so that steps see no others.

    A Gaussian matrix has the same distribution in all orthonormal coordinates. So ``Omega`` is
    drawn where it is first needed, along the fresh directions. A direction that left the basis left
    the memory, too; should it return, ``Omega`` is drawn anew along it. While there is room for all
    directions ``Omega`` is one fixed matrix. In either case the approximation is ``X^T P X`` for
    the stream ``X``, with a projector ``P``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> basis = lro.basis.Nystrom(40, update_truncate=20)
      >>> tx = lro.scale_by_lre(lro.curvature.Covariance(), basis, lro.inner.LInvSqrt())
      >>> state = jax.eval_shape(tx.init, jnp.zeros(1000)).basis
      >>> print(state.rows[0].shape, state.memory.sketch.shape)     # 40 directions and 13 columns
      (53, 1000) (1, 40, 40)

    Args:
      rank: number ``r`` of samples, the columns of ``Omega``; at least 1.
      beta: decay of the average per correction, in [0, 1), default 0.99; ``None`` sums.
      buffer: number of columns between two rotations, default ``max(8, rank // 3)``; see `Frame`.

    The remaining keywords are those of `Regularized`.

    Raises:
      ValueError: for a rank below 1, a ``beta`` or tolerance out of range, or corrections with
        weights of both signs.

    Cost: memory ``m d + m² + 3 r²``; a step two passes over the rows (``4 m d`` flops), ``eigh`` of
    sizes ``r`` and ``r + k``, and ``(2 m + 2 r) r d / buffer`` flops for the rotations.

    Source: Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation of a positive-semidefinite
    matrix from streaming data", NeurIPS 2017.
    """

    def init_memory(self, dtype: Any) -> NystromMemory:
        return NystromMemory(*jnp.zeros((3, self.rank, self.rank), dtype))

    def turn(self, memory: Any, lam: jax.Array, seen: Seen, signed: bool) -> Turn:
        decay, x = self.blend(seen, signed)
        rank, k = self.rank, x.shape[1]
        drawn = jax.random.normal(seen.key, (rank, k), x.dtype)
        test = jnp.concatenate([memory.test, jnp.where(seen.fresh, drawn, 0)], axis=1)
        samples = test @ x
        sketch = decay * jnp.pad(memory.sketch, ((0, 0), (0, k))) + samples @ x.T
        core = decay * memory.core + samples @ samples.T
        size, u = linalg.eigh(linalg.symmetrize(core))
        rounding = size <= jnp.finfo(x.dtype).eps * rank * jnp.max(size)
        root = jnp.sqrt(jnp.where(rounding, 1, size))
        half = jnp.where(rounding[:, None], 0, u @ sketch / root[:, None])
        lam, z = linalg.eigh(linalg.symmetrize(half.T @ half))
        lam, live = self.stored.apply(lam[:rank], lam[:rank] > 0)
        z = jnp.where(live[:, None], z[:rank], 0)
        return Turn(z, lam, NystromMemory(sketch @ z.T, core, test @ z.T))
