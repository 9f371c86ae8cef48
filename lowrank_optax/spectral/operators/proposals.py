"""Densities that the points of a differential operator are drawn from."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core.checks import check, check_count, check_decay, check_least


class Proposal(abc.ABC):
    """A density on ``R^d`` that may learn from the functions seen at its points.

    Attributes:
      dimension: the dimension of the space, ``d``.
    """

    dimension: int

    def init(self) -> Any:
        """What the density knows before the first batch: a pytree."""
        return ()

    @abc.abstractmethod
    def draw(self, key: jax.Array, size: int, state: Any) -> jax.Array:
        """Points ``(size, d)``."""

    @abc.abstractmethod
    def log_density(self, x: jax.Array, state: Any) -> jax.Array:
        """The log density at one point ``(d,)``, a scalar."""

    def adapt(self, state: Any, x: jax.Array, leverage: jax.Array) -> Any:
        """What the density knows after a batch.

        Args:
          state: what it knew before.
          x: the points of the batch, ``(B, d)``.
          leverage: the density of the modes' span there relative to this one, ``(B,)``, up to a
            factor.
        """
        return state

    def efficiency(self, state: Any) -> jax.Array:
        """Effective sample size as a fraction of the batch, 1 where it is not known."""
        return jnp.ones(())

    def boundary(self, x: jax.Array) -> jax.Array:
        """A factor, at one point, that vanishes where the density ends before the space does."""
        return jnp.ones((), x.dtype)


@dataclasses.dataclass(frozen=True)
class Box(Proposal):
    """The uniform density on ``[-half_width, half_width]^d``.

    Args:
      dimension: the dimension of the space, ``d``.
      half_width: half the side of the box, in units of the coordinates.

    Raises:
      ValueError: for a dimension below 1 or a width that is not positive.

    Cost: ``d`` random numbers a point.

    Source: elementary.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> box = spectral.operators.Box(2, 1.0)
      >>> print(round(float(jnp.exp(box.log_density(jnp.zeros(2), box.init()))), 3))
      0.25
    """

    dimension: int
    half_width: float

    def __post_init__(self):
        check_count("Box", "dimension", self.dimension)
        check_least("Box", "half_width", self.half_width, strict=True)

    def draw(self, key: jax.Array, size: int, state: Any) -> jax.Array:
        shape = (size, self.dimension)
        return jax.random.uniform(key, shape, minval=-self.half_width, maxval=self.half_width)

    def log_density(self, x: jax.Array, state: Any) -> jax.Array:
        return -self.dimension * jnp.log(2 * self.half_width) + 0 * jnp.sum(x)


class Adapted(NamedTuple):
    """What a mixture knows.

    Attributes:
      log_weights: logarithms of the components' weights, ``(K,)``.
      efficiency: the effective sample size as a fraction of the batch, a scalar.
    """

    log_weights: jax.Array
    efficiency: jax.Array


@dataclasses.dataclass(frozen=True)
class MultiScale(Proposal):
    """A mixture of Gaussians around one centre, ``sum_k a_k N(c, s_k² I)``, that adapts ``a``.

    Its target is the density of the modes' span, ``pi = sum_l phi_l² / L``: samples of it keep the
    Gram matrix of any functions of the span closest to its mean. Every batch moves the weights
    towards the shares ``mean_i (pi/q)(x_i) rho_k(x_i)`` of the scales in ``pi``, the step that
    brings the mixture closest to ``pi`` in Kullback-Leibler divergence. A floor keeps every scale
    alive, for modes not yet found.

    Args:
      dimension: the dimension of the space, ``d``.
      scales: standard deviations ``s_k`` of the ``K`` components, in units of the coordinates; a
        single one makes a plain Gaussian.
      center: the common centre ``c``, ``(d,)``; the origin by default.
      floor: sum of the lower bounds of the weights, in [0, 1], 0.3 by default; 1 switches
        adaptation off.
      rate: rate of the exponential average over batches, in [0, 1], 0.02 by default.
      low: coordinates below which nothing is drawn, ``(d,)`` and each below the centre's, minus
        infinity for none; points beyond are reflected, and functions vanish there. ``None``, the
        default, for none at all.
      high: the same for coordinates above.

    Raises:
      ValueError: for numbers out of range, no scales, or a centre or ends of another dimension.

    Cost: ``K`` densities a point; ``L³`` flops a batch.

    Source: Douc et al., "Convergence of adaptive mixtures of importance sampling schemes", 2007;
    Cohen and Migliorati, "Optimal weighted least-squares methods", 2017.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from lowrank_optax import spectral
      >>> mixture = spectral.operators.MultiScale(1, (1.0, 4.0))
      >>> adapt, centre = jax.jit(mixture.adapt), jnp.zeros((8, 1))
      >>> state = adapt(mixture.init(), centre, jnp.ones(8))  # every point in the centre
      >>> print(np.exp(np.asarray(state.log_weights)).round(4))
      [0.5042 0.4958]
    """

    dimension: int
    scales: tuple[float, ...]
    center: tuple[float, ...] | None = None
    floor: float = 0.3
    rate: float = 0.02
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None

    def __post_init__(self):
        check_count("MultiScale", "dimension", self.dimension)
        object.__setattr__(self, "scales", tuple(float(s) for s in self.scales))
        check(self.scales, "MultiScale: scales is empty; pass at least one.")
        for scale in self.scales:
            check_least("MultiScale", "scales", scale, strict=True)
        check_decay("MultiScale", "floor", self.floor, closed=True)
        check_decay("MultiScale", "rate", self.rate, closed=True)
        if self.center is not None:
            object.__setattr__(self, "center", tuple(float(c) for c in self.center))
            check(
                len(self.center) == self.dimension,
                f"MultiScale: center has {len(self.center)} entries; pass {self.dimension}.",
            )
        middle = np.zeros(self.dimension) if self.center is None else np.array(self.center)
        for name, sign in (("low", -1), ("high", 1)):
            end = getattr(self, name)
            if end is not None:
                object.__setattr__(self, name, tuple(float(c) for c in end))
                check(
                    len(end) == self.dimension and np.all(sign * (np.array(end) - middle) > 0),
                    f"MultiScale: {name} is {end!r}; pass {self.dimension} numbers on that side of "
                    "the centre.",
                )

    def init(self) -> Adapted:
        return Adapted(jnp.full(len(self.scales), -jnp.log(len(self.scales))), jnp.ones(()))

    def draw(self, key: jax.Array, size: int, state: Adapted) -> jax.Array:
        which, normal = jax.random.split(key)
        k = jax.random.categorical(which, state.log_weights, shape=(size,))
        noise = jax.random.normal(normal, (size, self.dimension))
        x = self._center[None] + jnp.asarray(self.scales)[k][:, None] * noise
        for end, side in ((self.low, jnp.less), (self.high, jnp.greater)):
            if end is not None:
                x = jnp.where(side(x, jnp.asarray(end)[None]), 2 * jnp.asarray(end)[None] - x, x)
        return x

    def log_density(self, x: jax.Array, state: Adapted) -> jax.Array:
        return jax.nn.logsumexp(self._terms(x, state))

    def adapt(self, state: Adapted, x: jax.Array, leverage: jax.Array) -> Adapted:
        terms = jax.vmap(lambda x: jax.nn.softmax(self._terms(x, state)))(x)
        count = len(self.scales)
        share = leverage @ terms / jnp.sum(leverage)
        share = self.floor / count + (1 - self.floor) * share
        mixed = (1 - self.rate) * jnp.exp(state.log_weights) + self.rate * share
        seen = jnp.sum(leverage) ** 2 / (len(leverage) * jnp.sum(leverage**2))
        efficiency = (1 - self.rate) * state.efficiency + self.rate * seen
        ok = jnp.all(jnp.isfinite(share)) & jnp.isfinite(seen)
        return Adapted(
            jnp.where(ok, jnp.log(mixed / jnp.sum(mixed)), state.log_weights),
            jnp.where(ok, efficiency, state.efficiency),
        )

    def efficiency(self, state: Adapted) -> jax.Array:
        return state.efficiency

    def boundary(self, x: jax.Array) -> jax.Array:
        """Rises from 0 at the ends over the smallest scale."""
        ends = [end for end in (self.low, self.high) if end is not None]
        factor = jnp.ones((), x.dtype)
        for end in ends:
            away = jnp.abs(x - jnp.asarray(end, x.dtype)) / min(self.scales)
            factor = factor * jnp.prod(-jnp.expm1(-away))
        within = jnp.ones((), bool)
        if self.low is not None:
            within = within & jnp.all(x >= jnp.asarray(self.low, x.dtype))
        if self.high is not None:
            within = within & jnp.all(x <= jnp.asarray(self.high, x.dtype))
        return jnp.where(within, factor, 0.0)

    @property
    def _center(self) -> jax.Array:
        return jnp.zeros(self.dimension) if self.center is None else jnp.asarray(self.center)

    def _terms(self, x: jax.Array, state: Adapted) -> jax.Array:
        s = jnp.asarray(self.scales)
        norm = self.dimension * jnp.log(s * (2 * jnp.pi) ** 0.5)
        if self.low is None and self.high is None:
            square = jnp.sum((x - self._center) ** 2)
            return state.log_weights - square / (2 * s**2) - norm
        # A component is a product over coordinates, each with its reflections at the ends.
        images = [x]
        for end in (self.low, self.high):
            if end is not None:
                end = jnp.asarray(end, x.dtype)
                finite = jnp.where(jnp.isfinite(end), end, 0.0)
                images.append(jnp.where(jnp.isfinite(end), 2 * finite - x, jnp.inf))
        apart = (jnp.stack(images) - self._center[None]) ** 2
        apart = jnp.where(jnp.isfinite(apart), apart, 1e12)
        terms = -apart[:, None, :] / (2 * s**2)[None, :, None]
        return state.log_weights + jnp.sum(jax.nn.logsumexp(terms, axis=0), -1) - norm


def gaussian(dimension: int, scale: float) -> MultiScale:
    """The normal density ``N(0, scale² I)``.

    Args:
      dimension: the dimension of the space, ``d``.
      scale: standard deviation along every coordinate, in their unit.

    Returns:
      A `MultiScale` of one scale.

    Raises:
      ValueError: for a dimension below 1 or a scale that is not positive.

    Example:
      >>> from lowrank_optax import spectral
      >>> spectral.operators.gaussian(2, 3.0).scales
      (3.0,)

    Source: elementary.
    """
    return MultiScale(dimension, (scale,))


def geometric(dimension: int, smallest: float, largest: float) -> MultiScale:
    """A `MultiScale` whose scales double from ``smallest`` up to at least ``largest``.

    Args:
      dimension: the dimension of the space, ``d``.
      smallest: the first scale, in units of the coordinates.
      largest: number that the last scale reaches or exceeds, in the same unit.

    Returns:
      The `MultiScale`.

    Raises:
      ValueError: unless ``0 < smallest <= largest``.

    Example:
      >>> from lowrank_optax import spectral
      >>> spectral.operators.geometric(1, 0.5, 3.0).scales
      (0.5, 1.0, 2.0, 4.0)

    Source: elementary.
    """
    check(
        0 < smallest <= largest,
        f"geometric: smallest {smallest!r} and largest {largest!r} came; pass 0 < smallest <= "
        "largest.",
    )
    scales = [smallest]
    while scales[-1] < largest:
        scales.append(2 * scales[-1])
    return MultiScale(dimension, tuple(scales))


def classical(
    potential: Callable[[jax.Array], jax.Array],
    dimension: int,
    energy: float,
    largest: float = 32.0,
) -> MultiScale:
    """A `geometric` that reaches as far as a classical particle of an energy, ``V(x) <= energy``.

    Functions of lower energy live there and fall off beyond it. So no length has to be chosen for a
    `Schrodinger`: pass its ``shift / scale`` as the energy.

    Args:
      potential: the potential ``V``, a function of one point ``(d,)``.
      dimension: the dimension of the space, ``d``.
      energy: the particle's energy, in units of the potential.
      largest: length at which the search begins, and at which the scales end if the particle is
        free there, 32 by default; it suits units in which lengths are of order one, such as ``H =
        -Δ - 1/r``.

    Returns:
      The `MultiScale`, with scales down to 0.5 or a quarter of its reach, and ends where the
      potential rises to 64 times the particle's largest kinetic energy within four of its scales.

    Raises:
      ValueError: for a dimension below 1, a length that is not positive, or an energy that is too
        low for any point that was tried.

    Cost: ``10752 + 2021 d`` values of the potential, along the axes, in directions at random, and
    at points of the `MultiScale`.

    Example:
      >>> from lowrank_optax.spectral import operators
      >>> operators.classical(operators.Harmonic(), 2, 16.0).scales
      (0.5, 1.0, 2.0, 4.0)
      >>> operators.classical(operators.Hydrogen(), 2, 0.0).scales[-1]
      32.0

    Source: elementary.
    """
    check_count("classical", "dimension", dimension)
    check_least("classical", "largest", largest, strict=True)
    axes = jnp.eye(dimension)
    anywhere = jax.random.normal(jax.random.key(0), (256, dimension))
    anywhere = anywhere / jnp.linalg.norm(anywhere, axis=1, keepdims=True)
    directions = jnp.concatenate([axes, -axes, anywhere])
    # Slightly within each length, so that rounding does not decide on a turning point there.
    lengths = largest * 2.0 ** -jnp.arange(10)
    values = jax.vmap(jax.vmap(potential))(lengths[:, None, None] * directions * (1 - 1e-6))
    within = jnp.any(values <= energy, axis=1)
    check(
        bool(jnp.any(within)),
        f"classical: the potential exceeds energy {energy!r} at every point that was tried; pass "
        "a higher one (a Schrodinger's shift / scale).",
    )
    reach = float(lengths[jnp.argmax(within)])
    found = geometric(dimension, min(0.5, reach / 4), reach)
    low, high = _ends(potential, found, energy)
    return dataclasses.replace(found, low=low, high=high)


WALL = 64.0
"""How many times a particle's largest kinetic energy a wall lies above its energy."""


def _ends(potential: Any, found: MultiScale, energy: float) -> list[tuple[float, ...] | None]:
    """Where along each coordinate the potential is far above the energy, in reach of the scales.

    Functions of that energy have died out there: by ``e^{-5}`` over the last stretch alone.
    """
    reach, d = 4 * max(found.scales), found.dimension
    line = jnp.linspace(-reach, reach, 2001)
    axes = (line[:, None, None] * jnp.eye(d)[None]).reshape(-1, d)
    x = jnp.concatenate([axes, found.draw(jax.random.key(1), 8192, found.init())])
    values = np.nan_to_num(np.asarray(jax.vmap(potential)(x), np.float64), nan=np.inf)
    kinetic = energy - values.min()
    inside = np.asarray(x)[values <= energy + WALL * kinetic]
    stretch = 5 / (WALL * kinetic) ** 0.5 + reach / 1000 + (0 if d == 1 else reach / 50)
    ends = inside.min(0) - stretch, inside.max(0) + stretch
    low = tuple(float(c) if c > -reach else -np.inf for c in ends[0])
    high = tuple(float(c) if c < reach else np.inf for c in ends[1])
    return [end if np.isfinite(end).any() else None for end in (low, high)]
