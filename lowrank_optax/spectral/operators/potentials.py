"""Potentials of Schrödinger and Langevin operators: functions of one point ``(d,)``.

Any function will do; these know their energies under ``H = -Δ + V``, ascending, where they are
known in closed form.
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
    """A potential energy."""

    @abc.abstractmethod
    def __call__(self, x: jax.Array) -> jax.Array:
        """At one point ``(d,)``."""

    def energies(self, k: int, dimension: int) -> np.ndarray | None:
        """The ``k`` lowest energies of ``-Δ + V`` in closed form, or ``None``."""
        return None


@dataclasses.dataclass(frozen=True)
class Hydrogen(Potential):
    r"""``V = -charge / r``, with energies below zero.

    .. math:: E_n = -\frac{charge^2}{(2n + d - 1)^2}, \quad n = 0, 1, \dots

    each as often as there are harmonics of degree ``n`` in ``d + 1`` dimensions (``2n + 1`` in the
    plane, ``(n + 1)²`` in space).

    Args:
      charge: in units where ``H = -Δ - charge / r``.

    Raises:
      ValueError: for a charge that is not positive, and for energies on a line.

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
    r"""``V = frequency² |x|²`` with ``E_n = frequency (2n + d)``, ``comb(n + d - 1, d - 1)`` times.

    Args:
      frequency: in units where ``H = -Δ + frequency² |x|²``.

    Raises:
      ValueError: for a frequency that is not positive.
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
    r"""``V = 0`` within ``|x_i| < half_width``: pair it with a mask that vanishes at the walls.

    .. math:: E = \left(\frac{\pi}{2\,half\_width}\right)^2 \sum_i n_i^2, \quad n_i = 1, 2, \dots

    Args:
      half_width: of the well along every coordinate.

    Raises:
      ValueError: for a width that is not positive.
    """

    half_width: float = 1.0

    def __post_init__(self):
        check_least("InfiniteWell", "half_width", self.half_width, strict=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return 0 * jnp.sum(x)

    def energies(self, k: int, dimension: int) -> np.ndarray:
        # k points of smallest norm lie within the cube of side k, and mostly far within.
        side = min(k, 2 + math.ceil(2 * k ** (1 / dimension)))
        squares = np.arange(1, side + 1) ** 2
        sums = np.zeros(1)
        for _ in range(dimension):
            sums = np.sort((sums[:, None] + squares).ravel())[: max(k, 64) * side]
        return (np.pi / (2 * self.half_width)) ** 2 * sums[:k]


@dataclasses.dataclass(frozen=True)
class DoubleWell(Potential):
    """``V = barrier * (x_1² - 1)² + sum_{i>1} x_i²``: minima at ``x_1 = ±1``.

    Args:
      barrier: height between the wells.

    Raises:
      ValueError: for a barrier that is not positive.
    """

    barrier: float = 1.0

    def __post_init__(self):
        check_least("DoubleWell", "barrier", self.barrier, strict=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.barrier * (x[0] ** 2 - 1) ** 2 + jnp.sum(x[1:] ** 2)


@dataclasses.dataclass(frozen=True)
class Prinz(Potential):
    """Four wells on ``[-1, 1]``, a usual test of models of molecular kinetics.

    ``4 (x⁸ + 0.8 e^{-80 x²} + 0.2 e^{-80 (x - 0.5)²} + 0.5 e^{-40 (x + 0.5)²})``, summed over
    coordinates.

    Source: Prinz et al., "Markov models of molecular kinetics: generation and validation", J. Chem.
    Phys. 134 (2011).
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        bump = lambda height, width, at: height * jnp.exp(-width * (x - at) ** 2)
        bumps = bump(0.8, 80, 0.0) + bump(0.2, 80, 0.5) + bump(0.5, 40, -0.5)
        return 4 * jnp.sum(x**8 + bumps)


def _first(levels, k: int) -> np.ndarray:
    return np.array(list(itertools.islice(itertools.chain.from_iterable(levels), k)), float)
