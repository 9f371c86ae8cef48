"""How the moments behind a row's cotangent are estimated from the batch."""

import abc
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lowrank_optax._core.checks import check, check_count
from lowrank_optax.spectral.methods._method import Pairs, SideMoments, moments

Coefficients = tuple[tuple[jax.Array, jax.Array], ...]
"""``(P, Q)`` for every side."""


class Estimate(abc.ABC):
    """How the moments behind a row's cotangent are estimated from the batch."""

    @abc.abstractmethod
    def directions(
        self, pairs: Pairs, coefficients: Callable[[tuple[SideMoments, ...]], Coefficients]
    ) -> tuple[jax.Array, ...]:
        """``G`` of every side, ``(B, L)``.

        Args:
          pairs: functions and images of every side, each ``(B, L)``.
          coefficients: the method's map from `SideMoments` to ``(P, Q)``, both of every side.
        """


@dataclasses.dataclass(frozen=True)
class WholeBatch(Estimate):
    """Moments of the whole batch, which are biased because they pair each row with itself.

    Cost: ``4 B L²`` flops.

    Source: elementary.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> f = jnp.array([[1.0], [2.0], [3.0], [4.0]])
      >>> weigh = lambda seen: ((jnp.zeros((1, 1)), seen[0].gram),)  # G = f <f, f> / B
      >>> (g,) = spectral.WholeBatch().directions(((f, f),), weigh)
      >>> print((4 * g / f)[:, 0])  # <f, f> as each row sees it
      [7.5 7.5 7.5 7.5]
    """

    def directions(self, pairs, coefficients):
        return _apply(pairs, coefficients(moments(pairs)), len(pairs[0][0]))


@dataclasses.dataclass(frozen=True)
class Halves(Estimate):
    """Each half of the batch is paired with the moments of the other half: unbiased for products.

    Raises:
      ValueError: by ``directions``, for a batch of fewer than 2 rows.

    Cost: ``4 B L²`` flops.

    Source: Ryu et al., "Operator SVD with Neural Networks via Nested Low-Rank Approximation",
    ICML 2024.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> f = jnp.array([[1.0], [2.0], [3.0], [4.0]])
      >>> weigh = lambda seen: ((jnp.zeros((1, 1)), seen[0].gram),)  # G = f <f, f> / B
      >>> (g,) = spectral.Halves().directions(((f, f),), weigh)
      >>> print((4 * g / f)[:, 0])  # <f, f> as each row sees it
      [12.5 12.5  2.5  2.5]
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
      group: number of rows that are one independent sample and are left out together, 1 by default;
        2 for `Koopman` and `GraphLaplacian`, which read each pair in both directions.

    Raises:
      ValueError: for a group below 1; by ``directions``, for a batch that is not at least two whole
        groups.

    Cost: memory ``B L² / group``, and ``8 B L²`` flops.

    Source: Hoeffding, "A class of statistics with asymptotically normal distribution", 1948.

    Example:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import spectral
      >>> f = jnp.array([[1.0], [2.0], [3.0], [4.0]])
      >>> weigh = lambda seen: ((jnp.zeros((1, 1)), seen[0].gram),)  # G = f <f, f> / B
      >>> (g,) = spectral.UStatistic().directions(((f, f),), weigh)
      >>> print((12 * g / f)[:, 0].round())  # 3 <f, f> as each row sees it
      [29. 26. 21. 14.]
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
