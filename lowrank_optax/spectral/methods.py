"""Methods that turn functions and their images under an operator into a direction of descent.

Every method is a map from a batch's pairs ``(f, T f)``, each ``(B, L)``, to cotangents ``G`` of the
``f``; no gradient flows through ``T``, because self-adjointness supplies what would. Nearly all of
them read the pairs through their ``L x L`` moments alone and answer with two coefficient matrices,

    G = (T f P + f Q) / B,    M = f^T f / B,    A = f^T T f / B,    C = (T f)^T T f / B,

so that a method is a few lines of small algebra, and how the moments are estimated from the batch
(`Halves`, `UStatistic`, `WholeBatch`) is a part of its own. An operator with two sides brings the
pairs ``(f, T g)`` and ``(g, T* f)``.

The operator's largest eigenvalues are sought; what has to be smallest is given with its sign
changed, as `operators` do.
"""

import abc
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._linalg import safe_divide, symmetrize
from lowrank_optax._types import check, check_count, check_decay, check_least
from lowrank_optax.spectral.nesting import Nesting, SequentialNesting, Unnested

Pairs = tuple[tuple[jax.Array, jax.Array], ...]
"""``((f, T f),)``, or ``((f, T g), (g, T* f))`` for an operator with two sides."""

Coefficients = tuple[tuple[jax.Array, jax.Array], ...]
"""``(P, Q)`` for every side."""


class Moments(NamedTuple):
    """Second moments of one side.

    Attributes:
      gram: ``(L, L)``, ``<f_l, f_m>``.
      cross: ``(L, L)``, ``<f_l, T f_m>``.
      image: ``(L, L)``, ``<T f_l, T f_m>``.
    """

    gram: Any
    cross: Any
    image: Any

    @classmethod
    def of(cls, f: jax.Array, tf: jax.Array) -> "Moments":
        """Means over the rows of a batch."""
        return cls(f.T @ f / len(f), f.T @ tf / len(f), tf.T @ tf / len(f))


def moments(pairs: Pairs) -> tuple[Moments, ...]:
    """`Moments` of every side."""
    return tuple(Moments.of(f, tf) for f, tf in pairs)


class Method(abc.ABC):
    """A rule for the cotangents, with a small memory where it needs one."""

    def init(self, modes: int) -> Any:
        """The memory before the first batch; a pytree of floating-point arrays."""
        return ()

    @abc.abstractmethod
    def cotangents(self, pairs: Pairs, memory: Any) -> tuple[tuple[jax.Array, ...], Any]:
        """A cotangent ``(B, L)`` for the ``f`` of every pair, and the memory after the batch."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def surrogate(method: Method, pairs: Pairs, memory: Any = ()) -> tuple[jax.Array, Any]:
    """A number whose gradient is the method's direction, and the memory after the batch.

    The number is the sum of the modes' Rayleigh quotients, the same for all methods; only its
    gradient is the method's: ``G`` at the ``f`` of every pair and zero elsewhere.

    Args:
      method: a `Method`.
      pairs: ``((f, T f),)`` or ``((f, T g), (g, T* f))``, each ``(B, L)``.
      memory: the method's memory.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> method = spectral.NestedLoRA(moments=spectral.WholeBatch())
      >>> f = jnp.eye(2)
      >>> loss = lambda f: spectral.surrogate(method, ((f, 0.5 * f),))[0]
      >>> print(jax.grad(loss)(f))  # at f^T f / B = T, where nothing is left to do
      [[0. 0.]
       [0. 0.]]
    """
    return _forward(method, pairs, memory)[0]


def _forward(method: Method, pairs: Pairs, memory: Any):
    directions, memory = method.cotangents(pairs, memory)
    value = jnp.sum(quotients(moments(pairs)))
    return (value, memory), (directions, pairs, memory)


def _backward(method: Method, residuals: Any, cotangent: Any):
    directions, pairs, memory = residuals
    return (
        tuple(
            ((cotangent[0] * g).astype(f.dtype), jnp.zeros_like(tf))
            for g, (f, tf) in zip(directions, pairs, strict=True)
        ),
        jax.tree.map(jnp.zeros_like, memory),
    )


surrogate.defvjp(_forward, _backward)


def quotients(seen: tuple[Moments, ...]) -> jax.Array:
    """``<f, T f> / ‖f‖²`` of every mode, or ``<f, T g> / (‖f‖ ‖g‖)`` with two sides."""
    norms = jnp.diagonal(seen[0].gram) * jnp.diagonal(seen[-1].gram)
    return safe_divide(jnp.diagonal(seen[0].cross), jnp.sqrt(norms))


class Estimate(abc.ABC):
    """How the moments behind a row's cotangent are estimated from the batch."""

    @abc.abstractmethod
    def directions(
        self, pairs: Pairs, coefficients: Callable[[tuple[Moments, ...]], Coefficients]
    ) -> tuple[jax.Array, ...]:
        """``G`` of every side."""


