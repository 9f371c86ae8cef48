"""Which residuals count how much: attention, causality, points drawn anew, built-in conditions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core.checks import as_size, check, check_decay, check_least


def attention_weights(
    weights: jax.Array,
    residuals: jax.Array,
    *,
    decay: float = 0.999,
    rate: float = 0.01,
    temperature: float | jax.Array | None = None,
) -> jax.Array:
    r"""The next weights of residual-based attention: large residuals gain what small ones lose.

    .. math:: w_i \leftarrow \gamma\, w_i + \eta\, q_i / \max_j q_j,\qquad
              q_i = \Phi'(|r_i| / \epsilon)

    With the quadratic potential, the default, ``q_i = |r_i|`` (RBA). With a ``temperature`` it is
    the exponential one, ``q_i = exp(|r_i| / eps)``, whose objective is close to the largest
    residual (vRBA). Weights stay in ``[0, rate / (1 - decay)]`` if they start there. Multiply
    squared residuals by them: ``weights=`` of `lowrank_optax.least_squares.at_points`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> w = lro.least_squares.attention_weights(jnp.ones(3), jnp.array([0.1, -0.2, 0.0]),
      ...                                         decay=0.9, rate=0.1)
      >>> [round(float(x), 2) for x in w]
      [0.95, 1.0, 0.9]

    Args:
      weights: the weights so far, ``(n,)``; ones or zeros at the start.
      residuals: residuals at the points, ``(n,)``, without their weights.
      decay: ``gamma`` in [0, 1), 0.999 by default.
      rate: ``eta``, 0.01 by default.
      temperature: ``eps`` as a share of the largest residual; ``None``, the default, for the
        quadratic potential. The source lowers it in the course of a run; it may be traced.

    Returns:
      The new weights, ``(n,)``; the old ones where residuals are all zero or one is not finite.

    Raises:
      ValueError: for values out of range.

    Cost: two passes over the residuals.

    Source: Anagnostopoulos et al., "Residual-based attention in physics-informed neural networks",
    2024 (RBA); Toscano et al., "A variational framework for residual-based adaptivity in neural PDE
    solvers and operator learning", arXiv 2509.14198 (vRBA).
    """
    owner = "attention_weights"
    check_decay(owner, "decay", decay)
    check_least(owner, "rate", rate)
    size = jnp.abs(residuals)
    top = jnp.max(size, initial=0)
    share = size / jnp.where(top > 0, top, 1)
    if temperature is not None:
        check_least(owner, "temperature", temperature, strict=True)
        share = jnp.exp((share - 1) / temperature)  # its largest entry is 1
    new = decay * weights + rate * share
    return jax.lax.stop_gradient(jnp.where((top > 0) & jnp.isfinite(top), new, weights))


def causal_weights(losses: jax.Array, tolerance: float | jax.Array = 1.0) -> jax.Array:
    r"""Weights of slices in time that count once those before them are solved.

    .. math:: w_i = \exp\Bigl(-\epsilon \sum_{j < i} L_j\Bigr)

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> w = lro.least_squares.causal_weights(jnp.array([1.0, 1.0, 1.0]))
      >>> [round(float(x), 3) for x in w]
      [1.0, 0.368, 0.135]

    Args:
      losses: the mean squared residual of every slice, ``(n,)``, in the order of time.
      tolerance: ``eps``, 1 by default; the source raises it from 0.01 to 100 in a run,
        whenever all weights are near 1.

    Returns:
      The weights, ``(n,)``, not differentiated; 0 behind a slice that is not finite.

    Raises:
      ValueError: for a tolerance below 0.

    Cost: one pass over the losses.

    Source: Wang, Sankaran and Perdikaris, "Respecting causality for training physics-informed
    neural networks", 2024.
    """
    check_least("causal_weights", "tolerance", tolerance)
    before = jnp.concatenate([jnp.zeros_like(losses[:1]), jnp.cumsum(losses)[:-1]])
    weights = jnp.exp(-tolerance * before)
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(before), weights, 0))


def resample(
    key: jax.Array,
    points: Any,
    residuals: jax.Array,
    count: int,
    *,
    power: float = 1.0,
    offset: float = 1.0,
) -> Any:
    r"""Draws points where residuals are large, without replacement (RAD).

    .. math:: p_i \propto \frac{|r_i|^k}{\mathrm{mean}_j |r_j|^k} + c

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> x = jnp.arange(100.0)
      >>> new = lro.least_squares.resample(jax.random.key(0), x, x > 89, 10, offset=0.0)
      >>> bool(jnp.all(jnp.sort(new) == jnp.arange(90.0, 100.0)))
      True

    Args:
      key: key of the draw.
      points: candidates, an array or a tree of arrays with ``n`` along the first axis.
      residuals: residuals at them, ``(n,)``.
      count: number of points to draw, at most ``n``.
      power: ``k``, 1 by default; 0 draws uniformly.
      offset: ``c``, 1 by default; 0 draws nothing where residuals are zero.

    Returns:
      The points that were drawn, ``count`` along the first axis.

    Raises:
      ValueError: for values out of range.

    Cost: a sort of ``n`` numbers.

    Source: Wu et al., "A comprehensive study of non-adaptive and residual-based adaptive sampling
    for physics-informed neural networks", 2023.
    """
    owner = "resample"
    count = as_size(owner, "count", count)
    check_least(owner, "power", power)
    check_least(owner, "offset", offset)
    n = residuals.shape[0]
    check(count <= n, f"{owner}: count is {count} of {n} candidates; pass at most {n}.")
    size = jnp.abs(jnp.asarray(residuals, float)) ** power
    mean = jnp.mean(size)
    chance = jnp.where(mean > 0, size / jnp.where(mean > 0, mean, 1), 1) + offset
    chance = jnp.where(jnp.isfinite(chance), chance, 0)
    at = jax.random.choice(key, n, (count,), replace=False, p=chance / jnp.sum(chance))
    return jax.tree.map(lambda x: x[at], points)


def hard_constraint(
    network: Callable[[Any, Any], jax.Array],
    value: Callable[[Any], jax.Array],
    distance: Callable[[Any], jax.Array],
) -> Callable[[Any, Any], jax.Array]:
    r"""A function that has the values it must have, whatever the network says.

    .. math:: u(x) = g(x) + \ell(x)\, N(x),\qquad \ell = 0 \text{ where } u = g \text{ is required}

    What is built in needs no residuals, no weights and no points.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> u = lro.least_squares.hard_constraint(
      ...     lambda p, x: p * x, value=lambda x: 1.0, distance=lambda x: x)       # u(0) = 1
      >>> float(u(5.0, 0.0))
      1.0

    Args:
      network: ``(params, point) -> N``.
      value: ``point -> g``.
      distance: ``point -> l``, smooth, zero where the value is required and nowhere else.

    Returns:
      The function ``(params, point) -> u``.

    Cost: that of the functions.

    Source: Lagaris, Likas and Fotiadis, "Artificial neural networks for solving ordinary and
    partial differential equations", 1998.
    """
    return lambda params, point: value(point) + distance(point) * network(params, point)
