"""Potentials of Schrödinger and Langevin operators: functions of one point ``(d,)``.

Any function will do. Those of this module also know their energies under ``H = -Δ + V`` where there
is a closed form.
"""

import abc
import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core.checks import check, check_least


class Potential(abc.ABC):
    """A potential energy, a function of one point."""

    @abc.abstractmethod
    def __call__(self, x: jax.Array) -> jax.Array:
        """The energy at one point ``(d,)``, a scalar."""

    def energies(self, k: int, dimension: int) -> np.ndarray | None:
        """The ``k`` lowest energies of ``-Δ + V``, ascending, or ``None`` without a closed form."""
        return None


@dataclasses.dataclass(frozen=True)
class Hydrogen(Potential):
    r"""The potential of a point charge, ``V = -charge / r``, with bound energies below zero.

    .. math:: E_n = -\frac{charge^2}{(2n + d - 1)^2}, \quad n = 0, 1, \dots

    each as often as there are harmonics of degree ``n`` in ``d + 1`` dimensions (``2n + 1`` in the
    plane, ``(n + 1)²`` in space).

    Args:
      charge: strength of the attraction, in units where ``H = -Δ - charge / r``, 1 by default.

    Raises:
      ValueError: for a charge that is not positive; by ``energies``, on a line.

    Cost: ``2 d`` flops a point.

    Source: Yang et al., "Analytic solution of a two-dimensional hydrogen atom", Phys. Rev. A 43
    (1991).

    Example:
      >>> from lowrank_optax import spectral
      >>> print(spectral.operators.Hydrogen().energies(4, 2).round(3))
      [-1. -0.111 -0.111 -0.111]
    """

    charge: float = 1.0

    def __post_init__(self):
        check_least("Hydrogen", "charge", self.charge, strict=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        square = jnp.maximum(jnp.sum(x**2), jnp.finfo(x.dtype).tiny ** 0.5)
        return -self.charge / jnp.sqrt(square)

    def energies(self, k: int, dimension: int) -> np.ndarray:
        check(dimension >= 2, "Hydrogen: no bound ground state on a line; pass dimension >= 2.")
        comb, d = math.comb, dimension
        levels = (
            itertools.repeat(
                -((self.charge / (2 * n + d - 1)) ** 2),
                comb(n + d, d) - (comb(n + d - 2, d) if n > 1 else 0),
            )
            for n in itertools.count()
        )
        return _first(levels, k)


@dataclasses.dataclass(frozen=True)
class Harmonic(Potential):
    r"""The harmonic oscillator, ``V = frequency² |x|²``.

    .. math:: E_n = frequency\, (2n + d), \quad n = 0, 1, \dots

    each ``comb(n + d - 1, d - 1)`` times.

    Args:
      frequency: the frequency, in units where ``H = -Δ + frequency² |x|²``, 1 by default.

    Raises:
      ValueError: for a frequency that is not positive.

    Cost: ``2 d`` flops a point.

    Source: elementary.

    Example:
      >>> from lowrank_optax import spectral
      >>> print(spectral.operators.Harmonic().energies(4, 2))
      [2. 4. 4. 6.]
    """

    frequency: float = 1.0

    def __post_init__(self):
        check_least("Harmonic", "frequency", self.frequency, strict=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.frequency**2 * jnp.sum(x**2)

    def energies(self, k: int, dimension: int) -> np.ndarray:
        d = dimension
        levels = (
            itertools.repeat(self.frequency * (2 * n + d), math.comb(n + d - 1, d - 1))
            for n in itertools.count()
        )
        return _first(levels, k)


@dataclasses.dataclass(frozen=True)
class InfiniteWell(Potential):
    r"""A box with hard walls, ``V = 0`` within ``|x_i| < half_width``.

    .. math:: E = \left(\frac{\pi}{2\,half\_width}\right)^2 \sum_i n_i^2, \quad n_i = 1, 2, \dots

    The walls are not in the potential: pass the operator a mask that vanishes there.

    Args:
      half_width: half the width of the well along every coordinate, in their unit, 1 by default.

    Raises:
      ValueError: for a width that is not positive.

    Cost: ``2 d`` flops a point.

    Source: elementary.

    Example:
      >>> import numpy as np
      >>> from lowrank_optax import spectral
      >>> print(spectral.operators.InfiniteWell(np.pi / 2).energies(4, 2))
      [2. 5. 5. 8.]
    """

    half_width: float = 1.0

    def __post_init__(self):
        check_least("InfiniteWell", "half_width", self.half_width, strict=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return 0 * jnp.sum(x)

    def energies(self, k: int, dimension: int) -> np.ndarray:
        # The k points of smallest norm lie within the cube of side k, most of them far within.
        side = min(k, 2 + math.ceil(2 * k ** (1 / dimension)))
        squares = np.arange(1, side + 1) ** 2
        sums = np.zeros(1)
        for _ in range(dimension):
            sums = np.sort((sums[:, None] + squares).ravel())[: max(k, 64) * side]
        return (np.pi / (2 * self.half_width)) ** 2 * sums[:k]


@dataclasses.dataclass(frozen=True)
class DoubleWell(Potential):
    """Two wells along the first coordinate, ``V = barrier * (x_1² - 1)² + sum_{i>1} x_i²``.

    Args:
      barrier: height of the barrier between the minima at ``x_1 = ±1``, in units of energy, 1 by
        default.

    Raises:
      ValueError: for a barrier that is not positive.

    Cost: ``2 d`` flops a point.

    Source: elementary.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> well = spectral.operators.DoubleWell(3.0)
      >>> print(well(jnp.array([0.0, 0.0])), well(jnp.array([1.0, 2.0])))
      3.0 4.0
    """

    barrier: float = 1.0

    def __post_init__(self):
        check_least("DoubleWell", "barrier", self.barrier, strict=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.barrier * (x[0] ** 2 - 1) ** 2 + jnp.sum(x[1:] ** 2)


@dataclasses.dataclass(frozen=True)
class Prinz(Potential):
    """Four wells on ``[-1, 1]``, a usual test of models of molecular kinetics.

    .. math:: 4 (x^8 + 0.8 e^{-80 x^2} + 0.2 e^{-80 (x - 0.5)^2} + 0.5 e^{-40 (x + 0.5)^2})

    summed over the coordinates.

    Cost: ``20 d`` flops a point.

    Source: Prinz et al., "Markov models of molecular kinetics: generation and validation", J. Chem.
    Phys. 134 (2011).

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> barrier = spectral.operators.Prinz()(jnp.array([0.0]))  # the highest of the three
      >>> print(round(float(barrier), 2))
      3.2
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        bump = lambda height, width, at: height * jnp.exp(-width * (x - at) ** 2)
        bumps = bump(0.8, 80, 0.0) + bump(0.2, 80, 0.5) + bump(0.5, 40, -0.5)
        return 4 * jnp.sum(x**8 + bumps)


def _first(levels, k: int) -> np.ndarray:
    return np.array(list(itertools.islice(itertools.chain.from_iterable(levels), k)), float)
