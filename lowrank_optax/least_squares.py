"""Nonlinear least squares, to the precision that the parameters' dtype allows."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import as_size, check, check_decay, check_least, require
from lowrank_optax._core.derivatives import undifferentiated
from lowrank_optax._core.entry import check_one_replica, own_arguments
from lowrank_optax._core.functions import flat_residuals
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.loops import while_loop
from lowrank_optax._core.precision import full_precision
from lowrank_optax.curvature._curvature import flat, need_params, rows_of
from lowrank_optax.curvature.examples import jacobian

OWNER = "levenberg_marquardt"

BEND = 0.75
"""The length of a curve's second term, relative to the first one's, above which it is not followed.

A curve that bends more shows that the residuals are not linear over the step. The loss may then be
lower far away, where parameters run off to infinity. The number is that of Transtrum and Sethna.
"""

STUCK = 0.95
"""The share of the loss above which a step that leaves it is tried in other units too."""


class LevenbergMarquardtState(NamedTuple):
    """State of `levenberg_marquardt`.

    Attributes:
      count: number of calls of ``update``.
      damping: ``mu`` of the last step, in units of the squared singular values; 0 before it.
      relative: ``mu`` of the last step that was tried relative to the parameters' sizes; 0 before
        it.
      step: the last update, ``(d,)``; 0 if it was refused.
      norms: the columns' norms as ``scaling`` remembers them, ``(d,)``; ``()`` without it.
      loss: the loss ``½ ‖r‖²`` after the last update.
      refused: number of steps whose trials, up to the largest ``mu`` that changes the parameters,
        all raised the loss by more than rounding; the update was zero.
      nonfinite: number of steps whose residuals, Jacobian or gradient were not finite; the update
        was zero and everything else stayed as it was.
    """

    count: jax.Array
    damping: jax.Array
    relative: jax.Array
    step: jax.Array
    norms: Any
    loss: jax.Array
    refused: jax.Array
    nonfinite: jax.Array


def levenberg_marquardt(
    *,
    damping: float = 1e-3,
    trials: int | None = None,
    spread: float = 4.0,
    momenta: tuple[float, ...] = (0.0, 0.5, 0.9),
    order: int | None = None,
    scaling: float | None = None,
    chunk: int | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gauss-Newton in the dual whose damping finds itself, along curves that follow the residuals.

    With residuals ``r`` and their Jacobian ``J = U diag(s) V^T``, every damping ``mu`` costs small
    products alone,

    .. math:: J_\mu^+ = V \mathrm{diag}\!\Bigl(\frac{s}{s^2 + \mu}\Bigr) U^T
              = (J^T J + \mu I)^{-1} J^T = J^T (J J^T + \mu I)^{-1}

    so that several are tried at once, each with every momentum ``b`` along the last update ``q``.
    A step is the Taylor polynomial at ``t = 1`` of the curve on which ``r`` falls in a straight
    line, up to every ``order``. The first order is Levenberg's step, the second adds the geodesic
    acceleration. Terms longer than the first are cut to its length:

    .. math:: x(t) = x + \sum_n c_n \frac{t^n}{n!},\quad c_1 = b q - J_\mu^+ (r + b J q),\quad
              c_n = -J_\mu^+\, \frac{d^n}{dt^n}\, r\Bigl(x + \sum_{i<n} c_i \frac{t^i}{i!}\Bigr)

    The trial with the lowest loss is taken. The dampings are powers of ``spread`` around the last
    ``mu``. If all of them raise the loss, the same step tries larger ones with the same
    decomposition, until one lowers the loss or no longer changes the parameters. In that last case
    the update is zero and the step is counted as refused. There is no learning rate: updates are
    complete.

    One ``mu`` for all parameters presumes that they are of similar size. A number for ``scaling``
    lifts that: the diagonal of ``J^T J`` takes the place of ``I``, and fits do not depend on units,

    .. math:: (J^T J + \mu D^2)^{-1} J^T,\quad D_j = \max(\text{scaling}\, D_j, \|J_j\|)

    The default, ``D = I``, serves networks best, whose weights are of similar size. Fits of curves,
    with fewer parameters than residuals, get two guards. A step that lowers the loss by less than a
    twentieth is tried once more with ``D_j = 1/|x_j|``, and the better one is taken. A curve whose
    second term is longer than 0.75 of the first is not followed, because that is how parameters
    start to run off to infinity. The default fits NIST's 27 problems from both starts.

    The decomposition is that of ``J D^{-1}`` itself, because small residuals in float32 need it:
    ``J J^T`` and the gradient ``J^T r`` would have lost what is below ``sqrt(eps)`` and ``eps`` of
    the largest singular value, so neither is formed.

    ``update`` takes the parameters and ``residuals_fn`` (params -> residuals), which must be
    differentiable forwards ``order`` times. The gradient that it is given is only checked to be
    finite. Residuals are an array or a tree of arrays of any shape; a complex one counts as its
    real and its imaginary part. A tuple is such a tree, so auxiliary output must be left out:
    ``lambda params: fn(params)[0]``. Where residuals do not share examples, ``per_example_grads``
    saves the ``k`` backward passes: a tree of ``(k, *leaf.shape)``, such as
    ``jax.vmap(jax.grad(residual), (None, 0))`` gives. Call ``update`` under `jax.jit`; outside,
    every call takes some hundred times as long.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> residuals = lambda x: jnp.array([10 * (x[1] - x[0] ** 2), 1 - x[0]])   # Rosenbrock
      >>> tx = lro.levenberg_marquardt()
      >>> x = jnp.array([-1.2, 1.0]); state = tx.init(x)
      >>> grad = jax.grad(lambda x: jnp.sum(residuals(x) ** 2) / 2)
      >>> step = jax.jit(lambda x, state: tx.update(grad(x), state, x, residuals_fn=residuals))
      >>> for _ in range(15):
      ...     updates, state = step(x, state)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(jnp.max(jnp.abs(x - 1)) < 1e-5)
      True

    Args:
      damping: the first ``mu``, relative to the largest squared singular value, 1e-3 by default.
      trials: number of values of ``mu`` in a step, 6 by default.
      spread: ratio of one value of ``mu`` to the next, above 1, 4 by default.
      momenta: values of ``b``, in [0, 1], each of which multiplies the trials; 0, 0.5 and 0.9 by
        default, ``(0.0,)`` for none.
      order: number of terms of the curve, 3 by default; the cost doubles from one term to the next.
      scaling: the share of the columns' norms that is remembered from one step to the next, in [0,
        1]: 0 for the norms of the step alone (Marquardt), 1 for the largest so far (Moré);
        ``None``, the default, for ``D = I`` with the guards above.
      chunk: number of residuals that are pulled back at a time, which bounds the memory; ``None``,
        the default, for all.
      axis_name: axes of `jax.pmap` or `jax.shard_map` over which the devices have residuals of
        their own. They are gathered, with their gradients, and every device takes the same step.
        ``()`` says that every device goes its own way; ``None``, the default, that there is one
        device.

    Returns:
      An optax transformation whose state is a `LevenbergMarquardtState`.

    Raises:
      ValueError: for values out of range; for ``trials``, ``order`` or ``chunk`` that is traced (to
        `optax.inject_hyperparams` pass ``static_args=("trials", "order", "chunk")``); by ``update``
        without params or ``residuals_fn``, for residuals that are not floating-point or complex,
        and for ``per_example_grads`` of other shapes.

    Cost: with ``m = min(k, d)``, memory ``2 k d`` in a step and ``d`` between steps, ``2 d`` with
    ``scaling``; ``k`` backward passes, a singular value decomposition of about ``6 k d m + 20 m³``
    flops, and for every trial the residuals ``order`` times and their derivatives along a line, up
    to that order. A second try decomposes twice. The Jacobian is one array, so ``k`` times the
    parameters have to fit into one device.

    Source: Levenberg, 1944, and Marquardt, 1963; Moré, "The Levenberg-Marquardt algorithm:
    implementation and theory", 1978, for the norms' maximum; acceleration and its bound are those
    of Transtrum and Sethna, "Improvements to the Levenberg-Marquardt algorithm for nonlinear
    least-squares minimization", 2012; the momentum that of Goldshlager, Abrahamsen and Lin, "A
    Kaczmarz-inspired approach to accelerate the optimization of neural network wavefunctions",
    2024.
    """
    check_least(OWNER, "damping", damping, strict=True)
    # None by default: `optax.inject_hyperparams` traces default numbers.
    trials = 6 if trials is None else as_size(OWNER, "trials", trials)
    order = 3 if order is None else as_size(OWNER, "order", order)
    check_least(OWNER, "spread", spread, 1.0, strict=True)
    check(len(momenta) > 0, f"{OWNER}: momenta is empty; pass (0.0,) for none.")
    for b in momenta:
        check_decay(OWNER, "momenta", b, closed=True)
    if scaling is not None:
        check_decay(OWNER, "scaling", scaling, closed=True)
    if chunk is not None:
        chunk = as_size(OWNER, "chunk", chunk)

    options = _Options(damping, trials, spread, tuple(momenta), order, scaling, chunk, axis_name)
    return optax.GradientTransformationExtraArgs(
        partial(_init, options), full_precision(partial(_update, options))
    )