@dataclasses.dataclass(frozen=True)
class WholeBatch(Estimate):
    """Moments of the whole batch: biased by the pairing of each row with itself."""

    def directions(self, pairs, coefficients):
        return _apply(pairs, coefficients(moments(pairs)), len(pairs[0][0]))


@dataclasses.dataclass(frozen=True)
class Halves(Estimate):
    """Each half of the batch is paired with the moments of the other: unbiased for products.

    Source: Ryu et al., "Operator SVD with Neural Networks via Nested Low-Rank Approximation",
    ICML 2024.
    """

    def directions(self, pairs, coefficients):
        size = len(pairs[0][0])
        check(size >= 2, f"Halves: a batch of {size} came; pass at least 2 points.")
        one = tuple((f[: size // 2], tf[: size // 2]) for f, tf in pairs)
        two = tuple((f[size // 2 :], tf[size // 2 :]) for f, tf in pairs)
        first = _apply(one, coefficients(moments(two)), size)
        second = _apply(two, coefficients(moments(one)), size)
        return tuple(jnp.concatenate(halves) for halves in zip(first, second, strict=True))


@dataclasses.dataclass(frozen=True)
class UStatistic(Estimate):
    """Each row is paired with the moments of all others: unbiased, with twice the pairs of halves.

    Args:
      group: rows that are one independent sample and leave together: 2 for `Koopman` and
        `GraphLaplacian`, which read each pair in both directions.

    Raises:
      ValueError: for a group below 1, or a batch that is not at least two whole groups.

    Cost: ``B L² / group`` numbers.

    Source: Hoeffding, "A class of statistics with asymptotically normal distribution", 1948.
    """

    group: int = 1

    def __post_init__(self):
        check_count("UStatistic", "group", self.group)

    def directions(self, pairs, coefficients):
        size, group = len(pairs[0][0]), self.group
        check(
            size >= 2 * group and size % group == 0,
            f"UStatistic: a batch of {size} rows came; pass whole groups of {group}, at least two.",
        )
        whole = moments(pairs)

        def block(own: Pairs) -> tuple[jax.Array, ...]:
            others = jax.tree.map(
                lambda mean, mine: (size * mean - group * mine) / (size - group),
                whole,
                moments(own),
            )
            return _apply(own, coefficients(others), size)

        blocks = jax.tree.map(lambda a: a.reshape(size // group, group, -1), pairs)
        return tuple(g.reshape(size, -1) for g in jax.vmap(block)(blocks))


def _apply(pairs: Pairs, coefficients: Coefficients, size: int) -> tuple[jax.Array, ...]:
    return tuple(
        (tf @ p + f @ q) / size for (f, tf), (p, q) in zip(pairs, coefficients, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class MomentMethod(Method):
    """A method that reads moments and answers with ``P`` and ``Q`` of every side."""

    two_sided: ClassVar[bool] = False
    """Whether it serves operators with two sides."""

    @abc.abstractmethod
    def coefficients(self, seen: tuple[Moments, ...], memory: Any) -> Coefficients:
        """``(P, Q)`` of every side."""

    def remember(self, seen: tuple[Moments, ...], memory: Any) -> Any:
        """The memory after the batch, which its own coefficients see already."""
        return memory

    @property
    def estimate(self) -> Estimate:
        """How moments are estimated; a field ``moments`` where there is a choice."""
        return getattr(self, "moments", WholeBatch())

    def cotangents(self, pairs: Pairs, memory: Any) -> tuple[tuple[jax.Array, ...], Any]:
        check(
            len(pairs) == 1 or self.two_sided,
            f"{type(self).__name__} is for self-adjoint operators and an operator with two sides "
            "came; pass NestedLoRA(), VAMP2() or DPNet().",
        )
        memory = self.remember(moments(pairs), memory)
        return self.estimate.directions(pairs, lambda seen: self.coefficients(seen, memory)), memory


@dataclasses.dataclass(frozen=True)
class NestedLoRA(MomentMethod):
    r"""NeuralSVD: the best low-rank approximation of the operator, nested to order its modes.

    .. math:: \mathcal{L} = -2 \sum_l v_l \langle g_l, T f_l\rangle
              + \sum_{lm} M_{lm} \langle f_l, f_m\rangle \langle g_l, g_m\rangle

    and the same with ``g = f`` for a self-adjoint ``T``. Orthogonality is not imposed, it results:
    ``f_l -> sqrt(lam_l) phi_l``.

    Limits: finds eigenvalues above zero only (give ``T`` a shift); a mode is learned at a rate
    proportional to its eigenvalue; within an eigenspace any basis is as good as another.

    Args:
      nesting: `SequentialNesting`, `JointNesting`, or `Unnested` for the span alone.
      moments: `Halves` or `UStatistic`, both unbiased, or `WholeBatch`.

    Cost: ``4 B L²`` flops, and ``B L²`` numbers with `UStatistic`.

    Source: Ryu et al., "Operator SVD with Neural Networks via Nested Low-Rank Approximation",
    ICML 2024.
    """

    nesting: Nesting = SequentialNesting()
    moments: Estimate = Halves()
    two_sided: ClassVar[bool] = True

    def coefficients(self, seen, memory):
        modes = len(seen[0].gram)
        v, mask = self.nesting.masks(modes)
        factor = 4 if len(seen) == 1 else 2
        return tuple(
            (-factor * jnp.diag(v), factor * mask * other.gram) for other in reversed(seen)
        )


@dataclasses.dataclass(frozen=True)
class OrbitalMinimization(MomentMethod):
    r"""Orbital minimisation: an energy whose minimum is orthonormal without a constraint.

    .. math:: \mathcal{L} = -2\, tr(v A) + tr(M \circ (f^T f)\, A)

    and, with `SequentialNesting`, its triangular form, which orders the modes.

    Limits: needs ``T`` positive semidefinite (give it a shift), or the energy has no minimum. All
    modes are learned at their eigenvalue's rate and end at norm one.

    Args:
      nesting: as for `NestedLoRA`.
      moments: as for `NestedLoRA`.

    Cost: ``8 B L²`` flops.

    Source: Mauri, Galli and Car, Phys. Rev. B 47 (1993); "Revisiting orbital minimization for
    neural operator decomposition", arXiv 2510.21952.
    """

    nesting: Nesting = SequentialNesting()
    moments: Estimate = Halves()

    def coefficients(self, seen, memory):
        (m,) = seen
        v, mask = self.nesting.masks(len(m.gram))
        return ((2 * mask * m.gram - 4 * jnp.diag(v), 2 * mask * symmetrize(m.cross)),)


@dataclasses.dataclass(frozen=True)
class TracePenalty(MomentMethod):
    r"""The trace, with deviations from orthonormality penalised.

    .. math:: \mathcal{L} = -tr(v A) + \tfrac{penalty}{2} \sum_{lm} M_{lm}
              (\langle f_l, f_m\rangle - \delta_{lm})^2

    `Unnested` it is the trace-penalty method, and on a `GraphLaplacian` the spectral graph drawing
    of Wu et al.; with `JointNesting` it is the generalised graph drawing objective.

    Limits: norms end at ``‖f_l‖² = 1 + lam_l / penalty``, so the penalty must exceed ``-lam_L``;
    unnested the modes are an arbitrary basis of the span.

    Args:
      penalty: in units of the eigenvalues.
      nesting: as for `NestedLoRA`.
      moments: as for `NestedLoRA`.

    Raises:
      ValueError: for a penalty that is not positive.

    Source: Wen et al., "Trace-penalty minimization for large-scale eigenspace computation", 2016;
    Wu, Tucker and Nachum, "The Laplacian in RL", ICLR 2019; Wang et al., "Towards better Laplacian
    representation in reinforcement learning with generalized graph drawing", ICML 2021.
    """

    penalty: float = 1.0
    nesting: Nesting = Unnested()
    moments: Estimate = Halves()

    def __post_init__(self):
        check_least("TracePenalty", "penalty", self.penalty, strict=True)

    def coefficients(self, seen, memory):
        (m,) = seen
        v, mask = self.nesting.masks(len(m.gram))
        return ((-2 * jnp.diag(v), 2 * self.penalty * mask * (m.gram - jnp.eye(len(m.gram)))),)


class Duals(NamedTuple):
    """What ALLO remembers: ``(L, L)`` multipliers, upper triangular, and the barrier."""

    multipliers: jax.Array
    barrier: jax.Array


@dataclasses.dataclass(frozen=True)
class ALLO(MomentMethod):
    r"""Augmented Lagrangian: ordered modes of norm one, with multipliers that are eigenvalues.

    .. math:: \min_f \max_\beta\; -tr A + \sum_{l \le m} \beta_{lm} (\langle [f_l], f_m\rangle
              - \delta_{lm}) + b\, (\langle [f_l], f_m\rangle - \delta_{lm})^2

    with the gradient stopped at ``[f_l]``. Every batch moves the multipliers by ``rate * b`` times
    the violation and raises ``b`` by ``growth`` times its mean square. At the solution
    ``beta_ll = lam_l``.

    Limits: a saddle point, so the multipliers must move slower than the functions; the barrier has
    to exceed the eigenvalues' range to be stable.

    Args:
      barrier: ``b`` at the start, in units of the eigenvalues.
      rate: step of the multipliers.
      growth: of the barrier.

    Raises:
      ValueError: for numbers that are not positive (``growth``: negative).

    Cost: ``L²`` numbers of memory.

    Source: Gomez, Bowling and Machado, "Proper Laplacian Representation Learning", ICLR 2024.
    """

    barrier: float = 2.0
    rate: float = 1e-2
    growth: float = 0.0
    moments: Estimate = Halves()

    def __post_init__(self):
        check_least("ALLO", "barrier", self.barrier, strict=True)
        check_least("ALLO", "rate", self.rate, strict=True)
        check_least("ALLO", "growth", self.growth)

    def init(self, modes: int) -> Duals:
        return Duals(jnp.zeros((modes, modes)), jnp.asarray(float(self.barrier)))

    def remember(self, seen, memory):
        error = jnp.triu(seen[0].gram - jnp.eye(len(seen[0].gram)))
        return Duals(
            memory.multipliers + self.rate * memory.barrier * error,
            memory.barrier + self.growth * jnp.mean(error**2),
        )

    def coefficients(self, seen, memory):
        eye = jnp.eye(len(seen[0].gram))
        error = jnp.triu(seen[0].gram - eye)
        return ((-2 * eye, (1 + eye) * (memory.multipliers + 2 * memory.barrier * error)),)


@dataclasses.dataclass(frozen=True)
class SpIN(MomentMethod):
    r"""Spectral inference networks: the trace in an orthonormal basis, with a masked gradient.

    .. math:: \Lambda = L^{-1} A L^{-T}, \; L L^T = \bar M, \qquad
              G = -\tfrac{2}{B} (T f\, L^{-T} D^{-1}
              - f\, L^{-T} triu(\Lambda D^{-1})),\; D = diag L

    with ``M̄`` an exponential average. The mask makes mode ``m`` blind to later ones.

    Limits: the modes are ``f L^{-T}``, the first ``m`` outputs span the first ``m`` modes, and
    Rayleigh-Ritz reads them off. Norms are free. Biased where the average lags behind. The original
    averages the Jacobian of ``M`` too, a matrix for every parameter; a cotangent of functions has
    no such average, so here the second term uses the batch's own.

    Args:
      decay: of the average of the covariance.

    Raises:
      ValueError: for a decay outside [0, 1).

    Cost: ``L²`` numbers of memory, ``L³`` flops.

    Source: Pfau et al., "Spectral Inference Networks", ICLR 2019.
    """

    decay: float = 0.9

    def __post_init__(self):
        check_decay("SpIN", "decay", self.decay)

    def init(self, modes: int) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((modes, modes)), jnp.zeros(())

    def remember(self, seen, memory):
        mix = lambda old, new: self.decay * old + (1 - self.decay) * new
        return mix(memory[0], seen[0].gram), mix(memory[1], 1.0)

    def coefficients(self, seen, memory):
        whiten = _whitening(memory[0] / memory[1])  # L^{-T}
        size = jnp.diagonal(whiten)  # 1 / D
        between = whiten.T @ symmetrize(seen[0].cross) @ whiten
        return ((-2 * whiten * size, 2 * whiten @ jnp.triu(between * size)),)


class Penalty(abc.ABC):
    """What keeps a mode away from earlier ones."""

    @abc.abstractmethod
    def __call__(self, quotient: jax.Array, cosine: jax.Array) -> jax.Array:
        """``(L, L)`` penalties; entry ``(l, m)`` is counted for ``l < m``, live in mode ``m``."""


@dataclasses.dataclass(frozen=True)
class AlphaPenalty(Penalty):
    """``R_lm² / R_ll``: the utility of α-EigenGame, and of NeuralEF.

    Source: Gemp et al., "EigenGame: PCA as a Nash equilibrium", ICLR 2021.
    """

    def __call__(self, quotient, cosine):
        return safe_divide(quotient**2, jax.lax.stop_gradient(jnp.diagonal(quotient))[:, None])


@dataclasses.dataclass(frozen=True)
class MuPenalty(Penalty):
    """``2 [R_lm] <f_l, f_m>``: the direction of μ-EigenGame.

    Source: Gemp et al., "EigenGame Unloaded: when playing games is better than optimizing", 2022.
    """

    def __call__(self, quotient, cosine):
        return 2 * jax.lax.stop_gradient(quotient) * cosine


@dataclasses.dataclass(frozen=True)
class SquaredPenalty(Penalty):
    """``weight * R_lm²``: Neural Eigenmaps.

    Args:
      weight: in units of one over the eigenvalues.

    Raises:
      ValueError: for a weight that is not positive.

    Source: Deng et al., "Neural eigenfunctions are structured representation learners", 2022.
    """

    weight: float = 1.0

    def __post_init__(self):
        check_least("SquaredPenalty", "weight", self.weight, strict=True)

    def __call__(self, quotient, cosine):
        return self.weight * quotient**2


@dataclasses.dataclass(frozen=True)
class MomentLoss(MomentMethod):
    """A method given by a loss of the moments, differentiated in them.

    An ``ordered`` loss is a sum of one loss a mode: its entry ``(l, m)`` of a moment is live in
    mode ``m`` alone, and what is read of earlier modes has its gradient stopped.
    """

    ordered: ClassVar[bool] = False

    @abc.abstractmethod
    def loss(self, grams: tuple[jax.Array, ...], cross: jax.Array) -> jax.Array:
        """From ``<f_l, f_m>`` of every side and ``<f_l, T f_m>`` (``<f_l, T g_m>``)."""

    def coefficients(self, seen, memory):
        cross = seen[0].cross if len(seen) == 2 else symmetrize(seen[0].cross)
        dm, da = jax.grad(self.loss, argnums=(0, 1))(tuple(s.gram for s in seen), cross)
        both = lambda x: (1 + jnp.eye(len(x))) * x if self.ordered else x + x.T
        if len(seen) == 1:
            return ((both(da), both(dm[0])),)
        return ((da.T, both(dm[0])), (da, both(dm[1])))


@dataclasses.dataclass(frozen=True)
class NeuralEF(MomentLoss):
    r"""One Rayleigh quotient a mode, with outputs normalised by their L2 norm over the batch.

    .. math:: \mathcal{L} = -\sum_m \Big(R_{mm} - \sum_{l<m} pen([f_l], f_m)\Big), \qquad
              R_{lm} = \langle f_l, T f_m\rangle / (‖f_l‖ ‖f_m‖)

    with the gradient stopped at earlier modes. With `AlphaPenalty` it is NeuralEF, and on a linear
    parametrisation α-EigenGame; with `MuPenalty` μ-EigenGame; with `SquaredPenalty` Neural
    Eigenmaps.

    Limits: ordered, orthogonal in the limit, norms free. `AlphaPenalty` and `SquaredPenalty` need
    ``T`` positive definite on the modes sought, and the latter a weight above ``1/lam_L``. Biased
    on small batches, through the norms.

    Args:
      penalty: a `Penalty`.
      moments: how they are estimated; the source's is the whole batch.

    Source: Deng, Shi and Zhu, "NeuralEF: deconstructing kernels by deep neural networks", ICML
    2022.
    """

    penalty: Penalty = AlphaPenalty()
    moments: Estimate = WholeBatch()
    ordered: ClassVar[bool] = True

    def loss(self, grams, cross):
        square = jnp.diagonal(grams[0])
        size = safe_divide(1.0, jnp.sqrt(square))
        scale = jax.lax.stop_gradient(size)[:, None] * size
        own = safe_divide(jnp.diagonal(cross), square)
        quotient = jnp.where(jnp.eye(len(cross), dtype=bool), own, cross * scale)
        return jnp.sum(jnp.triu(self.penalty(quotient, grams[0] * scale), 1)) - jnp.sum(own)


@dataclasses.dataclass(frozen=True)
class VAMP2(MomentLoss):
    r"""The squared singular values of the whitened cross-covariance, as in VAMPnets.

    .. math:: \mathcal{L} = -tr(C_{00}^{-1} C_{01} C_{11}^{-1} C_{10})

    with ``C_01 = <f, T g>``, and ``g = f`` for a self-adjoint operator.

    Limits: finds the span of the modes of largest ``|lam|``, with no order or norm: read them off
    by Rayleigh-Ritz. Biased on small batches, through the inverses.

    Source: Mardt et al., "VAMPnets for deep learning of molecular kinetics", 2018; Wu and Noé,
    "Variational approach for learning Markov processes from time series data", 2020.
    """

    moments: Estimate = WholeBatch()
    two_sided: ClassVar[bool] = True

    def loss(self, grams, cross):
        left, right = _whitening(grams[0]), _whitening(grams[-1])
        return -jnp.sum((left.T @ cross @ right) ** 2)


@dataclasses.dataclass(frozen=True)
class DPNet(MomentLoss):
    r"""A score of the span without inverses, and a penalty that holds the covariances at one.

    .. math:: \mathcal{L} = -\frac{‖C_{01}‖_F^2}{‖C_{00}‖ ‖C_{11}‖}
              + penalty \sum_C tr(C^2 - C - \ln C)

    with operator norms below the line.

    Limits: a span, as `VAMP2`; ``tr(C² - C - ln C)`` is 0 at the identity alone, so the covariances
    end near it.

    Args:
      penalty: in units of the squared eigenvalues.

    Raises:
      ValueError: for a penalty that is not positive.

    Source: Kostic et al., "Learning invariant representations of time-homogeneous stochastic
    dynamical systems", ICLR 2024.
    """

    penalty: float = 1.0
    moments: Estimate = WholeBatch()
    two_sided: ClassVar[bool] = True

    def __post_init__(self):
        check_least("DPNet", "penalty", self.penalty, strict=True)

    def loss(self, grams, cross):
        top = [jnp.linalg.eigvalsh(m)[-1] for m in grams]
        held = sum(jnp.sum(m * m) - jnp.trace(m) - _logdet(m) for m in grams)
        return self.penalty * held - safe_divide(jnp.sum(cross**2), top[0] * top[-1])


@dataclasses.dataclass(frozen=True)
class VariationalEnergy(MomentLoss):
    r"""Variational Monte Carlo: the sum of energies of the modes' span.

    .. math:: \mathcal{L} = -tr(M^{-1} A)

    With one mode it is the Rayleigh quotient of the ground state.

    Limits: a span, read off by Rayleigh-Ritz; norms are free; biased on small batches.

    Source: McMillan, Phys. Rev. 138 (1965); for several states the expectation of `ExcitedStates`.
    """

    moments: Estimate = WholeBatch()

    def loss(self, grams, cross):
        whiten = _whitening(grams[0])
        return -jnp.sum(whiten * (cross @ whiten))


@dataclasses.dataclass(frozen=True)
class SpectralNet(MomentMethod):
    r"""The trace in a basis orthonormalised on other samples, whose own gradient is left out.

    .. math:: \mathcal{L} = -tr(L^{-1} A L^{-T}), \quad [L] [L]^T = M' \text{ of the other half}

    Limits: a span, read off by Rayleigh-Ritz. Nothing holds the norms: squared, they change at four
    times the eigenvalue, so that the eigenvalues sought have to be small beside the gap after them,
    as those of minus the Laplacian of a graph with clusters are; elsewhere it slows down or
    collapses before it has converged.

    Source: Shaham et al., "SpectralNet: spectral clustering using deep neural networks", ICLR 2018.
    """

    moments: Estimate = Halves()

    def coefficients(self, seen, memory):
        whiten = _whitening(seen[0].gram)
        return ((-2 * whiten @ whiten.T, jnp.zeros_like(whiten)),)


@dataclasses.dataclass(frozen=True)
class Oja(MomentMethod):
    r"""Oja's subspace rule, and with `SequentialNesting` Sanger's, which orders the modes.

    .. math:: G = \tfrac{1}{B} (f\, (M \circ A) - T f)

    Limits: stable where ``A`` is positive; modes end orthonormal. Meant for linear
    parametrisations, where ``-G`` is the rule itself; not the gradient of a function.

    Args:
      nesting: `Unnested` for Oja's, `SequentialNesting` for Sanger's.

    Source: Oja, J. Math. Biol. 15 (1982); Sanger, Neural Networks 2 (1989).
    """

    nesting: Nesting = Unnested()
    moments: Estimate = WholeBatch()

    def coefficients(self, seen, memory):
        v, mask = self.nesting.masks(len(seen[0].gram))
        return ((-jnp.diag(v), mask * symmetrize(seen[0].cross)),)


@dataclasses.dataclass(frozen=True)
class Krasulina(MomentMethod):
    r"""The part of ``T f`` outside the span, with its matrix form for several modes.

    .. math:: G = \tfrac{1}{B} (f\, M^{-1} A - T f)

    Limits: a span, read off by Rayleigh-Ritz; norms are free and only grow.

    Source: Krasulina, 1969; Tang, "Exponentially convergent stochastic k-PCA without variance
    reduction", NeurIPS 2019.
    """

    moments: Estimate = WholeBatch()

    def coefficients(self, seen, memory):
        whiten = _whitening(seen[0].gram)
        return ((-jnp.eye(len(whiten)), whiten @ (whiten.T @ symmetrize(seen[0].cross))),)


@dataclasses.dataclass(frozen=True)
class NoisyPower(MomentMethod):
    r"""The power method on noisy images: a step of size one goes to orthonormal ``T f``.

    .. math:: G = \tfrac{1}{B} (f - T f\, R^{-1}), \qquad R^T R = (T f)^T T f / B

    with ``R`` upper triangular, as in a QR factorisation, so that modes are ordered by ``|lam|``.
    With a network it is a regression on the image.

    Limits: converges by the ratio of successive ``|lam|``, whatever the step.

    Source: Hardt and Price, "The noisy power method: a meta algorithm with applications", NeurIPS
    2014.
    """

    moments: Estimate = WholeBatch()

    def coefficients(self, seen, memory):
        return ((-_whitening(seen[0].image), jnp.eye(len(seen[0].gram))),)


@dataclasses.dataclass(frozen=True)
class LowRankProduct(MomentMethod):
    r"""Gauss-Newton steps on the symmetric low-rank product ``‖T - f f^T‖²``.

    .. math:: G = \tfrac{1}{B} \left(\tfrac12 f\,(M^{-1} A M^{-1} + I) - T f\, M^{-1}\right)

    A step of size one is Gauss-Newton's; modes of small eigenvalue are learned as fast as others.

    Limits: a span, ``f -> phi sqrt(lam) U`` with any rotation ``U``; eigenvalues above zero only.

    Source: Liu, Wen and Zhang, "An efficient Gauss-Newton algorithm for symmetric low-rank product
    matrix approximations", SIAM J. Optim. 2015.
    """

    moments: Estimate = WholeBatch()

    def coefficients(self, seen, memory):
        whiten = _whitening(seen[0].gram)
        inverse = whiten @ whiten.T
        eye = jnp.eye(len(inverse))
        return ((-inverse, (inverse @ symmetrize(seen[0].cross) @ inverse + eye) / 2),)


@dataclasses.dataclass(frozen=True)
class ExcitedStates(Method):
    r"""Natural excited states: variational Monte Carlo for the determinant of several states.

    The batch is cut into sets of ``L`` points. A set has the total ansatz ``Psi = det F`` with
    ``F_jl = f_l(x_j)`` and the local energy ``e = tr(F^{-1} T F)``, and

    .. math:: G = -2 \sum_s w_s (e_s - \bar e)\, F_s^{-T}, \qquad w_s = \det(F_s)^2 / \sum \det^2

    whose expectation is the gradient of `VariationalEnergy`.

    Limits: the weights ``det²`` vary the more, the more states: a few. A span, read off by
    Rayleigh-Ritz; norms are free. A batch must hold at least two sets; the rest is left out.

    Source: Pfau et al., "Accurate computation of quantum excited states with neural networks",
    Science 2024.
    """

    def cotangents(self, pairs: Pairs, memory: Any) -> tuple[tuple[jax.Array, ...], Any]:
        check(len(pairs) == 1, "ExcitedStates is for self-adjoint operators; pass NestedLoRA().")
        ((f, tf),) = pairs
        size, modes = f.shape
        sets = size // modes
        check(
            sets >= 2,
            f"ExcitedStates: a batch of {size} came for {modes} modes; pass at least {2 * modes}.",
        )
        cut = lambda a: a[: sets * modes].reshape(sets, modes, modes)
        f, tf = cut(f), cut(tf)
        log = jnp.linalg.slogdet(f)[1]
        # Sets whose determinant is rounding, such as those with a point twice, weigh nothing.
        bound = jnp.sum(jnp.log(jnp.linalg.norm(f, axis=2)), axis=1)
        live = log > bound + jnp.log(100 * jnp.finfo(f.dtype).eps)
        weight = jax.nn.softmax(jnp.where(live, 2 * log, -jnp.inf))
        f = jnp.where(live[:, None, None], f, jnp.eye(modes))
        inverse = jnp.linalg.inv(f)
        energy = jnp.einsum("sij,sji->s", inverse, tf)
        excess = weight * (energy - weight @ energy)
        direction = -2 * excess[:, None, None] * jnp.swapaxes(inverse, 1, 2)
        rows = direction.reshape(sets * modes, modes)
        return (jnp.pad(rows, ((0, size - sets * modes), (0, 0))),), memory


def _ridge(gram: jax.Array) -> jax.Array:
    """The Gram matrix, lifted by what its dtype cannot tell from zero."""
    lift = 10 * len(gram) * jnp.finfo(gram.dtype).eps
    return symmetrize(gram) + lift * jnp.diag(jnp.diagonal(gram))


def _whitening(gram: jax.Array) -> jax.Array:
    """``L^{-T}``, upper triangular, with ``L L^T`` the Gram matrix."""
    factor = jnp.linalg.cholesky(_ridge(gram))
    eye = jnp.eye(len(gram), dtype=gram.dtype)
    return jax.scipy.linalg.solve_triangular(factor, eye, lower=True).T


def _logdet(gram: jax.Array) -> jax.Array:
    return 2 * jnp.sum(jnp.log(jnp.diagonal(jnp.linalg.cholesky(_ridge(gram)))))
