"""Residuals as they come: of points one by one, and of a wavefunction's energy."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core.checks import as_size, check


class PointResiduals(NamedTuple):
    """What `at_points` returns.

    Attributes:
      residuals: ``params -> residuals``, a list with an array ``(n, *shape)`` for every part; for
        ``residuals_fn=``.
      gradients: ``params -> tree of (k, *leaf.shape)``, the residuals' gradients in the same order;
        for ``per_example_grads=``.
    """

    residuals: Callable[[Any], list[jax.Array]]
    gradients: Callable[[Any], Any]


def at_points(*parts: Sequence[Any], chunk: int | None = 2048) -> PointResiduals:
    r"""Residuals that each depend on one point, and their gradients at the price of one pass.

    .. math:: r_{p,i} = \sqrt{w_{p,i} / n_p}\; f_p(\text{params}, x_{p,i})

    A program does not see that residuals share no points: their Jacobian would cost ``k`` passes
    over all of them. Each residual's gradient from its own point costs what one pass does.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> u = lambda p, x: jnp.tanh(p[:, 0] * x + p[:, 1]) @ p[:, 2]
      >>> inside = lambda p, x: jax.grad(u, 1)(p, x) + u(p, x)          # u' = -u
      >>> start = lambda p, x: u(p, x) - 1.0                            # u(0) = 1
      >>> fit = lro.least_squares.at_points(
      ...     (inside, jnp.linspace(0, 1, 20)), (start, jnp.zeros(1), 10.0))
      >>> tx = lro.levenberg_marquardt()
      >>> params = jax.random.normal(jax.random.key(0), (5, 3)); state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(
      ...         params, state, params, residuals_fn=fit.residuals,
      ...         per_example_grads=fit.gradients(params))
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(30):
      ...     params, state = step(params, state)
      >>> bool(abs(u(params, 1.0) - jnp.exp(-1.0)) < 1e-3)
      True

    Args:
      *parts: tuples ``(f, points)`` or ``(f, points, weights)``: ``f`` takes the parameters and one
        point and returns a number or an array of a fixed shape; ``points`` is an array, or a tree
        of arrays, with ``n`` along the first axis; ``weights`` is a number or an array ``(n,)``, 1
        by default, not differentiated.
      chunk: number of points that are worked on at a time, 2048 by default, ``None`` for all. It
        bounds the memory of products with the Jacobian: of more points only the parameters are
        kept, and what else a derivative needs is computed again.

    Returns:
      A `PointResiduals`.

    Raises:
      ValueError: for a part that is no such tuple, points without a common first axis, or a chunk
        below 1.

    Cost: that of the functions, and once more in a derivative by chunks; gradients take ``k`` times
      the parameters of memory.

    Source: elementary.
    """
    if chunk is not None:
        chunk = as_size("at_points", "chunk", chunk)
    made = [_part(i, part) for i, part in enumerate(parts)]
    check(made, "at_points: no parts; pass (function, points), one for each kind of residual.")

    def residuals(params: Any) -> list[jax.Array]:
        return [_over(partial(f, params), (x, w), chunk) for f, x, w in made]

    def gradients(params: Any) -> Any:
        rows = []
        for f, x, w in made:
            each = jax.vmap(jax.jacrev(f), (None, 0))(params, (x, w))
            rows.append(
                jax.tree.map(lambda g, leaf: jnp.reshape(g, (-1, *jnp.shape(leaf))), each, params)
            )
        return jax.tree.map(lambda *g: jnp.concatenate(g), *rows)

    return PointResiduals(residuals, gradients)


def _over(f: Callable, xs: Any, chunk: int | None) -> jax.Array:
    """``f`` of every row, at most ``chunk`` at a time."""
    n = jax.tree.leaves(xs)[0].shape[0]
    if chunk is None or n <= chunk:
        return jax.vmap(f)(xs)
    return jax.lax.map(jax.checkpoint(f), xs, batch_size=chunk)


def _part(i: int, part: Any) -> tuple[Callable, Any, jax.Array]:
    """The weighted function of one point, the points and the roots of their weights."""
    good = isinstance(part, tuple | list) and len(part) in (2, 3) and callable(part[0])
    check(
        good,
        f"at_points: part {i} is {type(part).__name__}; pass (function, points) or (function, "
        "points, weights).",
    )
    f, points = part[0], part[1]
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(points)}
    check(
        len(sizes) == 1 and len(next(iter(sizes))) == 1,
        f"at_points: the points of part {i} have first axes {sorted(sizes)}; pass arrays with the "
        "points along the first axis, as many in each.",
    )
    n = next(iter(sizes))[0]
    weights = part[2] if len(part) == 3 else 1.0
    check(
        jnp.shape(weights) in ((), (n,)),
        f"at_points: the weights of part {i} have shape {jnp.shape(weights)}; pass a number or "
        f"({n},).",
    )
    roots = jnp.sqrt(jax.lax.stop_gradient(jnp.asarray(weights, float)) / max(n, 1))

    def weighted(params: Any, point: Any) -> jax.Array:
        x, root = point
        value = jnp.asarray(f(params, x))
        return value * root.astype(value.real.dtype)

    return weighted, points, jnp.broadcast_to(roots, (n,))


def energy_residuals(
    log_psi: Callable[[Any, Any], jax.Array],
    local_energy: Callable[[Any, Any], jax.Array],
    samples: Any,
) -> PointResiduals:
    r"""Residuals whose step is the natural gradient of a wavefunction's energy.

    Over samples ``s_i`` of ``psi²``, with the bar for "minus the mean over the samples", value and
    Jacobian are

    .. math:: r_i = \bar E(s_i) / \sqrt N,\qquad
              J_{ij} = \overline{\partial_j \log|\psi(s_i)|} / \sqrt N

    so that ``J^T r`` is half the gradient of the energy and ``J^T J`` a quarter of Fisher's matrix
    of ``psi²``. The value is not the antiderivative of ``J``: that is what stochastic
    reconfiguration is. Give it to `lowrank_optax.spring` with a number for ``damping``.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> log_psi = lambda a, x: -a * x**2                    # an oscillator, E = 1/2 at a = 1/2
      >>> energy = lambda a, x: a + x**2 * (0.5 - 2 * a**2)
      >>> x = jax.random.normal(jax.random.key(0), (500,))
      >>> fit = lro.least_squares.energy_residuals(log_psi, energy, x)
      >>> tx = lro.spring(1.0, damping=1e-3, momentum=0.0)
      >>> a = jnp.array(0.45)
      >>> updates, _ = tx.update(a, tx.init(a), a, residuals_fn=fit.residuals)
      >>> bool(updates > 0)
      True

    Args:
      log_psi: ``(params, sample) -> log|psi|``, a real number.
      local_energy: ``(params, sample) -> (H psi) / psi``, a real number, not differentiated.
      samples: samples of ``psi²`` at the parameters, a tree of arrays with ``N`` along the first
        axis.

    Returns:
      A `PointResiduals`.

    Cost: one pass over the samples for each of the two functions; gradients ``N d`` numbers.

    Source: Sorella, 1998, for stochastic reconfiguration; in this form Chen and Heyl, "Empowering
    deep neural quantum states through efficient optimization", 2024, and Goldshlager, Abrahamsen
    and Lin, 2024.
    """
    n = jax.tree.leaves(samples)[0].shape[0]
    centred = lambda x: (x - jnp.mean(x, axis=0, keepdims=True)) / n**0.5

    def residuals(params: Any) -> list[jax.Array]:
        energies = jax.vmap(local_energy, (None, 0))(params, samples)
        slopes = centred(jax.vmap(log_psi, (None, 0))(params, samples))
        still = jax.lax.stop_gradient
        return [still(centred(energies)) + slopes - still(slopes)]

    def gradients(params: Any) -> Any:
        each = jax.vmap(jax.grad(log_psi), (None, 0))(params, samples)
        return jax.tree.map(centred, each)

    return PointResiduals(residuals, gradients)