class _Options(NamedTuple):
    """The arguments of `levenberg_marquardt`, checked and with their defaults."""

    damping: float
    trials: int
    spread: float
    momenta: tuple[float, ...]
    order: int
    scaling: float | None
    chunk: int | None
    axis_name: str | Sequence[str] | None


def _init(options: _Options, params: Any) -> LevenbergMarquardtState:
    layout = Layout.of(params, None, owner=OWNER)
    d = sum(layout.sizes)
    zero = lambda: jnp.zeros((), jnp.int32)
    real = lambda *shape: jnp.zeros(shape, layout.dtype)
    return LevenbergMarquardtState(
        count=zero(),
        damping=real(),
        relative=real(),
        step=real(d),
        norms=() if options.scaling is None else real(d),
        loss=real(),
        refused=zero(),
        nonfinite=zero(),
    )


def _update(options: _Options, updates: Any, state: Any, params: Any = None, **extra: Any):
    updates = undifferentiated(OWNER, updates)
    params, extra = own_arguments(OWNER, updates, params, extra)
    axes = options.axis_name
    if axes is None:
        check_one_replica(OWNER, extra)
    params = need_params(OWNER, params)
    fn = require(OWNER, extra, "residuals_fn", "params -> residuals (k,)")
    fn = flat_residuals(OWNER, "residuals_fn", fn)
    layout = Layout.of(params, None, owner=OWNER)

    def own(p: jax.Array) -> jax.Array:
        """At the parameters as they will be after the update ``p``, rounding included."""
        return fn(optax.apply_updates(params, _tree(layout, p))).astype(layout.dtype)

    gather = lambda x: jax.lax.all_gather(x, axes, tiled=True) if axes else x
    residuals = lambda p: gather(own(p))
    zero = jnp.zeros_like(state.step)
    r = residuals(zero)
    here = jnp.sum(r**2) / 2
    if not r.size or not zero.size:  # nothing to fit, or nothing to fit it with
        counted = state._replace(count=linalg.tally(state.count), loss=here)
        return _tree(layout, zero, updates), counted
    given = extra.get("per_example_grads")
    j = jacobian(own, zero, options.chunk)[0] if given is None else _given(layout, given)
    j = gather(j)
    _check_rows(j, (r.size, zero.size))
    sound = linalg.finite(r, j, *map(jnp.asarray, jax.tree.leaves(updates)))
    j, x = jnp.where(sound, j, 0), jnp.concatenate(flat(layout, params))

    # What rounding of the losses' sum, or of the parameters, can change.
    eps = jnp.finfo(r.dtype).eps
    noise = 4 * eps * (2 * here + jnp.linalg.norm(r[:, None] * j * x[None]))
    noise = jnp.minimum(noise, here)  # where it overflows
    around = _Around(residuals, r, j, state.step, here, noise, sound)
    norms = state.norms
    if options.scaling is not None:
        norms = jnp.maximum(options.scaling * norms, jnp.linalg.norm(j, axis=0))
    found, other, best = _best(options, around, state, x, norms)

    keep = lambda new, old: jnp.where(sound, new, old)
    return _tree(layout, best.step, updates), LevenbergMarquardtState(
        count=linalg.tally(state.count),
        damping=keep(found.mu, state.damping),
        relative=keep(other.mu, state.relative),
        step=keep(best.step, state.step),
        norms=jax.tree.map(keep, norms, state.norms),
        loss=keep(best.loss, state.loss),
        refused=linalg.tally(state.refused, sound & ~best.better),
        nonfinite=linalg.tally(state.nonfinite, ~sound),
    )


