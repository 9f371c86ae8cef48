"""Bases with a guarantee for the whole matrix: Frequent Directions and randomised sketches."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_decay, fix_size
from lowrank_optax.basis._average import Average
from lowrank_optax.basis._frame import FrameState, Seen, Turn
from lowrank_optax.basis.eigen import Eigen


@dataclasses.dataclass(frozen=True)
class FrequentDirections(Average):
    r"""Frequent Directions: a deterministic sketch whose error is bounded on every stream.

    ``[Q, rho/‖rho‖]`` is rotated by the eigenvectors of ``diag(lam, 0) + sum_j w_j a_j a_j^T``, and
    all eigenvalues lose the ``(r+1)``-th, ``delta``:

    .. math:: \lambda_i \leftarrow \lambda_i - \delta, \qquad
              ‖A^T A - Q\,\mathrm{diag}(\lambda)\,Q^T‖_2 \le \sum \delta
              \le \min_{k \le r} \frac{‖A - A_k‖_F^2}{r + 1 - k}

    where the columns are the rows of ``A`` and ``A_k`` is its best approximation of rank ``k``. The
    sum ``rho`` of the ``delta``, in ``state.memory``, is the escaped mass and certifies the error.
    A share ``s`` of it can be given back as ``s rho I``: inside the basis steps then see ``lam + s
    rho``, and outside it a `complement` such as ``LInvSqrt()`` sees ``s rho``. Half of it
    (``robust``) halves error and bound; the whole is what S-AdaGrad's guarantee needs. The bound
    holds up to rounding; residuals below the resolution of `Frame` are not seen.

    It erases directions weaker than the tail over ``r``: use it for its guarantee.

    Example:
      >>> import lowrank_optax as lro
      >>> tx = lro.scale_by_lre(                                        # S-AdaGrad
      ...     lro.curvature.Covariance(), lro.basis.FrequentDirections(20, escaped=1.0),
      ...     lro.inner.LInvSqrt(), complement=lro.inner.LInvSqrt())

    Args:
      rank: eigenpairs kept, ``r``.
      beta: ``None`` sums, as the bound has it; a number averages, with a bound on the same average.
      robust: give half of the escaped mass back, as Robust Frequent Directions does.
      escaped: the share ``s`` of the escaped mass that is given back, in [0, 1]; by default 1/2
        with ``robust`` and 0 without. 1 is S-AdaGrad.
      buffer: columns between two rotations, see `Frame`.
      eig_tol: 0, as the bound wants it. For the others see `GGT`.

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

    provides: ClassVar[frozenset[str]] = frozenset({"eigenvalues", "outside"})

    beta: float | None = None
    robust: bool = dataclasses.field(default=False, kw_only=True)
    escaped: float | None = dataclasses.field(default=None, kw_only=True)
    eig_tol: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self):
        Average.__post_init__(self)
        if self.escaped is not None:
            check_decay("FrequentDirections", "escaped", self.escaped, closed=True)

    def remember(self, dtype: Any) -> jax.Array:
        """What was cut from every eigenvalue so far."""
        return jnp.zeros((), dtype)

    def turn(self, memory: Any, lam: jax.Array, seen: Seen, signed: bool) -> Turn:
        decay, x = self.blend(seen, signed)
        b = jnp.diag(decay * jnp.pad(lam, (0, x.shape[1]))) + x @ x.T
        lam, z = linalg.eigh(linalg.symmetrize(b))
        cut = jnp.maximum(lam[self.rank], 0)
        lam = lam[: self.rank] - cut
        lam, live = self.stored(lam, lam > 0)
        return Turn(jnp.where(live[:, None], z[: self.rank], 0), lam, decay * memory + cut)

    @property
    def share(self) -> float:
        """Of the escaped mass that is given back."""
        return (0.5 if self.robust else 0.0) if self.escaped is None else self.escaped

    def eigenvalues(self, lam: jax.Array, memory: Any) -> jax.Array:
        return jnp.where(lam != 0, lam + self.share * memory, 0)

    def outside(self, state: FrameState) -> jax.Array:
        mass = self.debiased(self.share * state.memory, state.updates)
        top = jnp.max(self.measured(state), axis=1)
        return mass + self.update_damping + self.update_rdamping * top


