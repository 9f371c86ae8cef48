"""The trials of a step: dampings, momenta and orders of the curve on which residuals fall."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_optax._core import linalg
from lowrank_optax._core.loops import traced, while_loop
from lowrank_optax.least_squares._jacobian import Solver

BEND = 0.75
"""The length of a curve's second term, relative to the first one's, above which it is not followed.

A curve that bends more shows that the residuals are not linear over the step. The loss may then be
lower far away, where parameters run off to infinity. The number is that of Transtrum and Sethna.
"""

STUCK = 0.95
"""The share of the loss above which a step that leaves it is tried in other units too."""

FINER = 4
"""How many dampings, from the best straight step's down, are tried along curves on large problems.

On networks the best curve has a damping of none to three trials below that of the best straight
step, since its higher terms correct what a long step does wrong. With two dampings a loss
ended five times higher after 150 steps on Poisson's equation.
"""


class Around(NamedTuple):
    """The residuals and what is known of them at the parameters of a step.

    Attributes:
      residuals: the residuals after an update, ``(d,) -> (k,)``, those of this device.
      solver: from the units ``(d,)`` and the damping in the middle of the trials, a function of the
        largest squared singular value, to the `Solver` in these units.
      total: sums over the devices.
      r: the residuals, ``(k,)``.
      pushed: the Jacobian times the last update, ``(k,)``.
      last: the last update, ``(d,)``.
      here: the loss.
      noise: what rounding can change of a loss.
      sound: whether all of it is finite.
      fewer: whether there are fewer parameters than residuals and none is a mere weight: steps are
        guarded.
      dear: whether trials are chosen with care, and evaluated one after the other.
    """

    residuals: Callable[[jax.Array], jax.Array]
    solver: Callable[[jax.Array, Callable[[jax.Array], jax.Array]], Solver]
    total: Callable[[jax.Array], jax.Array]
    r: jax.Array
    pushed: jax.Array
    last: jax.Array
    here: jax.Array
    noise: jax.Array
    sound: jax.Array
    fewer: bool
    dear: bool

    def loss(self, step: jax.Array) -> jax.Array:
        """Half the squared residuals after an update; infinite where they are not finite."""
        loss = self.total(jnp.sum(self.residuals(step) ** 2)) / 2
        return jnp.where(jnp.isfinite(loss), loss, jnp.inf)


class Found(NamedTuple):
    """The outcome of a search.

    Attributes:
      step: the best step, ``(d,)``.
      loss: the loss after it.
      mu: the damping of the best step, or the next one to try.
      better: whether the step is better than none.
      over: whether the search is at its end.
    """

    step: jax.Array
    loss: jax.Array
    mu: jax.Array
    better: jax.Array
    over: jax.Array


def best(options: Any, around: Around, state: Any, x: jax.Array, norms: Any) -> tuple[Found, ...]:
    """The outcomes in the usual units, in units of the parameters ``x``, and the better one."""
    zero, sound, here = jnp.zeros_like(x), around.sound, around.here
    if options.scaling is None:
        found = search(options, around, jnp.ones_like(zero), state.damping)
    else:
        found = search(options, around, 1 / jnp.where(norms > 0, norms, 1), state.damping)
    other = Found(zero, here, state.relative, jnp.zeros_like(sound), jnp.array(True))
    if options.scaling is None and around.fewer:
        # Where units differ a step may be a crawl: then each parameter's size is its unit.
        size = jnp.abs(x)
        size = jnp.where(size > 0, size, jnp.sqrt(jnp.mean(x**2)))
        stuck = sound & ~(found.loss < STUCK * here) & (here > 0)
        again = lambda found: search(options, around, size, found.mu)
        other = while_loop(
            lambda found: ~found.over,
            lambda found: again(found)._replace(over=jnp.ones_like(sound)),
            other._replace(over=~stuck),
        )
    swap = other.better & ~(found.better & (found.loss <= other.loss + around.noise))
    return found, other, jax.tree.map(lambda a, b: jnp.where(swap, a, b), other, found)


def search(options: Any, around: Around, units: jax.Array, mu: jax.Array) -> Found:
    """The best step when every parameter is measured in its unit, ``(d,)``."""
    here, noise, spread = around.here, around.noise, options.spread
    half, eps = options.trials // 2, jnp.finfo(around.r.dtype).eps

    def start(top: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The damping to start from, between the smallest and the largest one."""
        low, high = eps**2 * top, top / eps
        # After a refused step, which is at the largest one, it starts as it did at first.
        known = (mu > 0) & (mu < high)
        return jnp.clip(jnp.where(known, mu, options.damping * top), low, high), low, high

    solver = around.solver(units, lambda top: start(top)[0])
    middle, low, high = start(solver.top)
    last = linalg.safe_divide(around.last, units)
    last = jnp.where(jnp.isfinite(last), last, 0)
    in_units = around._replace(residuals=lambda p: around.residuals(p * units))
    try_out = sparing if around.dear and options.trials > 1 else every

    def attempt(found: Found) -> Found:
        """Every damping around ``mu`` with every momentum and order."""
        powers = spread ** jnp.arange(-half, options.trials - half).astype(here.dtype)
        mus = jnp.clip(found.mu * powers, low, high)
        steps, losses, dampings = try_out(options, in_units, solver, last, mus, low)
        # Rounding cannot tell some losses apart. The first of them is taken, the least damped step
        # without momentum: close to a minimum this is the step of Gauss-Newton.
        least = jnp.min(losses)
        at = jnp.argmax(losses <= least + noise)
        # A larger damping than that of the last step has to earn its place.
        better = jnp.where(found.mu > middle, least < here, least <= here + noise)
        better = better & jnp.isfinite(least)
        above = jnp.clip(found.mu * spread**options.trials, low, high)
        return Found(
            step=jnp.where(better, steps[at] * units, 0),
            loss=jnp.where(better, losses[at], here),
            mu=jnp.where(better, dampings[at], above),
            better=better,
            over=better | (found.mu >= high),
        )

    # The decomposition serves all dampings. Where none lowers the loss, larger ones are tried.
    wrong = jnp.zeros_like(around.sound)
    begin = Found(jnp.zeros_like(units), here, middle, wrong, ~around.sound)
    return while_loop(lambda found: ~found.over, attempt, begin)