class _Around(NamedTuple):
    """The residuals and what is known of them at the parameters of a step.

    Attributes:
      residuals: the residuals after an update, ``(d,) -> (k,)``.
      r: the residuals, ``(k,)``.
      j: their Jacobian, ``(k, d)``.
      last: the last update, ``(d,)``.
      here: the loss.
      noise: what rounding can change of a loss.
      sound: whether all of it is finite.
    """

    residuals: Callable[[jax.Array], jax.Array]
    r: jax.Array
    j: jax.Array
    last: jax.Array
    here: jax.Array
    noise: jax.Array
    sound: jax.Array

    @property
    def fewer(self) -> bool:
        """Fewer parameters than residuals: each of them means something, and steps are guarded."""
        return self.j.shape[1] < self.j.shape[0]


class _Found(NamedTuple):
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


def _best(
    options: _Options, around: _Around, state: LevenbergMarquardtState, x: jax.Array, norms: Any
) -> tuple[_Found, _Found, _Found]:
    """The outcomes in the usual units, in units of the parameters ``x``, and the better one."""
    zero, sound, here = jnp.zeros_like(x), around.sound, around.here
    if options.scaling is None:
        found = _search(options, around, jnp.ones_like(zero), state.damping)
    else:
        found = _search(options, around, 1 / jnp.where(norms > 0, norms, 1), state.damping)
    other = _Found(zero, here, state.relative, jnp.zeros_like(sound), jnp.array(True))
    if options.scaling is None and around.fewer:
        # Where units differ a step may be a crawl: then each parameter's size is its unit.
        size = jnp.abs(x)
        size = jnp.where(size > 0, size, jnp.sqrt(jnp.mean(x**2)))
        stuck = sound & ~(found.loss < STUCK * here) & (here > 0)
        again = lambda found: _search(options, around, size, found.mu)
        other = while_loop(
            lambda found: ~found.over,
            lambda found: again(found)._replace(over=jnp.ones_like(sound)),
            other._replace(over=~stuck),
        )
    swap = other.better & ~(found.better & (found.loss <= other.loss + around.noise))
    return found, other, jax.tree.map(lambda a, b: jnp.where(swap, a, b), other, found)


