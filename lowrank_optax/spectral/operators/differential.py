"""Differential operators: Schrödinger, Langevin, Fokker-Planck."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core.checks import check, check_finite, check_least
from lowrank_optax.spectral.laplacian import Jet, laplacian
from lowrank_optax.spectral.operators._operator import Function, SampledOperator
from lowrank_optax.spectral.operators.proposals import MultiScale, Proposal


@dataclasses.dataclass(frozen=True)
class BoxMask:
    r"""A factor that vanishes on the faces of a box.

    .. math:: \prod_i (1 - e^{-(\ell - x_i)}) (1 - e^{-(x_i + \ell)})

    Args:
      half_width: half the side ``l`` of the box, in units of the coordinates.

    Raises:
      ValueError: for a width that is not positive.

    Cost: ``4 d`` flops a point.

    Source: elementary.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> mask = spectral.operators.BoxMask(1.0)
      >>> print(round(float(mask(jnp.array([0.0]))), 3), abs(mask(jnp.array([1.0]))))
      0.4 0.0
    """

    half_width: float

    def __post_init__(self):
        check_least("BoxMask", "half_width", self.half_width, strict=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.prod(jnp.expm1(x - self.half_width) * jnp.expm1(-x - self.half_width))


@dataclasses.dataclass(frozen=True)
class RootMask:
    r"""A factor that vanishes outside a box and rises from its faces with a finite slope.

    .. math:: \prod_i \max\big((\sqrt{2 \ell^2 - x_i^2} - \ell) / \ell,\; 0\big)

    Args:
      half_width: half the side ``l`` of the box, in units of the coordinates.

    Raises:
      ValueError: for a width that is not positive.

    Cost: ``4 d`` flops and ``d`` square roots a point.

    Source: elementary.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> mask = spectral.operators.RootMask(1.0)
      >>> print(round(float(mask(jnp.array([0.0]))), 3), mask(jnp.array([2.0])))
      0.414 0.0
    """

    half_width: float

    def __post_init__(self):
        check_least("RootMask", "half_width", self.half_width, strict=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        within = jnp.minimum(jnp.abs(x / self.half_width), 1.0)
        return jnp.prod(jnp.sqrt(2 - within**2) - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Differential(SampledOperator):
    """An operator of second order on functions of ``R^d``, by importance sampling.

    A batch is ``(x, log q)``: points ``(B, d)``, and the log density ``(B,)`` they were drawn from.
    """

    def init(self) -> Any:
        return self._proposal.init()

    def sample(self, key: jax.Array, size: int, state: Any = None) -> tuple[jax.Array, jax.Array]:
        proposal = self._proposal
        state = proposal.init() if state is None else state
        x = proposal.draw(key, size, state)
        return x, jax.vmap(lambda x: proposal.log_density(x, state))(x)

    def adapt(self, state: Any, batch: Any, f: jax.Array) -> Any:
        # Densities of the span: rows of an orthonormalised f, squared and summed.
        gram = f.T @ f / len(f)
        gram = gram + 1e-4 * jnp.diag(jnp.diagonal(gram))
        leverage = jnp.sum(f * jnp.linalg.solve(gram, f.T).T, axis=1)
        return self._proposal.adapt(state, batch[0], leverage)

    def efficiency(self, state: Any) -> jax.Array:
        return self._proposal.efficiency(state)

    def points(self, batch: Any) -> tuple[Any, ...]:
        return (batch[0],)

    def apply(self, function: Function, batch: Any) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(lambda x, log_q: self._at(function, x, log_q))(*batch)

    @property
    def dimension(self) -> int:
        """The dimension of the space, ``d``."""
        return self._proposal.dimension

    @property
    @abc.abstractmethod
    def _proposal(self) -> Proposal: ...

    @abc.abstractmethod
    def _at(self, function: Function, x: jax.Array, log_q: jax.Array) -> Any:
        """``f`` and ``T f`` at one point, over the square root of its density."""


HIGHEST = 1e18
"""The energy of a wall whose own value is infinite in float32."""


def check_parts(owner: str, potential: Any, proposal: Any) -> None:
    """Refuses what is no potential on the space of the proposal, by its values at some points."""
    check(
        isinstance(proposal, Proposal),
        f"{owner}: proposal is {proposal!r}; pass a Proposal such as gaussian(2, 1.0).",
    )
    check(
        callable(potential) and not isinstance(potential, type),
        f"{owner}: potential is {potential!r}; pass a function of one point (d,), such as "
        "Harmonic().",
    )
    x = proposal.draw(jax.random.key(0), 64, proposal.init())
    values: Any = jax.vmap(potential)(x)
    check(
        getattr(values, "shape", None) == (64,),
        f"{owner}: potential maps a point {x.shape[1:]} to shape {jnp.shape(values)[1:]}; pass one "
        "that gives a scalar, such as lambda x: jnp.sum(x**2).",
    )
    bad = np.isnan(np.asarray(values))
    check(
        not bad.any(),
        f"{owner}: potential is NaN at {np.asarray(x)[bad][:1].tolist()}; pass one that is finite "
        "where the proposal draws.",
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Schrodinger(Differential):
    r"""A Schrödinger operator ``T = shift - scale * H``, ``H = -Δ + V``: low energies come first.

    A network's output ``n`` stands for the function ``psi = sqrt(p) m n``, with ``p`` the density
    of the proposal before it adapts and ``m`` a mask. Points come from the adapted density ``q``,
    and the batch sees ``psi / sqrt(q)``:

    .. math:: \frac{T \psi}{\sqrt q} = \sqrt{p/q}\,\big[(shift - scale V)\, h + scale (\Delta h
              + 2 \nabla u \cdot \nabla h + (\Delta u + |\nabla u|^2) h)\big], \quad
              h = m n,\; u = \tfrac12 \log p

    with the Laplacian exact. Residuals mean little where the potential is singular.

    Args:
      potential: the potential energy ``V``, a `Potential` or any function of one point ``(d,)``.
      proposal: the density that points are drawn from, a `Proposal` such as ``geometric(d,
        smallest, largest)``.
      shift: number added to the spectrum, in units of the eigenvalues, 0 by default; `NestedLoRA`
        finds what is above zero.
      scale: factor of the energies, eigenvalues per energy, 1 by default.
      mask: a function of one point whose zeros enforce a boundary, such as `BoxMask`; ``None`` by
        default.

    Raises:
      ValueError: for a scale that is not positive, or a potential that is not a function.

    Cost: ``d + 2`` evaluations of the network a point, forward only.

    Source: Ryu et al., "Operator SVD with Neural Networks via Nested Low-Rank Approximation",
    ICML 2024.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from lowrank_optax.spectral import operators
      >>> points = operators.gaussian(1, 0.5**0.5)  # sqrt(p) is the ground state, of energy 1
      >>> operator = operators.Schrodinger(operators.Harmonic(), points, shift=4.0)
      >>> at = jnp.array([[0.0], [1.0], [2.0]]), jnp.zeros(3)  # points, and log q
      >>> f, tf = jax.jit(lambda at: operator.apply(lambda x: jnp.ones(1), at))(at)
      >>> print(np.asarray(tf / f)[:, 0].round(3))
      [3. 3. 3.]
    """

    potential: Callable[[jax.Array], jax.Array]
    proposal: Proposal
    shift: float = 0.0
    scale: float = 1.0
    mask: Callable[[jax.Array], jax.Array] | None = None

    def __post_init__(self):
        check_least("Schrodinger", "scale", self.scale, strict=True)
        check_finite("Schrodinger", "shift", self.shift)
        check_parts("Schrodinger", self.potential, self.proposal)

    @property
    def least(self) -> float:
        """The eigenvalue of a particle that is free: none where the potential grows without end.

        It is the lowest of the potential's values on a sphere of eight times the largest scale of
        the proposal, where a bound state of the scales that are sampled has died out.
        """
        if self.mask is not None or not isinstance(self.proposal, MultiScale):
            return -math.inf
        d, center = self.dimension, self.proposal.center or (0.0,)
        around = jax.random.normal(jax.random.key(0), (64, d))
        around = jnp.concatenate([jnp.eye(d), -jnp.eye(d), around])
        around = around / jnp.linalg.norm(around, axis=1, keepdims=True)
        far = jnp.asarray(center)[None] + 8 * max(self.proposal.scales) * around
        lowest = float(jnp.min(jnp.nan_to_num(jax.vmap(self.potential)(far), nan=jnp.inf)))
        return self.shift - self.scale * lowest

    @property
    def _proposal(self) -> Proposal:
        return self.proposal

    def _envelope(self, x: jax.Array) -> jax.Array:
        return self.proposal.log_density(x, self.proposal.init()) / 2

    def _masked(self, function: Function) -> Function:
        mask, ends = self.mask, self.proposal.boundary
        return lambda x: (ends(x) if mask is None else ends(x) * mask(x)) * function(x)

    def dress(self, function: Function) -> Function:
        masked = self._masked(function)
        return lambda x: jnp.exp(self._envelope(x)) * masked(x)

    def _at(self, function: Function, x: jax.Array, log_q: jax.Array) -> Any:
        h = laplacian(self._masked(function), x)
        u = laplacian(self._envelope, x)
        curved = u.laplacian + jnp.sum(u.gradient**2)
        kinetic = h.laplacian + 2 * u.gradient @ h.gradient + curved * h.value
        ratio = jnp.exp(u.value - log_q / 2)
        # Beyond float32's range a wall is as high as it can be.
        energy = jnp.minimum(self.potential(x), HIGHEST)
        local = self.shift - self.scale * energy
        return ratio * h.value, ratio * (local * h.value + self.scale * kinetic)

    def energies(self, eigenvalues: Any) -> np.ndarray:
        """The energies of ``H`` that belong to eigenvalues of ``T``, both ``(k,)``."""
        return (self.shift - np.asarray(eigenvalues)) / self.scale

    def truth(self, k: int) -> np.ndarray:
        """The ``k`` largest eigenvalues of ``T``, descending, where the potential knows them.

        Raises:
          ValueError: for a potential without a closed form.
        """
        known = getattr(self.potential, "energies", lambda k, d: None)
        energies = known(k, self.proposal.dimension)
        check(energies is not None, f"{self.potential!r} has no energies in closed form.")
        return self.shift - self.scale * np.asarray(energies)


@dataclasses.dataclass(frozen=True, eq=False)
class Langevin(Differential):
    r"""The generator of overdamped Langevin dynamics, self-adjoint in the Boltzmann weight.

    .. math:: T f = shift\, f - \frac{\nabla U \cdot \nabla f}{\gamma}
              + \frac{\Delta f}{\beta\gamma}, \qquad \langle f, h\rangle = \int f h\, e^{-\beta U}

    The weight need not be normalised. Eigenvalues are ``shift - rate``, with rate 0 for the
    constant function.

    Args:
      potential: the energy ``U``, a function of one point ``(d,)``.
      proposal: the density that points are drawn from, a `Proposal`.
      beta: inverse temperature, in units of one over the potential, 1 by default.
      friction: the friction ``gamma``, 1 by default.
      shift: number added to the spectrum, in units of the rates, 0 by default; `NestedLoRA` finds
        what is above zero.

    Raises:
      ValueError: for a temperature or friction that is not positive, or a potential that is not a
        function.

    Cost: ``d + 2`` evaluations of the network a point, forward only.

    Source: Pavliotis, "Stochastic Processes and Applications", 2014, chapter 4.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from lowrank_optax.spectral import operators
      >>> operator = operators.Langevin(operators.Harmonic(), operators.gaussian(1, 1.0))  # U = x²
      >>> at = jnp.array([[-1.0], [1.0], [2.0]]), jnp.zeros(3)  # points, and log q
      >>> f, tf = jax.jit(lambda at: operator.apply(lambda x: x, at))(at)
      >>> print(np.asarray(tf / f)[:, 0].round(3))  # T x = -U' = -2 x
      [-2. -2. -2.]
    """

    potential: Callable[[jax.Array], jax.Array]
    proposal: Proposal
    beta: float = 1.0
    friction: float = 1.0
    shift: float = 0.0

    def __post_init__(self):
        owner = type(self).__name__
        check_least(owner, "beta", self.beta, strict=True)
        check_least(owner, "friction", self.friction, strict=True)
        check_finite(owner, "shift", self.shift)
        check_parts(owner, self.potential, self.proposal)

    @property
    def _proposal(self) -> Proposal:
        return self.proposal

    def _at(self, function: Function, x: jax.Array, log_q: jax.Array) -> Any:
        h: Jet = laplacian(function, x)
        energy, force = jax.value_and_grad(self.potential)(x)
        root = jnp.exp(-(self.beta * energy + log_q) / 2)
        drift = -(force @ h.gradient) / self.friction
        spread = h.laplacian / (self.beta * self.friction)
        return root * h.value, root * (self.shift * h.value + drift + spread)

    def truth(self, k: int, half_width: float = 4.0, cells: int = 1000) -> np.ndarray:
        """The ``k`` largest eigenvalues in one dimension, descending, from a fine grid.

        Jumps between neighbouring cells happen at the rates ``e^{-beta (U' - U)/2} / (beta gamma
        h²)``. These are in detailed balance, so that the matrix is similar to a symmetric
        tridiagonal one.

        Args:
          k: the number of eigenvalues.
          half_width: half the length of the interval, which reflects at its ends, in units of the
            coordinate.
          cells: the number of cells of the grid; the error falls with their square.

        Raises:
          ValueError: in more than one dimension.

        Source: Donati, Heida, Keller and Weber, "Estimation of the infinitesimal generator by
        square-root approximation", 2018.
        """
        check(self.proposal.dimension == 1, "truth: there is a grid in one dimension only.")
        edges = np.linspace(-half_width, half_width, cells + 1)
        x = (edges[1:] + edges[:-1]) / 2
        u = np.asarray(jax.vmap(self.potential)(jnp.asarray(x)[:, None]), np.float64)
        speed = 1 / (self.beta * self.friction * (edges[1] - edges[0]) ** 2)
        half = np.exp(-self.beta * np.diff(u) / 2)
        out = np.concatenate([half, [0]]) + np.concatenate([[0], 1 / half])
        matrix = speed * (np.diag(-out) + np.eye(cells, k=1) + np.eye(cells, k=-1))
        return self.shift + np.linalg.eigvalsh(matrix)[::-1][:k]


@dataclasses.dataclass(frozen=True, eq=False)
class FokkerPlanck(Langevin):
    r"""The Fokker-Planck operator: the adjoint of `Langevin`, on densities.

    .. math:: T \rho = shift\, \rho + \nabla\cdot(\rho \nabla U)/\gamma + \Delta\rho/(\beta\gamma),
              \qquad \langle \rho, h\rangle = \int \rho h\, e^{\beta U}

    A network's output ``n`` stands for ``rho = e^{-beta U} n``, and ``T rho = e^{-beta U} L n``
    with ``L`` the generator, so that both operators have the same eigenvalues and the same batches.
    Arguments are those of `Langevin`.

    Cost: ``d + 2`` evaluations of the network a point, forward only.

    Source: Pavliotis, "Stochastic Processes and Applications", 2014, chapter 4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lowrank_optax.spectral import operators
      >>> operator = operators.FokkerPlanck(operators.Harmonic(), operators.gaussian(1, 1.0))
      >>> one = lambda x: jnp.ones(1)  # stands for the stationary density e^{-U}, of rate 0
      >>> _, image = jax.jit(lambda at: operator.apply(one, at))((jnp.ones((3, 1)), jnp.zeros(3)))
      >>> print(jnp.abs(image).max(), round(float(operator.dress(one)(jnp.ones(1))[0]), 3))
      0.0 0.368
    """

    def dress(self, function: Function) -> Function:
        return lambda x: jnp.exp(-self.beta * self.potential(x)) * function(x)