Trials = tuple[jax.Array, jax.Array, jax.Array]
"""Steps ``(n, d)``, their losses ``(n,)`` and their dampings ``(n,)``, the least damped first."""


def every(
    options: Any, around: Around, solver: Solver, last: jax.Array, mus: jax.Array, low: jax.Array
) -> Trials:
    """Every damping with every momentum and order, all at once."""
    momenta = jnp.array(options.momenta, mus.dtype)
    curve = lambda mu, b: curved(options, around, solver, last, mu, b)
    steps, losses = jax.vmap(jax.vmap(curve, (None, 0)), (0, None))(mus, momenta)
    dampings = jnp.broadcast_to(mus[:, None, None], losses.shape)
    return jnp.reshape(steps, (-1, last.size)), jnp.ravel(losses), jnp.ravel(dampings)


def sparing(
    options: Any, around: Around, solver: Solver, last: jax.Array, mus: jax.Array, low: jax.Array
) -> Trials:
    """Every damping with every momentum along straight lines; curves where these point to.

    A curve of three terms costs about ten times its straight line. Curves are followed for the
    damping of the best line and those next below it.
    """
    momenta = jnp.array(options.momenta, mus.dtype)
    line = lambda mu, b: b * last - solver.solve(mu, around.r + b * around.pushed)
    lines = jax.vmap(jax.vmap(line, (None, 0)), (0, None))(mus, momenta)
    lines = jnp.reshape(lines, (-1, last.size))
    losses = one_by_one(around.loss, lines)
    dampings = jnp.repeat(mus, len(momenta))
    if options.order == 1:
        return lines, losses, dampings
    down = options.spread ** -jnp.arange(FINER - 1, -1, -1).astype(mus.dtype)
    finer = jnp.maximum(dampings[jnp.argmin(losses)] * down, low)
    finer = jnp.repeat(finer, len(momenta))
    first = jax.vmap(line)(finer, jnp.tile(momenta, FINER))
    steps = jnp.reshape(_curves(options, around, solver, finer, first), (-1, last.size))
    return (
        jnp.concatenate([steps, lines]),
        jnp.concatenate([one_by_one(around.loss, steps), losses]),
        jnp.concatenate([jnp.repeat(finer, options.order), dampings]),
    )