def _search(options: _Options, around: _Around, units: jax.Array, mu: jax.Array) -> _Found:
    """The best step when every parameter is measured in its unit, ``(d,)``."""
    here, noise, spread = around.here, around.noise, options.spread
    u, s, v = linalg.thin_svd(around.j * units[None])
    last = linalg.safe_divide(around.last, units)
    last = jnp.where(jnp.isfinite(last), last, 0)
    pushed = around.j @ around.last
    in_units = lambda p: around.residuals(p * units)
    top = jnp.max(s) ** 2
    eps = jnp.finfo(around.r.dtype).eps
    low, high = eps**2 * top, top / eps
    # After a refused step, which is at the largest one, it starts as it did at first.
    mu = jnp.clip(jnp.where((mu > 0) & (mu < high), mu, options.damping * top), low, high)

    def trial(mu: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Steps of every order, ``(order, d)``, and their losses."""
        solve = lambda y: (linalg.safe_divide(s, s**2 + mu) * (y @ u)) @ v
        first = b * last - solve(around.r + b * pushed)
        steps, bend = _curve(in_units, solve, first, options.order)
        losses = jnp.sum(jax.vmap(in_units)(steps) ** 2, axis=1) / 2
        bad = ~jnp.isfinite(losses) | (around.fewer & (bend > BEND))
        return steps, jnp.where(bad, jnp.inf, losses)

    def attempt(found: _Found) -> _Found:
        """Every damping around ``mu`` with every momentum and order."""
        half = options.trials // 2
        powers = spread ** jnp.arange(-half, options.trials - half).astype(s.dtype)
        mus = jnp.clip(found.mu * powers, low, high)
        over = jax.vmap(jax.vmap(trial, (None, 0)), (0, None))
        steps, losses = over(mus, jnp.array(options.momenta, s.dtype))
        # Rounding cannot tell some losses apart. The first of them is taken, the least damped step
        # without momentum: close to a minimum this is the step of Gauss-Newton.
        least = jnp.min(losses)
        at = jnp.unravel_index(jnp.argmax(losses <= least + noise), losses.shape)
        # A larger damping than that of the last step has to earn its place.
        better = jnp.where(found.mu > mu, least < here, least <= here + noise)
        better = better & jnp.isfinite(least)
        above = jnp.clip(found.mu * spread**options.trials, low, high)
        return _Found(
            step=jnp.where(better, steps[at] * units, 0),
            loss=jnp.where(better, losses[at], here),
            mu=jnp.where(better, mus[at[0]], above),
            better=better,
            over=better | (found.mu >= high),
        )

    # The decomposition serves all dampings. Where none lowers the loss, larger ones are tried.
    wrong = jnp.zeros_like(around.sound)
    start = _Found(jnp.zeros_like(units), here, mu, wrong, ~around.sound)
    return while_loop(lambda found: ~found.over, attempt, start)


def _tree(layout: Layout, p: jax.Array, like: Any = None) -> Any:
    """The flat update ``(d,)`` as a tree, in the dtypes of ``like`` where it is given."""
    parts = jnp.split(p, np.cumsum(layout.sizes)[:-1]) if layout.sizes else []
    return layout.unflatten(parts) if like is None else layout.unflatten(parts, like)


def _given(layout: Layout, tree: Any) -> jax.Array:
    """The residuals' gradients side by side, ``(k, d)``."""
    rows = rows_of(layout, layout.leaves(tree))
    return jnp.concatenate([x.astype(layout.dtype) for x in rows], axis=1)


def _check_rows(j: jax.Array, shape: tuple[int, int]) -> None:
    check(
        j.shape == shape,
        f"{OWNER}: per_example_grads has {j.shape[0]} rows of {j.shape[1]} entries for {shape[0]} "
        f"residuals of {shape[1]} parameters; pass one gradient a residual, such as "
        "jax.vmap(jax.grad(residual), (None, 0))(params, batch).",
    )


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

    def along(t: jax.Array) -> jax.Array:
        path = [t**n / math.factorial(n) * c for n, c in enumerate(terms, 1)]
        return residuals(sum(path[1:], path[0]))

    for n in range(2, order + 1):
        c = -solve(_derivative(along, n, first.dtype))
        length = jnp.linalg.norm(c)
        bend = linalg.safe_divide(length, size) if n == 2 else bend
        terms.append(jnp.minimum(1, linalg.safe_divide(size, length)) * c)
        steps.append(steps[-1] + terms[-1] / math.factorial(n))
    return jnp.stack(steps), bend


def _derivative(fn: Callable[[jax.Array], jax.Array], n: int, dtype: Any) -> jax.Array:
    """The ``n``-th derivative of a function of one number at 0."""
    slope = lambda f: lambda t: jax.jvp(f, (t,), (jnp.ones_like(t),))[1]
    for _ in range(n):
        fn = slope(fn)
    return fn(jnp.zeros((), dtype))