@dataclasses.dataclass(frozen=True)
class RandomizedEigen(Eigen):
    r"""`Eigen` whose small eigenproblem is solved by a randomised range finder.

    Of the ``(r + k, r + k)`` matrix ``B`` in the coordinates ``[Q, rho/‖rho‖]`` a Gaussian
    ``Omega`` takes ``l = r + oversample`` samples:

    .. math:: V = \mathrm{orth}(B^{1+q}\,\Omega), \qquad V^T B V = Z \Lambda Z^T, \qquad
              Q \leftarrow V Z

    which expects the optimal error times ``(1 + r/(oversample - 1))^{1/2}``, and closer to one the
    more power iterations ``q`` there are. Corrections no wider than ``oversample`` give nothing
    to save, and are exact.

    Example:
      >>> import lowrank_optax as lro
      >>> basis = lro.basis.RandomizedEigen(20, oversample=5, buffer=40)   # for 40 columns a step

    Args:
      rank: how many eigenpairs are kept, ``r``.
      beta: decay of the average; ``None`` sums. For the others see `Eigen`.
      oversample: samples beyond the rank.
      power_iterations: ``q``, multiplications by ``B`` that sharpen the spectrum.

    Raises:
      ValueError: as `Eigen`, and for a negative number of samples or iterations.

    Cost: that of `Eigen`, with ``eigh`` of size ``min(r + oversample, r + k)`` and
    ``(2 q + 4) (r + k)² l`` flops for the range.

    Source: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011.
    """

    oversample: int = dataclasses.field(default=5, kw_only=True)
    power_iterations: int = dataclasses.field(default=1, kw_only=True)

    def __post_init__(self):
        Eigen.__post_init__(self)
        fix_size(self, "oversample", 0)
        fix_size(self, "power_iterations", 0)

    def decompose(self, b: jax.Array, signed: bool, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        size, samples = b.shape[0], self.rank + self.oversample
        if samples >= size:
            return super().decompose(b, signed, key)
        v = jax.random.normal(key, (size, samples), b.dtype)
        for _ in range(1 + self.power_iterations):
            # Householder, for B is singular while slots are dead, and nothing here is long.
            v = linalg.qr(b @ v)
        lam, z = super().decompose(linalg.symmetrize(v.T @ b @ v), signed, key)
        return lam, z @ v.T


class NystromMemory(NamedTuple):
    """Memory of `Nystrom`.

    Attributes:
      sketch: ``(r, r)`` rows of ``Y^T = Omega^T B`` in the coordinates of ``Q``.
      core: ``(r, r)`` ``Omega^T B Omega``.
      test: ``(r, r)`` rows of ``Omega^T`` in the coordinates of ``Q``.
    """

    sketch: jax.Array
    core: jax.Array
    test: jax.Array


@dataclasses.dataclass(frozen=True)
class Nystrom(Average):
    r"""Streaming Nyström approximation: only ``Y = B Omega`` is kept, for a Gaussian ``Omega``.

    .. math:: B \approx Y (\Omega^T Y)^+ Y^T, \qquad
              Y \leftarrow \beta Y + (1 - \beta) \sum_j w_j\, y_j\, (\Omega^T y_j)^T

    ``Y`` has rank ``r``, so ``Q = orth(Y)`` and ``Y``'s coordinates in it lose nothing, and nothing
    is truncated between corrections. The approximation never exceeds ``B``. It needs more samples
    than the eigenpairs one trusts: for a good rank ``p`` take ``rank`` about ``2 p``, and
    ``update_truncate=p`` for steps to see these alone.

    A Gaussian matrix is the same in all orthonormal coordinates, so ``Omega`` is drawn where it is
    first needed: along the fresh directions. Along a direction that left the basis, and with it the
    memory, it is drawn anew; while there is room for all directions it is one fixed matrix. In
    either case the approximation is ``X^T P X`` for the stream ``X``, with a projector ``P``.

    Example:
      >>> import lowrank_optax as lro
      >>> basis = lro.basis.Nystrom(40, update_truncate=20)

    Args:
      rank: samples, the columns of ``Omega``, ``r``.
      beta: decay of the average; ``None`` sums.
      buffer: columns between two rotations, see `Frame`.
      eig_tol: eigenvalues below ``eig_tol * max`` are dropped. For the others see `GGT`.

    Raises:
      ValueError: for a rank below 1, a ``beta`` or tolerance out of range, or corrections with
        weights of both signs.

    Cost: memory ``m d + m² + 3 r²``; a step two passes over the rows (``4 m d`` flops), ``eigh`` of
    sizes ``r`` and ``r + k``, and ``(2 m + 2 r) r d / buffer`` flops for the rotations.

    Source: Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation of a positive-semidefinite
    matrix from streaming data", NeurIPS 2017.
    """

    def remember(self, dtype: Any) -> NystromMemory:
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
        lam, live = self.stored(lam[:rank], lam[:rank] > 0)
        z = jnp.where(live[:, None], z[:rank], 0)
        return Turn(z, lam, NystromMemory(sketch @ z.T, core, test @ z.T))