def _curves(
    options: Any, around: Around, solver: Solver, mus: jax.Array, first: jax.Array
) -> jax.Array:
    """As `_curve` for ``n`` dampings and first terms ``(n, d)`` at once: ``(n, order, d)``.

    Systems are solved together, since each reads the whole decomposition; derivatives are taken one
    after the other, with the memory of one.
    """
    terms, steps = (first,), [first]
    size = jnp.linalg.norm(first, axis=1)
    for n in range(2, options.order + 1):
        slope = lambda terms, n=n: _derivative(_along(around.residuals, terms), n, first.dtype)
        c = -jax.vmap(solver.solve)(mus, one_by_one(slope, terms))
        length = jnp.linalg.norm(c, axis=1)
        terms = (*terms, jnp.minimum(1, linalg.safe_divide(size, length))[:, None] * c)
        steps.append(steps[-1] + terms[-1] / math.factorial(n))
    return jnp.stack(steps, axis=1)


def one_by_one(f: Callable[[Any], Any], xs: Any) -> Any:
    """``f`` of every row of ``xs``, with the memory of one; outside of a trace in Python."""
    if traced(xs):
        return lax.map(f, xs)
    rows = range(len(jax.tree.leaves(xs)[0]))
    out = [f(jax.tree.map(lambda x, i=i: x[i], xs)) for i in rows]
    return jax.tree.map(lambda *x: jnp.stack(x), *out)


def curved(
    options: Any, around: Around, solver: Solver, last: jax.Array, mu: jax.Array, b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Steps of every order, ``(order, d)``, and their losses."""
    solve = lambda y: solver.solve(mu, y)
    first = b * last - solve(around.r + b * around.pushed)
    steps, bend = _curve(around.residuals, solve, first, options.order)
    losses = jax.vmap(around.loss)(steps)
    return steps, jnp.where(around.fewer & (bend > BEND), jnp.inf, losses)


def _curve(
    residuals: Callable[[jax.Array], jax.Array],
    solve: Callable[[jax.Array], jax.Array],
    first: jax.Array,
    order: int,
) -> tuple[jax.Array, jax.Array]:
    """The Taylor polynomials of the curve at ``t = 1``, from ``first`` up to ``order``.

    The second result is how far the curve bends: the second term's length relative to the first
    one's.
    """
    terms, steps, size = [first], [first], jnp.linalg.norm(first)
    bend = jnp.zeros_like(size)

    for n in range(2, order + 1):
        c = -solve(_derivative(_along(residuals, terms), n, first.dtype))
        length = jnp.linalg.norm(c)
        bend = linalg.safe_divide(length, size) if n == 2 else bend
        terms.append(jnp.minimum(1, linalg.safe_divide(size, length)) * c)
        steps.append(steps[-1] + terms[-1] / math.factorial(n))
    return jnp.stack(steps), bend


def _along(
    residuals: Callable[[jax.Array], jax.Array], terms: Sequence[jax.Array]
) -> Callable[[jax.Array], jax.Array]:
    """The residuals along the curve with these terms, as a function of ``t``."""

    def at(t: jax.Array) -> jax.Array:
        path = [t**n / math.factorial(n) * c for n, c in enumerate(terms, 1)]
        return residuals(sum(path[1:], path[0]))

    return at


def _derivative(fn: Callable[[jax.Array], jax.Array], n: int, dtype: Any) -> jax.Array:
    """The ``n``-th derivative of a function of one number at 0."""
    slope = lambda f: lambda t: jax.jvp(f, (t,), (jnp.ones_like(t),))[1]
    for _ in range(n):
        fn = slope(fn)
    return fn(jnp.zeros((), dtype))
